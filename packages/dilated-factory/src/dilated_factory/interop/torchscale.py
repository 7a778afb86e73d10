"""Checkpoints of torchscale's LongNetDecoder and LongNetEncoder, and of GigaPath's slide encoder.

torchscale's habits are part of what its weights were trained for: heads are offset in blocks, and
outside causal attention the zero keys that fill short segments stay in the softmax. Its GELU is
computed in float32, whatever the dtype.
"""

import warnings
from collections.abc import Mapping
from os import PathLike
from typing import TypeVar, overload

import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory.configs.models import LongNetConfig, LongNetEncoderConfig, StackConfig
from dilated_factory.configs.slides import SlideEncoderConfig
from dilated_factory.interop.checkpoints import StateDict, assign, read_checkpoint
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.models.encoder import LongNetEncoder
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.models.positions import xpos_bases

Stack = TypeVar("Stack", bound=StackConfig)

# Our names, then torchscale's, inside a layer and outside of it.
_LAYER_NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.inner_norm": "self_attn.inner_attn_ln",
    "attention": "self_attn",
    "feed_forward_norm": "final_layer_norm",
    "feed_forward.inner_norm": "ffn.ffn_layernorm",
    "feed_forward": "ffn",
}
_OUTER_NAMES = {"embedding": "embed_tokens", "norm": "layer_norm", "head": "output_projection"}
_XPOS = "self_attn.xpos.scale"


@overload
def load_torchscale(
    state_dict: StateDict | str | PathLike[str], config: LongNetConfig
) -> LongNetLM: ...
@overload
def load_torchscale(
    state_dict: StateDict | str | PathLike[str], config: LongNetEncoderConfig
) -> LongNetEncoder: ...
@overload
def load_torchscale(
    state_dict: StateDict | str | PathLike[str], config: SlideEncoderConfig
) -> SlideEncoder: ...
def load_torchscale(
    state_dict: StateDict | str | PathLike[str],
    config: LongNetConfig | LongNetEncoderConfig | SlideEncoderConfig,
) -> LongNetLM | LongNetEncoder | SlideEncoder:
    """Build the model of a torchscale checkpoint: the same outputs, in the checkpoint's dtype.

    The kind of ``config`` says which: a `LongNetConfig` a LongNetDecoder (pre-norm, sub-layer
    norms, GELU), a `LongNetEncoderConfig` a LongNetEncoder, a `SlideEncoderConfig` GigaPath's slide
    encoder. Of the first two, fields that are not set take what the checkpoint has or torchscale
    does: ``positions`` and ``tie_embeddings`` by its tensors, ``head_offsets`` "blocked",
    ``count_padding`` true for an encoder, ``float32_gelu`` true, ``scale_embedding`` false.

    Gradients differ from torchscale's, which leave out the weights that mix the branches.

    Args:
        state_dict: the named tensors, or a file: ``.safetensors``, or of ``torch.save``, read with
            weights_only=True. Tensors under the key "model" are taken from there.
        config: shape of the model.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: listing all tensors that are missing, unexpected or of another shape; or naming
            a field of ``config`` that contradicts the checkpoint.

    Warns:
        UserWarning: a segment length is not a multiple of its dilation rate. torchscale misplaces
            rows of that branch in inputs longer than the segment; this model does not.
    """
    state = read_checkpoint(state_dict)
    if isinstance(config, SlideEncoderConfig):
        model: LongNetLM | LongNetEncoder | SlideEncoder = SlideEncoder(config, device="meta")
        names = {own: _their_slide_name(own) for own in model.state_dict()}
    else:
        config = _completed(config, state)
        _drop_xpos(state, config)
        kind = LongNetLM if isinstance(config, LongNetConfig) else LongNetEncoder
        model = kind(config, device="meta")  # type: ignore[arg-type] # kind goes by the config
        names = {own: their_name(own) for own in model.state_dict()}
    assign(model, state, names)
    if isinstance(model, LongNetLM) and model.config.tie_embeddings:
        model.head.weight = model.embedding.weight  # two copies until here
    warn_of_misplacement(config.pattern)
    return model.eval()


def their_name(own: str) -> str:
    """The name in torchscale of an entry of our state dict."""
    if own.startswith("blocks."):
        _, index, inside = own.split(".", 2)
        for name, theirs in _LAYER_NAMES.items():
            if inside.startswith(name + "."):
                return f"layers.{index}.{theirs}{inside.removeprefix(name)}"
    name, _, rest = own.partition(".")
    return f"{_OUTER_NAMES[name]}.{rest}"


def _their_slide_name(own: str) -> str:
    if own.startswith("encoder."):
        return f"encoder.{their_name(own.removeprefix('encoder.'))}"
    return own.replace("patch_embed.", "patch_embed.proj.")


def warn_of_misplacement(pattern: DilatedPattern) -> None:
    """Warn where torchscale places rows of a branch elsewhere than the definition does."""
    wrong = [(w, r) for w, r in pattern.branches if w % r]
    if wrong:
        branches = ", ".join(f"(segment length {w}, dilation rate {r})" for w, r in wrong)
        warnings.warn(
            "outputs differ from torchscale's for inputs longer than "
            f"{min(w for w, _ in wrong)} positions: where a dilation rate does not divide the "
            "segment length, torchscale moves the rows of each segment but the first. This model "
            f"keeps them in place. Branches: {branches}.",
            UserWarning,
            stacklevel=3,
        )


def _completed(config: Stack, state: Mapping[str, Tensor]) -> Stack:
    """The configuration with torchscale's habits in the fields that were not set."""
    has_xpos = any(name.endswith(_XPOS) for name in state)
    habits: dict[str, object] = {
        "head_offsets": "blocked",
        "positions": "xpos" if has_xpos else "none",
        "float32_gelu": True,
    }
    if isinstance(config, LongNetEncoderConfig):
        habits["count_padding"] = True
    for field, value in habits.items():
        if field in config.model_fields_set and getattr(config, field) != value:
            raise ValueError(
                f"config.{field} must be {value!r} for this checkpoint. "
                f"Got {getattr(config, field)!r}."
            )
    if "scale_embedding" not in config.model_fields_set:
        habits["scale_embedding"] = False
    if isinstance(config, LongNetConfig):
        habits["tie_embeddings"] = _tied(config, state)
    # Through validation, because xPos limits the context.
    return type(config).model_validate({**config.model_dump(), **habits})


def _tied(config: LongNetConfig, state: Mapping[str, Tensor]) -> bool:
    embedding, head = (
        state.get(f"{name}.weight") for name in ("embed_tokens", "output_projection")
    )
    equal = embedding is not None and head is not None and torch.equal(embedding, head)
    if "tie_embeddings" not in config.model_fields_set:
        return equal
    if config.tie_embeddings and embedding is not None and head is not None and not equal:
        raise ValueError(
            "config.tie_embeddings must be False for this checkpoint, whose embedding and output "
            "projection differ. Got True."
        )
    return config.tie_embeddings


def _drop_xpos(state: dict[str, Tensor], config: StackConfig) -> None:
    """Take out the bases of xPos, which follow from the width of a head."""
    bases = xpos_bases(config.head_dim)
    for index in range(config.num_layers if config.positions == "xpos" else 0):
        name = f"layers.{index}.{_XPOS}"
        if name not in state:
            raise ValueError(f"state_dict must have xPos in all layers. Missing {name}.")
        found = state.pop(name)
        if found.shape != bases.shape or not torch.allclose(found.double(), bases, rtol=1e-2):
            raise ValueError(
                f"{name} must hold xPos's bases {bases.tolist()}. Got {found.tolist()}."
            )
