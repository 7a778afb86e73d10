"""Modules that take the place of others' attention: their weights and their call, our pattern."""

# Shapes: B batch, N queries, M keys, E embed_dim, H heads, D head_dim.

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dilated_factory.interop.unserved import described
from dilated_factory.interop.visible import Visible, between_heads


class PatternMultiheadAttention(nn.Module):
    """In the place of torch.nn.MultiheadAttention, whose parameters it takes, by the same names.

    Columns of padding count as positions: a row's segments begin at its first column. Where all
    keys are padding the output is the bias of the output projection, and torch's is NaN.

    Args:
        source: what it replaces: one without kdim, vdim, add_bias_kv and add_zero_attn.
        visible: which keys a query sees.
    """

    # By this, torch's layers do not go on in C++ in eval mode, which would read the weights past
    # this module and knows dense attention alone.
    _qkv_same_embed_dim = False

    embed_dim: int
    num_heads: int
    head_dim: int
    batch_first: bool
    dropout: float
    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear

    def __init__(
        self, source: "nn.MultiheadAttention | PatternMultiheadAttention", visible: Visible
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = source.embed_dim, source.num_heads
        self.head_dim, self.batch_first = source.head_dim, source.batch_first
        self.dropout = source.dropout
        self.in_proj_weight = source.in_proj_weight
        self.register_parameter("in_proj_bias", source.in_proj_bias)
        self.out_proj = source.out_proj
        self.attention = between_heads(visible, self.num_heads, self.dropout)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend, called as torch.nn.MultiheadAttention is.

        Args:
            query: (B, N, E) where batch_first, else (N, B, E); (N, E) without a batch.
            key: the same with M.
            value: as key.
            key_padding_mask: (B, M), or (M,) without a batch: bool, True = ignore, or 0 and -inf.
            need_weights: must be False.
            attn_mask: None or the causal mask (N, N): bool, True = hidden, or 0 and -inf.
            average_attn_weights: of no effect, there are none.
            is_causal: hide the keys after each query; it needs no mask.

        Returns:
            (output of query's shape, None).

        Raises:
            TypeError: a mask is neither bool nor floating point.
            ValueError: weights are asked for, a mask says something else, an input has another
                shape or is nested, or key is not as long as query where it is causal.
            RuntimeError: a mask says something else, in a graph that torch.compile made.
        """
        if need_weights:
            raise ValueError("need_weights must be False for dilated attention. Got True.")
        alike = query is key and key is value
        batched = query.ndim == 3
        query, key, value = self._rows(query=query, key=key, value=value)
        if key_padding_mask is not None:
            key_padding_mask = _ignored(
                key_padding_mask if batched else key_padding_mask[None], key.shape[:2]
            )
        if (is_causal or attn_mask is not None) and query.shape[1] != key.shape[1]:
            raise ValueError(
                "attn_mask must be None and is_causal False for dilated attention where key is not "
                f"as long as query. Got lengths {query.shape[1]} and {key.shape[1]}."
            )
        if attn_mask is not None:
            _check_causal(attn_mask, query.shape[1])
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if alike:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = map(F.linear, (query, key, value), weight.chunk(3), biases)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (q, k, v))
        out: Tensor = self.attention(
            q, k, v, is_causal=is_causal or attn_mask is not None, key_padding_mask=key_padding_mask
        )
        out = self.out_proj(out.flatten(-2))
        if not batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def _rows(self, **inputs: Tensor) -> list[Tensor]:
        """The inputs as (B, N, E)."""
        found, dimensions = [], inputs["query"].ndim
        for name, x in inputs.items():
            if x.is_nested:
                raise ValueError(
                    f"{name} must be padded, with a key_padding_mask, for dilated attention (in an "
                    "nn.TransformerEncoder, use_nested_tensor must be False). Got a nested tensor."
                )
            if dimensions not in (2, 3) or x.ndim != dimensions or x.shape[-1] != self.embed_dim:
                shape = "(batch, length, " if self.batch_first else "(length, batch, "
                raise ValueError(
                    f"{name} must have shape {shape}embed_dim={self.embed_dim}), or no batch in "
                    f"any. Got {tuple(x.shape)}."
                )
            if dimensions == 2:
                x = x.unsqueeze(0)
            elif not self.batch_first:
                x = x.transpose(0, 1)
            found.append(x)
        return found


class PatternViTAttention(nn.Module):
    """In the place of timm's Attention of vision transformers, whose children it takes.

    The class token, and what else comes before the patches, are rows like others: the pattern says
    who sees them.

    Args:
        source: what it replaces; it has qkv, proj and num_heads.
        visible: which keys a query sees.
    """

    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear

    def __init__(self, source: nn.Module, visible: Visible) -> None:
        super().__init__()
        for name, value in vars(source).items():
            if not name.startswith("_"):  # what others read of it: head_dim, scale
                setattr(self, name, value)
        for name, child in source.named_children():
            if name != "attention":
                self.add_module(name, child)
        dropped = getattr(source, "attn_drop", None)
        self.attention = between_heads(visible, self.num_heads, getattr(dropped, "p", 0.0))
        self.train(source.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend: (B, N, E) to (B, N, E).

        Raises:
            ValueError: attn_mask is given.
        """
        if attn_mask is not None:
            raise ValueError(
                f"attn_mask must be None for dilated attention. Got {described(attn_mask)}."
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self._child("q_norm", q), self._child("k_norm", k)
        out = self.attention(q, k, v, is_causal=is_causal).flatten(-2)
        out = self._child("norm", out)
        if (gate := self._modules.get("gate")) is not None:
            out = out * gate(x).sigmoid()
        return self._child("proj_drop", self.proj(out))

    def _child(self, name: str, x: Tensor) -> Tensor:
        child = self._modules.get(name)
        return x if child is None else cast(Tensor, child(x))


# Layers share masks, so that a forward reads them once: to read them waits for a GPU.
_read = WeakIdKeyDictionary()


def _check_causal(mask: Tensor, length: int) -> None:
    """Raise unless a mask (N, N) hides what is after each query, and that alone."""
    fault = "attn_mask must be None or causal for dilated attention, which serves no other mask"
    _check_dtype("attn_mask", mask)
    if mask.shape != (length, length):
        raise ValueError(f"{fault}, with shape {(length, length)}. Got {described(mask)}.")

    def holds(mask: Tensor) -> Tensor:
        after = torch.ones_like(mask, dtype=torch.bool).triu(1)
        return torch.where(after, _hidden(mask), mask == 0).all()

    _check_values(mask, holds, fault)


def _ignored(mask: Tensor, shape: torch.Size) -> Tensor:
    """A padding mask (B, M), True = ignore, of one that may say it by -inf."""
    fault = (
        "key_padding_mask must be True or -inf for padding and False or 0 elsewhere for dilated "
        "attention, which serves no bias on the scores"
    )
    _check_dtype("key_padding_mask", mask)
    if mask.shape != shape:
        raise ValueError(
            f"key_padding_mask must have shape (batch, key length)={tuple(shape)}. "
            f"Got {tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool:
        _check_values(mask, lambda mask: (_hidden(mask) | (mask == 0)).all(), fault)
    return _hidden(mask)


def _check_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point. Got {mask.dtype}.")


def _hidden(mask: Tensor) -> Tensor:
    # Some write the least number for minus infinity: exp of it is 0 as well.
    return mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min


def _check_values(mask: Tensor, holds: Callable[[Tensor], Tensor], fault: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(holds(mask), fault)
        return
    # In inference mode tensors do not say whether they were changed.
    version = None if mask.is_inference() else (mask._version, fault)
    if version is not None and _read.get(mask) == version:
        return
    if not holds(mask):
        raise ValueError(f"{fault}. Got {described(mask)} that says something else.")
    _read[mask] = version
