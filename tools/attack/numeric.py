"""Attention of every kind against the oracle: one call, packed sequences, a cache, layouts."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from dilated_core import (
    DilatedKVCache,
    DilatedPattern,
    dilated_attention,
    dilated_attention_varlen,
)
from dilated_sparse import BlockLayout, block_sparse_attention
from tools.attack import oracle

Case = dict[str, Any]
# Of the largest expected number, for a result and for a gradient.
TOLERANCE = {
    "float64": (1e-11, 1e-10),
    "float32": (1e-5, 5e-5),
    "bfloat16": (2e-2, 5e-2),
    "float16": (3e-3, 1e-2),
}


def draw_pattern(rng: random.Random, *, causal: bool | None = None) -> Case:
    """A pattern, heads and the switches that the oracle knows."""
    branches = [
        (rng.choice((1, 2, 3, 4, 5, 7, 8, 12, 16, 40)), rng.choice((1, 1, 2, 3, 4, 8)))
        for _ in range(rng.randint(1, 4))
    ]
    groups = rng.choice(("shared", "shared", "split"))
    kv_heads = rng.randint(1, 3)
    heads = kv_heads * rng.randint(1, 4)
    if heads < len(branches):
        groups = "shared"
    causal = rng.random() < 0.6 if causal is None else causal
    return {
        "branches": branches, "heads": heads, "kv_heads": kv_heads, "causal": causal,
        "offsets": rng.choice(("interleaved", "blocked")), "groups": groups,
        "zeros": not causal and rng.random() < 0.3, "dim": rng.choice((1, 2, 4, 8, 16)),
        "batch": rng.randint(1, 3), "scale": rng.choice((None, None, 0.0, -1.5, 0.3, 9.0)),
        "dtype": rng.choice(("float64", "float64", "float32", "bfloat16", "float16")),
        "seed": rng.randrange(2**31),
    }  # fmt: skip


def pattern_of(case: Case) -> DilatedPattern:
    """The product's pattern of a case."""
    lengths, rates = zip(*case["branches"], strict=True)
    return DilatedPattern(
        lengths, rates, head_offsets=case["offsets"], head_groups=case["groups"],
        count_padding=case["zeros"],
    )  # fmt: skip


def tensors(case: Case, length: int, key_length: int) -> list[Tensor]:
    """Query, key, value and an upstream gradient of a case."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype = getattr(torch, case["dtype"])
    shapes = [
        (length, case["heads"]),
        *[(key_length, case["kv_heads"])] * 2,
        (length, case["heads"]),
    ]
    return [
        torch.randn(case["batch"], n, h, case["dim"], generator=generator, dtype=torch.float64).to(
            dtype
        )
        for n, h in shapes
    ]


def same(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise unless two tensors agree, infinities included."""
    found = found.double()
    assert found.shape == expected.shape, (name, tuple(found.shape), tuple(expected.shape))
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite), f"{name}: other infinities"
    assert torch.equal(found[~finite], expected[~finite]), f"{name}: other infinities"
    if finite.any():
        far = (found - expected)[finite].abs().max().item()
        most = expected[finite].abs().max().item()
        assert far <= tolerance * (1 + most), f"{name}: off by {far:.3g} of {most:.3g}"


