"""Block layouts and block-sparse attention (not there yet)."""

from dilated_sparse.__about__ import __version__

__all__ = ["__version__"]
