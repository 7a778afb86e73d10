"""Models on a GPU: what they compute on the CPU, within the precision of their dtype."""

import copy

import pytest
import torch

from dilated_core import DilatedPattern
from dilated_factory import (
    LongNetConfig,
    LongNetLM,
    SlideEncoder,
    SlideEncoderConfig,
    generate_tokens,
    register_with_transformers,
    replace_attention,
)
from dilated_factory.models import generation
from dilated_factory.models.stack import Checkpointing
from dilated_testing import relative_error

pytestmark = pytest.mark.gpu

CONFIG = LongNetConfig(
    vocab_size=61, embed_dim=64, num_heads=4, num_layers=2, segment_lengths=(32, 96, 256),
    dilation_rates=(1, 2, 4), context=512, positions="xpos",
)  # fmt: skip


@pytest.fixture
def model() -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(CONFIG)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_loss_and_gradients_are_those_of_the_cpu(
    model: LongNetLM, dtype: torch.dtype, bound: float
) -> None:
    tokens = torch.randint(61, (2, 302))
    moved = copy.deepcopy(model).to("cuda", dtype)
    expected = model.double().loss(tokens)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = moved.loss(tokens.cuda())
    gradients = torch.autograd.grad(found, list(moved.parameters()))
    assert relative_error(found.cpu().double(), expected) < bound
    for (name, _), one, two in zip(model.named_parameters(), gradients, wanted, strict=True):
        error = (one.cpu().double() - two).norm() / two.norm()
        # A key bias moves all scores of a query alike but for xPos: its gradient is nearly zero.
        assert error < 4 * bound or "k_proj.bias" in name, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("checkpointing", [False, True, "pointwise", "selective"])
