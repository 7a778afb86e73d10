"""Generation: the same with and without the cache, deterministic, within its arguments."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core import DilatedAttention, DilatedKVCache
from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.models import generation
from dilated_factory.models.generation import generate, generate_tokens


@pytest.fixture
def model(tiny_model: LongNetConfig) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(tiny_model)


@settings(max_examples=10)
@given(
    length=st.integers(1, 60),
    positions=st.sampled_from(["rotary", "xpos", "none"]),
    head_groups=st.sampled_from(["shared", "split"]),
    temperature=st.sampled_from([0.0, 1.3]),
    chunk=st.sampled_from([7, 65536]),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_cache_changes_no_token(
    length: int, positions: str, head_groups: str, temperature: float, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed % 997)
    config = LongNetConfig.model_validate(
        {
            "vocab_size": 23,
            "embed_dim": 32,
            "num_heads": 4,
            "num_layers": 2,
            "segment_lengths": (5, 12, 40),
            "dilation_rates": (1, 2, 3),
            "context": 37,
            "positions": positions,
            "head_groups": head_groups,
        }
    )
    model = LongNetLM(config, dtype=torch.float64)
    prompt = torch.randint(23, (3, length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PREFILL_CHUNK", chunk)
        found = [
            generate_tokens(
                model,
                prompt,
                max_new_tokens=11,
                temperature=temperature,
                seed=seed,
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        ]
    assert found[0].shape == (3, 11)
    assert torch.equal(*found)


@settings(max_examples=10)
@given(
    sides=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=3),
    positions=st.sampled_from(["rotary", "xpos", "none"]),
    chunk=st.sampled_from([7, 65536]),
    use_cache=st.booleans(),
    stop=st.booleans(),
)
def test_each_prompt_of_a_batch_is_continued_as_alone(
    sides: list[tuple[int, int]], positions: str, chunk: int, use_cache: bool, stop: bool
) -> None:
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=23, embed_dim=32, num_heads=4, num_layers=2, segment_lengths=(5, 12, 40),
        dilation_rates=(1, 2, 3), context=37, positions=positions,  # type: ignore[arg-type]
    )  # fmt: skip
    model = LongNetLM(config, dtype=torch.float64)
    tokens = torch.randint(23, (len(sides), 41))
    columns = torch.arange(41)
    mask = torch.stack([(columns < a) | (columns >= 41 - b) for a, b in sides])
    stops = range(4) if stop else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PREFILL_CHUNK", chunk)
        found = generate_tokens(
            model, tokens, max_new_tokens=13, key_padding_mask=mask, temperature=0,
            stop_tokens=stops, use_cache=use_cache,
        )  # fmt: skip
    for row, (a, b) in enumerate(sides):
        alone = generate_tokens(
            model, tokens[row : row + 1, a : 41 - b], max_new_tokens=13, temperature=0
        )[0].tolist()
        if stop:
            end = next((i for i, token in enumerate(alone) if token < 4), 13)
            alone = alone[: end + 1] + alone[end : end + 1] * (12 - end)
        assert found[row].tolist() == alone


def test_draws_follow_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]]).expand(20000, 4)
    chances = torch.rand(20000, dtype=torch.float64)

    def shares(**options: Any) -> list[float]:
        counts = generation.Draw(**options)(logits, chances).bincount(minlength=4)
        return (counts / 20000).tolist()

    expected = torch.tensor([0.0, -torch.inf, 1.0, 2.0]).softmax(0)
    assert shares() == pytest.approx(expected.tolist(), abs=0.02)
    assert shares(top_k=2) == pytest.approx([0, 0, 0.2689, 0.7311], abs=0.02)
    # The likeliest has 0.665, the two likeliest 0.91.
    assert shares(top_p=0.6) == [0, 0, 0, 1]
    assert shares(top_p=0.7) == pytest.approx([0, 0, 0.2689, 0.7311], abs=0.02)
    assert shares(top_p=1.0) == shares()
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert generation.Draw()(logits[:1].flip(1), last).tolist() == [3]
    assert generation.Draw()(torch.tensor([[1.0, 1.0, -torch.inf]]), last).tolist() == [1]


def test_logits_that_are_no_numbers_are_refused(model: LongNetLM) -> None:
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="model must predict finite logits"):
        generate(model, b"a", max_bytes=3)
    assert model.training


def test_the_states_with_a_cache_are_those_without(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model, dtype=torch.float64).eval()
    tokens = torch.randint(256, (2, 71))
    caches = model.new_caches()
    with torch.no_grad():
        parts = [model(part, caches=caches) for part in tokens.split((13, 1, 40, 17), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-10, atol=1e-12)
    assert {cache.length for cache in caches} == {71}


def test_a_token_with_the_cache_costs_one_position(
    model: LongNetLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    entrance = LongNetLM.entrance

    def counting(self: LongNetLM, tokens: torch.Tensor, *options: Any) -> Any:
        lengths.append(tokens.shape[1])
        return entrance(self, tokens, *options)

    monkeypatch.setattr(LongNetLM, "entrance", counting)
    generate(model, bytes(range(41)), max_bytes=4)
    assert lengths == [41, 1, 1, 1]


def test_a_step_can_be_compiled(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model, dtype=torch.float64).eval()
    tokens = torch.randint(256, (2, 14))
    caches = model.new_caches()
    with torch.no_grad():
        model(tokens[:, :10], caches=caches)
        step = torch.compile(lambda token: model(token, caches=caches), backend="eager")
        found = torch.cat([step(tokens[:, i : i + 1]) for i in range(10, 14)], 1)
        torch.testing.assert_close(found, model(tokens)[:, 10:], rtol=1e-9, atol=1e-10)
    assert {cache.length for cache in caches} == {14}


def test_an_injected_attention_generates_without_a_cache(tiny_model: LongNetConfig) -> None:
    def attention(*heads: Any, **options: Any) -> Any:
        return dilated(*heads, **options)

    dilated = DilatedAttention(tiny_model.pattern)
    plain = LongNetLM(tiny_model)
    other = LongNetLM(tiny_model, attention=lambda: attention)
    other.load_state_dict(plain.state_dict())
    prompt = torch.tensor([list(b"abc")])
    with pytest.raises(ValueError, match="attention must be dilated or block-sparse"):
        generate_tokens(other, prompt, max_new_tokens=5, use_cache=True)
    found = [
        generate_tokens(model, prompt, max_new_tokens=5, temperature=0, use_cache=use_cache)
        for model, use_cache in ((plain, False), (other, None))
    ]
    assert torch.equal(*found)


def test_the_seed_decides_the_bytes_and_nothing_else_does(model: LongNetLM) -> None:
    first = generate(model, b"ab", max_bytes=60, seed=3)
    torch.manual_seed(99)
    assert generate(model, b"ab", max_bytes=60, seed=3) == first
    assert generate(model, b"ab", max_bytes=60, seed=4) != first
    assert len(first) == 60
    assert generate(model, b"ab", max_bytes=20, seed=3) == first[:20]
    assert generate(model, b"ab", max_bytes=0) == b""
    assert model.training


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-9}])
def test_the_careful_limits_take_the_likeliest_byte(
    model: LongNetLM, options: dict[str, float]
) -> None:
    prompt = b"xyz"
    added = generate(model, prompt, max_bytes=5, **options)  # type: ignore[arg-type]
    expected = bytearray(prompt)
    model.eval()
    for _ in range(5):
        expected.append(int(model(torch.tensor([list(expected)]))[0, -1].argmax()))
    model.train()
    assert prompt + added == bytes(expected)


def test_top_k_keeps_to_the_likeliest(model: LongNetLM) -> None:
    logits = model.eval()(torch.tensor([[7, 8]]))[0, -1]
    likeliest = set(logits.topk(3).indices.tolist())
    drawn = {generate(model, b"\x07\x08", max_bytes=1, top_k=3, seed=s)[0] for s in range(60)}
    assert drawn == likeliest


def test_the_whole_prompt_is_seen_past_the_context(model: LongNetLM) -> None:
    context, longest = model.config.context, max(model.config.segment_lengths)
    prompt = bytes(range(96 + 17))
    assert context < len(prompt)
    model.eval()
    expected = int(model(torch.tensor([list(prompt)]))[0, -1].argmax())
    assert generate(model, prompt, max_bytes=1, temperature=0)[0] == expected
    # Segments have their borders at multiples of the longest: all before the last is out of sight.
    assert 96 % longest == 0
    assert generate(model, prompt[96:], max_bytes=1, temperature=0)[0] == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": b""}, "prompt must hold at least one byte"),
        ({"max_bytes": -1}, "max_bytes must not be negative. Got -1"),
        ({"temperature": -0.1}, "temperature must be finite and not negative. Got -0.1"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative. Got nan"),
        ({"top_k": 0}, "top_k must be at least 1. Got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1. Got 0.0"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1. Got nan"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\). Got -1"),
    ],
)
def test_arguments_out_of_range_are_named(
    model: LongNetLM, options: dict[str, object], says: str
) -> None:
    arguments = {"prompt": b"a", "max_bytes": 1, **options}
    with pytest.raises(ValueError, match=says):
        generate(model, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "options", "says"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), {}, r"N >= 1. Got torch.int64 of \(2, 0\)"),
        (torch.zeros(3, dtype=torch.int64), {}, r"shape \(B, N\) with N >= 1.*\(3,\)"),
        (torch.zeros(2, 3), {}, r"tokens must be int64.*torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), {"max_new_tokens": -3}, "not be negative. Got -3"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            {"stop_tokens": [3, 256]},
            r"stop_tokens must be in \[0, 256\)\. Got 256",
        ),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            {"key_padding_mask": torch.tensor([[False] * 3, [True] * 3])},
            "key_padding_mask must leave a token in each row",
        ),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
            "key_padding_mask must have shape",
        ),
    ],
)
def test_tokens_that_cannot_be_continued_are_named(
    model: LongNetLM, tokens: torch.Tensor, options: dict[str, object], says: str
) -> None:
    arguments = {"max_new_tokens": 1, **options}
    with pytest.raises(ValueError, match=says):
        generate_tokens(model, tokens, **arguments)  # type: ignore[arg-type]  # wrong


def test_xpos_ends_where_its_factors_do(tiny_model: LongNetConfig) -> None:
    config = tiny_model.model_copy(update={"positions": "xpos", "xpos_scale_base": 2})
    tokens = torch.zeros(1, 100, dtype=torch.int64)
    model = LongNetLM(config)
    assert generate_tokens(model, tokens, max_new_tokens=24).shape == (1, 24)
    with pytest.raises(ValueError, match=r"must be at most 124 together.*Got 125"):
        generate_tokens(model, tokens, max_new_tokens=25)


def test_bytes_need_a_model_of_bytes(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model.model_copy(update={"vocab_size": 257}))
    with pytest.raises(ValueError, match=r"vocabulary of 256 bytes\. Got 257"):
        generate(model, b"a", max_bytes=1)


def test_caches_are_one_a_layer(model: LongNetLM) -> None:
    caches = [DilatedKVCache(model.config.pattern)] * 3
    with pytest.raises(ValueError, match=r"caches must be one a layer \(2\). Got 3"):
        model(torch.zeros(1, 2, dtype=torch.int64), caches=caches)


def test_a_block_sparse_model_trains_and_generates_at_any_length() -> None:
    sparse = pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=23, embed_dim=16, num_heads=2, num_layers=2, segment_lengths=(8,),
        dilation_rates=(1,), context=8,
    )  # fmt: skip
    layout = sparse.layouts.sliding_window(8, 3, block_size=4)
    model = LongNetLM(config, attention=lambda: sparse.BlockSparseAttention(layout)).double()
    tokens = torch.randint(23, (2, 8))
    for length in (2, 5, 8):
        model.loss(tokens[:, :length]).backward()
    assert model.can_cache
    added = generate_tokens(
        model, tokens[:, :4], max_new_tokens=3, temperature=0, use_cache=False
    )  # fmt: skip
    seen = tokens[:, :4]
    for step in range(3):
        seen = torch.cat([seen, model(seen)[:, -1:].argmax(-1)], 1)
        assert torch.equal(added[:, step], seen[:, -1])


def test_block_sparse_attention_decodes_as_the_whole_sequence() -> None:
    sparse = pytest.importorskip("dilated_sparse")
    config = LongNetConfig(
        embed_dim=16, num_layers=2, num_heads=2, vocab_size=23,
        segment_lengths=(8,), dilation_rates=(1,), context=16,
    )  # fmt: skip
    layout = sparse.layouts.longformer(8, 3, 2, block_size=4)
    model = LongNetLM(config, attention=lambda: sparse.BlockSparseAttention(layout)).double()
    tokens = torch.randint(23, (2, 19), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for cuts in ([1] * 19, [7] + [1] * 12, [5, 6, 8]):
            caches = model.new_caches(19)
            found = torch.cat([model(x, caches=caches) for x in tokens.split(cuts, 1)], 1)
            torch.testing.assert_close(found, model(tokens), rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match=r"must end within the cache's 19 positions"):
            model(tokens[:, :1], caches=caches)
        with pytest.raises(ValueError, match="within the cache's 8 positions"):
            model(tokens, caches=model.new_caches())
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, :4] = True
    kept, anew = (
        generate_tokens(
            model, tokens[:, :9], max_new_tokens=10, key_padding_mask=padding, use_cache=use_cache,
            stop_tokens=[3], seed=4,
        )
        for use_cache in (None, False)
    )  # fmt: skip
    assert torch.equal(kept, anew)


def test_attention_without_decoding_state_generates_anew_each_time() -> None:
    sparse = pytest.importorskip("dilated_sparse")
    config = LongNetConfig(
        embed_dim=16, num_layers=1, num_heads=2, vocab_size=23, segment_lengths=(8,),
        dilation_rates=(1,), context=16,
    )  # fmt: skip
    layout = sparse.layouts.sliding_window(8, 3, block_size=4)
    model = LongNetLM(
        config, attention=lambda: sparse.BlockSparseDilatedAttention(config.pattern, layout)
    )
    assert not model.can_cache
    tokens = torch.randint(23, (2, 4))
    assert generate_tokens(model, tokens, max_new_tokens=2).shape == (2, 2)
    with pytest.raises(ValueError, match="attention must be dilated or block-sparse"):
        generate_tokens(model, tokens, max_new_tokens=1, use_cache=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_chance_draws_what_cannot_be_drawn(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, -torch.inf, -torch.inf]])
    for chance, token in ((0.0, 0), (0.999, 2), (1.0, 2)):  # 1.0: the highest rounds to it
        assert generation.Draw()(logits, torch.tensor([chance], dtype=dtype)).item() == token


@pytest.mark.parametrize("positions", ["rotary", "xpos", "none", "learned", "sinusoidal"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_no_tokens_give_no_logits(
    positions: str, shape: tuple[int, int], tiny_model: LongNetConfig
) -> None:
    model = LongNetLM(tiny_model.model_copy(update={"positions": positions})).eval()
    tokens = torch.zeros(shape, dtype=torch.int64)
    caches = model.new_caches()
    logits = model(tokens)
    assert logits.shape == (*shape, 256)
    logits.sum().backward()
    with torch.no_grad():
        assert model(tokens, caches=caches).shape == (*shape, 256)
    assert {cache.length for cache in caches} == {shape[1]}


@pytest.mark.parametrize("first", [0, 5, 8, 16, 21])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_call_that_fails_in_any_layer_leaves_all_caches_where_they_were(
    first: int, steps: int, ragged: bool, tiny_model: LongNetConfig
) -> None:
    torch.manual_seed(0)
    model = LongNetLM(tiny_model, dtype=torch.float64).eval()
    tokens = torch.randint(256, (2, 29))
    caches = model.new_caches()
    lengths = torch.tensor([first, max(first - 3, 0)]) if ragged else None
    stop = first + steps
    with torch.no_grad():
        if first:
            model.hidden_states(tokens[:, :first], caches=caches, lengths=lengths)
        before = [cache.lengths.tolist() for cache in caches]
        # Where the last layer, its feed-forward part, the last norm and the head are.
        for part in (model.blocks[0].feed_forward, model.blocks[1], model.norm, model.head):
            handle = part.register_forward_pre_hook(_fail)
            with pytest.raises(MemoryError):
                model(tokens[:, first:stop], caches=caches)
            handle.remove()
            assert [cache.lengths.tolist() for cache in caches] == before
            with pytest.raises(ValueError, match=r"between 0 and|multiple of segment"):
                caches[0].truncate(stop)
        found = model(tokens[:, first:], caches=caches)
        for row, real in enumerate(before[0] if before[0] else [0, 0]):
            whole = torch.cat([tokens[row, :real], tokens[row, first:]])[None]
            expected = model(whole)[0, real:]
            torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-12)


def _fail(*_: object) -> None:
    raise MemoryError


def test_a_call_that_failed_takes_no_row_that_is_gone_for_held(tiny_model: LongNetConfig) -> None:
    model = LongNetLM(tiny_model).eval()
    caches = model.new_caches()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64), caches=caches)
        handle = model.norm.register_forward_pre_hook(_fail)
        with pytest.raises(MemoryError):
            model(torch.zeros(1, 1, dtype=torch.int64), caches=caches)
        handle.remove()
    # The row that failed took the place of the first one of the segment before.
    with pytest.raises(ValueError, match="no longer held"):
        caches[0].truncate(7)


@pytest.mark.parametrize("first", [0, 9])
def test_a_call_that_fails_leaves_caches_of_layouts_where_they_were(first: int) -> None:
    sparse = pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    layout = sparse.layouts.sliding_window(16, window=4, block_size=2).causal()
    config = LongNetConfig(embed_dim=16, num_heads=2, num_layers=2, context=16)
    model = LongNetLM(config, attention=lambda: sparse.BlockSparseAttention(layout)).double()
    model.eval()
    tokens, caches = torch.randint(256, (2, 14)), model.new_caches(14)
    with torch.no_grad():
        if first:
            model(tokens[:, :first], caches=caches)
        handle = model.norm.register_forward_pre_hook(_fail)
        with pytest.raises(MemoryError):
            model(tokens[:, first:], caches=caches)
        handle.remove()
        assert {cache.length for cache in caches} == {first}
        found, expected = model(tokens[:, first:], caches=caches), model(tokens)[:, first:]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
