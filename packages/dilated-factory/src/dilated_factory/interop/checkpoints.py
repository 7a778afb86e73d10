"""Reading checkpoints of other projects, without running anything that is in them."""

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

StateDict: TypeAlias = Mapping[str, Any]
Source: TypeAlias = StateDict | str | PathLike[str]
Model = TypeVar("Model", bound=nn.Module)

# Where tensors lie in a file: fairseq's and GigaPath's key, then Lightning's.
_NESTS = ("model", "state_dict")
# Settings that trainers pickle beside the weights are of classes in here. What stands for them is
# inert: nothing of these modules is imported.
_SETTINGS = ("argparse.", "omegaconf.", "fairseq.", "typing.", "enum.")
MOST_NAMES = 10
MOST_LETTERS = 120


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by their names.
        settings: the trainer's settings of the model beside them, empty where there are none.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]


class Inert:
    """What stands for an object of a trainer's settings: its attributes, and none of its code."""

    def __init__(self, *_: object) -> None:
        pass


def read_checkpoint(source: Source) -> Weights:
    """The named tensors of a state dict, of a ``.safetensors`` file, or of one of ``torch.save``.

    A ``torch.save`` file is read with ``weights_only=True``; of settings beside the weights, their
    data alone. Where the tensors lie under "model" (fairseq, GigaPath) or "state_dict" (Lightning),
    what is there is taken.

    Raises:
        ValueError: something else than named tensors.
        pickle.UnpicklingError: a file of ``torch.save`` that holds more than data.
    """
    content: object = source
    if isinstance(source, str | PathLike):
        if Path(source).suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(source)
        else:
            content = load_plain(source, lambda n: Inert if n.startswith(_SETTINGS) else None)
    settings: dict[str, Any] = {}
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            settings = _settings(content)
            content = content[nest]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"a checkpoint must hold named tensors. Got {type(content).__name__}.")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                "a checkpoint must hold named tensors only. "
                f"Got {type(tensor).__name__} under {name!r}."
            )
    return Weights(dict(content), settings)


def load_plain(
    path: str | PathLike[str],
    stand_in: Callable[[str], Any],
    also: Sequence[type] = (),
    **options: Any,
) -> object:
    """What a file of ``torch.save`` holds, where that is tensors, plain data, and what is known.

    Args:
        path: the file.
        stand_in: what stands for a class or a function that the file names, or None.
        also: classes of what stands, which the file does not name.
        options: of torch.load.

    Raises:
        pickle.UnpicklingError: the file holds something else, or is damaged.
    """
    options = {"map_location": "cpu", "weights_only": True, **options}
    try:
        return _unpickled(path, options)
    except pickle.UnpicklingError:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # an older format, or none
            names = []
        found = {name: stand_in(name) for name in names}
        if not found or None in found.values():
            raise
    with torch.serialization.safe_globals([*also, *((known, n) for n, known in found.items())]):
        return _unpickled(path, options)