def test_compiled_layers_are_eager_ones_and_no_step_waits(
    model: LongNetLM, checkpointing: Checkpointing
) -> None:
    torch._dynamo.reset()
    eager, compiled = model.cuda(), copy.deepcopy(model)
    compiled.activation_checkpointing = checkpointing
    compiled.compile_blocks()
    batches = torch.randint(61, (3, 2, 302), device="cuda")

    def step(one: LongNetLM, tokens: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = one.loss(tokens)
        return [loss.detach(), *torch.autograd.grad(loss, list(one.parameters()))]

    for one in (eager, compiled):
        step(one, batches[0])
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch._dynamo.config.patch(error_on_recompile=True):
            pairs = [(step(eager, tokens), step(compiled, tokens)) for tokens in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for expected, found in pairs:
        for name, one, two in zip(names, found, expected, strict=True):
            assert relative_error(one, two) < 5e-2 or "k_proj.bias" in name, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_layers_keep_less_where_parts_are_recomputed() -> None:
    torch._dynamo.reset()
    config = LongNetConfig(
        embed_dim=512, num_heads=8, num_layers=4, segment_lengths=(512, 4096),
        dilation_rates=(1, 4), context=16384,
    )  # fmt: skip
    tokens, kept = torch.randint(256, (1, 16385), device="cuda"), []
    choices: tuple[Checkpointing, ...] = (False, "pointwise", "selective")
    for checkpointing in choices:
        model = LongNetLM(config, activation_checkpointing=checkpointing, device="cuda")
        model.compile_blocks()
        for _ in range(2):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                before = torch.cuda.memory_allocated()
                loss = model.loss(tokens)
            kept.append(torch.cuda.memory_allocated() - before)
            loss.backward()
            model.zero_grad()
    # Tensors of N * E in bfloat16 a layer; the weights in bfloat16 are beside them.
    for found, tensors in zip(kept[1::2], (18, 11, 7), strict=True):
        assert found < 4 * (tensors + 1) * 2 * 16384 * 512 + 2**26


def test_the_cache_changes_no_likeliest_token(model: LongNetLM) -> None:
    moved, prompt = model.to("cuda", torch.float64), torch.randint(61, (3, 117))
    found = [
        generate_tokens(moved, prompt, max_new_tokens=30, temperature=0, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    assert found[0].device == prompt.device


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("stops", [(), tuple(range(30))], ids=["", "stops"])
@pytest.mark.parametrize("positions", ["rotary", "xpos", "none"])
def test_a_graph_of_a_step_generates_what_steps_do(
    options: dict[str, float],
    stops: tuple[int, ...],
    positions: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    moved = LongNetLM(CONFIG.model_copy(update={"positions": positions})).cuda()
    prompt, columns = torch.randint(61, (3, 117)), torch.arange(117)
    mask = torch.stack([columns < 0, columns < 19, columns >= 70])
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))
    )

    def added() -> torch.Tensor:
        return generate_tokens(
            moved, prompt, max_new_tokens=60, key_padding_mask=mask, stop_tokens=stops, seed=3,
            **options,  # type: ignore[arg-type] # they fit
        )  # fmt: skip

    found = added()
    assert replays
    replays.clear()
    monkeypatch.setattr(generation, "_STEPS_WORTH_A_GRAPH", 1000)
    assert torch.equal(added(), found)
    assert not replays
    moved.cpu()
    assert (added() == found).float().mean() > 0.9  # float32: a draw may fall on the other side


def test_bytes_of_state_stay_with_the_context_and_a_graph() -> None:
    moved = LongNetLM(CONFIG).to("cuda", torch.bfloat16)
    caches = moved.new_caches()
    sizes = set()
    with torch.no_grad():
        for length in (300, 8192 - 300):
            moved.hidden_states(torch.randint(61, (1, length)).cuda(), caches=caches)
            sizes.add(sum(cache.nbytes for cache in caches))
        token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        moved.hidden_states(token, caches=caches)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            moved.hidden_states(token, caches=caches)
        for _ in range(300):
            graph.replay()
        sizes.add(sum(cache.nbytes for cache in caches))
    assert {cache.length for cache in caches} == {8493}
    assert len(sizes) == 1


def test_a_slide_encoder_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    encoder = SlideEncoder(SlideEncoderConfig(num_layers=2)).eval()
    tiles, coords = torch.randn(1, 3001, 1536), torch.randint(256_000, (1, 3001, 2))
    with torch.no_grad():
        (expected,) = encoder(tiles, coords)
        (found,) = encoder.cuda()(tiles.cuda(), coords.cuda())
    assert relative_error(found.cpu(), expected) < 5e-3


def test_a_model_of_transformers_is_that_of_the_cpu() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name = "dilated_gpu_test"
    register_with_transformers(DilatedPattern([32, 96, 256], [1, 2, 4]), name)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = name
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    tokens, mask = torch.randint(1, 61, (2, 301)), torch.ones(2, 301, dtype=torch.int64)
    mask[0, :77] = 0
    with torch.no_grad():
        expected = llama(tokens, attention_mask=mask).logits
        llama = llama.cuda()
        found = llama(tokens.cuda(), attention_mask=mask.cuda()).logits.cpu()
    assert relative_error(found[mask.bool()], expected[mask.bool()]) < 5e-3
    longer = llama.generate(tokens.cuda(), attention_mask=mask.cuda(), max_new_tokens=5)
    assert longer.shape == (2, 306)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_a_replaced_encoder_is_that_of_the_cpu_in_both_modes(
    norm_first: bool, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        64, 4, 96, 0.0, batch_first=True, norm_first=norm_first
    )
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    replace_attention(model, DilatedPattern([16, 100], [1, 3]))
    moved, x = copy.deepcopy(model).to("cuda", dtype), torch.randn(3, 77, 64)
    padding = torch.arange(77) >= torch.tensor([[77], [50], [61]])
    causal = torch.ones(77, 77).triu(1).bool()
    for training in (True, False):
        for mask in (None, causal):
            with torch.no_grad():
                expected = model.double().train(training)(x.double(), mask, padding)
                cuda_mask = None if mask is None else mask.cuda()
                found = moved.train(training)(x.to("cuda", dtype), cuda_mask, padding.cuda())
            assert found.isfinite().all()
            assert relative_error(found.cpu().double()[~padding], expected[~padding]) < bound
