"""Checkpoints of torchscale's LongNetDecoder and LongNetEncoder, and of GigaPath's slide encoder.

torchscale's habits are part of what its weights were trained for: heads are offset in blocks, and
outside causal attention the zero keys that fill short segments stay in the softmax. Its GELU is
computed in float32, whatever the dtype.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory.configs.models import LongNetConfig, LongNetEncoderConfig, StackConfig
from dilated_factory.configs.slides import SlideEncoderConfig
from dilated_factory.interop.checkpoints import (
    Naming,
    Source,
    assign,
    layer_count,
    read_checkpoint,
)
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.models.encoder import LongNetEncoder
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.models.positions import FIRST_ROW, xpos_bases

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
_OUTER_NAMES = {
    "embedding": "embed_tokens",
    "place_embedding": "embed_positions",
    "embedding_norm": "layernorm_embedding",
    "norm": "layer_norm",
    "head": "output_projection",
}
# All that fairseq's sinusoidal positions leave in a checkpoint.
_SINUSOIDS = ("embed_positions._float_tensor", "embed_positions.version", "version")
_XPOS = "self_attn.xpos.scale"


@overload
def load_torchscale(source: Source, config: LongNetConfig, *, strict: bool = True) -> LongNetLM: ...
@overload
def load_torchscale(
    source: Source, config: LongNetEncoderConfig, *, strict: bool = True
) -> LongNetEncoder: ...
@overload
def load_torchscale(
    source: Source, config: SlideEncoderConfig, *, strict: bool = True
) -> SlideEncoder: ...
def load_torchscale(
    source: Source,
    config: LongNetConfig | LongNetEncoderConfig | SlideEncoderConfig,
    *,
    strict: bool = True,
) -> LongNetLM | LongNetEncoder | SlideEncoder:
    """Build the model of a torchscale checkpoint: the same outputs, in the checkpoint's dtype.

    The kind of ``config`` says which: a `LongNetConfig` a LongNetDecoder (pre-norm, sub-layer
    norms), a `LongNetEncoderConfig` a LongNetEncoder, a `SlideEncoderConfig` GigaPath's slide
    encoder. Of the first two, fields that are not set take what the checkpoint has or torchscale
    does: ``positions``, ``embedding_norm`` and ``tie_embeddings`` by its tensors (learned positions
    with their ``context``; none, with a warning, where nothing tells, for sines leave no trace),
    ``head_offsets`` "blocked", ``count_padding`` true for an encoder,
    ``float32_gelu`` true, ``scale_embedding`` false, ``activation`` "gelu".

    Checkpoints of torchscale's recipe for fairseq ("decoder.") take activation, scale and pattern
    from the settings in the file, of which no code is run; without settings, ``activation`` and
    ``scale_embedding`` have to be given, because the defaults of that recipe are others.

    What trainers put before the names ("module.", "model.", "slide_encoder.", "decoder.") is found
    by itself; tensors beside it, as of a classifier, belong to other modules and are left. A slide
    encoder is also loaded from the names of our own state dict.

    Gradients differ from torchscale's, which leave out the weights that mix the branches.

    Args:
        source: the named tensors, or a file: ``.safetensors``, or of ``torch.save``, read with
            weights_only=True. Tensors under the key "model" or "state_dict" are taken from there.
            Tensors of several dtypes are brought to the widest.
        config: shape of the model.
        strict: all tensors must fit. With False, those that are missing or have another shape start
            anew, e.g. the projection of tiles where ``config.tile_dim`` is that of another tile
            encoder.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape, after the likeliest cause;
            or a field of ``config`` contradicts the checkpoint, which names it.

    Warns:
        UserWarning: a segment length is not a multiple of its dilation rate. torchscale misplaces
            rows of that branch in inputs longer than the segment; this model does not. Or: a model
            of GigaPath's published size pools by the class token, which its authors did not train,
            and ``config`` does not say so. Or, without ``strict``: what started anew.

    Examples:
        >>> shape = SlideEncoderConfig(
        ...     tile_dim=8,
        ...     embed_dim=16,
        ...     num_heads=2,
        ...     num_layers=1,
        ...     segment_lengths=(16,),
        ...     dilation_rates=(1,),
        ... )
        >>> save_gigapath(SlideEncoder(shape), "slide_encoder.pth")
        >>> type(load_torchscale("slide_encoder.pth", shape)).__name__
        'SlideEncoder'
    """
    tensors, settings = read_checkpoint(source)
    if isinstance(config, SlideEncoderConfig):
        warn_of_untrained_token(config)
        model: LongNetLM | LongNetEncoder | SlideEncoder
        model = load_slide_encoder(tensors, config, strict=strict)
    else:
        model = _load_stack(tensors, settings, config, strict=strict)
    warn_of_misplacement(config.pattern)
    return model.eval()


def load_slide_encoder(
    tensors: Mapping[str, Tensor], config: SlideEncoderConfig, *, strict: bool
) -> SlideEncoder:
    """The slide encoder among named tensors, whatever their prefix; see `load_torchscale`."""
    make = partial(SlideEncoder, config)
    own = list(make(device="meta").state_dict())
    naming = Naming.of(tensors, [slide_names(own), {name: name for name in own}])
    return assign(
        make,
        naming.part(tensors),
        naming.names,
        strict=strict,
        hint=partial(_slide_hints, config=config, naming=naming),
    )


def _load_stack(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
    config: LongNetConfig | LongNetEncoderConfig,
    *,
    strict: bool,
) -> LongNetLM | LongNetEncoder:
    kind = LongNetLM if isinstance(config, LongNetConfig) else LongNetEncoder
    own = list(kind(config, device="meta").state_dict())  # type: ignore[arg-type] # by the config
    naming = Naming.of(tensors, [{name: their_name(name) for name in own}])
    state = naming.part(tensors)
    config = _completed(config, state, settings, naming.prefix)
    for name in _SINUSOIDS:
        state.pop(name, None)
    _drop_xpos(state, config)

    def make(**where: Any) -> LongNetLM | LongNetEncoder:
        return kind(config, **where)  # type: ignore[arg-type] # kind goes by the config

    names = {name: their_name(name) for name in make(device="meta").state_dict()}
    model = assign(make, state, names, strict=strict, hint=partial(_stack_hints, config=config))
    if isinstance(model, LongNetLM) and model.config.tie_embeddings:
        model.head.weight = model.embedding.weight  # two copies until here
    return model


def _stack_hints(
    state: Mapping[str, Tensor], config: StackConfig, layers: str = "layers."
) -> list[str]:
    """What of a configuration differs from what a checkpoint's tensors tell."""
    norm, inner = (
        state.get(f"{layers}0.{name}") for name in ("self_attn_layer_norm.weight", "ffn.fc1.bias")
    )
    told = [
        ("embed_dim", config.embed_dim, None if norm is None else len(norm)),
        ("num_layers", config.num_layers, layer_count(state, layers) or None),
        ("ffn_dim", config.hidden_dim, None if inner is None else len(inner)),
    ]
    last = f"{layers.removesuffix('layers.')}layer_norm.weight"
    unnormed = ["config.final_norm must be False where the output is not normalised, as in LongViT"]
    if all(value is None for _, _, value in told):
        some = ", ".join(map(repr, list(state)[:3]))
        return [f"another kind of model: there is no {layers}0, but {some or 'nothing'}"]
    return [
        f"config.{field} must be {value}, not {given}"
        for field, given, value in told
        if value is not None and value != given
    ] + unnormed * (last not in state and isinstance(config, LongNetEncoderConfig))


