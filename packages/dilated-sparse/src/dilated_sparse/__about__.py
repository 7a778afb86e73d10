"""The version of dilated-sparse."""

__version__ = "0.1.0"
