"""The model of a run: at step 0, in and out of checkpoints, and from another run."""

from collections.abc import Mapping

import torch
from torch import nn

from dilated_factory.configs.models import Parent, TrainConfig
from dilated_factory.corpora.tokens import Bytes, Tokenizer
from dilated_factory.errors import InputError, RunError
from dilated_factory.models.layers import AttentionFactory
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.models.stack import Checkpointing
from dilated_factory.room import require_room
from dilated_factory.training.batches import step_seed
from dilated_factory.training.run_folder import RunFolder

# What `recompute` of a configuration is to the model.
RECOMPUTED: dict[str, Checkpointing] = {
    "none": False,
    "pointwise": "pointwise",
    "feed_forward": "selective",
    "all": True,
}
# What decides the shapes of the weights.
_SHAPES = ("embed_dim", "num_layers", "hidden_dim", "vocab_size", "tie_embeddings")


def require_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise an `InputError` if a tokenizer is not that of a configuration, or does not fit it."""
    if (config.tokenizer is None) != isinstance(tokenizer, Bytes):
        raise InputError(
            "the corpus must be made with the tokenizer of the configuration. "
            f"Got tokenizer={config.tokenizer!r} in the configuration and a corpus of "
            f"{'bytes' if config.tokenizer else 'tokens'}."
        )
    if config.model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"vocab_size must be at least that of the tokenizer ({tokenizer.vocab_size}). "
            f"Got {config.model.vocab_size}."
            if config.tokenizer
            else f"vocab_size must be at least 256 for bytes. Got {config.model.vocab_size}."
        )


def require_heir(config: TrainConfig, parent: Parent) -> None:
    """Refuse a run that cannot begin with the weights of its parent."""
    run = RunFolder.open(parent.run)
    run.at(parent.step)
    there, here = run.config.model, config.model
    differing = [
        f"{name} is {getattr(there, name)!r} there and {getattr(here, name)!r} here"
        for name in _SHAPES
        if getattr(there, name) != getattr(here, name)
    ]
    if differing:
        raise RunError(f"the weights of {parent.run!r} do not fit: {'; '.join(differing)}.")


def require_room_for(config: TrainConfig) -> None:
    """Raise an `InputError` if the model or a batch does not fit into memory."""
    shape = config.model
    layer = 2 * shape.embed_dim * (2 * shape.embed_dim + shape.hidden_dim)
    require_room("the model", 4 * (shape.num_layers * layer + shape.vocab_size * shape.embed_dim))
    require_room("a batch", 8 * config.batch_size * (shape.context + 1))


def initial_model(config: TrainConfig, attention: AttentionFactory | None = None) -> LongNetLM:
    """The model at step 0, on the CPU: the seed alone decides its weights.

    Raises:
        InputError: as `require_room_for`.
    """
    require_room_for(config)
    with torch.random.fork_rng([]):
        torch.manual_seed(step_seed(config.seed, 0, "weights"))
        return LongNetLM(config.model, attention=attention)


def _is_tied(model: nn.Module) -> bool:
    # Other models, of a trainer's own, may have a head of that name which is not tied.
    return isinstance(model, LongNetLM) and model.config.tie_embeddings


def model_tensors(model: LongNetLM) -> dict[str, torch.Tensor]:
    """The state of a model by name, with a tied head left out: files hold each tensor once."""
    tensors = model.state_dict()
    if _is_tied(model):
        del tensors["head.weight"]
    return tensors


def load_model(model: LongNetLM, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the weights of a checkpoint into a model of the same configuration."""
    tensors = dict(tensors)
    if _is_tied(model) and "embedding.weight" in tensors:
        tensors["head.weight"] = tensors["embedding.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"the checkpoint does not fit its configuration: {reason}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(f"the weights of the checkpoint must be finite. Got others in {name}.")
