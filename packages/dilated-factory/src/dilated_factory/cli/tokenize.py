"""`dilated tokenize`: learn a tokenizer from a corpus."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dilated_factory.cli.display import file_size, progress_bar, show_readings
from dilated_factory.cli.fields import given_fields, with_fields
from dilated_factory.cli.options import Cache
from dilated_factory.cli.output import plain_console
from dilated_factory.configs.models import READING, TrainConfig, parse_config
from dilated_factory.corpora.tokens import LEAST_VOCABULARY, MOST_TOKENS
from dilated_factory.training.atomic import require_file_name, write_text
from dilated_factory.training.learning_tokens import learn_tokenizer


@with_fields(TrainConfig, but=TrainConfig.model_fields.keys() - set(READING))
def tokenize(
    paths: Annotated[list[str], typer.Argument(help="Files and folders to learn from.")],
    vocab_size: Annotated[
        int,
        typer.Option(
            min=LEAST_VOCABULARY,
            max=MOST_TOKENS,
            help="Tokens, those of the 256 bytes and of the end of a document among them.",
        ),
    ],
    cache: Cache = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tokenizer.json"),
    **fields: Any,
) -> int:
    """Learn a byte-level BPE tokenizer, for `dilated train --tokenizer`.

    Any bytes can be written in its tokens, and come back. What `dilated train` holds out by the
    same options is not learned from. The same files give the same tokenizer.

    Examples:
        dilated tokenize corpus --vocab-size 8192 --out tokenizer.json
        dilated tokenize rows/ --text-field text --vocab-size 8192
        dilated train corpus --tokenizer tokenizer.json --out runs/tokens
    """
    require_file_name(out)
    # A configuration says what does not go together.
    config = parse_config(TrainConfig, {"steps": 1, **given_fields(TrainConfig, fields)})
    options: dict[str, Any] = {name: getattr(config, name) for name in READING}
    with progress_bar() as show:
        learned = learn_tokenizer(paths, vocab_size, on_progress=show, cache=cache, **options)
    write_text(out, learned.text)
    console = plain_console()
    show_readings(console, learned.readings)
    console.print(
        f"written: {out}, {vocab_size:,} tokens from {file_size(learned.bytes_read)}",
        soft_wrap=True,
    )
    return 0
