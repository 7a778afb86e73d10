"""LongNet models, configurations, training and the `dilated` command line."""

from dilated_factory.__about__ import __version__
from dilated_factory.config import LongNetConfig, TrainConfig
from dilated_factory.errors import CorpusError, InputError, RunError
from dilated_factory.longnet import LongNetLM

__all__ = [
    "CorpusError",
    "InputError",
    "LongNetConfig",
    "LongNetLM",
    "RunError",
    "TrainConfig",
    "__version__",
]
