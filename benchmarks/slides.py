"""GigaPath's slide encoder at its published size: ours, and a checkout of prov-gigapath.

Inference in float16 and bfloat16 autocast with the embeddings of all layers, as GigaPath's pipeline
asks for them; a training step (forward and backward, bfloat16 autocast, no dropout); and a batch of
16 slides of different lengths that `encode` packs, beside the largest alone. GigaPath's code gets
torch's flash operator where it calls flash-attn's, and stand-ins for packages that it imports
without using them here. Weights are random; ours are theirs where both run, and outputs are
compared.

    python benchmarks/slides.py [--gigapath CHECKOUT] [--tiles 10000,50000] [--json FILE]
    python benchmarks/slides.py --device cpu --tiles 200 --small

Of the checkout einops is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from _machine import describe
from torch import Tensor, nn

from dilated_factory import SlideEncoder, SlideEncoderConfig, load_torchscale

SECONDS = 2.0  # of measuring a row, about
SMALL = {"embed_dim": 64, "num_heads": 4, "num_layers": 2}
BATCH = [round(500 * 40 ** (i / 15)) for i in range(16)]  # 500 to 20,000
Row = dict[str, Any]
Model = Callable[[Tensor, Tensor], list[Tensor]]


def main() -> None:
    """Measure all rows and print a line of JSON for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigapath", help="a checkout of prov-gigapath to compare with")
    parser.add_argument("--tiles", default="10000,50000")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model, to try the command")
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    config = SlideEncoderConfig(global_pool=True, **(SMALL if arguments.small else {}))
    machine = describe(arguments.device)
    print(json.dumps(machine))
    rows = []
    for row in measured(arguments, config):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "results": rows}, file)


