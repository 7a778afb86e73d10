"""`LongNetForCausalLM` in transformers: files, generation, the state behind its cache.

Of transformers' generation tests (GenerationTesterMixin) there is one of ours for each, or the
reason why none can be. That mixin is not in transformers' wheel, so its cases stand here by name.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.models.generation import generate_tokens

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_ALIKE = "test_their_generation_is_the_same_with_our_state_and_without"
_OUTPUTS = "test_dict_outputs_have_the_shapes_of_theirs_and_change_no_token"
_TAKES_BACK = "test_what_takes_tokens_back_says_that_it_needs_another_cache"
_MOVED = "not: moved out of transformers, to code that is fetched when it is called"
_NO_EMBEDDINGS = "not: the model takes tokens alone; test_embeddings_as_input_are_refused"
_NO_WEIGHTS = "not: no backend makes a matrix of attention weights"
_OWN_CACHE = "not: the state is of one constant size; test_their_caches_are_not_taken"

CASES = {
    "test_greedy_generate": _ALIKE,
    "test_greedy_generate_dict_outputs": _OUTPUTS,
    "test_greedy_generate_dict_outputs_use_cache": _OUTPUTS,
    "test_sample_generate": _ALIKE,
    "test_sample_generate_dict_output": _OUTPUTS,
    "test_beam_search_generate": _ALIKE,
    "test_beam_search_generate_dict_output": _OUTPUTS,
    "test_beam_search_generate_dict_outputs_use_cache": _OUTPUTS,
    "test_beam_sample_generate": _ALIKE,
    "test_beam_sample_generate_dict_output": _OUTPUTS,
    "test_generate_without_input_ids": "test_without_tokens_the_first_one_begins",
    "test_left_padding_compatibility": "test_padding_on_the_left_changes_no_logits",
    "test_generate_continue_from_past_key_values": (
        "test_a_returned_state_is_continued_and_its_bytes_stay"
    ),
    "test_past_key_values_format": "test_the_state_follows_what_transformers_does_to_a_cache",
    "test_generate_methods_with_logits_to_keep": "test_logits_of_some_positions_and_tuples",
    "test_inherits_generation_mixin": "test_our_model_generates_what_our_own_generation_does",
    "test_logits_processors": "test_their_logits_processors_see_our_logits",
    "test_stopping_criteria_and_streamers": "test_streamers_and_stopping_criteria_are_theirs",
    "test_classifier_free_guidance": _ALIKE,
    "test_assisted_decoding_matches_greedy_search": _TAKES_BACK,
    "test_assisted_decoding_sample": _TAKES_BACK,
    "test_assisted_decoding_with_early_exit": _TAKES_BACK,
    "test_prompt_lookup_decoding_matches_greedy_search": _TAKES_BACK,
    "test_contrastive_generate": _MOVED,
    "test_dola_decoding_sample": _MOVED,
    "test_group_beam_search_generate": _MOVED,
    "test_constrained_beam_search_generate": _MOVED,
    "test_generate_from_inputs_embeds": _NO_EMBEDDINGS,
    "test_generate_from_random_inputs_embeds": _NO_EMBEDDINGS,
    "test_generate_continue_from_inputs_embeds": _NO_EMBEDDINGS,
    "test_generate_from_inputs_embeds_with_static_cache": _NO_EMBEDDINGS,
    "test_generate_with_static_cache": _OWN_CACHE,
    "test_generate_with_quant_cache": _OWN_CACHE,
    "test_offloaded_cache_implementation": _OWN_CACHE,
    "test_generate_compile_model_forward_fullgraph": "not: it compiles for a static cache alone",
    "test_generate_compilation_all_outputs": "not: it compiles for a static cache alone",
    "test_attention_outputs": _NO_WEIGHTS,
    "test_generate_with_head_masking": _NO_WEIGHTS,
    "test_eager_matches_sdpa_generate": "not: the attention is ours, and has no such choice",
    "test_flash_attention_2_continue_generate_with_position_ids": (
        "not: the attention is ours, and has no such choice"
    ),
    "test_model_parallel_beam_search": "not: the model is not split over devices",
    "test_continuous_batching": "not: it needs transformers' paged cache",
}


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False])
def test_our_model_saves_and_loads_as_one_of_theirs(tied: bool, tmp_path: Path) -> None:
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    config = LongNetConfig(
        vocab_size=61, embed_dim=32, num_heads=4, num_layers=2, segment_lengths=(5, 12, 40),
        dilation_rates=(1, 2, 3), context=37, positions="xpos", tie_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump()))
    model.eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded: Any = LongNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.longnet.config == config
    assert (loaded.longnet.head.weight is loaded.longnet.embedding.weight) == tied

    batch, mask = tokens(37), torch.arange(37).expand(2, -1) > 4
    out = loaded(batch, attention_mask=mask.long(), labels=batch.masked_fill(~mask, -100))
    assert torch.equal(out.logits, model(batch, attention_mask=mask).logits)
    plain = LongNetLM(config).eval()
    plain.load_state_dict(loaded.longnet.state_dict())
    targets = batch.masked_fill(~mask, -100)[:, 1:]
    expected = plain.loss(batch[:, :-1], targets, key_padding_mask=~mask[:, :-1])
    torch.testing.assert_close(out.loss, expected)


def longnet(seed: int = 0) -> Any:
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    config = LongNetConfig(
        vocab_size=61, embed_dim=32, num_heads=4, num_layers=2, segment_lengths=(5, 12, 40),
        dilation_rates=(1, 2, 3), context=37,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: Any = LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump()))
    model.generation_config.pad_token_id = 0
    return model.eval().double().requires_grad_(False)


RAGGED = torch.stack([torch.arange(17) >= first for first in (4, 0)]).long()


def test_our_model_generates_what_our_own_generation_does() -> None:
    model, batch = longnet(), tokens(17)
    found = model.generate(batch, attention_mask=RAGGED, max_new_tokens=30, do_sample=False)
    expected = generate_tokens(
        model.longnet, batch, key_padding_mask=RAGGED == 0, max_new_tokens=30, temperature=0
    )
    assert torch.equal(found[:, 17:], expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 7},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "eos_token_id": list(range(1, 20))},
        {"eos_token_id": list(range(1, 20)), "repetition_penalty": 1.3},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.8},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_their_generation_is_the_same_with_our_state_and_without(options: dict[str, Any]) -> None:
    model, found = longnet(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(
            model.generate(
                tokens(17), attention_mask=RAGGED, max_new_tokens=30, use_cache=use_cache, **options
            )
        )
    assert torch.equal(*found)


def test_a_returned_state_is_continued_and_its_bytes_stay() -> None:
    from dilated_factory.interop.transformers import CACHE, LongNetCache

    model, batch = longnet(), tokens(17)
    whole = model.generate(batch, attention_mask=RAGGED, max_new_tokens=30, do_sample=False)
    first = model.generate(
        batch, attention_mask=RAGGED, max_new_tokens=11, do_sample=False,
        return_dict_in_generate=True, output_hidden_states=True, output_logits=True,
    )  # fmt: skip
    cache = getattr(first, CACHE)
    assert isinstance(cache, LongNetCache)
    assert cache.get_seq_length() == 27
    nbytes = cache.nbytes
    mask = torch.cat((RAGGED, torch.ones(2, 11, dtype=torch.int64)), 1)
    rest = model.generate(
        first.sequences, attention_mask=mask, max_new_tokens=19, do_sample=False, **{CACHE: cache}
    )
    assert torch.equal(rest, whole)
    assert cache.nbytes == nbytes > 0
    assert [tuple(x.shape) for x in first.hidden_states[1]] == [(2, 1, 32)] * 3
    logits = model.longnet.head(first.hidden_states[1][-1][:, 0])
    torch.testing.assert_close(logits.float(), first.logits[1])

    chunks = model.generate(
        batch, attention_mask=torch.ones_like(batch), max_new_tokens=5, do_sample=False,
        prefill_chunk_size=6, **{CACHE: LongNetCache(model)},
    )  # fmt: skip
    assert torch.equal(chunks, model.generate(batch, max_new_tokens=5, do_sample=False))


def test_streamers_and_stopping_criteria_are_theirs() -> None:
    model, batch, seen = longnet(), tokens(17)[:1], []

    class Streamer(transformers.generation.BaseStreamer):  # type: ignore[misc] # it has no types
        def put(self, value: Tensor) -> None:
            seen.append(value.flatten().tolist())

        def end(self) -> None:
            seen.append([])

    class Ends(transformers.StoppingCriteria):  # type: ignore[misc] # it has no types
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 21)

    found = model.generate(
        batch, max_new_tokens=30, do_sample=False, streamer=Streamer(), stopping_criteria=[Ends()]
    )
    assert found.shape == (1, 21)
    assert [token for part in seen[1:] for token in part] == found[0, 17:].tolist()
    assert seen[-1] == []


def test_the_state_follows_what_transformers_does_to_a_cache() -> None:
    from dilated_factory.interop.transformers import CACHE, LongNetCache

    model, batch = longnet(), tokens(30)
    cache = LongNetCache(model)

    def step(rows: Tensor) -> Tensor:
        logits: Tensor = model(rows, **{CACHE: cache}).logits
        return logits

    step(batch[:, :23])
    cache.crop(-2)
    assert cache.get_seq_length() == 21
    assert cache.get_mask_sizes(3, 0) == (24, 0)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    rows = batch[torch.tensor([1, 0, 1])]
    torch.testing.assert_close(step(rows[:, 21:]), model(rows).logits[:, 21:], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="no longer held"):
        cache.crop(-8)
    assert cache.get_seq_length() == 30
    cache.reset()
    torch.testing.assert_close(step(rows), model(rows).logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match="serves LongNetForCausalLM alone"):
        cache.update(batch, batch, 0)


def test_what_our_model_cannot_do_is_named() -> None:
    from dilated_factory.interop import transformers as ours

    model, batch = longnet(), tokens(17)
    with pytest.raises(TypeError, match=rf"{ours.CACHE} must be a LongNetCache. Got DynamicCache"):
        model(batch, **{ours.CACHE: transformers.DynamicCache()})
    if ours.CACHE == "cache":
        with pytest.warns(FutureWarning, match="past_key_values is now called cache"):
            model(batch, past_key_values=ours.LongNetCache(model))
        # Assisted generation takes tokens back.
        with pytest.raises(RuntimeError, match=r"(?i)assisted decoding requires a cache"):
            model.generate(batch[:1], max_new_tokens=9, prompt_lookup_num_tokens=3)


def test_logits_of_some_positions_and_tuples() -> None:
    model, batch = longnet(), tokens(17)
    whole = model(batch).logits
    last = torch.tensor([3, 16])
    torch.testing.assert_close(model(batch, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(batch, logits_to_keep=last).logits, whole[:, last])
    assert torch.equal(model(batch, return_dict=False)[0], whole)


def test_auto_classes_know_our_model_after_one_call(tmp_path: Path) -> None:
    from dilated_factory.interop.transformers import LongNetForCausalLM, register_longnet

    longnet().save_pretrained(tmp_path)
    register_longnet()
    register_longnet()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LongNetForCausalLM
    assert transformers.AutoConfig.from_pretrained(tmp_path).longnet == loaded.config.longnet
    batch = tokens(17)
    assert torch.equal(
        loaded.generate(batch, max_new_tokens=5, do_sample=False),
        longnet().generate(batch, max_new_tokens=5, do_sample=False),
    )


def test_each_case_has_a_test_or_a_reason() -> None:
    known = {*globals()}
    for case, ours in CASES.items():
        tests = [word for word in ours.split() if word.startswith("test_")]
        assert tests or ours.startswith("not: "), case
        assert set(tests) <= known, case


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_dict_outputs_have_the_shapes_of_theirs_and_change_no_token(
    beams: int, sampling: bool, use_cache: bool
) -> None:
    model, options = longnet(), {"num_beams": beams, "do_sample": sampling, "use_cache": use_cache}
    found = []
    for extra in ({}, {"return_dict_in_generate": True}):
        torch.manual_seed(3)
        asked = dict.fromkeys(
            ("output_scores", "output_logits", "output_hidden_states"), bool(extra)
        )
        found.append(
            model.generate(
                tokens(17), attention_mask=RAGGED, max_new_tokens=5, **options, **asked, **extra
            )
        )
    plain, whole = found
    assert torch.equal(plain, whole.sequences)
    rows = 2 * beams
    assert [tuple(x.shape) for x in whole.scores] == [(rows, 61)] * 5
    assert [tuple(x.shape) for x in whole.logits] == [(rows, 61)] * 5
    lengths = [17, 1, 1, 1, 1] if use_cache else [17, 18, 19, 20, 21]
    # The prompt goes through the model before there are beams.
    sizes = [[tuple(x.shape[1:]) for x in step] for step in whole.hidden_states]
    assert sizes == [[(length, 32)] * 3 for length in lengths]
    if beams > 1:
        assert whole.sequences_scores.shape == (2,)
        assert whole.beam_indices.shape[0] == 2


def test_without_tokens_the_first_one_begins() -> None:
    model = longnet()
    found = model.generate(bos_token_id=3, max_new_tokens=9, do_sample=False)
    first = torch.tensor([[3]])
    added = generate_tokens(model.longnet, first, max_new_tokens=9, temperature=0)
    assert torch.equal(found, torch.cat((first, added), 1))


def test_padding_on_the_left_changes_no_logits() -> None:
    model, batch = longnet(), tokens(17)
    padded = torch.cat((torch.zeros(2, 6, dtype=torch.int64), batch), 1)
    mask = torch.cat((torch.zeros(2, 6, dtype=torch.int64), torch.ones_like(batch)), 1)
    logits = model(padded, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(logits, model(batch).logits[:, -1], rtol=1e-10, atol=1e-12)
    found = model.generate(padded, attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert torch.equal(found[:, 6:], model.generate(batch, max_new_tokens=9, do_sample=False))


def test_their_logits_processors_see_our_logits() -> None:
    model, batch = longnet(), tokens(17)

    class Only(transformers.LogitsProcessor):  # type: ignore[misc] # it has no types
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(torch.arange(61) != input_ids.shape[1], -torch.inf)

    found = model.generate(batch, max_new_tokens=4, logits_processor=[Only()], do_sample=False)
    assert found[:, 17:].tolist() == [[17, 18, 19, 20]] * 2
    options: dict[str, Any] = {
        "do_sample": True, "min_p": 0.01, "typical_p": 0.95, "no_repeat_ngram_size": 2,
        "suppress_tokens": list(range(30)), "min_new_tokens": 12, "eos_token_id": 45,
        "temperature": 2.0,
    }  # fmt: skip
    added = model.generate(batch, max_new_tokens=12, **options)[:, 17:]
    assert added.shape == (2, 12)
    assert added.min() >= 30
    assert not (added[:, :11] == 45).any()


def test_embeddings_as_input_are_refused() -> None:
    with pytest.raises(TypeError, match="inputs_embeds"):
        longnet().generate(inputs_embeds=torch.randn(2, 4, 32).double(), max_new_tokens=5)


def test_their_caches_are_not_taken() -> None:
    model, batch = longnet(), tokens(17)
    plain = model.generate(batch, max_new_tokens=5, do_sample=False)
    for kind in ("static", "offloaded"):
        found = model.generate(batch, max_new_tokens=5, do_sample=False, cache_implementation=kind)
        assert torch.equal(found, plain)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"assistant_model": None}],
    ids=str,
)
def test_what_takes_tokens_back_says_that_it_needs_another_cache(options: dict[str, Any]) -> None:
    from dilated_factory.interop import transformers as ours

    if ours.CACHE != "cache":
        pytest.skip("transformers looks for a cache before assisted generation from 5.24 on")
    if "assistant_model" in options:
        options = {"assistant_model": longnet(1)}
    with pytest.raises(RuntimeError, match=r"(?i)assisted decoding requires a cache"):
        longnet().generate(tokens(17)[:1], max_new_tokens=9, do_sample=False, **options)
