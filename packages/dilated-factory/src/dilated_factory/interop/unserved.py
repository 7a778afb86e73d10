"""What transformers' models may ask of their attention that dilated attention does not serve."""

# Shapes: B batch, N queries, M keys.

import inspect
import re
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_PACKED = "packed sequences (position_ids that restart or jump)"

# The features behind transformers' mask functions, by the function that makes each. An unknown
# mask function is refused as well, by its own name.
_MASKS = {
    "sliding_window_overlay": "a sliding window of {sliding_window}",
    "sliding_window_bidirectional_overlay": "a sliding window of {sliding_window}",
    "chunked_overlay": "chunked attention in chunks of {chunk_size}",
    "packed_sequence_mask_function": _PACKED,
    "remap_positions_for_packed_sequence": _PACKED,
    "blockwise_overlay": "blocks that see themselves in both directions (block_sequence_ids)",
}

# The features behind what models hand to their attention that would change what it computes.
_OPTIONS = {
    "sliding_window": "sliding windows",
    "softcap": "capped scores (soft-capping)",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias of positions on the scores",
    "indices": "keys chosen by an indexer",
    "block_indices": "keys chosen by an indexer",
    "cache": "a paged cache",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "seq_idx": "packed sequences",
}


def features(mask_function: Callable[..., Any]) -> str:
    """Name in words what a mask function asks for besides causal or full attention."""
    return " and ".join(dict.fromkeys(_features(mask_function))) or _name(mask_function)


def _features(mask_function: Callable[..., Any]) -> Iterator[str]:
    held = _closure(mask_function)
    maker = _name(mask_function).partition(".")[0]
    parts = [
        part
        for value in held.values()
        for part in (value if isinstance(value, tuple) else (value,))
        if callable(part)
    ]
    if maker in _MASKS:
        yield _MASKS[maker].format_map(held)
    elif not parts and maker not in ("causal_mask_function", "bidirectional_mask_function"):
        yield f"a mask function of its own, {_name(mask_function)}"
    for part in parts:
        yield from _features(part)


def _name(mask_function: Callable[..., Any]) -> str:
    return str(getattr(mask_function, "__qualname__", type(mask_function).__name__))


def _closure(mask_function: Callable[..., Any]) -> dict[str, Any]:
    if not inspect.isfunction(mask_function):
        return {}
    return dict(inspect.getclosurevars(mask_function).nonlocals)


def refuse_options(options: dict[str, Any]) -> None:
    """Refuse what a model hands to its attention and dilated attention would have to ignore.

    Raises:
        ValueError: naming the option and the feature that it belongs to.
    """
    for name, feature in _OPTIONS.items():
        given = options.get(name)
        if given is not None:
            raise ValueError(
                f"{name} must be None for dilated attention, which does not serve {feature}. "
                f"Got {described(given)}."
            )
    if options.get("output_attentions"):
        raise ValueError("output_attentions must be False for dilated attention. Got True.")


# What a module of attention or its configuration calls the value of an option of `_OPTIONS`.
_HELD = {
    "sliding_window": ("sliding_window",),
    "softcap": ("attn_logit_softcapping",),
    "s_aux": ("sinks",),
}
_BIAS = re.compile("position_bias|relative_attention_bias")


def asks_for(module: nn.Module) -> str:
    """What a module of transformers' attention asks for that is not served, told without a call.

    Empty where nothing is found; what is not found here is refused when the model is called.
    """
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and isinstance(index, int) and kinds[index : index + 1] == ["chunked_attention"]:
        return "chunked attention"
    passed = {name for code in codes(type(module)) for name in _names(code)}
    for option, names in _HELD.items():
        holder = module if any(hasattr(module, name) for name in names) else config
        if option in passed and any(getattr(holder, name, None) is not None for name in names):
            return _OPTIONS[option]
    if any(_BIAS.search(name) for name in {*passed, *vars(module), *module._modules}):
        return _OPTIONS["position_bias"]
    return ""


def codes(kind: type) -> Iterator[CodeType]:
    """The code of the methods of a class of module."""
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for value in vars(base).values():
            if inspect.isfunction(value):
                yield inspect.unwrap(value).__code__


def _names(code: CodeType) -> Iterator[str]:
    """The names in a code, those of keyword arguments of its calls included."""
    yield from code.co_names
    yield from code.co_varnames
    for value in code.co_consts:
        yield from (
            x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, str)
        )


def described(value: object) -> str:
    """Describe a value by what fits into a line: no tensor is printed, no function, no object."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of {tuple(value.shape)}"
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


# Layers share these tensors, so that a forward reads them once: to read them waits for a GPU.
_checked = WeakIdKeyDictionary()


def refuse_packed_positions(positions: Tensor, mask: Tensor | None, past: int) -> None:
    """Refuse positions that cut a row into sequences; transformers itself ignores such, at times.

    It sees them where there is neither a cache nor a mask of padding, and else attends across.

    Args:
        positions: (B or 1, N) integers, of the queries.
        mask: (B, M) bool, True = attend, False = padding, whose positions mean nothing; None: no
            padding.
        past: how many of the M keys come before the first query.

    Raises:
        ValueError: in a row, the tokens' positions do not count up by one (across padding: do not
            grow), or start below the number of tokens before them.
        RuntimeError: the same, in a graph that torch.compile made.
    """
    fault = (
        f"position_ids must count up by one for dilated attention, which does not serve {_PACKED}"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~_restarts(positions, mask, past).any(), fault)
        return
    # In inference mode tensors do not say whether they were changed.
    version = None if positions.is_inference() else positions._version
    known = _checked.get(positions)
    if known is not None and version is not None:
        checked_version, checked_mask, checked_past = known
        # A mask that is gone is none that could come again.
        same = checked_mask is None if mask is None else checked_mask and checked_mask() is mask
        if same and (checked_version, checked_past) == (version, past):
            return
    bad = _restarts(positions, mask, past)
    if bad.any():
        row, place = bad.nonzero()[0].tolist()
        before = "" if place == 0 else f" after {positions[row % len(positions), place - 1].item()}"
        raise ValueError(
            f"{fault}. Got position {positions[row % len(positions), place].item()}{before} at "
            f"token {past + place} of row {row}."
        )
    _checked[positions] = (version, None if mask is None else weakref.ref(mask), past)


def _restarts(positions: Tensor, mask: Tensor | None, past: int) -> Tensor:
    """Tell of each query whether its sequence begins there: bool (B or 1, N)."""
    if mask is None:
        jumps = positions.diff(dim=1) != 1
        return torch.cat([positions[:, :1] < past, jumps], dim=1)
    before = mask.cumsum(dim=1)[:, past:] - 1  # the tokens before each token
    real = mask[:, past:]
    # The largest position of a token so far.
    highest = positions.masked_fill(~real, -1).cummax(dim=1).values[:, :-1]
    steps = positions.diff(dim=1)
    jumps = torch.where(real[:, :-1], steps != 1, positions[:, 1:] <= highest)
    jumps = torch.cat([torch.zeros_like(real[:, :1]), jumps], dim=1)
    return real & (jumps | (positions < before))
