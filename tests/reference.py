"""
What the network is compared with, independent of modeling_qwen: its definition written down a second time, in float64,
for one sequence, without cache and library layers; and transformers' Qwen2.
"""

from __future__ import annotations

import math

import torch
from conftest import lacks


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


def qwen2_of(model):
    """transformers' Qwen2 with the same weights; the same function without NTK and LogN."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        lacks("has no Qwen2 to compare with")
    c = model.config
    qwen2 = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size // 2,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_attention_heads,
            rms_norm_eps=c.layer_norm_epsilon,
            rope_theta=float(c.rotary_emb_base),
            max_position_embeddings=c.max_position_embeddings,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    state = {"lm_head.weight": model.lm_head.weight, "model.embed_tokens.weight": model.transformer.wte.weight}
    state["model.norm.weight"] = model.transformer.ln_f.weight
    for i, block in enumerate(model.transformer.h):
        name = f"model.layers.{i}."
        for part, key in zip(range(3), "qkv"):
            state[f"{name}self_attn.{key}_proj.weight"] = block.attn.c_attn.weight.chunk(3)[part]
            state[f"{name}self_attn.{key}_proj.bias"] = block.attn.c_attn.bias.chunk(3)[part]
        state[name + "self_attn.o_proj.weight"] = block.attn.c_proj.weight
        state[name + "mlp.up_proj.weight"] = block.mlp.w1.weight
        state[name + "mlp.gate_proj.weight"] = block.mlp.w2.weight
        state[name + "mlp.down_proj.weight"] = block.mlp.c_proj.weight
        state[name + "input_layernorm.weight"] = block.ln_1.weight
        state[name + "post_attention_layernorm.weight"] = block.ln_2.weight
    qwen2.load_state_dict(state)
    return qwen2.eval()
