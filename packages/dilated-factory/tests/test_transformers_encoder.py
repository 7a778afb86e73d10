"""`LongNetEncoder` in transformers: each row as alone, embeddings, losses, files, training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dilated_factory import LongNetEncoder, LongNetEncoderConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

KINDS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]
# The second row has tokens that are hidden between real ones.
MASK = torch.stack([torch.arange(17) >= 5, torch.arange(17) < 12, torch.ones(17).bool()]).long()
MASK[1, 4:6] = 0


def build(kind: str, shape: dict[str, Any] | None = None, **options: Any) -> Any:
    from dilated_factory.interop import transformers as ours

    config = LongNetEncoderConfig(
        **{"vocab_size": 61, "embed_dim": 32, "num_heads": 4, "num_layers": 2, "context": 37}
        | {"segment_lengths": (5, 12, 40), "dilation_rates": (1, 2, 3)} | (shape or {})
    )  # fmt: skip
    torch.manual_seed(0)
    made = ours.LongNetEncoderPreTrainedConfig(config.model_dump(), **options)
    return getattr(ours, f"LongNet{kind}")(made).eval().double()


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(1, 61, (batch, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "shape", [{}, {"positions": "learned"}, {"count_padding": True}, {"vocab_size": None}], ids=str
)
@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_each_row_gives_what_it_gives_alone(shape: dict[str, Any], pooling: str) -> None:
    model = build("Model", shape, pooling=pooling)
    name, batch = "input_ids", tokens()
    if "vocab_size" in shape:
        name, batch = "inputs_embeds", torch.randn(3, 17, 32).double()
    found = model(**{name: batch}, attention_mask=MASK, output_hidden_states=True)
    first = model.encoder.layer_states(batch)[0]
    for row, (lead, end) in enumerate([(5, 17), (0, 12), (0, 17)]):
        alone = batch[row : row + 1, lead:end]
        real = MASK[row, lead:end].bool()
        expected = model.encoder(alone, key_padding_mask=None if real.all() else ~real[None])[0]
        state = found.last_hidden_state[row, lead:end]
        torch.testing.assert_close(state[real], expected[real])
        pooled = expected[real].mean(0) if pooling == "mean" else expected[0]
        torch.testing.assert_close(found.pooler_output[row], pooled)
    torch.testing.assert_close(found.hidden_states[0][2], first[2])
    assert len(found.hidden_states) == 3
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    without = model(**{name: batch[2:]}).last_hidden_state
    torch.testing.assert_close(found.last_hidden_state[2:], without)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_load_what_was_saved(kind: str, tmp_path: Path) -> None:
    from dilated_factory.interop.transformers import register_longnet

    register_longnet()
    model = build(kind, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModel{kind.removeprefix('Model')}").from_pretrained(
        tmp_path, dtype=torch.float64
    )
    assert type(loaded) is type(model)
    found, expected = (x(tokens(), attention_mask=MASK)[0] for x in (loaded.eval(), model))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # What a base leaves out is drawn, and nothing else.
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, dtype=torch.float64
    )
    loaded, weights = classifier.stack.state_dict(), model.stack.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert classifier.classifier.weight.shape == (5, 32)
    assert 0.1 < classifier.classifier.weight.std() < 0.25


def test_weights_are_drawn_as_ours() -> None:
    model = build("ForMaskedLM")
    torch.manual_seed(0)
    plain = LongNetEncoder(model.stack.config)
    for name, expected in plain.state_dict().items():
        assert torch.equal(model.stack.state_dict()[name], expected.double()), name
    assert model.head.weight is model.stack.embedding.weight
    untied = build("ForMaskedLM", tie_word_embeddings=False)
    assert untied.head.weight is not untied.stack.embedding.weight


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
def test_what_a_file_leaves_out_is_drawn_as_ours_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    missing = [name for name in tensors if name.endswith(("fc1.weight", "q_proj.weight"))]
    for name in missing:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    for name, expected in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, expected) == (name not in missing), name
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.2), name


def test_losses_are_torchs_and_those_of_parts_add_up() -> None:
    batch = tokens()
    targets = torch.where(MASK == 1, batch, -100)
    numbers = torch.randn(3, 2).double()

    def by_token(x: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 1), targets.flatten())

    cases: list[tuple[Any, Tensor, Any]] = [
        (build("ForMaskedLM"), targets, by_token),
        (build("ForTokenClassification", num_labels=61), targets, by_token),
        (build("ForSequenceClassification"), torch.tensor([0, 1, 1]),
         lambda x: F.cross_entropy(x, torch.tensor([0, 1, 1]))),
        (build("ForSequenceClassification"), (numbers > 0).double(),
         lambda x: F.binary_cross_entropy_with_logits(x, (numbers > 0).double())),
        (build("ForSequenceClassification", problem_type="regression"), numbers,
         lambda x: F.mse_loss(x, numbers)),
        (build("ForSequenceClassification", num_labels=1), numbers[:, 0],
         lambda x: F.mse_loss(x[:, 0], numbers[:, 0])),
    ]  # fmt: skip
    for model, labels, expected in cases:
        out = model(batch, attention_mask=MASK, labels=labels)
        torch.testing.assert_close(out.loss, expected(out.logits))
        count = (labels != -100).sum()
        parts = [
            model(batch[i : i + 1], attention_mask=MASK[i : i + 1], labels=labels[i : i + 1],
                  num_items_in_batch=count).loss
            for i in range(3)
        ]  # fmt: skip
        torch.testing.assert_close(sum(parts), out.loss)
        assert model(batch, labels=labels, return_dict=False)[0].ndim == 0
    chunks = build("ForMaskedLM", loss_in_chunks=True).train()
    out = chunks(batch, attention_mask=MASK, labels=targets)
    assert out.logits is None
    torch.testing.assert_close(
        out.loss, cases[0][0](batch, attention_mask=MASK, labels=targets).loss
    )


def test_trainer_with_masked_tokens_lowers_the_loss_with_layers_computed_again(
    tmp_path: Path,
) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed, which Trainer needs")
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, "w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, mask_token="w60", pad_token="w0"
    )
    rows = [{"input_ids": [1 + (i + j) % 7 for j in range(9 + i % 5)]} for i in range(48)]
    model = build("ForMaskedLM").float()
    options: dict[str, Any] = {
        "max_steps": 24, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none",
        "learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 6,
        "gradient_accumulation_steps": 2, "seed": 3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    new = hasattr(transformers.TrainingArguments, "activation_checkpointing")
    options["activation_checkpointing" if new else "gradient_checkpointing"] = True
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), **options), data_collator=collator,
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    assert model.stack.activation_checkpointing is True
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_what_an_encoder_cannot_take_is_named() -> None:
    from dilated_factory.interop.transformers import LongNetEncoderPreTrainedConfig

    model, batch = build("Model"), tokens()
    with pytest.raises(TypeError, match="token_type_ids must be None for LongNetModel"):
        model(batch, token_type_ids=torch.zeros_like(batch))
    assert model(batch, output_attentions=False).pooler_output.shape == (3, 32)
    with pytest.raises(ValueError, match="input_ids must be given to this model"):
        model(inputs_embeds=torch.randn(3, 17, 32).double())
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 17\). Got \(3, 5\)"):
        model(batch, attention_mask=MASK[:, :5])
    with pytest.raises(ValueError, match=r"pooling must be 'mean' or 'token'\. Got 'max'"):
        build("Model", pooling="max")
    with pytest.raises(ValueError, match=r"longnet\.head must be False"):
        LongNetEncoderPreTrainedConfig({"vocab_size": 5, "head": True})
    with pytest.raises(ValueError, match=r"longnet\.vocab_size must be given"):
        build("ForMaskedLM", {"vocab_size": None})
    with pytest.raises(ValueError, match="resize_token_embeddings must have a vocabulary"):
        build("Model", {"vocab_size": None}).resize_token_embeddings(70)
