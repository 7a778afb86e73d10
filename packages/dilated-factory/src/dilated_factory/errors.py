"""Errors for input that cannot be used: one line and exit code 2 on the command line."""


class InputError(ValueError):
    """Something the caller gave cannot be used; the message names it and what is required."""


class CorpusError(InputError):
    """The given files cannot serve as a corpus."""


class RunError(InputError):
    """A run folder is missing, in the way, damaged, or from another configuration."""
