"""The attention of a model that is there already, replaced by that of a pattern; weights stay."""

import copy
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from dilated_core.extending import HeadAttention
from dilated_factory.interop.drop_in import PatternMultiheadAttention, PatternViTAttention
from dilated_factory.interop.unserved import asks_for, codes
from dilated_factory.interop.visible import ONE_SEGMENT, Visible, check_visible

_Choice: TypeAlias = "Callable[[str], tuple[Visible | None, str]]"
Patterns: TypeAlias = "Visible | Mapping[str, Visible | None] | Callable[[str], Visible | None]"

_CROSS = re.compile(r"cross|encoder_attn|encdec|multihead_attn", re.IGNORECASE)
_VIT_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_VIT_ARGUMENTS = {"self", "x", "attn_mask", "is_causal"}


@dataclass(frozen=True)
class ReplacedModule:
    """What became of one module of attention.

    Attributes:
        name: where it is in the model.
        kind: the class it has, or had.
        visible: the pattern or layout that it has now; None where it was left as it was.
        why_not: why it was left.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> (found,) = replace_attention(layer, DilatedPattern([8, 32], [1, 4])).modules
        >>> found.name, found.visible
        ('self_attn', DilatedPattern([8, 32], [1, 4]))
    """

    name: str
    kind: str
    visible: "Visible | None"
    why_not: str = ""


@dataclass(frozen=True)
class Replaced:
    """What `replace_attention` did; its text is a table.

    Attributes:
        model: the model that was given, or what replaces it where it is attention itself.
        modules: what became of each module of attention, in the model's order.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        >>> print(replace_attention(layer, DilatedPattern([8, 32], [1, 4])))
        module       kind                replaced  by, or why not
        (the model)  MultiheadAttention  yes       DilatedPattern([8, 32], [1, 4])
    """

    model: nn.Module
    modules: tuple[ReplacedModule, ...]

    def __str__(self) -> str:
        return _table(self.modules)


def replace_attention(model: nn.Module, pattern: Patterns) -> Replaced:
    """Give the attention of a model a pattern; the weights, and their names, stay what they are.

    Replaced are torch.nn.MultiheadAttention (so also nn.TransformerEncoder and nn.Transformer),
    timm's Attention of vision transformers, and what takes its attention from transformers'
    AttentionInterface. Parameters are the same objects, so an optimizer goes on, and a state dict
    goes both ways. Cross attention stays unless a mapping or a function names it. A model whose
    pattern hides keys is not the model that its weights were trained for: fine-tune it.

    transformers' own models load without it: replace again after `from_pretrained`.

    Args:
        model: changed in place, unless it is one module of attention.
        pattern: a DilatedPattern, or a BlockLayout (dilated-sparse), for all self-attention; or
            one for each, by the module's name: a mapping whose keys may have wildcards, as in
            ``"encoder.layers.*"``, first match first, or a function. None leaves a module.

    Returns:
        what was replaced and what was not, and why; print it.

    Raises:
        TypeError: model is no module, or a pattern is neither of the two.
        ValueError: nothing can be replaced; a key of the mapping names no attention; or a pattern
            splits more groups than a module has heads. The model is what it was. Later, from the
            model: it asks for what dilated attention does not serve, which the message names.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> _ = replace_attention(layer, DilatedPattern([8, 32], [1, 4]))
        >>> layer(torch.randn(2, 30, 16), is_causal=True).shape
        torch.Size([2, 30, 16])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module. Got {type(model).__name__}.")
    seen = _attentions(model)
    choose = _chooser(pattern, [each.name for each in seen])
    plan = [_planned(each, choose) for each in seen]
    rows = tuple(row for row, _ in plan)
    if not any(row.visible for row in rows):
        found = f":\n{_table(rows)}" if rows else f" {type(model).__name__}, which has none."
        raise ValueError(f"model must have attention that can be replaced. Got{found}")
    made = {id(x.module): new for x, (_, new) in zip(seen, plan, strict=True) if new is not None}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(x, PatternMultiheadAttention) for x in encoder.modules()
        ):
            # Else it makes nested tensors of padded batches in eval mode.
            encoder.use_nested_tensor = False
    _switch(seen, rows)
    return Replaced(made.get(id(model), model), rows)


@dataclass(frozen=True)
class _Seen:
    """A module of attention; with a root, a module of that model of transformers."""

    name: str
    module: nn.Module
    make: Callable[[Any, Visible], nn.Module] | None = None
    root: Any = None
    fault: str = ""


def _attentions(model: nn.Module) -> list[_Seen]:
    """All modules of attention; none inside another that can be replaced."""
    pretrained = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    found: list[_Seen] = []
    inside: str | None = None  # of the module whose children are passed over
    root, root_name = None, ""
    for name, module in model.named_modules():
        if inside is not None and f".{name}".startswith(inside):
            continue
        if root is not None and not f".{name}".startswith(root_name):
            root = None
        if root is None and isinstance(module, pretrained):
            root, root_name = module, _below(name)
        seen = _look(name, module, root)
        if seen is None:
            continue
        if seen.make or seen.root is not None or isinstance(module, HeadAttention):
            inside = _below(name)
        found.append(seen)
    # A wrapper says nothing beside what it wraps.
    wraps = {
        x.name
        for x in found
        if any(y is not x and f".{y.name}".startswith(_below(x.name)) for y in found)
    }
    found = [x for x in found if x.name not in wraps]
    refused = {id(x.root) for x in found if x.root is not None and x.fault}
    shared = "its model has attention that cannot be replaced, and all of it shares a mask"
    return [replace(x, fault=shared) if id(x.root) in refused and not x.fault else x for x in found]


def _below(name: str) -> str:
    """How the names of a module's descendants begin, with a dot before them."""
    return f".{name}." if name else "."


