"""`dilated generate`: continue prompts."""

import codecs
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dilated_factory.cli.options import Device, unit
from dilated_factory.corpora.tokens import Tokenizer
from dilated_factory.errors import InputError
from dilated_factory.models.generation import stream_texts
from dilated_factory.training.loop import select_device
from dilated_factory.training.trained import load_trained


def generate(
    run: Annotated[Path, typer.Argument(help="Run folder of `dilated train`.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help='Text to continue; again for more; "import " without any.'),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="File to continue; again for more.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=0, max=2**24, help="Bytes to add, at most.")] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends a continuation and is not printed; again for more."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among the k likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the likeliest tokens of this probability together."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "cpu",
) -> int:
    """Continue prompts; print prompts and continuations as they come.

    Several prompts go through the model together and are printed one after the other. How fast it
    was goes to stderr. Bytes that are not UTF-8 are printed as the replacement character. With a
    tokenizer a continuation is over where the model ends the document.

    Examples:
        dilated generate runs/longnet --prompt "def main("
        dilated generate runs/longnet --prompt "class A" --stop "class " --top-p 0.9
        dilated generate runs/longnet --max-bytes 1000 --temperature 0.5 --top-k 40
    """
    prompts = [text.encode("utf-8", "surrogateescape") for text in prompt or ()]
    prompts += [content_of(path) for path in prompt_file or ()]
    prompts = prompts or [b"import "]
    stops = [text.encode("utf-8", "surrogateescape") for text in stop or ()]
    for name, given in (("'--prompt'", prompts), ("'--stop'", stops)):
        if not all(given):
            raise typer.BadParameter("must hold at least one byte", param_hint=name)
    trained = load_trained(run, device=select_device(device))
    tokenizer = trained.tokenizer
    warn_of_changes(prompts, tokenizer)
    texts = [Continuation(start, stops) for start in prompts]
    started = time.perf_counter()
    steps = stream_texts(
        trained.model, prompts, max_bytes=max_bytes, tokenizer=tokenizer, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    times = []
    for step in steps:
        times.append(time.perf_counter())
        for text, added in zip(texts, step, strict=True):
            text.add(added)
        show(texts)
        if all(text.over for text in texts):
            break
    for text in texts:
        text.end()
    show(texts)
    sys.stdout.flush()
    if len(times) > 1:
        rate = (len(times) - 1) * len(texts) / (times[-1] - times[0])
        speed = f"{rate:,.0f} {unit(trained.run.config)}/s"
        print(f"prompt {times[0] - started:.2f} s, then {speed}", file=sys.stderr)
    return 0


def warn_of_changes(prompts: Sequence[bytes], tokenizer: Tokenizer) -> None:
    """Say what a model reads where that is not the prompt."""
    for prompt, ids in zip(prompts, tokenizer.encode(prompts), strict=True):
        if ids and (read := tokenizer.decode(ids)) != prompt:
            shown = printable(read[:200].decode("utf-8", "replace"))
            print(f"warning: the tokenizer makes of a prompt {shown!r}", file=sys.stderr)


def content_of(path: Path) -> bytes:
    """The bytes of a prompt file.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--prompt-file must be a file to read. Got {path}: {error}.") from error
    if not content:
        raise InputError(f"--prompt-file must hold at least one byte. Got {path}, which is empty.")
    return content


class Continuation:
    """A prompt and what was added, as text that a terminal can show.

    Attributes:
        ready: text that is not printed yet.
        over: whether nothing more comes.
    """

    def __init__(self, prompt: bytes, stops: Sequence[bytes]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops, self._held = stops, b""
        self.ready = printable(self._decoder.decode(prompt))
        self.over = False

    def add(self, added: bytes | None) -> None:
        """Take the next bytes, None at the end; what may be the start of a stop is held back."""
        if self.over:
            return
        if added is None:
            self.end()
            return
        self._held += added
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self._held = self._held[: min(ends)]
            self.end()
            return
        longest = max((starts(stop, self._held) for stop in self._stops), default=0)
        cut = len(self._held) - longest
        self.ready += printable(self._decoder.decode(self._held[:cut]))
        self._held = self._held[cut:]

    def end(self) -> None:
        """Give out what was held back; of a character that is not whole, nothing."""
        if not self.over:
            self.over = True
            self.ready += printable(self._decoder.decode(self._held)) + "\n"


def starts(stop: bytes, text: bytes) -> int:
    """How many bytes at the end of a text may be the start of a stop."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def show(texts: Sequence[Continuation]) -> None:
    """Print what is there of the first continuation that is not over, and of those before it."""
    for text in texts:
        if text.ready:
            sys.stdout.write(text.ready)
            sys.stdout.flush()
            text.ready = ""
        if not text.over:
            return


def printable(text: str) -> str:
    """Text that the terminal can show: no control characters, nothing that it cannot encode."""
    safe = "".join(
        char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return safe.encode(encoding, "replace").decode(encoding)
