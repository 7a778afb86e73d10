"""A model that is not ours in our trainer: locks, checkpoints, exact resume, schedule, metrics.

    python examples/own_model.py

`Trainer.make_model` says what a model needs: `loss` and `blocks`. Here it is torch's own
nn.TransformerEncoder, and its attention is replaced. `dilated evaluate` and `dilated generate`
read LongNetLM alone, so such a run is evaluated by its own code.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_core import DilatedPattern
from dilated_factory import LongNetConfig, TrainConfig, Trainer, load_corpus, replace_attention


class OwnModel(nn.Module):
    """A causal model over bytes, of torch's layers."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        width, heads = config.embed_dim, config.num_heads
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.places = nn.Embedding(config.context, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        replace_attention(encoder, DilatedPattern([32, 128], [1, 4]))
        self.blocks = encoder.layers
        self.head = nn.Linear(width, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) to logits (B, N, vocabulary)."""
        x = self.embedding(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=True)  # no mask of N x N
        return self.head(x)

    def loss(self, tokens: Tensor, targets: Tensor, **_: object) -> Tensor:
        """Mean over the targets; positions and documents are of no use to this model."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


class OwnTrainer(Trainer):
    """Our trainer with that model."""

    def make_model(self) -> nn.Module:
        """Weights that the seed decides."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.run.config.seed)
            return OwnModel(self.run.config.model)


with tempfile.TemporaryDirectory() as folder:
    text = Path(folder) / "text"
    text.write_bytes(b"It was the best of times, it was the worst of times. " * 200)
    shape = LongNetConfig(embed_dim=32, num_heads=4, num_layers=2, context=128)
    config = TrainConfig(model=shape, paths=(str(text),), steps=20, batch_size=4, seed=1)
    corpus = load_corpus(config.paths, validation_fraction=config.validation_fraction)

    losses: list[float] = []
    trainer = OwnTrainer.start(f"{folder}/run", config, corpus)
    trainer.train(
        on_step=lambda step: losses.append(step.loss), should_stop=lambda: len(losses) == 10
    )

    # Another process would go on like this.
    again = OwnTrainer(trainer.run, corpus)
    again.restore()
    again.train(on_step=lambda step: losses.append(step.loss))
    print(f"stopped at 10 and resumed: {losses[0]:.3f} to {losses[-1]:.3f} nats per byte")

    straight: list[float] = []
    OwnTrainer.start(f"{folder}/straight", config, corpus).train(
        on_step=lambda step: straight.append(step.loss)
    )
    print(f"never stopped:             {straight[0]:.3f} to {straight[-1]:.3f} nats per byte")
    assert losses == straight
    assert losses[-1] < losses[0] / 2
