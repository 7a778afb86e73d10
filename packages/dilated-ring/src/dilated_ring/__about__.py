"""The version of dilated-ring."""

__version__ = "0.1.0"
