"""
What the layers attend with: transformers' attention functions, taught what prompts and caches of ours bring.

A padded prompt needs no mask but where its rows lie (`PaddedRows`), and mostly no padding in the layers
(`rows_to_pack`); a cache may attend where it stores (`AttendingCache`). Everything else is left to the function that
the configuration names.

In the shapes below B is the batch, T the new tokens, S the tokens attended to, N the tokens of all rows without their
padding, nh the heads and hd the width of one.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .qwen_cache import QWenCache, is_plain_inference
from .qwen_plain import is_as_made
from .transformers_compat import (
    FLASH_TAKES_PACKED_ROWS,
    attention_function,
    causal_mask,
    computes_attention,
    has_varlen_attention,
    is_compiling,
    varlen_attention,
)

logger = logging.get_logger("transformers.models.qwen.qwen_attention")

# Tokens from which on the mask of a padded prompt, (B, 1, T, T), is not made for SDPA: at 32,768 it takes 1 GB a row,
# and several times that inside.
LONG_PROMPT = 4096

# Tokens from which on, and the share of padding from which on, the layers compute the tokens of a prompt alone.
PACKED_PROMPT, PACKED_SHARE = 16, 1 / 16


class PaddedRows:
    """
    In place of a mask: where each row's tokens are, padding left out. Attention then is causal, row by row.

    It packs the tokens of all rows into one, (1, N, ...), and attends to them there; padded tensors it packs first.

    Attributes:
        spans: a (start, end) for every row.
        lengths: of every row.
        shape: (B, T).
    """

    def __init__(self, spans: list, T: int, device):
        host = torch.device("cpu")  # whatever the program's default device is
        lengths = torch.tensor([end - start for start, end in spans], device=host)
        each = [torch.arange(start, end, device=host) + row * T for row, (start, end) in enumerate(spans)]
        self.spans = spans
        self.shape = len(spans), T
        self.lengths = lengths.tolist()
        self._tensors = {host: (torch.cat(each), F.pad(lengths.cumsum(0), (1, 0)).int())}
        self.to(device)

    @classmethod
    def of(cls, attention_mask, B: int, T: int, past_key_values) -> PaddedRows | None:
        """None for what isn't the mask (B, T or more) of a prompt whose rows have padding, and at the ends only."""
        if type(attention_mask) is not torch.Tensor or attention_mask.is_meta or torch.jit.is_tracing():
            return None  # what can't be looked into
        if is_compiling() or attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
            return None
        if attention_mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        if past_key_values is not None and int(past_key_values.get_seq_length()):
            return None
        real = attention_mask[:, :T].bool()
        run_to = torch.where(real, torch.arange(1, T + 1, device=real.device), 0).amax(-1)
        found = torch.stack((real.int().argmax(-1), run_to, real.sum(-1))).tolist()  # the device waits once
        if any(end - start != length for start, end, length in zip(*found)) or sum(found[2]) == real.numel():
            return None
        return cls(list(zip(*found[:2])), T, real.device)

    def to(self, device, non_blocking: bool = False) -> PaddedRows:
        """Itself, with its tensors also on this device: accelerate calls it for a block that is elsewhere."""
        self._on(torch.device(device))
        return self

    def _on(self, device: torch.device) -> tuple:
        """Where the tokens are in the rows one after the other, int64 (N,), and begin when packed, int32 (B + 1,)."""
        if device not in self._tensors:
            self._tensors[device] = tuple(t.to(device) for t in self._tensors[torch.device("cpu")])
        return self._tensors[device]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B or 1, T, ...). Returns (1, N, ...)."""
        x = x.expand(self.shape[0], *x.shape[1:])
        return x.flatten(0, 1).index_select(0, self._on(x.device)[0])[None]

    def unpack(self, x: torch.Tensor, filler: int = 0) -> torch.Tensor:
        """x: (1, N, ...). Returns (B, T, ...), with `filler` for padding."""
        B, T = self.shape
        padded = x.new_full((B * T, *x.shape[2:]), filler)
        return padded.index_copy_(0, self._on(x.device)[0], x[0]).unflatten(0, (B, T))

    def attend(self, function, module, query, key, value, scaling, dropout):
        """
        function: the attention function that is configured; module: the layer. query: (B, nh, T, hd); key, value:
        (B, nh, T or more, hd); or packed, (1, nh, N, hd) each. Returns (B, T, nh, hd), zeros for padding, or
        (1, N, nh, hd).
        """
        if query.shape[:3:2] != self.shape:
            return self._attend_packed(function, module, query, key, value, scaling, dropout)
        T = self.shape[1]
        packed = (self.pack(x[:, :, :T].transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        return self.unpack(self._attend_packed(function, module, *packed, scaling, dropout))

    def _attend_packed(self, function, module, query, key, value, scaling, dropout):
        starts, longest = self._on(query.device)[1], max(self.lengths)
        if module.config._attn_implementation == "flash_attention_2":
            where = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
            return function(module, query, key, value, None, scaling=scaling, dropout=dropout, **where)[0]
        if not dropout and is_plain_inference() and has_varlen_attention(query.device, query.dtype, query.shape[-1]):
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, nh, hd)
            return varlen_attention(q, k, v, starts, longest, scaling)[None]
        rows = zip(*(x.split(self.lengths, dim=2) for x in (query, key, value)))
        attended = [
            F.scaled_dot_product_attention(*row, dropout_p=dropout, is_causal=True, scale=scaling) for row in rows
        ]
        return torch.cat(attended, dim=2).transpose(1, 2)


def rows_to_pack(network, x: torch.Tensor, attention_mask, past_key_values) -> PaddedRows | None:
    """
    The rows of a padded prompt, where the layers may be given the tokens alone, packed into one row: attention can take
    them, it saves enough, no gradient is wanted, and the layers are as they were made, so that nobody watches them.

    network: a `QWenModel`; x: (B, T, hidden), its embedded tokens. None where it isn't so.
    """
    B, T, attention = *x.shape[:2], network.config._attn_implementation
    takes_packed = FLASH_TAKES_PACKED_ROWS if attention == "flash_attention_2" else attention == "sdpa"
    # What is compiled asks for no length: it would be compiled for that alone.
    if not is_plain_inference() or not takes_packed or not computes_attention(attention) or T < PACKED_PROMPT:
        return None
    plans = attention == "sdpa" and x.device.type != "cpu" and x.dtype != torch.float32  # cuDNN may, for every length
    if plans and not has_varlen_attention(x.device, x.dtype, network.config.kv_channels):
        return None
    rows = PaddedRows.of(attention_mask, B, T, past_key_values)
    if rows is None or min(rows.lengths) == 0 or sum(rows.lengths) > (1 - PACKED_SHARE) * B * T:
        return None
    return rows if is_as_made(network) and not _is_hooked(network) else None


def _is_hooked(network) -> bool:
    """Whether something is called around a module of the blocks: it may know rows (peft's `adapter_names`)."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in network.h.modules())


class PackedCache:
    """A cache for one prompt of packed rows: it stores keys and values padded; attended to they are packed."""

    def __init__(self, cache, rows: PaddedRows):
        self.cache, self.rows = cache, rows

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """key_states, value_states: (1, nh, N, hd). Returns them."""
        # Static caches of releases up to 4.57 take keys of zeros for room that is left.
        keys, values = self.rows.unpack(key_states.transpose(1, 2), 1), self.rows.unpack(value_states.transpose(1, 2))
        self.cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer_idx, *args, **kwargs)  # (B, nh, T, hd)
        return key_states, value_states


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