def measured(arguments: argparse.Namespace, config: SlideEncoderConfig) -> Iterator[Row]:
    """All rows, one after the other."""
    device = arguments.device
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {}
    if arguments.gigapath:
        models["gigapath"] = theirs = gigapath(arguments.gigapath, config).to(device)
        models["ours"] = load_torchscale(theirs.state_dict(), config).to(device)
    else:
        models["ours"] = SlideEncoder(config).to(device)
    if device == "cuda":
        models["ours, compiled"] = compiled = SlideEncoder(config).to(device)
        compiled.load_state_dict(models["ours"].state_dict())
        compiled.encoder.compile_blocks()
        models["ours, compiled, selective"] = frugal = SlideEncoder(config).to(device)
        frugal.load_state_dict(models["ours"].state_dict())
        frugal.encoder.activation_checkpointing = "selective"
        frugal.encoder.compile_blocks()
    for tiles in map(int, arguments.tiles.split(",")):
        inputs = slide(tiles, config, device)
        for name, dtype in (
            ("inference", "float16"),
            ("inference", "bfloat16"),
            ("step", "bfloat16"),
        ):
            outputs = {}
            for who, model in models.items():
                if name == "inference" and who.endswith("selective"):
                    continue  # nothing is kept for a backward
                row = {"what": name, "dtype": dtype, "tiles": tiles, "who": who}
                work = partial(infer if name == "inference" else step, model, inputs, dtype)
                yield row | time_of(work, device)
                if name == "inference":
                    outputs[who] = infer(model, inputs, dtype)[-1].double()
            if "gigapath" in outputs:
                difference = (outputs["ours"] - outputs["gigapath"]).norm() / outputs["ours"].norm()
                yield {
                    "what": "difference",
                    "dtype": dtype,
                    "tiles": tiles,
                    "ratio": difference.item(),
                }
    model = models["ours"].eval()
    lengths = [length // 100 for length in BATCH] if arguments.small else BATCH
    slides = [tuple(x[0] for x in slide(length, config, device)) for length in lengths]
    for dtype in ("float16", "bfloat16"):
        alone = time_of(partial(encode, model, slides[-1:], dtype), device)["ms"]
        together = time_of(partial(encode, model, slides, dtype), device)["ms"]
        rates = lengths[-1] / alone, sum(lengths) / together
        yield {
            "what": "batch of 16", "dtype": dtype, "tiles": sum(lengths), "ms": together,
            "ms of the largest alone": alone,
            "tiles/s to those of the largest": rates[1] / rates[0],
        }  # fmt: skip


def slide(tiles: int, config: SlideEncoderConfig, device: str) -> tuple[Tensor, Tensor]:
    """Features and places of a slide, without overlap, row by row."""
    cells = torch.stack((torch.arange(tiles) // 400, torch.arange(tiles) % 400), 1)
    features = torch.randn(1, tiles, config.tile_dim)
    return features.to(device), (cells[None] * config.tile_size).to(device)


def infer(model: nn.Module, inputs: tuple[Tensor, Tensor], dtype: str) -> list[Tensor]:
    """The embeddings of all layers."""
    model.eval()
    with torch.no_grad(), torch.autocast(inputs[0].device.type, getattr(torch, dtype)):
        found: list[Tensor] = model(*inputs, all_layer_embed=True)
    return found


def encode(model: SlideEncoder, slides: list[tuple[Tensor, Tensor]], dtype: str) -> list[Tensor]:
    """The embeddings of slides that are packed."""
    with torch.no_grad(), torch.autocast(slides[0][0].device.type, getattr(torch, dtype)):
        return model.encode(slides)


def step(model: nn.Module, inputs: tuple[Tensor, Tensor], dtype: str) -> None:
    """Forward and backward."""
    model.train()
    model.zero_grad()
    with torch.autocast(inputs[0].device.type, getattr(torch, dtype)):
        (embedding,) = model(*inputs)
    embedding.float().square().sum().backward()


def time_of(work: Callable[[], Any], device: str) -> Row:
    """Milliseconds (median, least, most) and the most memory that was held, in GiB."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    gc.collect()
    for _ in range(2):
        work()
    synchronize()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    ms = [1e3 * x for x in (statistics.median(times), min(times), max(times))]
    return {"ms": ms[0], "least": ms[1], "most": ms[2], "GiB": memory, "rounds": len(times)}


def gigapath(checkout: str, config: SlideEncoderConfig) -> nn.Module:
    """GigaPath's own class, with torch's flash operator where it calls flash-attn's."""
    sys.path.insert(0, checkout)
    # It imports them, and uses them only to download, or where layers are dropped or spread.
    names = (
        "fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers",
        "timm.models.registry", "huggingface_hub",
    )  # fmt: skip
    for name in names:
        module = sys.modules.setdefault(name, ModuleType(name))
        module.__dict__.update(
            checkpoint_wrapper=None, wrap=None, drop_path=None, register_model=lambda made: made
        )
    from gigapath.slide_encoder import LongNetViT  # type: ignore[import-not-found]
    from torchscale.architecture import config as settings  # type: ignore[import-not-found]
    from torchscale.component import multihead_attention  # type: ignore[import-not-found]
    from torchscale.model import LongNetConfig  # type: ignore[import-not-found]

    def flash(
        q: Tensor, k: Tensor, v: Tensor, _p: float, _bias: None, scale: None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        suffix = "" if q.is_cuda else "_for_cpu"
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{suffix}")
        out, lse, *_ = operator(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    multihead_attention.flash_attn_func = flash
    # It evaluates the text of numbers of numpy, which name it since numpy 2.
    settings.np = np
    # Its table of shapes has no other widths and heads than those published.
    name = f"LongNet_{config.num_layers}_layers_{config.embed_dim}_dim"
    if not hasattr(LongNetConfig, name):
        shape = dict(LongNetConfig.LongNet_12_layers_768_dim)
        shape |= {
            "encoder_layers": config.num_layers,
            "encoder_embed_dim": config.embed_dim,
            "encoder_ffn_embed_dim": 4 * config.embed_dim,
            "encoder_attention_heads": config.num_heads,
        }
        setattr(LongNetConfig, name, shape)
    norm = partial(nn.LayerNorm, eps=config.final_norm_eps)
    with contextlib.redirect_stdout(sys.stderr):
        model: nn.Module = LongNetViT(
            in_chans=config.tile_dim, embed_dim=config.embed_dim, depth=config.num_layers,
            norm_layer=norm, global_pool=True, dropout=0.0, drop_path_rate=0.0,
        )  # fmt: skip
    return model


if __name__ == "__main__":
    main()
