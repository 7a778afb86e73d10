"""The version of dilated-core."""

__version__ = "0.1.0"
