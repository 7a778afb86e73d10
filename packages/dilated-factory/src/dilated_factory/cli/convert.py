"""`dilated convert`: a checkpoint of torchscale's recipe for fairseq as a run folder."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dilated_factory.cli.output import plain_console
from dilated_factory.cli.train import DEFAULT_MINUTES
from dilated_factory.configs.kinds import read_config
from dilated_factory.configs.models import LongNetConfig, TrainConfig
from dilated_factory.corpora.tokens import FILE, FileTokenizer
from dilated_factory.errors import InputError
from dilated_factory.interop.fairseq import dictionary_tokenizer, load_fairseq, read_dictionary
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.slides.models import loaded
from dilated_factory.training.checkpoints import RunState
from dilated_factory.training.run_folder import NO_CORPUS, RunFolder
from dilated_factory.training.weights import model_tensors


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of fairseq (.pt), or tensors (.safetensors).")
    ],
    to: Annotated[Path, typer.Option(help="Run folder; must be new.")],
    dictionary: Annotated[Path, typer.Option(help="The dict.txt that the model was trained with.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="A longnet in JSON or TOML, for what the checkpoint does not tell.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Make a run folder of a checkpoint of torchscale's LongNet recipe for fairseq.

    Its shape is told by the tensors and by the settings beside them, of which no code is run. The
    dictionary becomes the folder's tokenizer: words between white space, and `</s>` at the end of a
    line, so texts have to be of words as the corpus of the training was. State of the optimizer is
    not taken over, and dropout is none until it is given.

    Examples:
        dilated convert best.pt --dictionary dict.txt --to runs/theirs
        dilated evaluate runs/theirs words.txt
        dilated train words.txt --from runs/theirs --out runs/ours --steps 1000
    """
    RunFolder.require_new(to)
    given = None if config is None else read_config(config)
    if not isinstance(given, LongNetConfig | None):
        raise InputError(f"--config must hold a longnet. Got kind {type(given).__name__}.")
    words = read_dictionary(dictionary)
    model = loaded(lambda path: load_fairseq(path, given), checkpoint)
    if len(words) != model.config.vocab_size:
        raise InputError(
            f"{str(dictionary)!r} must hold the words of the checkpoint, "
            f"{model.config.vocab_size} with 4 special ones. Got {len(words)}."
        )
    write_run(to, model, words)
    count = sum(parameter.numel() for parameter in model.parameters())
    shape = model.config
    plain_console().print(
        f"{count:,} parameters, {len(words):,} words, context {shape.context:,}, "
        f"{shape.positions} positions: {to}",
        soft_wrap=True,
    )
    return 0


def write_run(to: Path, model: LongNetLM, words: list[str]) -> None:
    """A run folder at step 0 that has learned nothing of its own yet."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        file.write_text(json.dumps(dictionary_tokenizer(words), ensure_ascii=False), "utf-8")
        tokenizer = FileTokenizer(file)
    own = str(to.resolve())
    config = TrainConfig(model=model.config, minutes=DEFAULT_MINUTES, tokenizer=own)
    state = RunState(step=0, elapsed_seconds=0.0, corpus_digest=NO_CORPUS)
    # With its checkpoint from the first: without one it would be a run that begins anew.
    RunFolder.create(
        to, config, tokenizer, complete=lambda run: run.save(model_tensors(model), {}, state)
    )
