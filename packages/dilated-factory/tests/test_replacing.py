"""`replace_attention`: others' models keep their weights and calls, and attend by a pattern."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from dilated_core import DilatedPattern, reference_attention
from dilated_factory import Replaced, replace_attention
from dilated_factory.interop.drop_in import PatternMultiheadAttention, PatternViTAttention

WHOLE = DilatedPattern([64], [1])
HIDING = DilatedPattern([3, 8], [1, 2])
LENGTH, WIDTH, HEADS = 13, 20, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [7], [11]])


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64, **options}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 28, **options)
    nested = options["batch_first"] and options.get("bias", True)  # it warns where it cannot
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    return randomised(model)


def randomised(model: Any) -> Any:
    """Give weights that make attention matter, biases too."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def replaced(model: nn.Module, pattern: Any = WHOLE) -> Any:
    return replace_attention(copy.deepcopy(model), pattern).model


def rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_alike(
    one: nn.Module, other: nn.Module, call: Callable[[Any], Tensor], counted: Any = ...
) -> None:
    """Outputs and the gradients of all weights are equal to 1e-10, in both modes."""
    for training in (True, False):
        outs = [call(model.train(training)) for model in (one, other)]
        assert (outs[0] - outs[1])[counted].abs().max() < 1e-10
        assert outs[0][counted].std() > 0.1
        for model, out in zip((one, other), outs, strict=True):
            model.zero_grad()
            out[counted].square().sum().backward()
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert (a.grad - b.grad).abs().max() < 1e-10 * a.grad.abs().max().clamp(min=1), name
    with torch.no_grad():  # where torch would leave for its kernels
        outs = [call(model.eval()) for model in (one, other)]
    assert (outs[0] - outs[1])[counted].abs().max() < 1e-10


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("asked", ["all", "padding", "causal", "causal by a hint", "both"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_an_encoder_with_one_segment_is_what_it_was(norm_first: bool, asked: str) -> None:
    model = encoder(norm_first=norm_first)
    options: dict[str, Any] = {}
    if asked in ("padding", "both"):
        options["src_key_padding_mask"] = PADDING
    if asked in ("causal", "both"):
        options["mask"] = CAUSAL.isinf() if asked == "both" else CAUSAL
    theirs = dict(options, mask=CAUSAL) if asked == "causal by a hint" else options
    ours = dict(options, is_causal=True) if asked == "causal by a hint" else options
    new, x = replaced(model), rows(3, LENGTH, WIDTH)
    counted = ~PADDING if "src_key_padding_mask" in options else ...
    assert_alike(model, new, lambda m: m(x, **(ours if m is new else theirs)), counted)


def test_layers_that_are_not_batch_first_without_biases_and_inputs_without_a_batch() -> None:
    model = encoder(batch_first=False)
    x = rows(LENGTH, 3, WIDTH)
    assert_alike(model, replaced(model), lambda m: m(x, src_key_padding_mask=PADDING), (~PADDING).T)
    assert_alike(model, replaced(model), lambda m: m(x[:, 0], mask=CAUSAL))
    bare = encoder(bias=False).layers[0]
    assert_alike(bare, replaced(bare), lambda m: m(x.transpose(0, 1)))


def test_a_decoder_attends_to_itself_by_the_pattern_and_across_where_it_is_named() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 28, batch_first=True, dropout=0.0, dtype=torch.float64
    )
    layer = randomised(layer)
    target, memory = rows(3, LENGTH, WIDTH), rows(3, 17, WIDTH)

    def call(model: nn.Module) -> Tensor:
        out = model(target, memory, tgt_mask=CAUSAL.isinf(), tgt_key_padding_mask=PADDING)
        assert isinstance(out, Tensor)
        return out

    assert_alike(layer, replaced(layer), call, ~PADDING)
    both = replaced(layer, {"*": WHOLE})
    assert isinstance(both.multihead_attn, PatternMultiheadAttention)
    assert_alike(layer, both, call, ~PADDING)
    assert type(replaced(layer).multihead_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("is_causal", [True, False])
def test_multihead_attention_by_a_pattern_is_the_definition(is_causal: bool) -> None:
    old = randomised(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64))
    new = replaced(old, HIDING)
    x, others = rows(2, LENGTH, WIDTH), rows(2, LENGTH, WIDTH).flip(1)
    ignored = PADDING[1:]
    out, weights = new(x, others, x, ignored, need_weights=False, is_causal=is_causal)
    q, k, v = (
        nn.functional.linear(y, w, b).unflatten(-1, (HEADS, -1))
        for y, w, b in zip(
            (x, others, x), old.in_proj_weight.chunk(3), old.in_proj_bias.chunk(3), strict=True
        )
    )
    expected = reference_attention(q, k, v, HIDING, is_causal=is_causal, key_padding_mask=ignored)
    assert isinstance(expected, Tensor)
    assert weights is None
    assert (out - old.out_proj(expected.flatten(-2))).abs().max() < 1e-10


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_the_pattern_holds_in_eval_mode_too_and_padding_gives_numbers() -> None:
    model = replaced(encoder(), HIDING)
    again = nn.TransformerEncoder(copy.deepcopy(model.layers[0]), 2)  # made of a replaced layer
    again.load_state_dict(model.state_dict())
    x, padding = rows(4, LENGTH, WIDTH), torch.cat([PADDING, torch.ones(1, LENGTH).bool()])
    with torch.no_grad():
        expected = model.train()(x, src_key_padding_mask=padding)
        for each in (model, again):
            assert torch.equal(each.eval()(x, src_key_padding_mask=padding), expected)
        assert expected.isfinite().all()
        assert (encoder().eval()(x) - model(x)).abs().max() > 1e-3


def test_weights_are_the_same_objects_and_state_dicts_go_both_ways() -> None:
    model = encoder()
    before, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    replace_attention(model, HIDING)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(state)
    encoder().load_state_dict(model.state_dict())
    model.load_state_dict(state)


def test_a_replaced_model_is_copied_pickled_compiled_and_replaced_again() -> None:
    model, x = replaced(encoder(), HIDING).eval(), rows(3, LENGTH, WIDTH)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        for each in (copy.deepcopy(model), loaded):
            assert torch.equal(each(x, src_key_padding_mask=PADDING), expected)
        dense = replaced(replaced(model, WHOLE), HIDING)
        assert torch.equal(dense(x, src_key_padding_mask=PADDING), expected)


def test_one_graph_holds_a_replaced_layer_and_refuses_wrong_masks() -> None:
    model, x = replaced(encoder(), HIDING).eval().layers[0], rows(3, LENGTH, WIDTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    float_padding = torch.zeros(3, LENGTH, dtype=x.dtype).masked_fill(PADDING, -torch.inf)
    with torch.no_grad():
        got = compiled(x, CAUSAL, float_padding)
        assert (got - model(x, CAUSAL, float_padding)).abs().max() < 1e-12
        with pytest.raises(RuntimeError, match="attn_mask must be None or causal"):
            compiled(x, CAUSAL.flip(0), float_padding)


def test_autocast_and_bfloat16_stay_close() -> None:
    model, x = replaced(encoder(), HIDING).float().eval(), rows(3, LENGTH, WIDTH).float()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.1
    low = model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - expected).abs().max() < 0.2


def test_dropout_falls_on_the_attention_weights_while_training() -> None:
    old = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True, dtype=torch.float64)
    new, x = replaced(randomised(old)), rows(1, LENGTH, WIDTH)

    def call() -> Tensor:
        out: Tensor = new(x, x, x, need_weights=False)[0]
        return out

    new.train()
    assert not torch.equal(call(), call())
    new.eval()
    assert torch.equal(call(), call())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"need_weights": True}, "need_weights must be False .* Got True"),
        ({"attn_mask": CAUSAL.T}, "attn_mask must be None or causal .* says something else"),
        ({"attn_mask": CAUSAL.isinf().T}, "attn_mask must be None or causal"),
        ({"attn_mask": CAUSAL.T, "is_causal": True}, "attn_mask must be None or causal"),
        ({"attn_mask": CAUSAL[:5]}, r"with shape \(13, 13\)\. Got torch.float64 of \(5, 13\)"),
        ({"attn_mask": CAUSAL.expand(8, 13, 13)}, "attn_mask must be None or causal"),
        ({"key_padding_mask": rows(2, LENGTH)}, "key_padding_mask must be True or -inf .* no bias"),
        ({"key_padding_mask": PADDING}, r"key_padding_mask must have shape .*\(2, 13\). Got \(3,"),
        ({"key": rows(2, 5, WIDTH), "is_causal": True}, "Got lengths 13 and 5"),
        ({"key": rows(2, 5, WIDTH + 4)}, "key must have shape .*embed_dim=20"),
    ],
)
def test_a_call_for_what_is_not_served_says_so(options: dict[str, Any], message: str) -> None:
    new = replaced(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64))
    x = rows(2, LENGTH, WIDTH)
    key = options.get("key", x)
    options = {"need_weights": False, **{k: v for k, v in options.items() if k != "key"}}
    with pytest.raises(ValueError, match=message):
        new(x, key, key, **options)
    with pytest.raises(ValueError, match="need_weights must be False"):
        new(x, x, x)  # torch's default


