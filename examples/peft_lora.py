"""LoRA by peft on a Llama whose attention is dilated: fine-tuning that a replaced pattern wants.

    python examples/peft_lora.py        # needs dilated-factory[transformers] and peft

The projections stay the modules that they were, so peft finds them by their names. An adapter
holds weights, not the pattern: replace the attention of the base model again before it is loaded.
"""

import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dilated_core import DilatedPattern
from dilated_factory import replace_attention

PATTERN = DilatedPattern([32, 256], [1, 8])


def base() -> LlamaForCausalLM:
    """What `from_pretrained` would give, with our attention."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **shape))
    replace_attention(model, PATTERN)
    return model


# peft 0.21 asks transformers 5.24 by a name that it warns of.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
text = b"It was the best of times, it was the worst of times. " * 6
tokens = torch.tensor([list(text[:256])])
projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
model = get_peft_model(base(), LoraConfig(r=8, target_modules=projections))
model.print_trainable_parameters()
optimizer = torch.optim.AdamW((x for x in model.parameters() if x.requires_grad), 2e-2)
for step in range(31):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: {loss:.3f} nats per token")
assert loss < 5.3

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.eval().save_pretrained(folder)
    expected = model(input_ids=tokens).logits
    again = PeftModel.from_pretrained(base(), folder).eval()
    assert torch.equal(again(input_ids=tokens).logits, expected)
    merged = model.merge_and_unload()
    difference = (merged(input_ids=tokens).logits - expected).abs().max().item()
    print(f"loaded again: the same; merged: differs by {difference:.1e}")
    assert difference < 1e-3
