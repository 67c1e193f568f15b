"""
What the layers attend with: transformers' attention functions, taught what prompts and caches of ours bring.

A long padded prompt needs no mask but where its rows lie (`PaddedRows`); a cache may attend where it stores
(`AttendingCache`). Everything else is left to the function that the configuration names.

In the shapes below B is the batch, T the new tokens, S the tokens attended to, nh the heads and hd the width of one.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .qwen_cache import QWenCache
from .transformers_compat import attention_function, causal_mask, is_compiling

logger = logging.get_logger("transformers.models.qwen.qwen_attention")

# Tokens from which on the mask of a padded prompt, (B, 1, T, T), is not made for SDPA: at 32,768 it takes 1 GB a row,
# and several times that inside.
LONG_PROMPT = 4096


class PaddedRows:
    """In place of a mask: where each row's tokens are, padding left out. Attention then is causal, row by row."""

    def __init__(self, spans: list):
        self.spans = spans  # of (start, end)

    @classmethod
    def of(cls, attention_mask, T: int, past_key_values) -> PaddedRows | None:
        """None for what isn't the mask (B, T) of a long prompt whose rows have padding at the ends only."""
        if T < LONG_PROMPT or is_compiling() or attention_mask is None or attention_mask.shape[1:] != (T,):
            return None
        real = attention_mask.bool()
        starts, lengths = real.int().argmax(-1), real.sum(-1)
        run_to = torch.where(real, torch.arange(1, T + 1, device=real.device), 0).amax(-1)
        if bool(real.all()) or not bool((run_to - starts == lengths).all()):
            return None
        if past_key_values is not None and int(past_key_values.get_seq_length()):
            return None
        return cls(list(zip(starts.tolist(), run_to.tolist())))

    def attend(self, query, key, value, scaling, dropout):
        """query: (B, nh, T, hd); key, value: (B, nh, T or more, hd). Returns (B, T, nh, hd), zeros for padding."""
        y = torch.zeros_like(query)
        for row, (start, end) in enumerate(self.spans):
            q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
            y[row : row + 1, :, start:end] = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling
            )
        return y.transpose(1, 2)


class AttendingCache:
    """
    A cache of ours for one step through the layers: `update` takes keys and values, and gives what attends to all of
    them where they are stored, in place of keys and of values.
    """

    def __init__(self, cache: QWenCache):
        self.cache = cache

    def __getattr__(self, name: str):
        return getattr(self.cache, name)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """key_states, value_states: (B, nh, T, hd) of the new tokens."""

        def attend(query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
            return self.cache.attend(query, key_states, value_states, layer_idx, mask, scaling)

        return attend, attend


def create_causal_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values,
    position_ids: torch.Tensor,
    cache_position: torch.Tensor,
    output_attentions: bool = False,
):
    """
    What the attention function takes as its mask; the arguments are those of `QWenModel.forward`.

    For `AttendingCache` that is the mask of real keys, boolean (B, S) or (B, 1 or nh, T, S), or None; for long padded
    prompts and SDPA it is `PaddedRows`; else what transformers makes. `output_attentions` asks for the mask of the
    eager function, whatever the configuration names.
    """
    if isinstance(past_key_values, AttendingCache):
        S = past_key_values.get_seq_length() + inputs_embeds.shape[1]
        return None if attention_mask is None else attention_mask[..., :S].bool()
    if output_attentions and config._attn_implementation != "eager":
        if not is_compiling():
            logger.warning_once(
                f"output_attentions=True: attention by {config._attn_implementation} has no weights to return, so "
                f"the eager kernel is used, which takes memory for all of them; attn_implementation='eager' at loading "
                f"chooses it for good."
            )
        config = copy.copy(config)
        config._attn_implementation = "eager"
    if config._attn_implementation == "sdpa":
        rows = PaddedRows.of(attention_mask, inputs_embeds.shape[1], past_key_values)
        if rows is not None:
            return rows
    return causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, cache_position)


class _AttentionFunctions:
    """transformers' table of attention functions, each taking `PaddedRows` and what `AttendingCache` gives too."""

    def get_interface(self, name: str | None, default):
        """The function of this name; `default` for "eager" and None. Raises KeyError for a name that isn't known."""
        function = attention_function(name, default)

        def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            if callable(key):
                return key(query, attention_mask, scaling), None
            if isinstance(attention_mask, PaddedRows):
                return attention_mask.attend(query, key, value, scaling, dropout), None
            return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

        return attention


ALL_ATTENTION_FUNCTIONS = _AttentionFunctions()
