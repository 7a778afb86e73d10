"""LongNet models, a registry of attention, configurations, training and the command line.

Modules are imported when a name of theirs is first used, so the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dilated_factory.__about__ import __version__
from dilated_factory.errors import (
    CorpusError,
    InputError,
    MissingPackageError,
    RunError,
)

if TYPE_CHECKING:
    from dilated_factory.configs.attention import (
        AttentionConfig,
        AutoConfig,
        BlockSparseConfig,
        BlockSparseDilatedConfig,
        BlockSparseRingConfig,
        BlockSparseRingDistributedConfig,
        DilatedConfig,
        MultiheadConfig,
        RingConfig,
        RingMultiheadConfig,
    )
    from dilated_factory.configs.files import to_toml
    from dilated_factory.configs.genomes import GenomeConfig
    from dilated_factory.configs.kinds import parse_any, read_config
    from dilated_factory.configs.models import LongNetConfig, LongNetEncoderConfig, TrainConfig
    from dilated_factory.configs.pattern import default_pattern
    from dilated_factory.configs.pool import PoolConfig, create_pool
    from dilated_factory.configs.slides import SlideEncoderConfig
    from dilated_factory.corpora.tokens import load_tokenizer
    from dilated_factory.genomes.dataset import GenomeDataset
    from dilated_factory.genomes.embedding import embed_intervals
    from dilated_factory.genomes.fasta import Genome
    from dilated_factory.genomes.intervals import GenomeWindows, read_bed
    from dilated_factory.genomes.training import GenomeTrainer, evaluate_genome, load_genome
    from dilated_factory.interop import export_to_transformers, register_with_transformers
    from dilated_factory.interop.classifier import (
        SlideClassifier,
        parameter_groups,
        save_gigapath,
    )
    from dilated_factory.interop.gigapath import SlideEncoder
    from dilated_factory.interop.over_ranks import shard_for_transformers
    from dilated_factory.interop.replacing import Replaced, ReplacedModule, replace_attention
    from dilated_factory.interop.torchscale import load_torchscale
    from dilated_factory.kinds.default import default_registry
    from dilated_factory.kinds.registry import Registry, Runtime, create_attention
    from dilated_factory.kinds.selection import Environment, Selection
    from dilated_factory.models.encoder import LongNetEncoder
    from dilated_factory.models.generation import generate, generate_tokens
    from dilated_factory.models.layers import TransformerDecoderLayer, TransformerEncoderLayer
    from dilated_factory.models.longnet import LongNetLM
    from dilated_factory.slides.readers import SlideFeatures, read_slide_features
    from dilated_factory.training.corpus import Corpus, load_corpus
    from dilated_factory.training.learning_tokens import learn_tokenizer
    from dilated_factory.training.loop import StepMetrics, Trainer
    from dilated_factory.training.running import train
    from dilated_factory.training.trained import (
        Evaluation,
        TrainedModel,
        evaluate_run,
        load_trained,
    )

__all__ = [
    "AttentionConfig",
    "AutoConfig",
    "BlockSparseConfig",
    "BlockSparseDilatedConfig",
    "BlockSparseRingConfig",
    "BlockSparseRingDistributedConfig",
    "Corpus",
    "CorpusError",
    "DilatedConfig",
    "Environment",
    "Evaluation",
    "Genome",
    "GenomeConfig",
    "GenomeDataset",
    "GenomeTrainer",
    "GenomeWindows",
    "InputError",
    "LongNetConfig",
    "LongNetEncoder",
    "LongNetEncoderConfig",
    "LongNetLM",
    "MissingPackageError",
    "MultiheadConfig",
    "PoolConfig",
    "Registry",
    "Replaced",
    "ReplacedModule",
    "RingConfig",
    "RingMultiheadConfig",
    "RunError",
    "Runtime",
    "Selection",
    "SlideClassifier",
    "SlideEncoder",
    "SlideEncoderConfig",
    "SlideFeatures",
    "StepMetrics",
    "TrainConfig",
    "TrainedModel",
    "Trainer",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "__version__",
    "create_attention",
    "create_pool",
    "default_pattern",
    "default_registry",
    "embed_intervals",
    "evaluate_genome",
    "evaluate_run",
    "export_to_transformers",
    "generate",
    "generate_tokens",
    "learn_tokenizer",
    "load_corpus",
    "load_genome",
    "load_tokenizer",
    "load_torchscale",
    "load_trained",
    "parameter_groups",
    "parse_any",
    "read_bed",
    "read_config",
    "read_slide_features",
    "register_with_transformers",
    "replace_attention",
    "save_gigapath",
    "shard_for_transformers",
    "to_toml",
    "train",
]

# The module of each name that is not here yet.
_HOMES = {
    "GenomeConfig": "configs.genomes",
    "GenomeDataset": "genomes.dataset",
    "embed_intervals": "genomes.embedding",
    "Genome": "genomes.fasta",
    "GenomeWindows": "genomes.intervals",
    "read_bed": "genomes.intervals",
    "GenomeTrainer": "genomes.training",
    "evaluate_genome": "genomes.training",
    "load_genome": "genomes.training",
    "default_registry": "kinds.default",
    "LongNetConfig": "configs.models",
    "LongNetEncoderConfig": "configs.models",
    "TrainConfig": "configs.models",
    "AttentionConfig": "configs.attention",
    "AutoConfig": "configs.attention",
    "BlockSparseConfig": "configs.attention",
    "BlockSparseDilatedConfig": "configs.attention",
    "BlockSparseRingConfig": "configs.attention",
    "BlockSparseRingDistributedConfig": "configs.attention",
    "DilatedConfig": "configs.attention",
    "MultiheadConfig": "configs.attention",
    "RingConfig": "configs.attention",
    "RingMultiheadConfig": "configs.attention",
    "to_toml": "configs.files",
    "parse_any": "configs.kinds",
    "read_config": "configs.kinds",
    "default_pattern": "configs.pattern",
    "PoolConfig": "configs.pool",
    "create_pool": "configs.pool",
    "LongNetEncoder": "models.encoder",
    "generate": "models.generation",
    "generate_tokens": "models.generation",
    "export_to_transformers": "interop",
    "register_with_transformers": "interop",
    "shard_for_transformers": "interop.over_ranks",
    "Replaced": "interop.replacing",
    "ReplacedModule": "interop.replacing",
    "replace_attention": "interop.replacing",
    "SlideClassifier": "interop.classifier",
    "parameter_groups": "interop.classifier",
    "save_gigapath": "interop.classifier",
    "SlideEncoder": "interop.gigapath",
    "SlideEncoderConfig": "configs.slides",
    "load_torchscale": "interop.torchscale",
    "TransformerDecoderLayer": "models.layers",
    "TransformerEncoderLayer": "models.layers",
    "LongNetLM": "models.longnet",
    "SlideFeatures": "slides.readers",
    "read_slide_features": "slides.readers",
    "Registry": "kinds.registry",
    "Runtime": "kinds.registry",
    "create_attention": "kinds.registry",
    "Environment": "kinds.selection",
    "Selection": "kinds.selection",
    "Corpus": "training.corpus",
    "load_corpus": "training.corpus",
    "load_tokenizer": "corpora.tokens",
    "learn_tokenizer": "training.learning_tokens",
    "StepMetrics": "training.loop",
    "Trainer": "training.loop",
    "train": "training.running",
    "Evaluation": "training.trained",
    "TrainedModel": "training.trained",
    "evaluate_run": "training.trained",
    "load_trained": "training.trained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
