"""Generation: milliseconds a token and a prompt, against context and batch, and bytes of state.

A language model of 12 layers of 768 in bfloat16 on CUDA (4 of 256 in float32 and two threads on the
CPU), w = 2048, 8192, 32768 and r = 1, 4, 16, generates by `generate_tokens`; a token is the mean of
a stretch of steps, draws included. An older commit does the same in a process of its own; there it
is the median of some steps. With --dense a Llama of the same size in transformers beside it, with a
static cache, compiled; its tokens are timed on a cache that is filled by nothing but its length.

    python benchmarks/decoding.py [--device cpu|cuda] [--commit HASH|FOLDER] [--dense] [--json FILE]
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _machine import describe
from host import ROOT, checked_out

SEGMENTS, RATES, VOCAB = (2048, 8192, 32768), (1, 4, 16), 256
# layers, width, heads, dtype
SHAPES = {"cuda": (12, 768, 12, torch.bfloat16), "cpu": (4, 256, 4, torch.float32)}
# Context and batch; an older commit, the dense model and a plain forward stop at LONGEST. Where a
# segment of 2048 begins, few rows are held; 9,900 is near the end of one, and alike to a dense
# model.
CASES = {
    "cuda": [(8192, 1), (9900, 1), (8192, 64), (9900, 64), (131072, 1), (1048576, 1)],
    "cpu": [(8192, 1), (9900, 1)],
}
LONGEST = 131072
CHUNK = 65536
# Tokens of a stretch, tokens before it (a graph is made meanwhile), and prompts timed.
TOKENS, WARM_UP, PROMPTS = {"cuda": 256, "cpu": 64}, {"cuda": 40, "cpu": 4}, 3
OLDER_TOKENS = 24
Row = dict[str, Any]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="an older commit, or a folder of one")
    parser.add_argument("--dense", action="store_true", help="a Llama with a static cache as well")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(2)
    if arguments.child:
        for row in CHILDREN[arguments.child](arguments.device):
            print(json.dumps(row), flush=True)
        return
    machine = describe(arguments.device)
    print(json.dumps(machine), flush=True)
    rows = child(ROOT, "ours", arguments.device)
    if arguments.commit:
        with checked_out(arguments.commit) as tree:
            rows += child(tree, "older", arguments.device)
    if arguments.dense:
        rows += child(ROOT, "dense", arguments.device)
    if arguments.json:
        text = json.dumps({"machine": machine, "commit": arguments.commit, "rows": rows}, indent=1)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


def child(tree: Path, kind: str, device: str) -> list[Row]:
    """The rows of a tree, measured in a process of its own; printed as they come."""
    found = [str(path) for path in tree.glob("packages/*/src")]
    sources = os.pathsep.join([*found, os.environ.get("PYTHONPATH", "")])
    rows = []
    with subprocess.Popen(
        [sys.executable, __file__, "--child", kind, "--device", device],
        env={**os.environ, "PYTHONPATH": sources}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            rows.append(json.loads(line))
            print(shown(rows[-1]), flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return rows


def shown(row: Row) -> str:
    """One line of the table."""
    prompt, forward = (
        f"{row[name]:9.1f} ms" if row.get(name) else f"{'':12}" for name in ("prompt", "forward")
    )
    return (
        f"{row['model']:6} context {row['context']:8} batch {row['batch']:3} "
        f"token {row['token']:8.3f} ms  prompt {prompt}  forward {forward}  "
        f"state {row['state_bytes'] / 2**20:9.1f} MiB"
    )


def ours(device: str, *, older: bool = False) -> Iterator[Row]:
    """This model, by the packages that are on the path."""
    from dilated_factory import LongNetConfig, LongNetLM

    layers, width, heads, dtype = SHAPES[device]
    config = LongNetConfig(
        embed_dim=width, num_heads=heads, num_layers=layers, vocab_size=VOCAB, context=32768,
        segment_lengths=SEGMENTS, dilation_rates=RATES, positions="rotary",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongNetLM(config).to(device, dtype).eval()
    for context, batch in CASES[device]:
        if older and (context > LONGEST or batch > 1):
            continue
        tokens = torch.randint(VOCAB, (batch, context), device=device)
        caches: list[Any] = []

        @torch.no_grad()
        def prompt(tokens: torch.Tensor = tokens, caches: list[Any] = caches) -> None:
            caches[:] = model.new_caches()
            for part in tokens.split(CHUNK, dim=1):
                model.hidden_states(part, caches=caches)

        row = {"model": "older" if older else "ours", "context": context, "batch": batch}
        row["prompt"] = milliseconds(prompt, device)
        row["state_bytes"] = sum(cache.nbytes for cache in caches)
        if context <= LONGEST:
            row["forward"] = milliseconds(
                lambda tokens=tokens: torch.no_grad()(model.hidden_states)(tokens), device
            )
        caches.clear()
        row["token"] = (seconds_of_older if older else seconds_of_steps)(model, tokens) * 1e3
        yield row


def seconds_of_steps(model: Any, tokens: torch.Tensor) -> float:
    """Seconds a token, over a stretch after the prompt and the first steps."""
    from dilated_factory.models.generation import Draw, stream_tokens

    device = tokens.device.type
    warm_up, count = WARM_UP[device], TOKENS[device]
    steps = stream_tokens(model, tokens, None, warm_up + count + 1, Draw(), (), 0, use_cache=True)
    start = 0.0
    for index, _ in enumerate(steps):
        if index in (warm_up, warm_up + count):
            synchronize(device)
            start, before = time.perf_counter(), start
    return (start - before) / count


def seconds_of_older(model: Any, tokens: torch.Tensor) -> float:
    """The same of a tree without `stream_tokens`: its head is called once a token."""
    from dilated_factory import generate_tokens

    times: list[float] = []

    def note(*_: Any) -> None:
        synchronize(tokens.device.type)
        times.append(time.perf_counter())

    handle = model.head.register_forward_hook(note)
    generate_tokens(model, tokens, max_new_tokens=OLDER_TOKENS)
    handle.remove()
    return statistics.median(b - a for a, b in pairwise(times[2:]))


def dense(device: str) -> Iterator[Row]:
    """A Llama of the same size with a static cache, compiled."""
    import transformers

    layers, width, heads, dtype = SHAPES[device]
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=8 * width // 3,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=2**20,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    for context, batch in CASES[device]:
        if context > LONGEST or context % SEGMENTS[0]:
            continue
        tokens = torch.randint(VOCAB, (batch, context), device=device)
        row = {"model": "dense", "context": context, "batch": batch}
        row["prompt"] = row["forward"] = milliseconds(
            lambda tokens=tokens: torch.no_grad()(model)(tokens, use_cache=False, logits_to_keep=1),
            device,
        )
        count = TOKENS[device]
        cache: Any = transformers.StaticCache(
            config=config, max_cache_len=context + WARM_UP[device] + count
        )
        cache.early_initialization(batch, heads, width // heads, dtype, torch.device(device))
        for layer in cache.layers:
            layer.cumulative_length += context
        row["state_bytes"] = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        mode = "reduce-overhead" if device == "cuda" else "default"
        compiled = torch.compile(model.forward, mode=mode)
        place = torch.full((batch, 1), context, device=device)
        token = tokens[:, -1:].clone()

        def step(
            compiled: Any = compiled, token: Any = token, place: Any = place, cache: Any = cache
        ) -> None:
            logits = compiled(token, position_ids=place, use_cache=True, **{name: cache}).logits
            token.copy_(torch.multinomial(logits[:, -1].float().softmax(-1), 1))
            place.add_(1)

        with torch.no_grad():
            for _ in range(WARM_UP[device]):
                step()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
        row["token"] = (time.perf_counter() - start) / count * 1e3
        yield row
        del cache, compiled, step
        torch.compiler.reset()


CHILDREN: dict[str, Callable[[str], Iterator[Row]]] = {
    "ours": ours,
    "older": lambda device: ours(device, older=True),
    "dense": dense,
}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """The median time of a call, until the device has done it, after one to warm up."""
    times = []
    for _ in range(1 + PROMPTS):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
