"""Options that several commands share, and parsers of their values."""

from pathlib import Path
from typing import Annotated

import typer

from dilated_factory.configs.models import StackConfig, TrainConfig
from dilated_factory.configs.pattern import sight
from dilated_factory.errors import InputError
from dilated_factory.training.compiling import Compile

Device = Annotated[
    str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...", show_default=True)
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the tokens of a corpus, made once; default $XDG_CACHE_HOME/dilated or "
        "~/.cache/dilated.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Best = Annotated[
    bool, typer.Option("--best", help="Take the checkpoint of the least validation loss.")
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on from the newest checkpoint in --out, with its settings."),
]
Compiling = Annotated[
    Compile, typer.Option("--compile", help="torch.compile for the blocks; auto: on CUDA.")
]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
# Beyond these no machine goes, and products of them leave what tensors count in.
MOST_POSITIONS, MOST_HEADS, MOST_WIDTH, MOST_SEQUENCES = 2**40, 2**16, 2**20, 2**32


def parse_lengths(option: str, text: str | None) -> tuple[int, ...] | None:
    """Parse "256,1024" into (256, 1024); None stays None.

    Raises:
        InputError: a part is not a positive whole number.
    """
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1 or max(values) >= 2**63:
        raise InputError(
            f"{option} must be positive whole numbers separated by commas, below 2**63. "
            f"Got {_shown(text)!r}."
        )
    return values


def unit(config: TrainConfig) -> str:
    """What the contexts of a run are counted in."""
    return "bytes" if config.tokenizer is None else "tokens"


def sight_warning(model: StackConfig, context: int, units: str = "bytes") -> str | None:
    """What to tell of a pattern that does not reach over a context; None if it does."""
    seen = sight(model.pattern, model.num_layers)
    if seen >= context:
        return None
    return (
        f"warning: with these segments {model.num_layers} layers see {seen:,} {units} at most, of "
        f"a context of {context:,}; without --segment-lengths and --dilation-rates a new run sees "
        "all"
    )


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."
