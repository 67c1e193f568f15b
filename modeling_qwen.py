"""
The first-generation Qwen network (https://arxiv.org/abs/2309.16609) for transformers.

Reads top to bottom: RMSNorm, rotary embedding, attention, MLP, block, the model, the language-model head. It is all
plain PyTorch. Around it: qwen_loading.py makes a checkpoint a model, qwen_decode.py generates, qwen_chat.py chats.

In the shapes below B is the batch, T the new tokens, S the tokens attended to (cached and new),
nh the heads and hd the width of one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_qwen import QWenConfig
from .qwen_attention import ALL_ATTENTION_FUNCTIONS, PackedCache, check_mask, create_causal_mask, rows_to_pack
from .qwen_cache import QWenCache, QWenQuantizedCache, new_cache, remembered_alpha
from .qwen_chat import QWenChatMixin
from .qwen_decode import QWenGenerationMixin, decoding_step
from .qwen_generation_utils import StopWordsLogitsProcessor, decode_tokens, get_stop_words_ids, make_context
from .qwen_loading import QWenPreTrainedModel
from .qwen_loss import causal_lm_loss
from .transformers_compat import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GradientCheckpointingLayer,
    addcmul,
    as_cache,
    cache_kwargs,
    can_return_tuple,
    known_arguments,
    rms_norm,
    tensor_parallel_plan,
    tied_weights,
    to_device_of,
)

if TYPE_CHECKING:  # whoever copies this file, copies what it names: these stand behind the modules above
    from .cpp_kernels import load  # noqa: F401
    from .qwen_cuda_graph import GraphedSteps  # noqa: F401
    from .qwen_graphed_generation import GraphedGeneration  # noqa: F401
    from .qwen_ops import decode_blocks  # noqa: F401
    from .qwen_plain import is_as_made  # noqa: F401
    from .qwen_quantization import Int8Linear  # noqa: F401
    from .qwen_sampling import draw  # noqa: F401
    from .triton_attention import attend  # noqa: F401
    from .triton_kernels import register  # noqa: F401
    from .triton_launch import kernel  # noqa: F401
    from .triton_products import product  # noqa: F401

__all__ = [
    "QWenCache",
    "QWenConfig",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenPreTrainedModel",
    "QWenQuantizedCache",
    "StopWordsLogitsProcessor",
    "decode_tokens",
    "get_stop_words_ids",
    "make_context",
]


class RMSNorm(nn.Module):
    """Root mean square norm (https://arxiv.org/abs/1910.07467), normalised in float32: (..., dim) to (..., dim)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """
    Scale of the rotary base for prompts of `lengths` tokens, at least 1: `2 ** ceil(log2(L / seq_length) + 1) - 1`.

    lengths: int64, any shape, padding not counted. Returns float32 of that shape. The base becomes
    `base * alpha ** (d / (d - 2))` for d rotated channels, the NTK-aware scaling of the Qwen report, section 2.3
    (https://arxiv.org/abs/2309.16609).
    """
    octaves = torch.ceil(torch.log2(lengths.float() / seq_length) + 1)
    return (torch.exp2(octaves) - 1).clamp(min=1)


def logn_scale(position_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
    """
    LogN scale of the queries, `max(1, log(p + 1) / log(seq_length))` for the 0-based position p.

    position_ids: int64 (B, T). Returns float32 (B, T). Keeps the entropy of attention steady beyond the training
    length (section 2.3 of https://arxiv.org/abs/2309.16609).
    """
    return (torch.log(position_ids.float() + 1) / math.log(seq_length)).clamp(min=1)


class RotaryEmbedding(nn.Module):
    """
    Rotary position embedding (https://arxiv.org/abs/2104.09864), with a base for every sequence.

    It holds no tables: the angles of T positions cost less than a norm, need no buffer that a cast to half precision
    could spoil, and have no longest position.
    """

    def __init__(self, dim: int, base: float = 10000):
        super().__init__()
        self.dim = dim
        self.base = base

    def forward(
        self, position_ids: torch.Tensor, alpha: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        position_ids: int64 (B or 1, T); alpha: float32 (B or 1, T or 1), the NTK scale of the base.
        Returns cosines and sines, each float32 (B or 1, 1, T, dim / 2).
        """
        exponents = torch.arange(0, self.dim, 2, device=position_ids.device, dtype=torch.float32) / self.dim
        base = self.base if alpha is None else self.base * alpha[..., None] ** (self.dim / (self.dim - 2))  # (B, T, 1)
        angles = (position_ids[:, :, None].float() * (1.0 / base**exponents))[:, None]  # (B, 1, T, dim / 2)
        return angles.cos(), angles.sin()


class Rotation:
    """
    What queries and keys of tokens are multiplied by: cos, sin, float32 (B or 1, 1, T, rotated / 2); query_scale,
    float32 (B or 1, 1, T, 1) or None, LogN.

    Not three tensors, because FSDP2 rounds every tensor among a block's arguments to the precision of its weights.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, query_scale: torch.Tensor | None = None):
        self.cos, self.sin, self.query_scale = cos, sin, query_scale

    def map(self, function) -> Rotation:
        return Rotation(*(y if y is None else function(y) for y in (self.cos, self.sin, self.query_scale)))

    def to(self, *args, **kwargs) -> Rotation:
        return self.map(lambda y: y.to(*args, **kwargs))


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotate the first d channels of every head, pairs (x_i, x_{i + d/2}), in float32.

    x: (B, nh, T, hd). cos, sin: float32 (B or 1, 1, T, d / 2). Returns (B, nh, T, hd) in x's dtype.
    """
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    y1, y2 = addcmul(x1 * cos, x2, sin, value=-1), addcmul(x2 * cos, x1, sin)  # float32 (B, nh, T, d / 2)
    return torch.cat((y1.to(x.dtype), y2.to(x.dtype), rest), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention in plain PyTorch with the interface of transformers' attention functions.

    query: (B, nh, T, hd); key, value: (B, nh, S, hd); attention_mask: None or broadcastable to (B, nh, T, S),
    boolean (True is attended to) or to be added. Returns the output (B, T, nh, hd) and the weights (B, nh, T, S).
    """
    scores = query @ key.transpose(2, 3) * scaling  # (B, nh, T, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    output = F.dropout(weights, dropout, module.training) @ value  # (B, nh, T, hd)
    return output.transpose(1, 2), weights


class QWenAttention(nn.Module):
    """Multi-head self-attention by the function that `config._attn_implementation` names."""

    def __init__(self, config: QWenConfig, layer_idx: int | None = None):
        super().__init__()
        projection_size = config.kv_channels * config.num_attention_heads
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * projection_size)
        self.c_attn.num_heads = config.num_attention_heads  # for tensor parallelism
        self.c_proj = nn.Linear(projection_size, config.hidden_size, bias=not config.no_bias)
        self.c_proj.into_residual = True  # for the initial weights

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotation: Rotation,
        past_key_values=None,
        update_kwargs: dict | None = None,
        attention_weights: list | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        x: (B, T, hidden). past_key_values: the cache that takes the new keys and values. attention_weights: a list to
        which this layer's weights (B, nh, T, S) are appended; only the eager function has them. Returns (B, T, hidden).
        """
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))  # (B, nh, T, hd) each
        q, k = (apply_rotary(y, rotation.cos, rotation.sin) for y in (q, k))
        if rotation.query_scale is not None:
            q = (q * rotation.query_scale).to(v.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, **(update_kwargs or {}))  # (B, nh, S, hd)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if attention_weights is not None:
            attention = eager_attention_forward
        y, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            **kwargs,
        )  # (B, T, nh, hd)
        if attention_weights is not None:
            attention_weights.append(weights)
        return self.c_proj(y.reshape(B, T, -1))


class QWenMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202), (B, T, hidden) to the same; w2 is the gate."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.c_proj.into_residual = True
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * self.act(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    """One pre-norm transformer block, (B, T, hidden) to the same."""

    def __init__(self, config: QWenConfig, layer_idx: int | None = None):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), attention_mask, **kwargs)
        x = x + self.mlp(self.ln_2(x))
        return x


