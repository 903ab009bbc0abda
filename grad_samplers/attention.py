"""`F.multi_head_attention_forward` written with known functions, so that its parameters can be followed.

The built-in function takes weights and biases together and hides where each is used; this one computes the same from
`F.linear`, `cat` and `scaled_dot_product_attention`. Letters: L target length, S source length, B batch, E width,
H heads, D = E / H. As there, inputs are `[L, B, E]` (or `[L, E]` for a single sample).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments and results as `torch.nn.functional.multi_head_attention_forward`.

    Raises:
        ValueError: for unbatched inputs and for `static_k`/`static_v`, which no module of torch uses.
    """
    if query.dim() != 3:
        raise ValueError("multi-head attention on a single unbatched sample: give the input a batch dimension")
    if static_k is not None or static_v is not None:
        raise ValueError("multi-head attention with static_k or static_v is not supported")
    length, batch, width = query.shape
    if use_separate_proj_weight:
        assert q_proj_weight is not None and k_proj_weight is not None and v_proj_weight is not None
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    else:
        assert in_proj_weight is not None
        q, k, v = _packed_projection(query, key, value, in_proj_weight, in_proj_bias)
    mask = _merged_mask(attn_mask, key_padding_mask, num_heads, q.dtype)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, width)])
        v = torch.cat([v, bias_v.expand(1, batch, width)])
        mask = None if mask is None else F.pad(mask, (0, 1))
    q, k, v = (x.view(x.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch, num_heads, 1, x.shape[-1])], dim=2) for x in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1))
    dropout_p = dropout_p if training else 0.0
    out, attention = _attend(q, k, v, mask, dropout_p, need_weights)
    out = F.linear(out.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    if attention is not None and average_attn_weights:
        attention = attention.mean(dim=1)
    return out, attention


def _packed_projection(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if query is key and key is value:  # one product for all three, and one capture
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        return q, k, v
    weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _merged_mask(attn_mask: Tensor | None, key_padding: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one addend that broadcasts to `[B, H, L, S]`."""
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, dtype)
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.view(-1, heads, *attn_mask.shape[1:])
    if key_padding is not None:
        key_padding = _additive(key_padding, dtype)[:, None, None, :]
        return key_padding if attn_mask is None else attn_mask + key_padding
    return attn_mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p), None
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    attention = scores.softmax(dim=-1)
    if dropout_p > 0:
        attention = F.dropout(attention, dropout_p)
    return attention @ v, attention