def check_mask(mask, B: int, T: int, past_length) -> None:
    """Raise ValueError, before a cache grows, unless the network takes the mask for T new tokens of B rows."""
    if not isinstance(mask, torch.Tensor) or is_compiling():
        return
    S = past_length + T
    is_short = not isinstance(S, torch.Tensor) and mask.shape[-1] < S
    if mask.dim() == 2 and mask.shape[0] in (1, B):
        if is_short:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, but there are {past_length} cached and {T} new tokens; "
                f"it must cover both."
            )
        return
    if mask.dim() != 4 or mask.shape[0] not in (1, B) or mask.shape[2] != T or is_short:
        raise ValueError(
            f"attention_mask must be of shape ({B}, {S}), rows and tokens, those in the cache included, or "
            f"({B} or 1, heads or 1, {T}, {S}), found {tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attention_mask of four dimensions must be boolean, True where a token is attended to, or be added to "
            f"the scores, in floating point, found {mask.dtype}."
        )


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
    if config._attn_implementation == "sdpa" and inputs_embeds.shape[1] >= LONG_PROMPT:
        rows = PaddedRows.of(attention_mask, *inputs_embeds.shape[:2], past_key_values)
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
                return attention_mask.attend(function, module, query, key, value, scaling, dropout), None
            return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

        return attention


ALL_ATTENTION_FUNCTIONS = _AttentionFunctions()
