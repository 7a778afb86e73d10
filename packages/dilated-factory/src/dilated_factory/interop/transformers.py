"""Hugging Face transformers: dilated attention inside its models, and our model as one of its.

Importing this module imports transformers; `dilated_factory` itself does not.
"""

# Shapes, transformers' layout: B batch, H heads, N queries, M keys, D head_dim.

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
)
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dilated_core import DilatedPattern
from dilated_factory.configs.models import LongNetConfig
from dilated_factory.interop.over_ranks import Misplaced, fault_in_share, rank_in, refuse_share
from dilated_factory.interop.transformers_base import (
    LongNetPreTrainedConfig,
    LongNetPreTrainedModel,
    token_loss,
)
from dilated_factory.interop.transformers_cache import CACHE, LongNetCache
from dilated_factory.interop.transformers_encoder import (
    LongNetEncoderPreTrainedConfig,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
)
from dilated_factory.interop.unserved import (
    described,
    features,
    refuse_options,
    refuse_packed_positions,
)
from dilated_factory.interop.visible import Visible, attend, check_visible
from dilated_factory.models.head_loss import IGNORED
from dilated_factory.models.longnet import LongNetLM

__all__ = [
    "CACHE",
    "DilatedAttentionFunction",
    "LongNetCache",
    "LongNetEncoderPreTrainedConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedConfig",
    "RingAttentionFunction",
    "padding_mask",
    "register",
    "register_longnet",
]