def test_masks_of_other_dtypes_and_nested_tensors_are_refused() -> None:
    new = replaced(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64))
    x = rows(2, LENGTH, WIDTH)
    with pytest.raises(TypeError, match=r"attn_mask must be bool or floating point. Got torch.int"):
        new(x, x, x, need_weights=False, attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.int32))
    nested = torch.nested.nested_tensor([x[0], x[1, :5]], layout=torch.jagged)
    with pytest.raises(ValueError, match="use_nested_tensor must be False"):
        new(nested, nested, nested, need_weights=False)


class Subclass(nn.MultiheadAttention):
    pass


def pruned() -> nn.Module:
    module = nn.MultiheadAttention(WIDTH, HEADS)
    prune.random_unstructured(module, "in_proj_weight", 0.5)
    return module


def hooked() -> nn.Module:
    module = nn.MultiheadAttention(WIDTH, HEADS)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.MultiheadAttention(WIDTH, HEADS, kdim=5), "kdim or vdim"),
        (nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True), "add_bias_kv"),
        (nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True), "add_zero_attn"),
        (Subclass(WIDTH, HEADS), "a subclass"),
        (pruned(), "parameters of its own"),
        (hooked(), "hooks, which would be lost"),
        (nn.Linear(3, 3), "Got Linear, which has none"),
    ],
)
def test_nothing_to_replace_is_an_error_that_tells_what_was_seen(
    module: nn.Module, why: str
) -> None:
    with pytest.raises(ValueError, match=f"model must have attention .*(?s:.*){why}"):
        replace_attention(nn.Sequential(module) if "none" not in why else module, WHOLE)