def _unpickled(path: str | PathLike[str], options: dict[str, Any]) -> object:
    try:
        return torch.load(path, **options)
    except (OSError, MemoryError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise
    except Exception as error:  # torch's reader takes any file for a program of its own
        raise pickle.UnpicklingError(f"{str(path)!r} is damaged, or no such file.") from error


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's settings of the model: under "cfg" and "model", or in older files under "args"."""
    found = content.get("cfg")
    found = _plain(found).get("model") if found is not None else content.get("args")
    return _plain(found)


def _plain(value: object) -> dict[str, Any]:
    value = vars(value) if isinstance(value, Inert) else value
    inside = value.get("_content", value) if isinstance(value, Mapping) else {}
    if not isinstance(inside, Mapping):
        return {}
    # omegaconf wraps each value in a node.
    return {
        str(key): vars(item).get("_val", item) if isinstance(item, Inert) else item
        for key, item in inside.items()
    }


class Naming(NamedTuple):
    """What a checkpoint calls the entries of a model's state dict.

    Attributes:
        names: by our names.
        prefix: what stands before the checkpoint's names, as wrappers and trainers add it.
    """

    names: dict[str, str]
    prefix: str

    @classmethod
    def of(cls, state: StateDict, schemes: list[dict[str, str]]) -> "Naming":
        """The scheme, and the prefix, that fit most tensors of a checkpoint."""
        found = [cls(schemes[0], "")]
        best = sum(name in state for name in schemes[0].values())
        for names in schemes:
            prefixes = Counter(
                name.removesuffix(known)
                for name in state
                for known in _ends(name, set(names.values()))
            )
            for prefix, count in sorted(prefixes.items(), key=lambda item: len(item[0])):
                if count > best:
                    best = count
                    found.append(cls(names, prefix))
        return found[-1]

    def part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the prefix, without it; others belong to other modules."""
        return {
            name.removeprefix(self.prefix): tensor
            for name, tensor in state.items()
            if name.startswith(self.prefix)
        }


def _ends(name: str, known: set[str]) -> list[str]:
    """The known names that a name ends with, after a dot or from its beginning."""
    parts = name.split(".")
    return [end for i in range(len(parts)) if (end := ".".join(parts[i:])) in known]


def assign(
    make: Callable[..., Model],
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    strict: bool = True,
    hint: Callable[[Mapping[str, Tensor]], list[str]] = lambda state: [],
) -> Model:
    """A model with copies of a checkpoint's tensors, all in the widest dtype among them.

    Args:
        make: makes the model on a ``device``.
        state: the checkpoint.
        names: the checkpoint's name of each entry of the model's state dict.
        strict: everything must fit. Otherwise what is missing or has another shape starts anew and
            what is left over is left out, with a warning.
        hint: what in the configuration may be wrong, the likeliest first.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape, which lists at most
            ten in under 2,000 characters; or no tensor fits at all.

    Warns:
        UserWarning: without ``strict``, what started anew and what was left out.
    """
    model = make(device="meta")
    expected = model.state_dict()
    known = set(names.values())
    missing = [name for name in dict.fromkeys(names.values()) if name not in state]
    surplus = [name for name in state if name not in known]
    shapes = {
        names[own]: (tuple(tensor.shape), tuple(state[names[own]].shape))
        for own, tensor in expected.items()
        if names[own] in state and state[names[own]].shape != tensor.shape
    }
    problems = [f"missing {_short(name)}" for name in missing]
    problems += [f"unexpected {_short(name)}" for name in surplus]
    problems += [
        f"{name} must have shape {wanted}, got {got}" for name, (wanted, got) in shapes.items()
    ]
    if problems and (strict or len(missing) + len(shapes) == len(set(names.values()))):
        # The rarest kind first: a hundred missing layers must not hide the one wrong shape.
        kinds = ("must", "missing", "unexpected")
        count = {kind: sum(kind in p.split() for p in problems) for kind in kinds}
        problems.sort(key=lambda p: min(count[kind] for kind in kinds if kind in p.split()))
        hints = hint(state)
        raise ValueError(
            "state_dict must hold exactly what the configuration asks for. "
            + (f"Likeliest cause: {'; '.join(hints)}. " if hints else "")
            + f"Got: {listed(problems)}."
        )
    fitting = [own for own in expected if names[own] in state and names[own] not in shapes]
    dtype = torch.float32 if not fitting else state[names[fitting[0]]].dtype
    for own in fitting:
        dtype = torch.promote_types(dtype, state[names[own]].dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"state_dict must hold floating-point tensors. Got {dtype}.")
    # Copies, so that training the model leaves the checkpoint alone.
    copies = {own: state[names[own]].detach().to(dtype, copy=True) for own in fitting}
    if problems:
        model = make(device="cpu", dtype=dtype)
        anew = [*missing, *shapes]
        warnings.warn(
            (f"started anew: {listed(anew)}. " if anew else "")
            + (f"Left out of the checkpoint: {listed(surplus)}." if surplus else ""),
            UserWarning,
            stacklevel=4,
        )
        model.load_state_dict(copies, strict=False)
    else:
        model.load_state_dict(copies, assign=True)
    return model


def listed(items: list[str]) -> str:
    """At most ten of the items, and how many more there are."""
    more = f"; and {len(items) - MOST_NAMES} more" if len(items) > MOST_NAMES else ""
    return "; ".join(items[:MOST_NAMES]) + more


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[:MOST_LETTERS]}..."


def layer_count(state: StateDict, layers: str) -> int:
    """How many layers a checkpoint has, whose names begin with ``layers`` and a number."""
    found = {
        match[1] for name in state if (match := re.match(rf"{re.escape(layers)}(\d+)\.", name))
    }
    return len(found)