def _slide_hints(
    state: Mapping[str, Tensor], config: SlideEncoderConfig, naming: Naming
) -> list[str]:
    own = {theirs: name for name, theirs in naming.names.items()}
    theirs = {_their_slide_name(own[n]) if n in own else n: t for n, t in state.items()}
    hints = _stack_hints(theirs, config.encoder, "encoder.layers.")
    width = theirs.get("patch_embed.proj.weight")
    if width is None:
        hints.append("the projection of tiles is missing: strict=False starts it anew")
    elif width.ndim == 2 and width.shape[1] != config.tile_dim:
        hints.append(
            f"config.tile_dim must be {width.shape[1]}, not {config.tile_dim}: for another tile "
            "encoder, strict=False starts the projection of tiles anew"
        )
    return hints


def warn_of_untrained_token(config: SlideEncoderConfig) -> None:
    """Warn where a model of the published size pools by its class token without being told to."""
    published = SlideEncoderConfig()
    shape = ("embed_dim", "num_heads", "num_layers")
    if (
        all(getattr(config, field) == getattr(published, field) for field in shape)
        and not config.global_pool
        and "global_pool" not in config.model_fields_set
    ):
        warnings.warn(
            "the class token of GigaPath's published weights was not trained, by their authors' "
            "word: set global_pool=True in the SlideEncoderConfig to pool the tiles, as they do, "
            "or global_pool=False for weights whose token was trained.",
            UserWarning,
            stacklevel=3,
        )


