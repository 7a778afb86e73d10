"""What ranks run in the tests of transformers' models over ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from dilated_core import DilatedPattern
from dilated_factory import register_with_transformers, shard_for_transformers
from dilated_factory.interop.over_ranks import rank_in
from dilated_factory.interop.transformers import CACHE

PATTERN = DilatedPattern([4, 64], [1, 2])
CONFIG = LlamaConfig(
    vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
)  # fmt: skip
Results = tuple[float, Tensor, list[Tensor]]


def model(*, shared: bool) -> Any:
    """A small model in float64 whose attention is dilated, of whole sequences or of parts."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("dilated_ranks", None)
    group = dist.group.WORLD if shared else None
    register_with_transformers(PATTERN, "dilated_ranks", group=group)
    torch.manual_seed(0)
    found: Any = LlamaForCausalLM(CONFIG).double()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found.set_attn_implementation("dilated_ranks")
    return found


def results(net: Any, given: dict[str, Any]) -> Results:
    """Loss, logits and gradients."""
    found = net(**given)
    found.loss.backward()
    grads = [parameter.grad for parameter in net.parameters()]
    return found.loss.item(), found.logits.detach(), grads


def train(tokens: Tensor, labels: Tensor, mask: Tensor | None) -> Results:
    """Of this rank's part of sequences; gradients averaged over the ranks."""
    given = shard_for_transformers(tokens, labels, mask, group=dist.group.WORLD)
    loss, logits, grads = results(model(shared=True), given)
    for grad in grads:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return loss, logits, grads


def misuse(what: str) -> None:
    """A call whose arguments are not those of this rank's part."""
    tokens = torch.arange(8 * dist.get_world_size()).remainder(23)[None]
    given = shard_for_transformers(tokens)
    rank, _ = rank_in(None)
    if what == "no positions":
        del given["position_ids"]
    if what == "padding on the left":
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, 0] = rank > 0
    if what == "another name":
        register_with_transformers(PATTERN, "dilated_whole")
        net = model(shared=False)
        if rank:  # nothing shows on the first rank
            net(**given)
        return
    net = model(shared=True)
    if what == "a cache":
        given |= {CACHE: DynamicCache(), "use_cache": True}
        net(**given)
        given["position_ids"] += 8
    net(**given)
