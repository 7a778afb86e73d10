"""A training recipe in one file, to copy and change: a config, data, a loop.

    python examples/recipe.py
    python examples/recipe.py steps=50 learning_rate=1e-3 text=book.txt out=run

Nothing is hidden: where `dilated train` keeps locks, checksums and exact resume, this keeps one
file of weights. Settings are the fields of `Recipe`, changed as key=value.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dilated_factory import LongNetConfig, LongNetLM, generate_tokens


@dataclass(frozen=True)
class Recipe:
    """All settings."""

    text: str = ""  # a file; empty for a sentence over and over
    out: str = ""  # a folder for the weights; empty for none
    context: int = 256
    embed_dim: int = 64
    num_layers: int = 2
    batch: int = 4  # sequences at once
    accumulate: int = 2  # batches of a step
    steps: int = 30
    warmup: int = 5  # steps
    learning_rate: float = 3e-3
    clip: float = 1.0  # largest norm of all gradients
    dtype: str = "float32"  # "bfloat16": mixed precision
    evaluate_every: int = 10  # steps
    seed: int = 0


def read_settings(words: list[str]) -> Recipe:
    """A recipe with the settings of the command line."""
    kinds = {field.name: type(field.default) for field in fields(Recipe)}
    changed = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in kinds:
            sys.exit(f"a setting must be one of {', '.join(kinds)}. Got {name!r}.")
        changed[name] = kinds[name](value)
    return Recipe(**changed)


def read_tokens(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last tenth, which is held out."""
    sentence = b"It was the best of times, it was the worst of times. " * 400
    text = Path(recipe.text).read_bytes() if recipe.text else sentence
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:]


def batches(tokens: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Windows (batch, context + 1) at random places, without end."""
    generator = torch.Generator().manual_seed(recipe.seed)
    window = torch.arange(recipe.context + 1)
    while True:
        places = torch.randint(len(tokens) - recipe.context, (recipe.batch, 1), generator=generator)
        yield tokens[places + window].long()


def learning_rate(recipe: Recipe, step: int) -> float:
    """A ramp, then half a cosine down to a tenth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * share))


@torch.no_grad()
def evaluate(model: LongNetLM, tokens: Tensor, recipe: Recipe) -> float:
    """Bits per byte of held-out text, in whole windows."""
    windows = tokens.long().unfold(0, recipe.context + 1, recipe.context)[:8]
    model.eval()
    nats = model.loss(windows).item()
    model.train()
    return nats / math.log(2)


def main(recipe: Recipe) -> float:
    """Train; return the bits per byte at the end."""
    torch.manual_seed(recipe.seed)
    train, held_out = read_tokens(recipe)
    model = LongNetLM(
        LongNetConfig(
            embed_dim=recipe.embed_dim, num_layers=recipe.num_layers, context=recipe.context
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    data, start = batches(train, recipe), time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        total = 0.0
        for _ in range(recipe.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                loss = model.loss(next(data)) / recipe.accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % recipe.evaluate_every == 0:
            seconds = time.perf_counter() - start
            read = (step + 1) * recipe.accumulate * recipe.batch * recipe.context
            bits = evaluate(model, held_out, recipe)
            print(
                f"step {step + 1}: {total:.3f} nats, {bits:.3f} bits per held-out byte, "
                f"{read / seconds:,.0f} bytes/s"
            )
    if recipe.out:
        Path(recipe.out).mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), Path(recipe.out) / "model.safetensors")
    prompt = torch.tensor([list(b"It was the ")])
    added = generate_tokens(model.eval(), prompt, max_new_tokens=40, temperature=0.0)
    print("It was the " + bytes(added[0].tolist()).decode(errors="replace"))
    return evaluate(model, held_out, recipe)


if __name__ == "__main__":
    main(read_settings(sys.argv[1:]))
