"""`dilated tokenize`: learn a tokenizer from a corpus."""

from pathlib import Path
from typing import Annotated

import typer

from dilated_factory.cli.display import file_size, progress_bar
from dilated_factory.cli.options import Cache
from dilated_factory.cli.output import plain_console
from dilated_factory.corpora.tokens import LEAST_VOCABULARY, MOST_TOKENS
from dilated_factory.training.atomic import require_file_name, write_text
from dilated_factory.training.learning_tokens import learn_tokenizer


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
    text_field: Annotated[
        str | None,
        typer.Option(
            help="Documents are this field of JSON lines, Parquet and Arrow.", show_default=False
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Glob of files to read.", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob of files not to read.", show_default=False)
    ] = None,
    cache: Cache = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tokenizer.json"),
) -> int:
    """Learn a byte-level BPE tokenizer, for `dilated train --tokenizer`.

    Any bytes can be written in its tokens, and come back. The files that `dilated train` would hold
    out are not learned from. The same files give the same tokenizer.

    Examples:
        dilated tokenize corpus --vocab-size 8192 --out tokenizer.json
        dilated tokenize rows/ --text-field text --vocab-size 8192
        dilated train corpus --tokenizer tokenizer.json --out runs/tokens
    """
    require_file_name(out)
    with progress_bar() as show:
        learned = learn_tokenizer(
            *(paths, vocab_size),
            on_progress=show,
            text_field=text_field,
            include=include or (),
            exclude=exclude or (),
            cache=cache,
        )
    write_text(out, learned.text)
    plain_console().print(
        f"written: {out}, {vocab_size:,} tokens from {file_size(learned.bytes_read)}",
        soft_wrap=True,
    )
    return 0
