"""Packed documents in a language model: each gives what it gives alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_factory import LongNetConfig, LongNetLM


def model(positions: str = "rotary") -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(
        LongNetConfig(
            vocab_size=23, embed_dim=16, num_heads=2, num_layers=2, segment_lengths=(3, 8, 40),
            dilation_rates=(1, 2, 3), context=40, positions=positions,
        )
    ).double()  # fmt: skip


def ends_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize("positions", ["rotary", "xpos", "none"])
@given(sizes=st.lists(st.integers(0, 13), min_size=1, max_size=5).filter(sum))
@settings(max_examples=15)
def test_each_document_is_what_it_is_alone(positions: str, sizes: list[int]) -> None:
    net, ends = model(positions), ends_of(sizes)
    tokens = torch.randint(23, (1, sum(sizes)))
    logits = net(tokens, cu_seqlens=ends)
    for start, stop in pairwise(ends.tolist()):
        if start < stop:
            alone = net(tokens[:, start:stop])
            torch.testing.assert_close(logits[:, start:stop], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [[7, 12, 1, 9], [0, 5, 0, 6], [2, 2], [1, 11, 1], [17]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_loss_is_that_of_all_documents_with_its_gradients(
    sizes: list[int], dtype: torch.dtype
) -> None:
    """No document's first token is predicted from the one before."""
    net, ends = model(), ends_of(sizes)
    tokens = torch.randint(23, (1, sum(sizes)))
    packed = net.loss(tokens, cu_seqlens=ends.to(dtype))
    packed.backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    parts = [tokens[:, a:b] for a, b in pairwise(ends.tolist()) if b - a > 1]
    count = sum(part.shape[1] - 1 for part in parts)
    true = sum(net.loss(part) * (part.shape[1] - 1) for part in parts) / count
    true.backward()
    torch.testing.assert_close(packed, true, rtol=1e-10, atol=0)
    for one, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-8, atol=1e-12)


def test_positions_may_differ_by_row() -> None:
    net, tokens = model(), torch.randint(23, (2, 9))
    rows = torch.stack([torch.arange(9), torch.arange(9) * 2 + 3])
    both = net(tokens, positions=rows)
    for row in range(2):
        alone = net(tokens[row : row + 1], positions=rows[row])
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_documents_go_with_recomputation(checkpointing) -> None:
    tokens, ends = torch.randint(23, (1, 20)), ends_of([7, 13])
    losses = []
    for value in (False, checkpointing):
        net = model()
        net.activation_checkpointing = value
        loss = net.loss(tokens, cu_seqlens=ends)
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in net.parameters())])
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_what_documents_do_not_go_with_is_named() -> None:
    net, ends = model(), ends_of([3, 6])
    tokens = torch.randint(23, (1, 9))
    with pytest.raises(ValueError, match=r"tokens must have shape \(1, N\) with cu_seqlens"):
        net(torch.cat([tokens, tokens]), cu_seqlens=ends)
    with torch.no_grad(), pytest.raises(ValueError, match="cu_seqlens must be None with caches"):
        net.eval()(tokens, cu_seqlens=ends, caches=net.new_caches())
    with pytest.raises(ValueError, match="must rise from 0 to the total"):
        net(tokens, cu_seqlens=ends_of([3, 5]))
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape .* Got \(1, 3\)"):
        net(tokens, cu_seqlens=ends[None])
