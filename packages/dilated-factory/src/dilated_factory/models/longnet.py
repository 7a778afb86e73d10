"""LongNetLM: a causal language model over bytes (or any small vocabulary) at long context."""

# Shapes: B batch, N length, E embed_dim, V vocab_size.

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dilated_core.extending import HeadAttention, check_padding_mask, let_gloo_rest_at_exit
from dilated_core.interfaces import DecodingState
from dilated_factory.configs.models import LongNetConfig
from dilated_factory.models.head_loss import IGNORED, head_loss
from dilated_factory.models.layers import TransformerDecoderLayer
from dilated_factory.models.stack import LongNetStack

ResultT = TypeVar("ResultT")


class LeftAligned:
    """Rows without their leading padding, which goes to their ends; no host waits for it.

    Args:
        key_padding_mask: (B, N) bool, True = padding; N >= 1.

    Attributes:
        lengths: (B,) int64, from the first real token of a row to its last.
        index: (B, N) int64, where the tokens of an aligned row come from.
        between: (B, N) bool, padding between the real tokens of aligned rows; None where none is.
    """

    def __init__(self, key_padding_mask: Tensor) -> None:
        length = key_padding_mask.shape[1]
        columns = torch.arange(length, device=key_padding_mask.device)
        first = torch.where(key_padding_mask, length, columns).amin(1, keepdim=True)
        last = torch.where(key_padding_mask, -1, columns).amax(1)
        self.lengths = (last - first[:, 0] + 1).clamp(min=0)
        self.index = (columns + first) % length
        self._back = (columns - first) % length
        between = key_padding_mask.gather(1, self.index) & (columns < self.lengths[:, None])
        known = between.is_cpu and not torch.compiler.is_compiling()
        none = length < 3 or (known and not between.any())
        self.between = None if none else between

    def back(self, states: Tensor) -> Tensor:
        """Put aligned states (B, N, E) where their tokens were."""
        return states.gather(1, self._back.unsqueeze(-1).expand(states.shape))


