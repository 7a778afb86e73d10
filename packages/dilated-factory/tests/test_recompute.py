"""Activation checkpointing: the same gradients from less saved memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_core import DilatedAttention
from dilated_factory import LongNetConfig, LongNetEncoder, LongNetEncoderConfig, LongNetLM
from dilated_factory.models.stack import Checkpointing

SHAPE: dict[str, Any] = {
    "embed_dim": 32,
    "num_heads": 4,
    "num_layers": 5,
    "segment_lengths": (5, 12, 40),
    "dilation_rates": (1, 2, 3),
    "context": 37,
    "dropout": 0.2,
    "vocab_size": 23,
}
TOKENS = torch.randint(23, (2, 41), generator=torch.Generator().manual_seed(0))


def language_model(frugal: Checkpointing) -> tuple[LongNetLM, Callable[[], Tensor]]:
    model = LongNetLM(LongNetConfig(**SHAPE), activation_checkpointing=frugal)
    return model, lambda: model.loss(TOKENS)


def encoder(frugal: Checkpointing) -> tuple[LongNetEncoder, Callable[[], Tensor]]:
    config = LongNetEncoderConfig(**SHAPE)
    model = LongNetEncoder(
        config,
        activation_checkpointing=frugal,
        attention=lambda: DilatedAttention(config.pattern, dropout=0.3),
    )
    mask = torch.arange(41).expand(2, -1) > 33
    upstream = torch.randn(2, 41, 32, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        total: Tensor = (model(TOKENS, key_padding_mask=mask) * upstream).sum()
        return total

    return model, loss


# A layer keeps its input instead of about ten tensors of that size and four times that, most of
# which are inside the feed-forward part.
@pytest.mark.parametrize(
    ("checkpointing", "share"), [(True, 0.2), ("selective", 0.5), ("pointwise", 0.9)]
)
@pytest.mark.parametrize("build", [language_model, encoder])
def test_gradients_are_equal_and_saved_memory_is_not(
    build: Callable[[Checkpointing], Any], checkpointing: Checkpointing, share: float
) -> None:
    gradients, saved = [], []
    choices: tuple[Checkpointing, ...] = (False, checkpointing)
    for frugal in choices:
        torch.manual_seed(1)
        model, loss = build(frugal)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = loss()
        saved.append(sum(kept.values()))
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert saved[1] < share * saved[0]
