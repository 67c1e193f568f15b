"""
The Qwen network written down a second time from its definition: float64, one sequence, no cache, no library layers.

Independent of modeling_qwen: it shares no code with it and computes everything the long way.
"""

from __future__ import annotations

import math

import torch


def forward(weights: dict, config, ids: list[int], prompt_length: int | None = None) -> torch.Tensor:
    """
    Logits, float64 (len(ids), vocab), of one sequence.

    prompt_length: tokens at the time the NTK scale was fixed; default all. `config` gives the sizes.
    """
    w = {name: value.double() for name, value in weights.items()}
    heads, width, dim = config.num_attention_heads, config.kv_channels, config.rotary_dim
    length = prompt_length or len(ids)
    base = float(config.rotary_emb_base)
    if config.use_dynamic_ntk:
        alpha = max(2 ** math.ceil(math.log2(length / config.seq_length) + 1) - 1, 1)
        base *= alpha ** (dim / (dim - 2))

    def norm(x, weight):
        return (
            torch.stack([row / math.sqrt((row @ row).item() / len(row) + config.layer_norm_epsilon) for row in x])
            * weight
        )

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def turn(vector, position):
        """Rotate the pairs (i, i + dim / 2) by position * base ** (-2 i / dim)."""
        out = vector.clone()
        for i in range(dim // 2):
            angle = position * base ** (-2 * i / dim)
            a, b = vector[..., i], vector[..., i + dim // 2]
            out[..., i] = a * math.cos(angle) - b * math.sin(angle)
            out[..., i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["transformer.wte.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"transformer.h.{layer}."
        qkv = linear(norm(x, w[name + "ln_1.weight"]), name + "attn.c_attn")
        q, k, v = qkv.view(len(ids), 3, heads, width).unbind(1)
        q = torch.stack([turn(row, p) for p, row in enumerate(q)])
        k = torch.stack([turn(row, p) for p, row in enumerate(k)])
        mixed = torch.zeros(len(ids), heads, width, dtype=torch.float64)
        for p in range(len(ids)):
            scale = max(1, math.log(p + 1) / math.log(config.seq_length)) if config.use_logn_attn else 1
            for head in range(heads):
                scores = k[: p + 1, head] @ q[p, head] * scale
                scores = scores / math.sqrt(width) if config.scale_attn_weights else scores
                mixed[p, head] = scores.softmax(0) @ v[: p + 1, head]
        x = x + linear(mixed.flatten(1), name + "attn.c_proj")
        y = norm(x, w[name + "ln_2.weight"])
        gate = linear(y, name + "mlp.w2")
        x = x + linear(linear(y, name + "mlp.w1") * gate / (1 + torch.exp(-gate)), name + "mlp.c_proj")
    return norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def greedy(weights: dict, config, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation: ids with the prompt, and the logits that chose each, float64 (new_tokens, vocab)."""
    ids, chosen = list(prompt), []
    for _ in range(new_tokens):
        chosen.append(forward(weights, config, ids, prompt_length=len(prompt))[-1])
        ids.append(int(chosen[-1].argmax()))
    return ids, torch.stack(chosen)