def compare(
    case: Case, call: Any, seen: Tensor, zeros: Tensor, inputs: list[Tensor], **how: Any
) -> None:
    """Results and gradients of a call against the oracle's."""
    result, gradient = TOLERANCE[case["dtype"]]
    *qkv, upstream = inputs
    ours = [x.detach().requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out, lse = call(*ours)
    q, k, v = exact
    want, want_lse = oracle.attention(q, k, v, seen, zeros, scale=case["scale"], **how)
    same("out", out.detach(), want.detach(), result)
    if lse is not None:
        same("lse", lse.detach(), want_lse.detach(), result)
    # Half-precision lse times a large scale moves probabilities by more than the inputs' rounding.
    spread = max(1.0, abs(case["scale"] or 1.0))
    for name, a, b in zip(
        "qkv",
        torch.autograd.grad(out, ours, upstream),
        torch.autograd.grad(want, exact, upstream.double()),
        strict=True,
    ):
        same(f"gradient of {name}", a, b, gradient * spread)


class Attention:
    """`dilated_attention`, results and gradients, of all backends of a CPU."""

    def draw(self, rng: random.Random) -> Case:
        case = draw_pattern(rng)
        length = rng.randint(0, 24) if rng.random() < 0.95 else rng.randint(25, 90)
        more = rng.choice((0, 0, rng.randint(0, 9)))
        key_length = (
            length + more if case["causal"] else max(0, length + rng.choice((0, more, -more)))
        )
        if case["zeros"]:
            key_length = length
        return case | {
            "length": length, "key_length": key_length, "hidden": rng.choice((0.0, 0.0, 0.3, 1.0)),
            "backend": rng.choice((None, "torch", "reference")),
        }  # fmt: skip

    def check(self, case: Case) -> None:
        inputs = tensors(case, case["length"], case["key_length"])
        generator = torch.Generator().manual_seed(case["seed"] + 1)
        hidden = torch.rand(case["batch"], case["key_length"], generator=generator) < case["hidden"]
        seen, zeros = oracle.counts(case, case["length"], case["key_length"])

        def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return dilated_attention(
                q, k, v, pattern_of(case), is_causal=case["causal"], scale=case["scale"],
                key_padding_mask=hidden if case["hidden"] else None, enable_gqa=True,
                return_lse=True, backend=case["backend"],
            )  # fmt: skip

        compare(case, call, seen, zeros, inputs, hidden=hidden)


class Packed:
    """`dilated_attention_varlen` against each sequence alone."""

    def draw(self, rng: random.Random) -> Case:
        lengths = [rng.choice((0, 1, rng.randint(1, 17))) for _ in range(rng.randint(1, 5))]
        return draw_pattern(rng) | {"batch": 1, "lengths": lengths}

    def check(self, case: Case) -> None:
        lengths = case["lengths"]
        total = sum(lengths)
        inputs = tensors(case, total, total)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        seen = torch.zeros(case["heads"], total, total, dtype=torch.float64)
        zeros = torch.zeros(case["heads"], total, dtype=torch.float64)
        for start, length in zip(bounds.tolist(), lengths, strict=False):
            rows = slice(start, start + length)
            seen[:, rows, rows], zeros[:, rows] = oracle.counts(case, length, length)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
            out, lse = dilated_attention_varlen(
                q[0], k[0], v[0], bounds, pattern_of(case), is_causal=case["causal"],
                scale=case["scale"], enable_gqa=True, return_lse=True,
            )  # fmt: skip
            return out[None], lse[None]

        compare(case, call, seen, zeros, inputs)


class Blocks:
    """`block_sparse_attention` of layouts out of random masks."""

    def draw(self, rng: random.Random) -> Case:
        case = draw_pattern(rng)
        length = rng.randint(1, 40)
        key_length = length if case["causal"] else rng.randint(1, 40)
        return case | {
            "length": length, "key_length": key_length, "block_size": rng.choice((1, 4, 8, 16, 32)),
            "share": rng.choice((0.02, 0.2, 0.6, 1.0)), "by_head": rng.random() < 0.5,
            "even": rng.random() < 0.5, "hidden": rng.choice((0.0, 0.0, 0.3, 1.0)),
            "backend": rng.choice((None, "reference")),
        }  # fmt: skip

    def check(self, case: Case) -> None:
        n, m, size = case["length"], case["key_length"], case["block_size"]
        inputs = tensors(case, n, m)
        generator = torch.Generator().manual_seed(case["seed"] + 1)
        heads = case["heads"] if case["by_head"] else 1
        mask = torch.rand(heads, n, m, generator=generator) < case["share"]
        if case["even"]:  # whole blocks
            rows, columns = torch.arange(n) // size * size, torch.arange(m) // size * size
            mask = mask[:, rows][:, :, columns]
        hidden = torch.rand(case["batch"], m, generator=generator) < case["hidden"]
        layout = BlockLayout.from_dense(mask, block_size=size)
        seen = mask.expand(case["heads"], n, m).double()
        if case["causal"]:
            seen = seen * (torch.arange(m)[None] <= torch.arange(n)[:, None])

        def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return block_sparse_attention(
                q, k, v, layout, is_causal=case["causal"], scale=case["scale"],
                key_padding_mask=hidden if case["hidden"] else None, enable_gqa=True,
                return_lse=True, backend=case["backend"],
            )  # fmt: skip

        compare(case, call, seen, torch.zeros(case["heads"], n), inputs, hidden=hidden)


class Cache:
    """`DilatedKVCache` under any mix of operations, failed ones too, against whole sequences."""

    def draw(self, rng: random.Random) -> Case:
        case = draw_pattern(rng, causal=True)
        operations: list[list[Any]] = []
        for _ in range(rng.randint(1, 14)):
            kind = rng.choice(
                ("attend",) * 6 + ("ragged", "truncate", "each", "reorder", "reset", "bad")
            )
            operations.append([kind, rng.randrange(2**20), rng.randint(1, rng.choice((1, 3, 9)))])
        return case | {"operations": operations, "hidden": rng.choice((0.0, 0.0, 0.3))}

    @torch.no_grad()
    def check(self, case: Case) -> None:
        cache = DilatedKVCache(pattern_of(case))
        rows = [_Row(case) for _ in range(case["batch"])]
        generator = torch.Generator().manual_seed(case["seed"])
        called = False
        for kind, number, size in case["operations"]:
            lengths = [row.length for row in rows]
            if kind in ("attend", "ragged"):
                self._attend(
                    case, cache, rows, generator, size, number if kind == "ragged" else None
                )
                called = True
            elif kind == "reset":
                cache.reset()
                rows = [_Row(case) for _ in rows]
            elif kind == "bad":
                self._refused(case, cache, rows, generator, number)
            elif called and kind == "reorder":
                index = [(number >> 3 * i) % len(rows) for i in range(1 + number % 3)]
                cache.reorder(torch.tensor(index))
                rows = [rows[i].copy() for i in index]
            elif called and kind in ("truncate", "each"):
                wanted = [number % (max(lengths) + 2)] * len(rows)
                if kind == "each":
                    wanted = [(number >> 3 * i) % (n + 2) for i, n in enumerate(lengths)]
                given: Any = torch.tensor(wanted) if kind == "each" else wanted[0]
                try:
                    cache.truncate(given)
                except ValueError:
                    assert wanted != lengths, "truncation to the present length was refused"
                else:
                    most = lengths if kind == "each" else [max(lengths)] * len(rows)
                    assert all(w <= n for w, n in zip(wanted, most, strict=True)), "beyond the end"
                    for row, length in zip(rows, wanted, strict=True):
                        row.cut(length)
            found = cache.lengths.tolist() if called else [row.length for row in rows]
            assert found == [row.length for row in rows], (kind, found)

    def _attend(
        self, case: Case, cache: DilatedKVCache, rows: list[_Row], generator: torch.Generator,
        size: int, ragged: int | None,
    ) -> None:  # fmt: skip
        q, k, v, hidden = self._rows(case, len(rows), size, generator)
        real = [size] * len(rows)
        if ragged is not None:
            real = [(ragged >> 3 * i) % (size + 1) for i in range(len(rows))]
        out = cache.attend(
            q, k, v, scale=case["scale"], key_padding_mask=hidden if case["hidden"] else None,
            lengths=None if ragged is None else torch.tensor(real),
        )  # fmt: skip
        for i, row in enumerate(rows):
            n = real[i]
            assert not out[i, n:].count_nonzero(), "output of rows that are not real"
            row.append(k[i, :n], v[i, :n], hidden[i, :n])
            seen, zeros = oracle.counts(case, n, row.length)
            want, _ = oracle.attention(
                q[i : i + 1, :n].double(), *row.double(), seen, zeros, scale=case["scale"],
                hidden=row.hidden[None],
            )  # fmt: skip
            same("out of the cache", out[i : i + 1, :n], want, TOLERANCE[case["dtype"]][0])

    def _rows(self, case: Case, batch: int, size: int, generator: torch.Generator) -> list[Tensor]:
        dtype = getattr(torch, case["dtype"])
        made = [
            torch.randn(batch, size, heads, case["dim"], generator=generator, dtype=torch.float64)
            for heads in (case["heads"], case["kv_heads"], case["kv_heads"])
        ]
        hidden = torch.rand(batch, size, generator=generator) < case["hidden"]
        return [x.to(dtype) for x in made] + [hidden]

    def _refused(
        self,
        case: Case,
        cache: DilatedKVCache,
        rows: list[_Row],
        generator: torch.Generator,
        number: int,
    ) -> None:
        q, k, v, _ = self._rows(case, len(rows), 2, generator)
        calls: list[tuple[Any, ...]] = [
            (q, k[:, :1], v[:, :1]), (q, k, v[..., :0]), (q[0], k[0], v[0]), (q, k, v.int()),
            (q[:, :, :0], k, v), (q, k.requires_grad_(), v, {"lengths": torch.tensor([-1])}),
            (q, k, v, {"scale": float("nan")}), (q, k, v, {"key_padding_mask": torch.ones(9)}),
        ]  # fmt: skip
        *arguments, options = (*calls[number % len(calls)], {})[:4]
        try:
            cache.attend(*arguments, **options)
        except (TypeError, ValueError, RuntimeError):
            return
        raise AssertionError(f"bad call {number % len(calls)} was accepted")


class _Row:
    """All keys and values that one batch row has seen."""

    def __init__(self, case: Case) -> None:
        shape, dtype = (0, case["kv_heads"], case["dim"]), getattr(torch, case["dtype"])
        self.key, self.value = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self.hidden = torch.empty(0, dtype=torch.bool)

    @property
    def length(self) -> int:
        return len(self.key)

    def append(self, key: Tensor, value: Tensor, hidden: Tensor) -> None:
        self.key, self.value = torch.cat((self.key, key)), torch.cat((self.value, value))
        self.hidden = torch.cat((self.hidden, hidden))

    def cut(self, length: int) -> None:
        self.key, self.value, self.hidden = (
            self.key[:length], self.value[:length], self.hidden[:length],
        )  # fmt: skip

    def copy(self) -> _Row:
        other = object.__new__(_Row)
        other.__dict__ = dict(self.__dict__)
        return other

    def double(self) -> tuple[Tensor, Tensor]:
        return self.key.double()[None], self.value.double()[None]
