#!/usr/bin/env bash
# transformers 5.24.0 (5.6.0 and 5.17.0 too): whether packed sequences see each other depends on
# whether there is a cache, which is the default, in training too.
#
# Two sequences are packed into one row, and `position_ids` restart at 0 where the second begins, as
# DataCollatorWithFlattening makes them. With use_cache=False the model keeps them apart: the second
# one's logits are those that it has alone. With the default use_cache=True, in eval and in train
# mode, or with an attention_mask of ones, the second sequence attends to the first. No warning.
# The reason: `_preprocess_mask_arguments` looks for packed positions only where it got neither
# a mask nor a cache.
#
# What to do: use_cache=False and no attention_mask with packed rows.
#
# Seen with torch 2.14.1 on a CPU, Python 3.11 (largest difference from the second sequence alone):
#   eval, use_cache=False           0.000
#   eval, default                   2.725
#   train, default                  2.725
#   eval, use_cache=False, ones     2.725
# The last digits depend on torch's version.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch>=2.11" "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=61, hidden_size=48, intermediate_size=72, num_hidden_layers=2,
    num_attention_heads=6, max_position_embeddings=128, attn_implementation="sdpa",
)
model = LlamaForCausalLM(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
tokens = torch.randint(1, 61, (1, 20))
positions = torch.cat([torch.arange(12), torch.arange(8)]).unsqueeze(0)
ones = torch.ones_like(tokens)


@torch.no_grad()
def difference(**options):
    alone = model(tokens[:, 12:]).logits
    packed = model(tokens, position_ids=positions, **options).logits[:, 12:]
    return (packed - alone).abs().max().item()


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
seen = {
    "eval, use_cache=False": difference(use_cache=False),
    "eval, default": difference(),
    "train, default": (model.train(), difference())[1],
    "eval, use_cache=False, ones": (model.eval(), difference(use_cache=False, attention_mask=ones))[1],
}
for name, value in seen.items():
    print(f"{name:<30}{value:7.3f}")
apart, *together = seen.values()
sys.exit(0 if apart < 1e-4 and min(together) > 0.1 else 1)
PY