class QWenModel(QWenPreTrainedModel):
    """The network without its head: token ids or embeddings to hidden states."""

    _auto_class = "AutoModel"

    def __init__(self, config: QWenConfig):
        config.check()
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = RotaryEmbedding(config.rotary_dim, config.rotary_emb_base)
        self.h = nn.ModuleList([QWenBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @known_arguments
    @can_return_tuple
    @decoding_step
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        ntk_alpha: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: int64 (B, T), or `inputs_embeds`: (B, T, hidden).
            past_key_values: a transformers `Cache` of earlier tokens; it is extended in place.
            attention_mask: (B, S), 1 for tokens and 0 for padding, cached tokens included; or (B, 1 or nh, T, S),
                boolean (True is attended to) or to be added to the scores, which then decides alone.
            position_ids: int64 (B or 1, T). Default: counted over the unpadded tokens of a (B, S) mask.
            use_cache: return a cache. Default: `config.use_cache`, and no cache in training.
            output_attentions: return the weights of every layer, (B, nh, T, S) each; takes the eager function.
            output_hidden_states: return the input of every block and the final states, (B, T, hidden) each.
            ntk_alpha: float32 (B,), the NTK scale of each row, for a prompt that comes in pieces (the function
                `ntk_alpha` gives that of its whole length). Default: what the cache remembers of the first tokens it
                saw, and without that the scale of the tokens of this call.
            kwargs: handed to the attention function (`cu_seq_lens_q`, a paged cache and the like).

        Returns:
            `last_hidden_state` (B, T, hidden; for padding it means nothing), `past_key_values`, `hidden_states`,
            `attentions`; a tuple of those that are not None with `return_dict=False`.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, no tokens, a mask of another shape or dtype.
            IndexError: an id outside the vocabulary (where the device reports it).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        past_key_values = as_cache(past_key_values)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)

        x = self.embed(input_ids, inputs_embeds)  # (B, T, hidden)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        cache_position = kwargs.pop("cache_position", None)  # where in the cache the tokens go; `generate` may say it
        # accelerate brings a model's arguments to its main device, where the embedding and the first block need not be.
        attention_mask, position_ids, past_length, cache_position = (
            value.to(x.device) if isinstance(value, torch.Tensor) else value
            for value in (attention_mask, position_ids, past_length, cache_position)
        )
        if cache_position is None:
            cache_position = torch.arange(x.shape[1], device=x.device) + past_length  # (T,)
        check_mask(attention_mask, *x.shape[:2], past_length)
        if position_ids is None:
            position_ids = self.positions(attention_mask, cache_position)  # (B or 1, T)
        rows = None  # of a prompt whose padding need not be computed
        if not (output_attentions or output_hidden_states or any(value is not None for value in kwargs.values())):
            rows = rows_to_pack(self, x, attention_mask, past_key_values)
        mask = rows
        if rows is None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                cache_position=cache_position,
                output_attentions=output_attentions,
            )
        rotation = self.rotation(position_ids, past_key_values, past_length, ntk_alpha, kwargs.get("cu_seq_lens_q"))
        stored = past_key_values
        if rows is not None:
            x = rows.pack(x)  # (1, N, hidden)
            rotation = rotation.map(lambda y: rows.pack(y[:, 0])[:, None])
            stored = stored if stored is None else PackedCache(stored, rows)

        all_hidden_states = [] if output_hidden_states else None
        attention_weights = [] if output_attentions else None
        shared = {  # by all blocks
            "attention_mask": mask,
            "rotation": rotation,
            "update_kwargs": cache_kwargs(cache_position),
            "position_ids": position_ids,
            **kwargs,
        }
        x = self.drop(x)
        for block in self.h[: self.config.num_hidden_layers]:  # which `assistant_early_exit` makes fewer for its drafts
            if output_hidden_states:
                all_hidden_states.append(x)
            x, shared = to_device_of(block, (x, shared))
            x = block(x, past_key_values=stored, attention_weights=attention_weights, **shared)
        x = self.ln_f(x)
        x = x if rows is None else rows.unpack(x)  # (B, T, hidden)
        if output_hidden_states:
            all_hidden_states.append(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(attention_weights) if output_attentions else None,
        )

    def embed(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """
        input_ids: int64 (B, T), or inputs_embeds: (B, T, hidden), which is returned.

        Returns (B, T, hidden). Raises IndexError for an id outside the vocabulary, ValueError if there are no tokens.
        """
        self.check_tokens(input_ids if inputs_embeds is None else inputs_embeds)
        if inputs_embeds is not None:
            return inputs_embeds
        try:
            return self.wte(input_ids)
        except IndexError:
            self.check_ids(input_ids)
            raise

    @staticmethod
    def check_tokens(tokens: torch.Tensor) -> None:
        """Raise ValueError unless `tokens`, ids (B, T) or embeddings (B, T, hidden), hold at least one."""
        if tokens.dim() < 2 or tokens.shape[0] == 0 or tokens.shape[1] == 0:
            raise ValueError(
                f"The input has no tokens: its shape is {tuple(tokens.shape)}, but (rows, tokens) are wanted, at least "
                f"one of each. To begin without a text pass the token <|endoftext|>, tokenizer.eod_id."
            )

    def check_ids(self, input_ids: torch.LongTensor) -> None:
        """Raise IndexError if one of the ids is outside the vocabulary."""
        vocab_size = self.config.vocab_size  # adapters of embeddings don't say it
        bad = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if bad.numel():
            raise IndexError(
                f"input_ids hold {bad[0].item()}, but this model's vocabulary has the ids 0 to {vocab_size - 1}. "
                f"Was the text encoded with this checkpoint's tokenizer? After adding tokens call "
                f"model.resize_token_embeddings(len(tokenizer))."
            )

    @staticmethod
    def positions(attention_mask, cache_position: torch.Tensor) -> torch.Tensor:
        """
        Positions of new tokens counted over the real ones, int64 (B or 1, T).

        attention_mask: None, (B, S), or of four dimensions, which says nothing of positions. cache_position: int64
        (T,).
        """
        if attention_mask is None or attention_mask.dim() != 2:
            return cache_position[None]
        counted = attention_mask.long().cumsum(-1) - 1  # (B, S)
        return counted.clamp(min=0)[:, cache_position]  # (B, T)

    def prompt_alpha(self, lengths: torch.Tensor) -> torch.Tensor:
        """The NTK scale of prompts of so many tokens, int64 (B,), with this model's context: float32 (B,)."""
        return ntk_alpha(lengths, self.config.seq_length)

    def rotation(self, position_ids, cache, past_length, wanted_alpha=None, sequence_starts=None) -> Rotation:
        """
        What depends on positions, int64 (B or 1, T).

        wanted_alpha: float32 (B,), the NTK scale of each row if this is the first of it. sequence_starts: int32
        (sequences + 1,), for several sequences in one row; each then has the scale of its present length.
        """
        if not self.config.use_dynamic_ntk or self.training:
            alpha = None
        elif sequence_starts is not None:
            alpha = self.prompt_alpha(packed_lengths(position_ids, sequence_starts))  # (1, T)
        else:

            def of_these_tokens() -> torch.Tensor:  # (B or 1, T or 1)
                if wanted_alpha is not None:
                    return wanted_alpha.to(position_ids.device)[:, None]
                return self.prompt_alpha(lengths_so_far(position_ids))

            alpha = remembered_alpha(cache, past_length, of_these_tokens).to(position_ids.device)
        query_scale = None
        if self.config.use_logn_attn and not self.training:
            query_scale = logn_scale(position_ids, self.config.seq_length)[:, None, :, None]  # (B or 1, 1, T, 1)
        return Rotation(*self.rotary_emb(position_ids, alpha), query_scale)


def lengths_so_far(position_ids: torch.Tensor) -> torch.Tensor:
    """
    For every token the length of its sequence, int64 (B, T), up to the last token of it that is here.

    position_ids: int64 (B, T). A sequence ends where the next position does not follow: rows may be packed with
    several, each counted from 0.
    """
    begins = (position_ids != position_ids.roll(1, dims=1) + 1).long()  # (B, T)
    sequence = begins.cumsum(-1) - begins[:, :1]  # (B, T), which of its row's a token belongs to
    last = torch.zeros_like(position_ids).scatter_reduce(1, sequence, position_ids, "amax")  # (B, sequences)
    return last.gather(1, sequence) + 1


def packed_lengths(position_ids: torch.Tensor, sequence_starts: torch.Tensor) -> torch.Tensor:
    """
    `lengths_so_far` of one row, int64 (1, T), whose sequences begin at `sequence_starts`, int32 (sequences + 1,).
    """
    tokens = torch.arange(position_ids.shape[1], device=position_ids.device)
    ends = sequence_starts[1:].to(position_ids.device)
    last = ends[torch.searchsorted(ends, tokens, right=True).clamp(max=ends.shape[0] - 1)] - 1
    return position_ids[:, last.long().clamp(min=0)] + 1


class QWenLMHeadModel(QWenChatMixin, QWenGenerationMixin, QWenPreTrainedModel):
    """The language model: the network and its output layer, with generation and chat."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = tied_weights({"lm_head.weight": "transformer.wte.weight"})
    _tp_plan = tensor_parallel_plan({"lm_head": "colwise_gather_output"})
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: QWenConfig):
        config.check()
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers would guess it from the class's name
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @known_arguments
    @can_return_tuple
    @decoding_step
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        ntk_alpha: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        The arguments of `QWenModel.forward`, and:

        Args:
            labels: int64 (B, T), the ids themselves (they are shifted here), -100 where there is no loss.
            logits_to_keep: compute logits for the last n positions only, or for those a 1-D tensor indexes; 0: all.
            skip_logits: with labels, return no logits: the loss is computed without holding those of all positions.
            kwargs: `num_items_in_batch` divides the summed loss instead of the number of labels; the rest goes to
                `QWenModel.forward`.

        Returns:
            `loss` (if labels are given), `logits` (B, positions kept, vocab) or None, and what `QWenModel.forward`
            returns.
        """
        output = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            ntk_alpha=ntk_alpha,
            return_dict=True,
            **kwargs,
        )
        loss, logits = None, None
        if skip_logits and labels is not None:
            loss = causal_lm_loss(self.lm_head, output.last_hidden_state, labels, self.config.vocab_size, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = output.last_hidden_state[:, kept]
            # Strides without gaps, also of one row: for others PyTorch copies a matrix that is frozen, at every call.
            logits = self.lm_head(hidden.contiguous().view(hidden.shape))  # (B, positions kept, vocab)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
