"""Where the settings of a new run come from: a file, another run, and what is to be different."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilated_factory.configs.files import read_values
from dilated_factory.configs.models import READING, LongNetConfig, Parent
from dilated_factory.configs.pattern import default_pattern
from dilated_factory.corpora.tokens import load_tokenizer, rounded
from dilated_factory.errors import InputError
from dilated_factory.training.run_folder import RunFolder

_PATTERN = ("segment_lengths", "dilation_rates")
_DURATION = ("steps", "minutes")


def values_in(file: Path) -> dict[str, Any]:
    """The settings of a run in a TOML or JSON file; relative paths are from its folder.

    Raises:
        InputError: the file is not what its name's ending says, or of another kind.
        OSError: it cannot be read.
    """
    values = read_values(file)
    kind = values.setdefault("kind", "train")
    if kind != "train":
        raise InputError(f"{str(file)!r} must be of kind 'train'. Got {kind!r}.")
    for name in ("paths", "validation"):
        paths = values.get(name, ())
        if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
            raise InputError(f"{name} must be a list of strings. Got {paths!r}.")
        # Absolute, so that a run can be resumed and evaluated from another folder.
        values[name] = tuple(str((file.parent / path).resolve()) for path in paths)
    if isinstance(values.get("tokenizer"), str):
        values["tokenizer"] = str((file.parent / values["tokenizer"]).resolve())
    return values


def child_of(path: Path) -> dict[str, Any]:
    """The settings of a run that goes on from another's newest checkpoint.

    Its batches are others: its seed is the next one. It does not begin with short sequences again.

    Raises:
        RunError: there is no run folder, or no checkpoint in it.
    """
    run = RunFolder.open(path)
    _, state = run.newest()
    values = run.config.model_dump(exclude_none=True, exclude={"short_context", "short_share"})
    if run.config.tokenizer is not None:
        values["tokenizer"] = str(path.resolve())  # the original may be gone
    return values | {
        "seed": (run.config.seed + 1) % 2**63,
        "parent": Parent(run=str(path.resolve()), step=state.step).model_dump(),
    }


def changed(
    values: Mapping[str, Any], training: Mapping[str, Any], shape: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings with some changed.

    One duration takes the place of the other. Another context has its own default pattern, unless
    the settings had a pattern of their own. Where another run's paths give way, so does how they
    were read: globs, fields and what was held out are of those files.
    """
    base = dict(values)
    if "paths" in training and "parent" in base:
        base = {name: value for name, value in base.items() if name not in READING}
    if set(_DURATION) & training.keys():
        base = {name: value for name, value in base.items() if name not in _DURATION}
    model = base.get("model", {})
    if not isinstance(model, Mapping):
        raise InputError(f"model must be a table. Got {model!r}.")
    model = dict(model)
    if "context" in shape and _is_default(model):
        model = {name: value for name, value in model.items() if name not in _PATTERN}
    model |= dict(shape)
    base |= dict(training)
    if isinstance(base.get("tokenizer"), str) and "vocab_size" not in model:
        model["vocab_size"] = rounded(load_tokenizer(base["tokenizer"]).vocab_size)
    return base | {"model": model}


def _is_default(model: Mapping[str, Any]) -> bool:
    context = model.get("context", LongNetConfig.model_fields["context"].default)
    if not isinstance(context, int) or context < 1:
        return False  # the configuration says so
    expected = default_pattern(context)
    return all(tuple(model.get(name, ())) == getattr(expected, name) for name in _PATTERN)
