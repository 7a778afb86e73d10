"""Embeddings of our model as transformers changes them, and adapters of peft on it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_factory import LongNetConfig, LongNetLM, SlideEncoder, SlideEncoderConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# What peft asks of transformers 5.24.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depre:FutureWarning")


def build(*, tied: bool = True, vocab_size: int = 61) -> Any:
    from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig

    config = LongNetConfig(
        vocab_size=vocab_size, embed_dim=32, num_heads=4, num_layers=2, context=37,
        segment_lengths=(5, 12, 40), dilation_rates=(1, 2, 3), tie_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return LongNetForCausalLM(LongNetPreTrainedConfig(config.model_dump())).eval()


def tokens(length: int = 17) -> Tensor:
    return torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [67, 23])
@pytest.mark.parametrize("mean", [True, False])
def test_a_vocabulary_of_another_size_is_that_in_all_places(
    tied: bool, size: int, mean: bool, tmp_path: Path
) -> None:
    model = build(tied=tied)
    batch = tokens() % 23
    with torch.no_grad():  # transformers puts other weights into the same parameters
        expected = model(batch).logits
    embedding = model.resize_token_embeddings(size, mean_resizing=mean)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape == model.get_output_embeddings().weight.shape == (size, 32)
    assert (model.longnet.head.weight is embedding.weight) == tied
    kept = min(size, 61)
    torch.testing.assert_close(model(batch).logits[..., :kept], expected[..., :kept])
    if size > 61:
        assert embedding.weight[61:].std() < 0.3
        assert model(torch.full((1, 5), size - 1)).logits.isfinite().all()
    assert model.longnet.config.vocab_size == model.config.vocab_size == size
    model.save_pretrained(tmp_path)
    loaded: Any = type(model).from_pretrained(tmp_path)
    assert loaded.longnet.config == model.longnet.config
    assert torch.equal(loaded(batch).logits, model(batch).logits)
    model(batch, labels=batch).loss.backward()
    assert model.generate(batch, max_new_tokens=3, do_sample=False).shape == (2, 20)
    assert model.resize_token_embeddings() is embedding  # asks, and changes nothing


def test_a_model_that_is_made_has_the_weights_of_ours() -> None:
    model = build()
    torch.manual_seed(0)
    plain = LongNetLM(model.longnet.config).state_dict()
    assert all(torch.equal(model.longnet.state_dict()[name], plain[name]) for name in plain)


def test_embeddings_and_head_can_be_replaced() -> None:
    model = build(tied=False)
    embedding, head = nn.Embedding(61, 32), nn.Linear(32, 61, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.longnet.embedding is embedding
    assert model.get_output_embeddings() is model.longnet.head is head


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["q_proj", "head"]])
@pytest.mark.parametrize("chunks", [False, True])
def test_adapters_of_low_rank_train_alone_and_are_merged(
    targets: Any, chunks: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, batch = build(tied=False), tokens()
    model.config.loss_in_chunks = chunks
    before = {name: x.clone() for name, x in model.state_dict().items()}
    lora = peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = adapted(batch, labels=batch, attention_mask=torch.ones_like(batch)).loss
        loss.backward()
        assert all(("lora_" in n) == (p.grad is not None) for n, p in adapted.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    adapted.eval()
    expected = adapted(batch).logits
    written = adapted.generate(batch, max_new_tokens=4, do_sample=False)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(tied=False), tmp_path).eval()
    torch.testing.assert_close(again(batch).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(batch, max_new_tokens=4, do_sample=False), written)
    kept = build(tied=False).state_dict()
    assert all(torch.equal(before[name], kept[name]) for name in before)


@pytest.mark.parametrize("kind", ["language model", "slides"])
def test_adapters_of_our_own_classes_are_merged(kind: str, tmp_path: Path) -> None:
    # peft 0.21 reads a model's config as a dict, by `to_dict`, where it merges or has no targets.
    peft = pytest.importorskip("peft", reason="peft is not installed")
    shape: Any = {
        "embed_dim": 32, "num_heads": 2, "num_layers": 2, "segment_lengths": (8,),
        "dilation_rates": (1,),
    }  # fmt: skip
    inputs: tuple[Tensor, ...]
    if kind == "slides":
        make: Any = SlideEncoder
        inputs = (torch.randn(1, 9, 16), 5000 * torch.rand(1, 9, 2))
        config: Any = SlideEncoderConfig(tile_dim=16, **shape)
    else:
        make, inputs = LongNetLM, (tokens(),)
        config = LongNetConfig(context=64, vocab_size=97, **shape)
    torch.manual_seed(0)
    model = make(config)
    state = copy.deepcopy(model.state_dict())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        expected = adapted(*inputs)
        adapted.save_pretrained(tmp_path)
        fresh = make(config)
        fresh.load_state_dict(state)
        merged = peft.PeftModel.from_pretrained(fresh, tmp_path).eval().merge_and_unload()
        torch.testing.assert_close(merged(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == state.keys()
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(make(config), peft.LoraConfig())


def test_smoothed_labels_of_an_adapted_model_are_those_of_the_next_token(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed, which Trainer needs")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(build(tied=False), lora)
    arguments = transformers.TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.3, use_cpu=True, report_to="none"
    )
    trainer = transformers.Trainer(adapted, arguments)
    batch = tokens()
    found = trainer.compute_loss(adapted, {"input_ids": batch, "labels": batch})
    logits = adapted(batch[:, :-1]).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten(), label_smoothing=0.3
    )
    torch.testing.assert_close(found, expected)