def _look(name: str, module: nn.Module, root: Any) -> _Seen | None:
    kind = type(module)
    if isinstance(module, HeadAttention):
        return _Seen(name, module, fault="dilated or block-sparse attention already")
    if kind is nn.MultiheadAttention or kind is PatternMultiheadAttention:
        return _Seen(name, module, PatternMultiheadAttention, fault=_multihead_fault(module))
    if kind is PatternViTAttention:
        return _Seen(name, module, PatternViTAttention, fault=_hooks_fault(module))
    if isinstance(module, nn.MultiheadAttention):
        return _Seen(name, module, fault="a subclass, whose forward may be another")
    if "attention" not in kind.__name__.lower():
        return None
    if {"qkv", "proj"} <= module._modules.keys() and isinstance(
        getattr(module, "num_heads", None), int
    ):
        return _Seen(name, module, PatternViTAttention, fault=_vit_fault(module))
    if root is not None and any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes(kind)):
        fault = asks_for(module)
        if not root._can_set_attn_implementation():
            fault = "transformers cannot set the attention of this model"
        return _Seen(name, module, root=root, fault=fault)
    unknown = "not a kind of attention that is known here"
    if root is not None:
        unknown = "its attention is not from transformers' AttentionInterface"
    return _Seen(name, module, fault=unknown)


def _hooks_fault(module: nn.Module) -> str:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return "hooks, which would be lost" if hooks else ""


def _multihead_fault(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            return "kdim or vdim is not embed_dim"
        if module.bias_k is not None or module.bias_v is not None:
            return "add_bias_kv"
        if module.add_zero_attn:
            return "add_zero_attn"
    # Pruning keeps weights by other names, and makes them by hooks.
    own = {name for name, value in module._parameters.items() if value is not None}
    if own | {"in_proj_bias"} != {"in_proj_weight", "in_proj_bias"}:
        return "parameters of its own"
    return _hooks_fault(module)


def _vit_fault(module: nn.Module) -> str:
    """Why a module that looks like timm's Attention is not, judged by what it computes."""
    own = (
        module._modules.keys() - _VIT_CHILDREN or module._parameters.keys() | module._buffers.keys()
    )
    if own:
        return f"parts of its own ({', '.join(sorted(own))})"
    more = inspect.signature(type(module).forward).parameters.keys() - _VIT_ARGUMENTS
    if more:
        return f"its forward takes more ({', '.join(sorted(more))})"
    if hooks := _hooks_fault(module):
        return hooks
    try:
        trial = copy.deepcopy(module).to("cpu", torch.float64).eval()
    except (NotImplementedError, RuntimeError):
        return "its weights are not there yet"
    try:
        x = torch.randn(2, 7, cast(nn.Linear, trial.qkv).in_features, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
        with torch.no_grad():
            theirs, ours = trial(x), PatternViTAttention(trial, ONE_SEGMENT)(x)
        same = torch.allclose(theirs, ours, 1e-8, 1e-8)
    except Exception:  # it is not what we take it for, and may do anything with our input
        same = False
    return "" if same else "it computes something else than timm's Attention"


def _chooser(pattern: Patterns, names: list[str]) -> _Choice:
    """What says of the name of a module which pattern it gets, or why none."""
    find: Callable[[str], Visible | None]
    if isinstance(pattern, Mapping):
        unused = [key for key in pattern if not any(fnmatchcase(x, key) for x in names)]
        if unused:
            raise ValueError(
                f"pattern must have names of modules of attention as keys, of {names}. "
                f"Got {unused[0]!r}."
            )
        table = dict(pattern)

        def find(name: str) -> "Visible | None":
            return next((table[key] for key in table if fnmatchcase(name, key)), None)

    elif callable(pattern):
        find = pattern
    else:
        check_visible("pattern", pattern)
        return lambda name: (None, "cross attention") if _CROSS.search(name) else (pattern, "")

    def choose(name: str) -> "tuple[Visible | None, str]":
        visible = find(name)
        if visible is not None:
            check_visible(f"pattern of {name!r}", visible)
        return visible, "" if visible is not None else "no pattern is given for it"

    return choose


def _planned(seen: _Seen, choose: _Choice) -> tuple[ReplacedModule, nn.Module | None]:
    """What becomes of a module, and the one in its place if there is to be one."""
    kind = type(seen.module).__name__
    visible, why_not = (None, seen.fault) if seen.fault else choose(seen.name)
    if visible is None:
        return ReplacedModule(seen.name, kind, None, why_not), None
    new = None if seen.make is None else seen.make(seen.module, visible)
    return ReplacedModule(seen.name, kind, visible), new


def _switch(seen: list[_Seen], rows: tuple[ReplacedModule, ...]) -> None:
    """Have models of transformers call what their modules say, where any was given a pattern."""
    roots = {id(x.root): x.root for x, row in zip(seen, rows, strict=True) if row.visible}
    for root in roots.values():
        if root is None:
            continue
        # Only now: it takes seconds to import.
        from dilated_factory.interop.transformers import register_modules

        for each, row in zip(seen, rows, strict=True):
            if each.root is root:
                each.module.dilated_visible = row.visible or ONE_SEGMENT  # type: ignore[assignment] # Module takes tensors and modules only, by its types
        root.set_attn_implementation(register_modules())


def _table(rows: tuple[ReplacedModule, ...]) -> str:
    lines = [("module", "kind", "replaced", "by, or why not")]
    lines += [
        (
            x.name or "(the model)",
            x.kind,
            "yes" if x.visible else "no",
            repr(x.visible) if x.visible else x.why_not,
        )
        for x in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(x.ljust(w) for x, w in zip(line[:3], widths, strict=True)), line[3]])
        for line in lines
    )