class LongNetLM(LongNetStack[LongNetConfig]):
    """Decoder of LongNet (Ding et al., arXiv 2307.02486) with MAGNETO's norms and initialisation.

    Token embedding scaled by sqrt(E), pre-norm blocks of causal attention and GELU feed-forward
    with sub-layer norms, a last norm, and a head that shares the embedding's weight by default.

    Shapes: batch B, positions N, width of the model E, vocabulary V, packed sequences S.

    Args:
        config: shape of the model.
        attention: makes the attention of each layer, in place of dilated attention by the config's
            pattern and dropout; called once a layer.
        activation_checkpointing: True recomputes each layer in backward instead of keeping what it
            computed; memory then grows with N * E * num_layers only. "pointwise" recomputes
            norms and GELU, and "selective" all of the feed-forward part: compiled under autocast, a
            layer keeps 11 and 7 tensors (B, N, E) of two bytes, and 18 without.
        device, dtype: as in torch.nn; with ``device="meta"`` nothing is allocated, and
            ``model.to_empty(device=...)`` followed by ``reset_parameters()`` makes it real.

    Examples:
        >>> model = LongNetLM(LongNetConfig(embed_dim=32, num_heads=4, num_layers=2, context=64))
        >>> tokens = torch.randint(256, (2, 50))
        >>> model.loss(tokens).backward()
        >>> model(tokens).shape
        torch.Size([2, 50, 256])
    """

    layer_type = TransformerDecoderLayer
    embedding: nn.Embedding
    head: nn.Linear

    @property
    def can_cache(self) -> bool:
        """Whether `new_caches` can make decoding state: the attention of all layers keeps it."""
        attentions = [x.attention.attention for x in self.layers()]
        return all(isinstance(x, HeadAttention) and x.keeps_state for x in attentions)

    def new_caches(self, length: int | None = None) -> list[DecodingState]:
        """Empty decoding state, one cache a layer, for `forward` under torch.no_grad().

        Args:
            length: positions at most, for block-sparse attention, whose layout goes on so far; that
                of the layout when None. Dilated attention needs none.

        Raises:
            ValueError: the attention was injected and keeps no decoding state.
        """
        caches = []
        for block in self.layers():
            attention = block.attention.attention
            if not isinstance(attention, HeadAttention) or not attention.keeps_state:
                raise ValueError(
                    "attention must be dilated or block-sparse attention for a cache. "
                    f"Got {type(attention).__name__}."
                )
            caches.append(attention.new_cache(length))
        return caches

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        caches: Sequence[DecodingState] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """States after the last norm (B, N, E); all arguments but one as in `forward`.

        With ``lengths``, (B,) int64, only so many tokens of a row are real, the first, and go into
        the caches, which must be given; the mask then moves no row.
        """
        return _or_nothing(
            tokens, caches, self._normed, key_padding_mask=key_padding_mask, positions=positions,
            lengths=lengths, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def layer_states(
        self,
        inputs: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        caches: Sequence[DecodingState] | None = None,
    ) -> list[Tensor]:
        """What enters the first layer and what leaves each: num_layers + 1 tensors (B, N, E).

        None of them has gone through the last norm; arguments as in `forward`.
        """
        return _or_nothing(
            inputs, caches, self._all_states, key_padding_mask=key_padding_mask,
            positions=positions,
        )  # fmt: skip

    def _placed(
        self, inputs: Tensor, **options: Any
    ) -> tuple[Iterator[Tensor], Callable[[Tensor], Tensor]]:
        mask, lengths = options.get("key_padding_mask"), options.get("lengths")
        if (ends := options.get("cu_seqlens")) is not None:
            self._check_documents(inputs, ends, options)
            if options.get("positions") is None and self.config.positions != "none":
                options["positions"] = document_positions(ends, inputs.shape[1])
        stays = options.get("positions") is not None or lengths is not None
        if mask is None or stays or inputs.ndim != 2 or not inputs.numel():
            return super()._placed(inputs, **options)
        batch, length = inputs.shape
        check_padding_mask(mask, batch, length, inputs.device)
        rows = LeftAligned(mask)
        options["key_padding_mask"] = rows.between
        if options.get("caches") is not None:
            options["lengths"] = rows.lengths
        return self._states(inputs.gather(1, rows.index), **options), rows.back

    def _check_documents(self, tokens: Tensor, ends: Tensor, options: dict[str, Any]) -> None:
        if options.get("caches") is not None:
            raise ValueError("cu_seqlens must be None with caches. Got a Tensor.")
        if tokens.ndim != 2 or tokens.shape[0] != 1:
            raise ValueError(
                f"tokens must have shape (1, N) with cu_seqlens. Got {tuple(tokens.shape)}."
            )
        if ends.ndim != 1 or ends.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "cu_seqlens must have shape (documents + 1,), int32 or int64. "
                f"Got {tuple(ends.shape)}, {ends.dtype}."
            )

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        caches: Sequence[DecodingState] | None = None,
    ) -> Tensor:
        """Logits (B, N, V) of the next token.

        Args:
            tokens: (B, N) int64.
            key_padding_mask: (B, N) bool, True = no position looks at this one. Where it hides the
                first or last tokens of a row, the row gives what it gives alone: positions and
                segments count from its first real token, unless ``positions`` are given. Between
                real tokens, hidden ones keep their positions.
            positions: (N,) or (B, N) int64 for the position embedding, e.g. of a rank's share of a
                sequence; when None they count from 0, or from the length of the caches, or in each
                document.
            cu_seqlens: (S + 1,) int32 or int64, 0 and then the end of each of S documents that the
                tokens (1, N) are; each gives what it gives alone. Over ranks the ends are those of
                the whole sequence, and positions must be given: `local_positions` makes them.
            caches: of `new_caches`; the tokens follow those in them, and are added, in all or,
                where the call fails, in none.

        Raises:
            ValueError: ``tokens`` is not (B, N), or the caches are not one a layer.
            TypeError: ``tokens`` is not int64.
        """
        return _or_nothing(
            tokens, caches, self._logits, key_padding_mask=key_padding_mask, positions=positions,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def _logits(self, tokens: Tensor, **options: Any) -> Tensor:
        logits: Tensor = self.head(self._normed(tokens, **options))
        return logits

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        label_smoothing: float = 0.0,
        group: dist.ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of predicting tokens[:, 1:] from those before each.

        Logits are made chunk by chunk, gradients with them, so a long sequence never holds all of
        them. The head is used by its weight, not called. Divide by log(2) for bits per byte.

        Args:
            tokens: (B, N + 1) int64, or (B, N) with targets.
            targets: (B, N) int64, what to predict at each token, e.g. in a rank's share of a
                sequence, whose last target is the next rank's; -100 leaves a token out.
            key_padding_mask: (B, N) bool, as in `forward`; hidden tokens predict nothing.
            positions: (N,) or (B, N) int64, as in `forward`.
            cu_seqlens: (S + 1,), as in `forward`. Without targets the ends are those of the N + 1
                tokens, and the first token of a document is not predicted; targets that are given
                leave it out themselves.
            label_smoothing: the share of each target, in [0, 1), that all tokens have alike, as in
                torch's cross_entropy.
            group: the ranks among which targets are divided, unevenly or not; a mesh of one
                dimension, or a process group. Each then returns its share of the mean over all
                their targets: the mean of the shares is that mean, and the mean of their gradients,
                which DistributedDataParallel and FSDP take, is its gradient. All must make the
                call.

        Returns:
            A number; 0, with gradients of 0, where there is no target.

        Raises:
            ValueError: ``tokens`` holds fewer than two positions, or targets of another shape, or
                label_smoothing is out of its range.
        """
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1). Got {label_smoothing}.")
        if targets is None:
            if tokens.ndim != 2 or tokens.shape[1] < 2:
                raise ValueError(
                    f"tokens must have shape (B, N + 1) with N >= 1. Got {tuple(tokens.shape)}."
                )
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            if cu_seqlens is not None:
                targets = targets.masked_fill(_begins(cu_seqlens, targets.shape[1]), IGNORED)
                cu_seqlens = cu_seqlens.clamp(max=tokens.shape[1])
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have tokens' shape {tuple(tokens.shape)}. "
                f"Got {tuple(targets.shape)}."
            )
        hidden = self.hidden_states(
            tokens, key_padding_mask=key_padding_mask, positions=positions, cu_seqlens=cu_seqlens
        )
        if key_padding_mask is not None:
            targets = targets.masked_fill(key_padding_mask, IGNORED)
        count, ranks = _count_targets(targets, group)
        total = head_loss(
            hidden.flatten(0, 1), self.head.weight, targets.flatten(), label_smoothing
        )
        return total * ranks / count


def _or_nothing(
    inputs: Tensor,
    caches: Sequence[DecodingState] | None,
    compute: Callable[..., ResultT],
    **options: Any,
) -> ResultT:
    """Compute with caches, which a failure leaves where they were."""
    backs: list[Callable[[], None]] = []
    if caches is not None and not torch.compiler.is_compiling():
        count = inputs.shape[1] if inputs.ndim > 1 else 0
        backs = [cache.bookmark(count) for cache in caches]
    try:
        return compute(inputs, caches=caches, **options)
    except BaseException:
        for back in backs:
            back()
        raise


def _count_targets(
    targets: Tensor, group: dist.ProcessGroup | DeviceMesh | None
) -> tuple[Tensor, int]:
    """The targets of all ranks of a group, at least 1, and how many ranks these are."""
    count = (targets != IGNORED).sum()
    if group is None:
        return count.clamp(min=1), 1
    ranks = group.get_group() if isinstance(group, DeviceMesh) else group
    if not torch.compiler.is_compiling():
        let_gloo_rest_at_exit()
    dist.all_reduce(count, group=ranks)
    return count.clamp(min=1), dist.get_world_size(ranks)


def document_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """Positions (N,) that begin anew in each document, and behind the last one."""
    positions = torch.arange(length, device=cu_seqlens.device)
    ends = cu_seqlens.to(torch.int64)
    return positions - ends[torch.searchsorted(ends, positions, right=True) - 1]


def _begins(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which of the tokens 1 to N begin a document: bool (N,)."""
    begins = torch.zeros(length + 2, dtype=torch.bool, device=cu_seqlens.device)
    begins[cu_seqlens.to(torch.int64).clamp(0, length + 1)] = True
    return begins[1 : length + 1]