def register(
    pattern: Visible,
    name: str = "dilated",
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> None:
    """Make dilated attention available as ``attn_implementation=name``; see the public name."""
    check_visible("pattern", pattern)
    attention = DilatedAttentionFunction(pattern)
    mask: Callable[..., Tensor | None] = padding_mask
    if group is not None:
        if not isinstance(pattern, DilatedPattern):
            raise ValueError("pattern must be a DilatedPattern with a group. Got a BlockLayout.")
        attention = RingAttentionFunction(pattern, group)
        # Ranks have a mask or none of them has, whether or not it hides a token of theirs.
        mask = partial(padding_mask, keep=True)
    _register(name, attention, mask)


def _register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    known = AttentionInterface()
    if name in known.valid_keys() and known[name] != attention:
        raise ValueError(
            f"name must not be registered for another attention yet. Got {name!r}, which is "
            f"{known[name]!r}."
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def register_modules() -> str:
    """Make what `replace_attention` gave to each module available; return the name of it."""
    _register("dilated_modules", _as_its_module_says, padding_mask)
    return "dilated_modules"


def _as_its_module_says(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
    visible = getattr(module, "dilated_visible", None)
    if visible is None:
        raise ValueError(
            "attn_implementation must be set by replace_attention to be 'dilated_modules'. "
            f"Got {type(module).__name__} without a pattern."
        )
    return DilatedAttentionFunction(visible)(module, *args, **options)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    keep: bool = False,
    **_: Any,
) -> Tensor | None:
    """The mask for `DilatedAttentionFunction`: bool (B, M), True = attend, or None if all do.

    With ``keep`` also where all do.

    Raises:
        ValueError: the model asks for something else than causal or full attention to all positions
            so far: sliding windows, chunks, packed sequences, a cache of fixed size.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "the attention mask must be causal or full for dilated attention. "
            f"Got {features(mask_function)}."
        )
    causal = mask_function is causal_mask_function
    if kv_offset or (causal and int(q_offset) + q_length != kv_length):
        raise ValueError(
            f"{CACHE} must hold exactly the positions so far for dilated attention, as a "
            f"DynamicCache does. Got {kv_length} keys from position {kv_offset} on, for queries "
            f"{int(q_offset)} to {int(q_offset) + q_length - 1}."
        )
    if attention_mask is None or (attention_mask.all() and not keep):
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask must have shape {(batch_size, kv_length)}. "
            f"Got {tuple(attention_mask.shape)}."
        )
    return attention_mask.to(torch.bool)


@dataclass(frozen=True)
class DilatedAttentionFunction:
    """Attention as transformers' models call it, over a dilated pattern.

    Leading padding of a row is cut off, so segments start at its first real token and a row padded
    on the left gives what it gives alone.
    """

    pattern: Visible
    cuts_padding: ClassVar[bool] = True

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Query (B, H, N, D), key and value (B, H_kv, M, D) to ((B, N, H, D), None)."""
        refuse_options(options)
        if attention_mask is not None and not (
            isinstance(attention_mask, Tensor)  # or a BlockMask of FlexAttention
            and attention_mask.ndim == 2
            and attention_mask.dtype == torch.bool
        ):
            raise ValueError(
                "attention_mask must be a padding mask (B, M) for dilated attention, which serves "
                "neither square masks nor biases on the scores. "
                f"Got {described(attention_mask)}."
            )
        if is_causal is None:
            is_causal = _is_causal(module)
        queries, keys = query.shape[2], key.shape[2]
        other = not is_causal and queries != keys  # keys of another sequence
        positions = options.get("position_ids")
        if positions is not None and (positions.ndim != 2 or other):
            positions = None
        fault = self._fault(positions, attention_mask, queries, keys)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return self._attend(
                fault, q, k, v, is_causal=is_causal, scale=scaling, dropout_p=dropout,
                enable_gqa=True, key_padding_mask=mask,
            )  # fmt: skip

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if attention_mask is None:
            return attend(q, k, v, None), None
        ignored = ~attention_mask
        if other or not self.cuts_padding:
            return attend(q, k, v, ignored), None
        return _without_leading_padding(attend, q, k, v, ignored), None

    def _fault(
        self, positions: Tensor | None, mask: Tensor | None, queries: int, keys: int
    ) -> str | None:
        """What is wrong on this rank alone; what is wrong everywhere is raised."""
        if positions is not None:
            refuse_packed_positions(positions, mask, keys - queries)
            if mask is None:
                refuse_share(positions, keys - queries)
        return None

    def _attend(
        self, fault: str | None, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        assert fault is None
        return attend(self.pattern, query, key, value, **options)


@dataclass(frozen=True)
class RingAttentionFunction(DilatedAttentionFunction):
    """The same where ranks of a group share each sequence, each with a contiguous part.

    Padding that leads is refused, not cut off: it would move the segments of other ranks.
    """

    pattern: DilatedPattern
    group: dist.ProcessGroup | DeviceMesh
    cuts_padding: ClassVar[bool] = False

    def _fault(
        self, positions: Tensor | None, mask: Tensor | None, queries: int, keys: int
    ) -> str | None:
        return fault_in_share(positions, mask, queries, keys, rank_in(self.group)[0])

    def _attend(
        self, fault: str | None, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        from dilated_ring import ring_attention

        pattern = self.pattern if fault is None else Misplaced(self.pattern, fault)
        out = ring_attention(query, key, value, pattern, group=self.group, **options)
        assert isinstance(out, Tensor)
        return out


def _without_leading_padding(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, ignored: Tensor
) -> Tensor:
    """Attend (B, N, H, D) in groups of rows with equal leading padding, without that padding."""
    # A row of nothing but padding has none that leads; all its keys are ignored.
    leading = (~ignored).int().argmax(dim=1)
    if not leading.any():
        return attend(q, k, v, ignored)
    out = torch.zeros_like(q)
    for count in leading.unique().tolist():
        rows = leading == count
        first = max(0, count - (k.shape[1] - q.shape[1]))
        out[rows, first:] = attend(
            q[rows, first:], k[rows, count:], v[rows, count:], ignored[rows, count:]
        )
    return out


def _is_causal(module: nn.Module) -> bool:
    # A configuration may make a decoder see both directions, and its modules do not know of it.
    config = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", True)) and bool(getattr(config, "is_causal", True))


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """`LongNetLM` as one of transformers' models: save_pretrained, from_pretrained, generate.

    ``LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump()))``; the model itself is in
    ``.longnet``. It decodes with a `LongNetCache`. Assisted generation, which takes tokens back,
    cannot: rows that the start of a segment wrote over are gone.
    """

    _tied_weights_keys = {"longnet.head.weight": "longnet.embedding.weight"}  # noqa: RUF012 # theirs

    def __init__(self, config: LongNetPreTrainedConfig) -> None:
        super().__init__(config)
        # Trainer shifts the labels that it smooths for the classes of this table alone; unshifted,
        # a model learns to repeat its input.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = LongNetForCausalLM.__name__
        self.longnet = LongNetLM(LongNetConfig.model_validate(config.longnet))
        self.finish()

    def _get_name(self) -> str:
        # What is looked up in that table, where FSDP and subclasses have other names.
        return LongNetForCausalLM.__name__

    @property
    def stack(self) -> LongNetLM:
        """The `LongNetLM`."""
        return self.longnet

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.longnet.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another head."""
        self.longnet.head = new_embeddings  # type: ignore[assignment] # adapters wrap it

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Its own is made by the first forward.
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: LongNetCache | None = None,
        past_key_values: LongNetCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unserved: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, N, V), and with labels the mean loss of the next token in nats.

        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N) or, with a cache, (B, columns so far + N), 0 = ignore. A row with
                padding on either side gives what it gives alone.
            labels: (B, N) int64, as ``input_ids``; -100 leaves a token out, and tokens that the
                mask hides predict nothing.
            cache: what earlier calls left, which the input follows and is added to.
            past_key_values: its older name.
            use_cache: return a new cache where none is given; False when None.
            output_hidden_states: also return what enters the first layer and what leaves each, the
                last after the last norm.
            logits_to_keep: of so many last positions, or of these; 0 means all.
            return_dict: False returns a tuple.
            num_items_in_batch: what the sum of losses is divided by, instead of the number of
                targets: that of all parts of a batch whose gradients are accumulated.
            **unserved: what other models take, such as ``output_attentions``; None or False.

        Raises:
            TypeError: the cache is no `LongNetCache`, or something unserved is asked for.
        """
        self.refuse(unserved)
        if past_key_values is not None:
            if CACHE == "cache":
                warnings.warn("past_key_values is now called cache.", FutureWarning, stacklevel=2)
            cache = past_key_values
        if cache is None and use_cache:
            cache = LongNetCache(self)
        if cache is not None and not isinstance(cache, LongNetCache):
            raise TypeError(f"{CACHE} must be a LongNetCache. Got {type(cache).__name__}.")
        length = input_ids.shape[1]
        options: dict[str, Any] = {}
        if attention_mask is not None:
            options["key_padding_mask"] = ~attention_mask[:, -length:].to(torch.bool)
        if cache is not None:
            options["caches"] = cache.states
        if output_hidden_states:
            states = self.longnet.layer_states(input_ids, **options)
            states[-1] = hidden = self.longnet.norm(states[-1])
        else:
            hidden = self.longnet.hidden_states(input_ids, **options)
        for layer in () if cache is None else cache.of_layers:
            layer.columns += length
        logits = None
        if isinstance(logits_to_keep, Tensor):
            logits = self.longnet.head(hidden[:, logits_to_keep])
        elif labels is None or not (self.training and self.config.loss_in_chunks):
            logits = self.longnet.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            targets = labels[:, 1:]
            if attention_mask is not None:
                targets = targets.masked_fill(options["key_padding_mask"][:, :-1], IGNORED)
            whole = not isinstance(logits_to_keep, Tensor) and not logits_to_keep
            given = logits[:, :-1] if whole and logits is not None else None
            loss = token_loss(hidden[:, :-1], self.longnet.head, given, targets, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if cache is not None:
            setattr(output, CACHE, cache)
        if output_hidden_states:
            output.hidden_states = tuple(states)
        return output.to_tuple() if return_dict is False else output


def register_longnet() -> None:
    """Make the Auto classes of transformers know our models; again changes nothing."""
    for config, models in MODELS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, model in models.items():
            auto.register(config, model, exist_ok=True)


MODELS: dict[type[LongNetPreTrainedConfig], dict[Any, type[LongNetPreTrainedModel]]] = {
    LongNetPreTrainedConfig: {AutoModelForCausalLM: LongNetForCausalLM},
    LongNetEncoderPreTrainedConfig: {
        AutoModel: LongNetModel,
        AutoModelForMaskedLM: LongNetForMaskedLM,
        AutoModelForSequenceClassification: LongNetForSequenceClassification,
        AutoModelForTokenClassification: LongNetForTokenClassification,
    },
}