def test_the_result_is_a_table_and_has_the_model() -> None:
    class AttentionModel(nn.ModuleDict):  # a name that says nothing beside what is in it
        pass

    model = AttentionModel({"ours": encoder(), "theirs": nn.MultiheadAttention(6, 2, kdim=4)})
    found = replace_attention(model, HIDING)
    assert isinstance(found, Replaced)
    assert [line.split()[:3] for line in str(found).splitlines()] == [
        ["module", "kind", "replaced"],
        ["ours.layers.0.self_attn", "MultiheadAttention", "yes"],
        ["ours.layers.1.self_attn", "MultiheadAttention", "yes"],
        ["theirs", "MultiheadAttention", "no"],
    ]
    assert str(found).count("DilatedPattern([3, 8], [1, 2])") == 2
    assert found.model is model
    alone = nn.MultiheadAttention(WIDTH, HEADS)
    assert isinstance(replace_attention(alone, WHOLE).model, PatternMultiheadAttention)


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    shared = nn.MultiheadAttention(WIDTH, HEADS)
    model = nn.Sequential(shared, nn.Sequential(shared))
    replace_attention(model, WHOLE)
    assert isinstance(model[0], PatternMultiheadAttention)
    assert model[0] is model[1][0]


def test_each_module_gets_the_pattern_of_its_name() -> None:
    by_table = replace_attention(encoder(), {"layers.0.*": HIDING, "layers.*": WHOLE})
    assert [row.visible for row in by_table.modules] == [HIDING, WHOLE]
    left = replace_attention(encoder(), {"layers.0.*": None, "layers.*": WHOLE})
    assert [row.visible for row in left.modules] == [None, WHOLE]
    by_function = replace_attention(encoder(), lambda name: HIDING if "1" in name else None)
    assert [row.visible for row in by_function.modules] == [None, HIDING]
    assert by_function.modules[0].why_not == "no pattern is given for it"


