"""The `dilated` command line.

Exit codes: 0 done; 1 the answer is bad news (the demo missed its margin, something does not work);
2 the input cannot be used; 129, 130 and 143 stopped by SIGHUP, Ctrl-C and SIGTERM, after saving.
"""

import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

from dilated_factory.errors import InputError
from dilated_factory.room import keep_freed_memory, wait_asleep_soon

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. Mistakes of the user are one line on stderr."""
    if arguments is None:
        keep_freed_memory()
        wait_asleep_soon()
        warnings.showwarning = _tell_warning
    import typer

    from dilated_factory.cli.app import app

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        result = command.main(arguments or ["--help"], prog_name="dilated", standalone_mode=False)
    except InputError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("dilated: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        return _complain(_describe_file(error, arguments))
    except Exception as error:
        # Usage errors: their class lives in click or inside typer, depending on typer's version.
        if hasattr(error, "format_message"):
            return _complain(error.format_message())
        if _is_too_large(error):
            return _complain(f"the sizes do not fit into memory: {error}")
        invalid = _describe_validation(error)
        if invalid is None:
            raise
        return _complain(invalid)
    return result if isinstance(result, int) else 0


def _is_too_large(error: Exception) -> bool:
    """Whether an allocator, or a conversion to what tensors count in, gave up."""
    if isinstance(error, MemoryError | OverflowError):
        return True
    said = ("allocate memory", "out of memory", "Overflow", "overflow", "invalid buffer size")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def _describe_validation(error: Exception) -> str | None:
    # Imported here: the help needs neither pydantic nor torch.
    from pydantic import ValidationError

    from dilated_factory.configs.base import describe_invalid

    return describe_invalid(error) if isinstance(error, ValidationError) else None


def _describe_file(error: OSError, arguments: Sequence[str]) -> str:
    """What is wrong with which file, and the option that named it, if one did."""
    if error.filename is None or error.strerror is None:
        return str(error)
    name = str(error.filename)
    apart = [part for argument in arguments for part in argument.split("=", 1)]
    options = (a for a, b in pairwise(apart) if b == name and a.startswith("--"))
    return f"{next(options, 'the file')} {name!r} cannot be used: {error.strerror}."


def _complain(message: str) -> int:
    print(f"dilated: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, as errors are, without the place in our code that warns."""
    print(f"dilated: warning: {' '.join(str(message).split())}", file=file or sys.stderr)
