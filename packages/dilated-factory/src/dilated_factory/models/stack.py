"""What the LongNet models share: embedding, blocks, last norm and head, made from a config."""

# Shapes: B batch, N length, E embed_dim, V vocab_size.

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_core import DilatedAttention
from dilated_core.interfaces import DecodingState
from dilated_factory.configs.models import LongNetConfig, LongNetEncoderConfig, StackConfig
from dilated_factory.models.layers import (
    AttentionFactory,
    Recompute,
    TransformerLayer,
    magneto_gain,
)
from dilated_factory.models.positions import FIRST_ROW, RotaryEmbedding, XPosEmbedding, sinusoids

Checkpointing: TypeAlias = bool | Recompute
ConfigT = TypeVar("ConfigT", bound=LongNetConfig | LongNetEncoderConfig)


class LongNetStack(nn.Module, Generic[ConfigT]):
    """The base of `LongNetLM` and `LongNetEncoder`, which say what the arguments are."""

    layer_type: ClassVar[type[TransformerLayer]]
    embedding: nn.Embedding | None
    head: nn.Linear | None

    def __init__(
        self,
        config: ConfigT,
        *,
        attention: AttentionFactory | None = None,
        activation_checkpointing: Checkpointing = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        attention = dilated_attention_factory(config) if attention is None else attention
        width, vocab_size = config.embed_dim, config.vocab_size
        positions = position_embedding(config)
        with nullcontext() if device is None else torch.device(device):
            self.embedding = None if vocab_size is None else nn.Embedding(vocab_size, width)
            self.place_embedding = (
                nn.Embedding(FIRST_ROW + config.context, width)
                if config.positions == "learned"
                else None
            )
            self.embedding_norm = (
                nn.LayerNorm(width, eps=config.layer_norm_eps) if config.embedding_norm else None
            )
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(
                self.layer_type(
                    width,
                    config.num_heads,
                    attention(),
                    ffn_dim=config.hidden_dim,
                    dropout=config.dropout,
                    layer_norm_eps=config.layer_norm_eps,
                    gain=magneto_gain(config.num_layers),
                    position_embedding=positions,
                    activation=config.activation,
                    float32_gelu=config.float32_gelu,
                    drop_path=config.drop_path * i / max(config.num_layers - 1, 1),
                )
                for i in range(config.num_layers)
            )
            self.norm = (
                nn.LayerNorm(width, eps=config.layer_norm_eps)
                if getattr(config, "final_norm", True)
                else nn.Identity()
            )
            self.head = (
                None
                if vocab_size is None or not getattr(config, "head", True)
                else nn.Linear(width, vocab_size, bias=False)
            )
        self.activation_checkpointing = activation_checkpointing
        if dtype is not None:
            self.to(dtype)
        self._reset_ends()

    @property
    def activation_checkpointing(self) -> Checkpointing:
        """What backward computes again: nothing, layers, or `recompute` of `TransformerLayer`."""
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: Checkpointing) -> None:
        if not isinstance(value, bool) and value not in get_args(Recompute):
            raise ValueError(
                "activation_checkpointing must be a bool, 'pointwise' or 'selective'. "
                f"Got {value!r}."
            )
        self._checkpointing = value
        for block in self.layers():
            block.recompute = None if isinstance(value, bool) else value

    def compile_blocks(self) -> None:
        """Let torch.compile fuse what is inside each layer, from the next call on.

        It compiles one layer for all of them, once for each dtype and each of training and
        inference. Calls with caches are not compiled, and neither is a copy of the model.
        """
        for block in self.layers():
            block.compile_forward()

    def reset_parameters(self) -> None:
        """Draw all weights anew, from torch's global random state."""
        for block in self.layers():
            block.reset_parameters()
        for norm in (self.embedding_norm, self.norm):
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()
        self._reset_ends()

    def _reset_ends(self) -> None:
        # Standard deviation 1 / sqrt(E): unit variance after the scaling at the input, and logits
        # of unit variance from normalised states at the output.
        ends: list[nn.Embedding | nn.Linear]
        ends = [end for end in (self.embedding, self.head) if end is not None]
        if getattr(self.config, "tie_embeddings", False):
            first, last = ends
            last.weight = first.weight  # again, because to_empty() parts them
            del ends[1]
        if self.place_embedding is not None:
            ends.append(self.place_embedding)
        for end in ends:
            nn.init.normal_(end.weight, std=1 / math.sqrt(self.config.embed_dim))

    def hidden_states(
        self,
        inputs: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """States after the last norm (B, N, E); arguments as in `forward`."""
        return self._normed(inputs, key_padding_mask=key_padding_mask, positions=positions)

    def layer_states(
        self,
        inputs: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> list[Tensor]:
        """What enters the first layer and what leaves each: num_layers + 1 tensors (B, N, E).

        None of them has gone through the last norm; arguments as in `forward`.
        """
        return self._all_states(inputs, key_padding_mask=key_padding_mask, positions=positions)

    def _all_states(self, inputs: Tensor, **options: Any) -> list[Tensor]:
        states, back = self._placed(inputs, **options)
        return [back(state) for state in states]

    def _normed(self, inputs: Tensor, **options: Any) -> Tensor:
        states, back = self._placed(inputs, **options)
        # A queue of one: a list of all states would keep them alive.
        normed: Tensor = self.norm(back(deque(states, maxlen=1).pop()))
        return normed

    def _placed(
        self, inputs: Tensor, **options: Any
    ) -> tuple[Iterator[Tensor], Callable[[Tensor], Tensor]]:
        """The states of inputs, wherever they are put for that, and what puts states back."""
        return self._states(inputs, **options), lambda state: state

    def _states(
        self,
        inputs: Tensor,
        *,
        key_padding_mask: Tensor | None,
        positions: Tensor | None,
        caches: Sequence[DecodingState] | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Iterator[Tensor]:
        if caches is not None and len(caches) != len(self.blocks):
            raise ValueError(f"caches must be one a layer ({len(self.blocks)}). Got {len(caches)}.")
        hidden, table = self.entrance(inputs, positions, caches)
        yield hidden
        options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "positions": table}
        if lengths is not None:
            options["lengths"] = lengths
        if cu_seqlens is not None:
            options["cu_seqlens"] = cu_seqlens
        for index, block in enumerate(self.blocks):
            if caches is not None:
                options["cache"] = caches[index]
            if self.activation_checkpointing is True and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False, **options)
            else:
                hidden = block(hidden, **options)
            yield hidden

    def entrance(
        self,
        inputs: Tensor,
        positions: Tensor | None,
        caches: Sequence[DecodingState] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What enters the first layer (B, N, E), and the positions that all layers are given."""
        hidden, positions = self.embedded(inputs, positions, caches)
        return hidden, self._position_table(hidden, positions, caches)

    def embedded(
        self,
        inputs: Tensor,
        positions: Tensor | None,
        caches: Sequence[DecodingState] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What enters the first layer (B, N, E), and positions unless they are in it."""
        hidden = self._embed(inputs)
        if self.config.positions in ("learned", "sinusoidal"):
            counted = self._counted(hidden, positions, caches)
            hidden, positions = hidden + self._place(counted).to(hidden.dtype), None
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        return self.dropout(hidden), positions

    def layers(self) -> Iterator[TransformerLayer]:
        """The layers, first to last."""
        for block in self.blocks:
            assert isinstance(block, TransformerLayer)
            yield block

    def _position_table(
        self,
        hidden: Tensor,
        positions: Tensor | None,
        caches: Sequence[DecodingState] | None,
    ) -> Tensor | None:
        """What the position embedding makes of positions, once for all layers."""
        embedding = next(self.layers()).attention.position_embedding
        if not isinstance(embedding, RotaryEmbedding):
            return None if embedding is None else positions
        return embedding.table(self._counted(hidden, positions, caches), hidden.dtype)

    def _counted(
        self,
        hidden: Tensor,
        positions: Tensor | None,
        caches: Sequence[DecodingState] | None,
    ) -> Tensor:
        """Where hidden states (B, N, E) are: as given, after a cache, or from 0."""
        length = hidden.shape[1]
        if positions is None and caches:
            positions = caches[0].next_positions(length, hidden.device)
        elif positions is None:
            positions = torch.arange(length, device=hidden.device)
        elif positions.shape not in ((length,), hidden.shape[:2]):
            raise ValueError(
                f"positions must have shape (N,)={(length,)} or (B, N)={tuple(hidden.shape[:2])}. "
                f"Got {tuple(positions.shape)}."
            )
        return positions

    def _place(self, positions: Tensor) -> Tensor:
        """What is added to embeddings at positions."""
        if self.place_embedding is None:
            return sinusoids(positions, self.config.embed_dim)
        if positions.shape[-1] > self.config.context:
            raise ValueError(
                f"inputs must be no longer than context={self.config.context}, which the learned "
                f"positions reach to. Got {positions.shape[-1]}."
            )
        placed: Tensor = self.place_embedding(positions + FIRST_ROW)
        return placed

    def _embed(self, inputs: Tensor) -> Tensor:
        width = self.config.embed_dim
        if self.embedding is None:
            if inputs.ndim != 3 or inputs.shape[-1] != width:
                raise ValueError(
                    f"inputs must have shape (B, N, embed_dim={width}) without a vocabulary. "
                    f"Got {tuple(inputs.shape)}."
                )
            return inputs
        if inputs.ndim != 2:
            raise ValueError(f"tokens must have shape (B, N). Got {tuple(inputs.shape)}.")
        if inputs.dtype != torch.int64:
            raise TypeError(f"tokens must be int64. Got {inputs.dtype}.")
        embedded: Tensor = self.embedding(inputs)
        return embedded * math.sqrt(width) if self.config.scale_embedding else embedded


def dilated_attention_factory(config: StackConfig) -> AttentionFactory:
    """The attention of a model where none is injected: dilated, by the pattern of its config."""
    return lambda: DilatedAttention(config.pattern, dropout=config.dropout)


def position_embedding(config: StackConfig) -> RotaryEmbedding | None:
    """The position embedding of queries and keys that ``config.positions`` names, if it does."""
    if config.positions in ("none", "learned", "sinusoidal"):
        return None
    if config.positions == "rotary":
        return RotaryEmbedding(config.head_dim, base=config.angle_base)
    return XPosEmbedding(
        config.head_dim,
        base=config.angle_base,
        scale_base=config.xpos_scale_base,
        centre=config.context // 2,
    )