def test_a_wrong_pattern_is_an_error_and_the_model_is_what_it_was() -> None:
    model = encoder()
    split = DilatedPattern([2, 4, 8, 16, 32], [1] * 5, head_groups="split")
    for pattern, error, message in [
        ("dilated", TypeError, "pattern must be a DilatedPattern or a BlockLayout. Got str"),
        (lambda name: 7 if "1" in name else WHOLE, TypeError, r"of 'layers\.1\.self_attn' must be"),
        ({"layers.7": WHOLE}, ValueError, r"names of modules of attention .* Got 'layers\.7'"),
        (split, ValueError, "heads"),
        (lambda name: None, ValueError, "must have attention that can be replaced"),
    ]:
        with pytest.raises(error, match=message):
            replace_attention(model, pattern)
        assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)
        assert model.use_nested_tensor
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module. Got str"):
        replace_attention("bert", WHOLE)  # type: ignore[arg-type] # the wrong type is the point


# Vision transformers: timm needs torchvision, which is not everywhere; its structure is.


class Attention(nn.Module):
    """As in timm 1.0.31, with its children."""

    def __init__(self, gated: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_norm = nn.LayerNorm(self.head_dim) if normed else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if normed else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.LayerNorm(WIDTH) if normed else nn.Identity()
        self.gate = nn.Linear(WIDTH, WIDTH) if gated else None
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.proj_drop = nn.Dropout(0.0)

    def attend(self, x: Tensor, factor: float = 1.0) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q) * factor, self.k_norm(k)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        out = self.proj_drop(self.proj(out))
        assert isinstance(out, Tensor)
        return out

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.attend(x)


class ScaledAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override] # others' are so
        return self.attend(x, 2.0)


class TupleAttention(Attention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override] # as the first DINO's
        return self.attend(x), None


class ImageAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]  # as Segment Anything's
        return self.attend(x.flatten(1, 2)).unflatten(1, (height, width))


class RotaryAttention(Attention):
    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]  # as timm's
        return self.attend(x)


class BiasedAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_a_vision_transformer_with_one_segment_is_what_it_was(gated: bool, normed: bool) -> None:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(Attention(gated, normed), Attention(gated, normed)).double())
    new, x = replaced(model), rows(2, 17, WIDTH)
    assert all(isinstance(module, PatternViTAttention) for module in new)
    assert list(new.state_dict()) == list(model.state_dict())
    assert new[0].head_dim == model[0].head_dim
    assert_alike(model, new, lambda m: m(x))
    assert (replaced(model, HIDING)(x) - model(x)).abs().max() > 1e-3
    assert torch.equal(replaced(new, HIDING)(x), replaced(model, HIDING)(x))
    with pytest.raises(ValueError, match="attn_mask must be None"):
        new[0](x, torch.ones(17, 17))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (ScaledAttention, "computes something else"),
        (TupleAttention, "computes something else"),
        (ImageAttention, "computes something else"),
        (RotaryAttention, "its forward takes more .rope."),
        (BiasedAttention, "parts of its own .relative_position_bias_table."),
    ],
)
def test_what_only_looks_like_attention_of_a_vision_transformer_stays(
    kind: type[Attention], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        replace_attention(randomised(nn.Sequential(kind())), WHOLE)
    with torch.device("meta"):
        model = nn.Sequential(Attention())
    with pytest.raises(ValueError, match="its weights are not there yet"):
        replace_attention(model, WHOLE)
