"""
A stand-in for the package flash-attn with its interface, computed in float32 on any device; `calls` records each call.

Written from the interface's documentation: causal masks are aligned at the bottom right, variable-length sequences
follow each other in one tensor, `cu_seqlens` say where each begins.
"""

from __future__ import annotations

import torch

__version__ = "2.8.3"
calls: list[dict] = []


def _attention(q, k, v, softmax_scale, causal):
    """q: (T, nh, hd); k, v: (S, nh, hd)."""
    scores = torch.einsum("thd,shd->hts", q.float(), k.float())
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if causal:
        T, S = scores.shape[1:]
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden, -float("inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v.float()).to(q.dtype)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """q: (B, T, nh, hd); k, v: (B, S, nh, hd)."""
    calls.append({"name": "func", "shape": list(q.shape), "scale": softmax_scale, "causal": causal, "p": dropout_p})
    return torch.stack([_attention(*sequence, softmax_scale, causal) for sequence in zip(q, k, v)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """q: (all T, nh, hd); k, v: (all S, nh, hd); cu_seqlens: int32 (B + 1,)."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    q_starts, k_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert (q_starts[-1], k_starts[-1]) == (q.shape[0], k.shape[0])
    assert max_seqlen_q == max(b - a for a, b in zip(q_starts, q_starts[1:]))
    calls.append({"name": "varlen", "starts": k_starts, "scale": softmax_scale, "causal": causal, "p": dropout_p})
    sequences = zip(q_starts, q_starts[1:], k_starts, k_starts[1:])
    return torch.cat([_attention(q[a:b], k[c:d], v[c:d], softmax_scale, causal) for a, b, c, d in sequences])


def flash_attn_with_kvcache(*args, **kwargs):
    raise NotImplementedError("paged attention needs the real package")
