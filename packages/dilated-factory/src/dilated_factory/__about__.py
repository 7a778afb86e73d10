"""The version of dilated-factory."""

__version__ = "0.1.0"
