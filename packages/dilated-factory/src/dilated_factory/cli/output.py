"""Where commands print: plain text, so that brackets in paths and samples stay as they are."""

from rich.console import Console


def plain_console() -> Console:
    """A console that neither reads markup nor colours what looks like a number."""
    return Console(markup=False, highlight=False)


def silent_console() -> Console:
    """A console that prints nothing: that of all processes but the first."""
    return Console(quiet=True)
