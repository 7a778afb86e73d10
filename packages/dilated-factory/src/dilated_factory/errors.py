"""Errors for input that cannot be used: one line and exit code 2 on the command line."""

from dilated_factory.installing import how_to_install


class InputError(ValueError):
    """Something the caller gave cannot be used; the message names it and what is required.

    Examples:
        >>> issubclass(InputError, ValueError)
        True
    """


class CorpusError(InputError):
    """The given files cannot serve as a corpus.

    Examples:
        >>> try:
        ...     load_corpus(["missing"])
        ... except CorpusError as error:
        ...     print(error)
        path must be an existing file or folder. Got 'missing'.
    """


class RunError(InputError):
    """A run folder is missing, in the way, damaged, or from another configuration.

    Examples:
        >>> try:
        ...     load_trained("missing")
        ... except RunError as error:
        ...     print(error)
        'missing' is not a run folder: no config.json in it.
    """


class MissingPackageError(InputError, ImportError):
    """Something needs a package that is not installed; the message says how to install it.

    Examples:
        >>> issubclass(MissingPackageError, ImportError)
        True
    """


def missing_package(what: str, *packages: str) -> MissingPackageError:
    """The error for `what`, which needs packages that are not installed."""
    names = " and ".join(packages)
    verb = "is" if len(packages) == 1 else "are"
    return MissingPackageError(
        f"{what} needs {names}, which {verb} not installed: {how_to_install(*packages)}"
    )
