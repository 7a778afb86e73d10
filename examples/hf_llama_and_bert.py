"""Hugging Face's Llama and BERT with dilated attention, one pattern in each layer.

    python examples/hf_llama_and_bert.py        # needs dilated-factory[transformers]

Models are made here, untrained, so that nothing is downloaded; `AutoModel.from_pretrained` gives
what goes the same way. Weights that were trained for dense attention want fine-tuning.
`save_pretrained` keeps weights, not patterns: replace again after loading.
"""

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from dilated_core import DilatedPattern
from dilated_factory import replace_attention

shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
torch.manual_seed(0)

llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_attention_heads=4, **shape))
tokens = torch.randint(100, (2, 200))
# Near keys in the first layers, all of them in the last.
patterns = {"*.2.self_attn": DilatedPattern([4096], [1]), "*": DilatedPattern([64, 1024], [1, 16])}
print(replace_attention(llama, patterns))
loss = llama(tokens, labels=tokens).loss
loss.backward()
longer = llama.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
print(f"loss {loss:.3f}, generated {longer[0, -5:].tolist()}")

bert = BertModel(BertConfig(vocab_size=100, num_attention_heads=4, **shape)).eval()
mask = (torch.arange(200) < torch.tensor([[200], [150]])).int()
expected = bert(tokens, attention_mask=mask).last_hidden_state
print(replace_attention(bert, DilatedPattern([200], [1])))  # one segment: what it was
states = bert(tokens, attention_mask=mask).last_hidden_state
difference = (states - expected)[mask.bool()].abs().max().item()
print(f"one segment: differs by {difference:.1e}")
assert difference < 1e-4

# What has sliding windows of its own is left as it is, and the error is the table.
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
mistral = MistralForCausalLM(MistralConfig(vocab_size=100, **heads, **shape))
try:
    replace_attention(mistral, DilatedPattern([64], [1]))
except ValueError as error:
    print(error)
else:
    raise AssertionError("a sliding window was replaced")
