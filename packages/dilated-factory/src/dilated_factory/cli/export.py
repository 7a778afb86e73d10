"""`dilated export`: a trained model for other libraries."""

from pathlib import Path
from typing import Annotated

import typer

from dilated_factory.cli.options import Best
from dilated_factory.corpora.tokens import FILE, Bytes
from dilated_factory.interop import export_to_transformers
from dilated_factory.training.trained import load_trained


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `dilated train`.")],
    to: Annotated[Path, typer.Option(help="New folder to write.")],
    best: Best = False,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Also write code for trust_remote_code=True; it imports dilated_factory.",
        ),
    ] = False,
) -> int:
    """Write a trained model as a folder that Hugging Face transformers loads.

    The folder gets config.json, generation_config.json, model.safetensors and the tokenizer: that
    of the run, or one whose tokens are bytes. It is complete or absent. In Python, AutoConfig,
    AutoModelForCausalLM and AutoTokenizer load it after one call,
    `dilated_factory.interop.transformers.register_longnet()`.

    Examples:
        dilated export runs/longnet --to exported
        dilated export runs/longnet --to exported --best --remote-code
    """
    trained = load_trained(run, best=best)
    is_of_bytes = isinstance(trained.tokenizer, Bytes)
    tokenizer = None if is_of_bytes else trained.run.path / FILE
    export_to_transformers(trained.model, to, tokenizer=tokenizer, remote_code=remote_code)
    print(f"step {trained.state.step} of {run} as {to}")
    return 0
