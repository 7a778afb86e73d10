"""Who called the pool."""

import sys
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


def caller() -> str:
    """The file, line and function of the innermost call from outside this package."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"


def stack() -> tuple[str, ...]:
    """The calls that lead here from outside this package, outermost first."""
    frames = traceback.extract_stack()
    return tuple(
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in frames
        if not frame.filename.startswith(_PACKAGE)
    )
