"""The version of dilated-pool."""

__version__ = "0.1.0"