def their_name(own: str) -> str:
    """The name in torchscale of an entry of our state dict."""
    if own.startswith("blocks."):
        _, index, inside = own.split(".", 2)
        for name, theirs in _LAYER_NAMES.items():
            if inside.startswith(name + "."):
                return f"layers.{index}.{theirs}{inside.removeprefix(name)}"
    name, _, rest = own.partition(".")
    return f"{_OUTER_NAMES[name]}.{rest}"


def slide_names(own: Iterable[str]) -> dict[str, str]:
    """GigaPath's name of each entry of the state dict of a slide encoder or a classifier."""
    inside = "slide_encoder."
    return {
        name: inside + _their_slide_name(name.removeprefix(inside))
        if name.startswith(inside)
        else _their_slide_name(name)
        for name in own
    }


def _their_slide_name(own: str) -> str:
    """GigaPath's name of an entry of our state dict."""
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


def _completed(
    config: Stack, state: Mapping[str, Tensor], settings: Mapping[str, object], prefix: str
) -> Stack:
    """The configuration with what the checkpoint tells, else torchscale's habits, where not set."""
    told: dict[str, object] = {
        "head_offsets": "blocked",
        "head_groups": "shared",
        "float32_gelu": True,
        "embedding_norm": "layernorm_embedding.weight" in state,
        **_told_positions(config, state),
        **_told_settings(settings),
    }
    if isinstance(config, LongNetEncoderConfig):
        told["count_padding"] = True
    for field, value in told.items():
        if field in config.model_fields_set and getattr(config, field) != value:
            raise ValueError(
                f"config.{field} must be {value!r} for this checkpoint. "
                f"Got {getattr(config, field)!r}."
            )
    if prefix.endswith("decoder."):  # fairseq's recipe, whose defaults are not torchscale's
        for field in ("activation", "scale_embedding"):
            if field not in {*told, *config.model_fields_set}:
                raise ValueError(
                    f"config.{field} must be given for a checkpoint of fairseq without settings: "
                    "its tensors do not tell. Got none."
                )
    if "scale_embedding" not in {*told, *config.model_fields_set}:
        told["scale_embedding"] = False
    if told["positions"] == "none" and "positions" not in config.model_fields_set and not settings:
        warnings.warn(
            "positions are taken as 'none': sines leave no trace in tensors. Say so in the "
            "configuration (positions='none', or 'sinusoidal' if the model was trained with them).",
            UserWarning,
            stacklevel=5,
        )
    if isinstance(config, LongNetConfig):
        told["tie_embeddings"] = _tied(config, state)
    if "rotary_base" not in config.model_fields_set:
        told["rotary_base"] = None  # that of these positions
    # Through validation, because xPos limits the context.
    return type(config).model_validate({**config.model_dump(), **told})


def _told_positions(config: StackConfig, state: Mapping[str, Tensor]) -> dict[str, object]:
    table = state.get("embed_positions.weight")
    if table is not None:
        return {"positions": "learned", "context": len(table) - FIRST_ROW}
    if any(name.endswith(_XPOS) for name in state):
        return {"positions": "xpos"}
    # Sines are in no checkpoint but fairseq's, which has a mark of them.
    marked = any(name in state for name in _SINUSOIDS[:2])
    given = config.positions if "positions" in config.model_fields_set else "none"
    return {"positions": "sinusoidal" if marked or given == "sinusoidal" else "none"}


def _told_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """What fairseq's settings of a model tell of our fields."""
    told: dict[str, object] = {}
    if "activation_fn" in settings:
        told["activation"] = str(settings["activation_fn"])
    if "no_scale_embedding" in settings:
        told["scale_embedding"] = not settings["no_scale_embedding"]
    for theirs, field in (
        ("segment_length", "segment_lengths"),
        ("dilated_ratio", "dilation_rates"),
    ):
        value = settings.get(theirs)
        numbers = re.findall(r"\d+", value) if isinstance(value, str) else value
        if isinstance(numbers, list | tuple) and numbers:
            told[field] = tuple(int(number) for number in numbers)
    return told


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
