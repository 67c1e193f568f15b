"""
The first-generation Qwen network (https://arxiv.org/abs/2309.16609) for transformers.

Reads top to bottom: RMSNorm, RotaryEmbedding, attention, MLP, block, how a checkpoint is loaded, the model,
the language-model head with `generate`, `chat` and `chat_stream`.

In the shapes below B is the batch, T the new tokens, S the tokens attended to (cached and new),
nh the heads and hd the width of one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import cached_file, logging

from .configuration_qwen import AUTO_MAP, PRECISION_FLAGS, QWenConfig, check_precision
from .cpp_kernels import (
    copy_source,
    has_decode_kernel,
    linear,
    linear_reference,
    rms_norm,
    rms_norm_reference,
    rotary,
    rotary_reference,
    set_cuda_kernels,
    set_source_folder,
)
from .qwen_cache import QWenCache, QWenQuantizedCache
from .qwen_generation_utils import (
    StopAtText,
    StopWordsLogitsProcessor,
    TextStream,
    check_stop,
    check_stop_words_ids,
    get_stop_words_ids,
    make_context,
    stream_generate,
)
from .qwen_loss import causal_lm_loss
from .transformers_compat import (
    DRAFTS_CROP_CACHES,
    DTYPE,
    FLASH_MIXES_ROWS,
    DynamicCache,
    GradientCheckpointingLayer,
    PreTrainedModel,
    as_cache,
    attention_function,
    cache_kwargs,
    can_return_tuple,
    cpu_supports_bf16,
    cpu_supports_fp16,
    create_causal_mask,
    crop_cache,
    forget_device_map,
    gpu_supports_bf16,
    is_compiling,
    is_flash_attn_2_available,
    load_config,
    loading_defaults,
    named_attention,
    pop_dtype,
    set_attention,
    tensor_parallel_plan,
    to_device_of,
)

logger = logging.get_logger(__name__)


def _load_triton(library) -> str:
    """The kernels for GPUs, at their first use. Here: transformers to 4.57 copies only what this file imports."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("They need the package triton: pip install triton.")
    from .triton_kernels import register

    return register(library)


set_cuda_kernels(_load_triton)


class Linear(nn.Linear):
    """
    `nn.Linear`, which reads bfloat16 and int8 weights at the speed of memory where a CPU has few rows to multiply:
    decoding.

    Everything else (training, compilation, other precisions and devices, weights that a quantiser or tensor
    parallelism put in place) is `nn.Linear`. int8: the weight is int8 (out, in), constant, and is multiplied by
    weight_scale, float32 (out,).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, int8: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32) if int8 else None)
        if int8:
            self.weight = nn.Parameter(torch.zeros_like(self.weight, dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight_scale is not None:
            return (linear_reference if is_compiling() else linear)(x, self.weight, self.bias, self.weight_scale)
        if is_compiling() or x.dtype != self.weight.dtype:
            return super().forward(x)
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root mean square norm (https://arxiv.org/abs/1910.07467), normalised in float32: (..., dim) to (..., dim)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (rms_norm_reference if is_compiling() else rms_norm)(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """
    Scale of the rotary base for prompts of `lengths` tokens, at least 1: `2 ** ceil(log2(L / seq_length) + 1) - 1`.

    lengths: int64 (B,), padding not counted. Returns float32 (B,). The base becomes `base * alpha ** (d / (d - 2))`
    for d rotated channels, the NTK-aware scaling of the Qwen report, section 2.3 (https://arxiv.org/abs/2309.16609).
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


def eager_attention(
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
    """Multi-head self-attention; the kernel is the one that `config._attn_implementation` names."""

    def __init__(self, config: QWenConfig, layer_idx: int | None = None):
        super().__init__()
        projection_size = config.kv_channels * config.num_attention_heads
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.is_causal = True
        int8 = config.int8_weights
        self.c_attn = Linear(config.hidden_size, 3 * projection_size, int8=int8)
        self.c_attn.num_heads = config.num_attention_heads  # for tensor parallelism
        self.c_proj = Linear(projection_size, config.hidden_size, not config.no_bias, int8)
        self.c_proj.into_residual = True  # for the initial weights

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_scale: torch.Tensor | None = None,
        past_key_values=None,
        update_kwargs: dict | None = None,
        attend=None,
        attention_weights: list | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        x: (B, T, hidden). cos, sin: float32 (B or 1, 1, T, rotated / 2). query_scale: float32 (B, 1, T, 1), LogN.
        past_key_values: the cache that takes the new keys and values. attend: takes them and computes the attention
        over the cache itself (`QWenCache.attend`). attention_weights: a list to which this layer's weights
        (B, nh, T, S) are appended; asking for them takes the eager kernel. Returns (B, T, hidden).
        """
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, 3 nh, T, hd)
        nh = qkv.shape[1] // 3
        rotate = rotary_reference if is_compiling() else rotary
        q, k = rotate(qkv[:, : 2 * nh], cos, sin).chunk(2, dim=1)  # (B, nh, T, hd) each
        v = qkv[:, 2 * nh :]
        if query_scale is not None:
            q = (q * query_scale).to(v.dtype)
        if attend is not None:
            y = attend(q, k, v, self.layer_idx, attention_mask, self.scaling)  # (B, T, nh, hd)
            return self.c_proj(y.reshape(B, T, -1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, **(update_kwargs or {}))  # (B, nh, S, hd)

        attention = eager_attention
        if attention_weights is None and self.config._attn_implementation not in (None, "eager"):
            attention = attention_function(self.config._attn_implementation)
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
        width, bias, int8 = config.intermediate_size // 2, not config.no_bias, config.int8_weights
        self.w1 = Linear(config.hidden_size, width, bias, int8)
        self.w2 = Linear(config.hidden_size, width, bias, int8)
        self.c_proj = Linear(width, config.hidden_size, bias, int8)
        self.c_proj.into_residual = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


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


class QWenPreTrainedModel(PreTrainedModel):
    """How a Qwen model is made and loaded: weights, precision, attention kernel."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    # Objects that every block shares: a cache moves by layer itself, a list is appended to.
    _skip_keys_device_placement = ["past_key_values", "attention_weights"]
    # Tables that early checkpoints carry and that are computed here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$", r"logn_tensor$"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As inherited; raises ValueError for a model with int8 weights."""
        if self.config.int8_weights and new_num_tokens is not None:
            raise ValueError(
                "A model with int8 weights can't get other embeddings: resize the model that it was made from, before "
                "tools/quantize_weights.py."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those that write to the residual stream smaller by `sqrt(2 * layers)`, as in GPT-2."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            if getattr(module, "into_residual", False):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            if module.weight.is_floating_point():  # int8 weights come from a checkpoint
                nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, strict=True, **kwargs):
        """
        Load a checkpoint; the arguments are those of transformers' `from_pretrained`, and:

        bf16, fp16, fp32: at most one True; the precision of the weights. Without one, and without `dtype`, the
        checkpoint's own (config.json's `dtype`) if the device has it, else bfloat16 where the device supports it,
        else float16 on a GPU, else float32.
        strict: a weight that this architecture has and the checkpoint lacks, or the reverse, is an error. False
        leaves it at transformers' warning, for experiments with a changed configuration; so does
        `output_loading_info=True`, which returns the lists.

        Raises ValueError for a contradiction in the configuration, RuntimeError for weights that don't fit it.
        """
        config, kwargs = load_config(cls.config_class, config, pretrained_model_name_or_path, kwargs)
        cls._find_kernels(config, pretrained_model_name_or_path, kwargs)
        device_map = kwargs.get("device_map")
        on_accelerator = _goes_to_accelerator(device_map)
        dtype = pop_dtype(kwargs)
        if pretrained_model_name_or_path is not None:
            loading_defaults(kwargs)
        elif dtype is None:
            dtype = "auto"  # that of the `state_dict`
        kwargs[DTYPE] = cls._choose_dtype(config, dtype, on_accelerator)
        cls._warn_of_precision(kwargs[DTYPE], on_accelerator)
        attention, reason = named_attention(config, kwargs), ""
        if attention is None:
            attention, reason = cls._choose_attention(config, kwargs[DTYPE], on_accelerator)
        set_attention(config, kwargs, attention)
        info_wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        forget_device_map(model, device_map)
        model._forget_precision_flags()
        chosen = model.config._attn_implementation
        why = f" ({reason})" if reason else ""
        logger.info(f"{cls.__name__}: weights in {model.dtype}, attention by {chosen}{why}")
        if strict and not info_wanted and getattr(model, "hf_quantizer", None) is None:  # quantisers rename weights
            model._check_loaded(info, pretrained_model_name_or_path)
        return (model, info) if info_wanted else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        """A new model; bf16, fp16 and fp32 in `config` choose its precision as at loading."""
        config.check()
        cls._find_kernels(config, getattr(config, "_name_or_path", None), {})
        dtype = pop_dtype(kwargs)
        if any(getattr(config, flag) for flag in PRECISION_FLAGS):
            dtype = cls._choose_dtype(config, dtype, on_accelerator=False)
        if dtype is not None:
            kwargs[DTYPE] = dtype
        model = super()._from_config(copy.deepcopy(config), **kwargs)
        model._forget_precision_flags()
        return model

    def save_pretrained(self, save_directory, **kwargs):
        """As inherited. The code is saved beside the weights, and the configuration names it for every auto class."""
        self.config.auto_map = dict(AUTO_MAP)  # loaded from a hub, it names the code's repository there
        if kwargs.get("is_main_process", True):
            copy_source(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @staticmethod
    def _find_kernels(config: QWenConfig, path, kwargs: dict) -> None:
        """
        Say where the checkpoint's code has its cpp_kernels.cpp, which transformers does not copy: in the folder, or in
        the repository of a hub that `auto_map` names, at the revision that this module is of.
        """
        here = Path(__file__).resolve().parent
        if (here / "cpp_kernels.cpp").exists():
            return
        repository = (getattr(config, "auto_map", None) or {}).get("AutoConfig", "").rpartition("--")[0]
        path = str(path or "")
        is_local = os.path.isdir(path) and not repository
        if is_local:
            set_source_folder(path)
        if is_local or not (repository or path):
            return
        hub = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "proxies", "token") if key in kwargs}
        try:
            found = cached_file(
                repository or path,
                "cpp_kernels.cpp",
                revision=here.name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **hub,
            )
        except (OSError, ValueError) as error:  # the model works without
            logger.info(f"cpp_kernels.cpp can't be had from the hub: {error}")
            found = None
        if found is not None:
            set_source_folder(Path(found).parent)

    def _forget_precision_flags(self) -> None:
        """What they asked for is done, and `dtype` says it; a saved flag would overrule a later change of precision."""
        for flag in PRECISION_FLAGS:
            setattr(self.config, flag, False)

    @staticmethod
    def _choose_dtype(config: QWenConfig, dtype, on_accelerator: bool):
        """The precision to load in; `dtype` is what the caller passed: a torch.dtype, "auto" or None."""
        config.check()
        flag = next((flag for flag in PRECISION_FLAGS if getattr(config, flag)), None)
        if flag is not None:
            check_precision(flag, dtype)
            return getattr(torch, PRECISION_FLAGS[flag])
        if dtype is not None:
            return dtype
        own = getattr(config, DTYPE, None)
        own = getattr(torch, own) if isinstance(own, str) else own
        if on_accelerator:
            supported = gpu_supports_bf16() if torch.cuda.is_available() else True
            fallback = torch.float16
        else:
            supported = cpu_supports_bf16()
            fallback = torch.float32
        if own is not None and (own != torch.bfloat16 or supported):
            return own
        return torch.bfloat16 if supported else fallback

    @staticmethod
    def _warn_of_precision(dtype, on_accelerator: bool) -> None:
        """One warning for a precision that the device has no instructions for."""
        if on_accelerator and torch.cuda.is_available():
            device = torch.cuda.get_device_name()
            supported = {torch.bfloat16: gpu_supports_bf16(), torch.float16: True}
        elif on_accelerator:
            return
        else:
            device = "This CPU"
            supported = {torch.bfloat16: cpu_supports_bf16(), torch.float16: cpu_supports_fp16()}
        if not supported.get(dtype, True):
            others = [flag for flag, name in PRECISION_FLAGS.items() if supported.get(getattr(torch, name), True)]
            logger.warning_once(
                f"{device} has no instructions for {dtype}, which will be slow. Faster is "
                f"{' or '.join(f'{flag}=True' for flag in others)}."
            )

    @staticmethod
    def _choose_attention(config: QWenConfig, dtype, on_accelerator: bool) -> tuple[str | None, str]:
        """
        `use_flash_attn` as an attention implementation of transformers, or None, which leaves the choice to it; and
        why flash attention was not taken. Raises ImportError if it is asked for and something is missing.
        """
        if config.use_flash_attn is False:
            return None, "use_flash_attn=False"
        missing = flash_attention_lacks(dtype)
        if config.use_flash_attn == "auto":
            missing += [] if on_accelerator else ["a model on a GPU"]
            return (None, f"flash_attention_2 needs {' and '.join(missing)}") if missing else ("flash_attention_2", "")
        if missing:
            raise ImportError(
                f"use_flash_attn=True needs {' and '.join(missing)}. With use_flash_attn='auto' it is taken where "
                f"that is there, and PyTorch's own attention elsewhere."
            )
        return "flash_attention_2", ""

    def _quantized_cache(self, bits: int | None = None) -> QWenQuantizedCache:
        """As the configuration says; by `use_cache_kernel` too if it is what asked for quantisation."""
        kernel = self.config.use_cache_kernel or not self.config.use_cache_quantization
        return QWenQuantizedCache(self.config.cache_bits if bits is None else bits, kernel=kernel)

    def _check_loaded(self, info, source) -> None:
        """Raise RuntimeError if weights of this architecture were missing from or left over in the checkpoint."""

        def ours(key: str) -> bool:  # heads of subclasses and of other projects are left to transformers' warning
            base = self.base_model_prefix + "."
            return key.startswith((base, "lm_head.", "wte.", "h.", "ln_f."))

        missing = sorted(filter(ours, info["missing_keys"]))
        unexpected = sorted(filter(ours, info["unexpected_keys"]))
        if self.get_output_embeddings() is None:  # the bare model of a checkpoint with a head
            unexpected = [key for key in unexpected if not key.startswith("lm_head.")]
        problems = []
        for keys, what in (
            (missing, "missing from it"),
            (unexpected, "in it without a place in this configuration"),
        ):
            if keys:
                shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
                problems.append(f"{len(keys)} weights {what} ({shown})")
        if problems:
            raise RuntimeError(
                f"The checkpoint {source} does not fit its configuration: {'; '.join(problems)}. Compare its "
                f"config.json (num_hidden_layers, no_bias) with its weight files, and see that every file is there. "
                f"To load it all the same, with new values for what is missing, pass strict=False."
            )


def flash_attention_lacks(dtype) -> list[str]:
    """What flash attention 2 needs and is not here; nothing if it can run. dtype: torch.dtype, or "auto" (unknown)."""
    lacks = []
    if importlib.util.find_spec("flash_attn") is None:
        lacks.append("the package flash-attn (pip install flash-attn)")
    elif torch.cuda.is_available() and not is_flash_attn_2_available():
        lacks.append("a newer version of the package flash-attn")
    if not torch.cuda.is_available():
        lacks.append("a GPU")
    elif torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        lacks.append(f"a GPU of compute capability 8.0 or higher (found {found})")
    if FLASH_MIXES_ROWS:
        lacks.append("another release of transformers (this one mixes up the rows of a batch)")
    if dtype not in (torch.float16, torch.bfloat16, "auto"):
        lacks.append(f"half precision (found {dtype}; pass bf16=True or fp16=True)")
    return lacks


def _goes_to_accelerator(device_map) -> bool:
    """Whether a model loaded with this `device_map` will run on a GPU; without a map it will if there is one."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if all(str(place) in ("cpu", "disk", "meta") for place in places):
        return False
    return torch.cuda.is_available() or any(str(place).split(":")[0] in ("mps", "xpu", "npu") for place in places)


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

    @can_return_tuple
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
            output_attentions: return the weights of every layer, (B, nh, T, S) each; takes the eager kernel.
            output_hidden_states: return the input of every block and the final states, (B, T, hidden) each.
            kwargs: handed to the attention function (`cu_seq_lens_q`, a paged cache and the like).

        Returns:
            `last_hidden_state` (B, T, hidden), `past_key_values`, `hidden_states`, `attentions`; a tuple of those
            that are not None with `return_dict=False`.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, or a mask too short for the cache.
            IndexError: an id outside the vocabulary (on a CPU; a GPU stops the process by an assertion).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        past_key_values = as_cache(past_key_values)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache

        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, hidden)
        T = x.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = self._quantized_cache() if self.config.use_cache_quantization else DynamicCache()
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        # kwargs hold it when a release up to 4.57 generates; it means the same.
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            cache_position = torch.arange(T, device=x.device) + past_length  # (T,)
        if position_ids is None:
            position_ids = self._positions(attention_mask, cache_position, past_length)  # (B or 1, T)
        if output_attentions and self.config._attn_implementation != "eager" and not is_compiling():
            logger.warning_once(
                f"output_attentions=True: attention by {self.config._attn_implementation} has no weights to return, so "
                f"the eager kernel is used, which takes memory for all of them; attn_implementation='eager' at loading "
                f"chooses it for good."
            )
        attend = None
        plain_mask = attention_mask is None or attention_mask.dim() == 2 or attention_mask.dtype == torch.bool
        # A cache of ours, maybe of another copy of this code; while compiling it never attends.
        ours = not is_compiling() and hasattr(past_key_values, "attend")
        if ours and not output_attentions and plain_mask and past_key_values.attends(T):
            attend = past_key_values.attend
            mask = None if attention_mask is None else attention_mask[..., : past_length + T].bool()
        else:
            mask = create_causal_mask(
                config=self._eager_config() if output_attentions else self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                cache_position=cache_position,
            )

        alpha, query_scale = None, None
        if self.config.use_dynamic_ntk and not self.training:
            alpha = self._ntk_alpha(position_ids, past_key_values, past_length, kwargs.get("cu_seq_lens_q"))
        if self.config.use_logn_attn and not self.training:
            query_scale = logn_scale(position_ids, self.config.seq_length)[:, None, :, None]  # (B, 1, T, 1)
        cos, sin = self.rotary_emb(position_ids, alpha)  # (B or 1, 1, T, rotated / 2) each

        all_hidden_states = [] if output_hidden_states else None
        attention_weights = [] if output_attentions else None
        shared = {  # by all blocks
            "attention_mask": mask,
            "cos": cos,
            "sin": sin,
            "query_scale": query_scale,
            "update_kwargs": cache_kwargs(cache_position),
            "position_ids": position_ids,
            **kwargs,
        }
        x = self.drop(x)
        for block in self.h:
            if output_hidden_states:
                all_hidden_states.append(x)
            x, shared = to_device_of(block, (x, shared))
            x = block(x, past_key_values=past_key_values, attend=attend, attention_weights=attention_weights, **shared)
        x = self.ln_f(x)
        if output_hidden_states:
            all_hidden_states.append(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(attention_weights) if output_attentions else None,
        )

    def _embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        try:
            return self.wte(input_ids)
        except IndexError:
            raise IndexError(_outside_vocabulary(input_ids, self.wte.num_embeddings)) from None

    def _eager_config(self) -> QWenConfig:
        """A view of the configuration that asks for masks the eager kernel can read."""
        config = copy.copy(self.config)
        config._attn_implementation = "eager"
        return config

    @staticmethod
    def _positions(attention_mask, cache_position: torch.Tensor, past_length) -> torch.Tensor:
        """Positions of the new tokens, int64 (B or 1, T), counted over real tokens."""
        if attention_mask is None or attention_mask.dim() != 2:
            return cache_position[None]
        needed = past_length + cache_position.shape[0]
        if not isinstance(needed, torch.Tensor) and attention_mask.shape[1] < needed:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but there are {past_length} cached and "
                f"{cache_position.shape[0]} new tokens; it must cover both."
            )
        counted = attention_mask.long().cumsum(-1) - 1  # (B, S)
        return counted.clamp(min=0)[:, cache_position]  # (B, T)

    def _ntk_alpha(self, position_ids: torch.Tensor, cache, past_length, sequence_starts=None) -> torch.Tensor:
        """
        The NTK scale of each sequence, float32 (B or 1, T or 1): that of its prompt, which its cache remembers.

        While `generate` runs, the length of the prompt is noted on the cache (`prompt_lengths`), for a prompt that
        arrives in chunks or with draft tokens behind it; otherwise the first tokens that a cache sees are the prompt.

        sequence_starts: int32 (sequences + 1,), for several sequences in one row (packed, or continuous batching, whose
        cache is not seen here): each has the scale of its present length then.
        """
        if sequence_starts is not None:
            tokens = torch.arange(position_ids.shape[1], device=position_ids.device)
            ends = sequence_starts[1:].to(position_ids.device)
            last = ends[torch.searchsorted(ends, tokens, right=True).clamp(max=ends.shape[0] - 1)] - 1
            return ntk_alpha(position_ids[:, last.long().clamp(min=0)] + 1, self.config.seq_length)  # (1, T)
        lengths = getattr(cache, "prompt_lengths", None)
        if lengths is None:
            lengths = position_ids.amax(-1) + 1
        elif lengths.shape[0] < position_ids.shape[0]:  # rows became beams after the note
            lengths = lengths.repeat_interleave(position_ids.shape[0] // lengths.shape[0])
        alpha = ntk_alpha(lengths.to(position_ids.device), self.config.seq_length)  # (B,)
        if cache is None:
            return alpha[:, None]
        stored = getattr(cache, "ntk_alpha", None)
        if isinstance(past_length, torch.Tensor) and stored is not None:
            # A static cache may have been reset. Its length is a tensor: decide without a branch, so that this
            # compiles and no device waits for the host. A compiled step is never the first, and has nothing to store.
            alpha = torch.where(past_length == 0, alpha, stored.to(alpha.device))
            if not is_compiling():
                cache.ntk_alpha = alpha
            return alpha[:, None]
        if stored is None or past_length == 0:
            cache.ntk_alpha = alpha
        return cache.ntk_alpha[:, None]


@functools.lru_cache(maxsize=None)
def _announce(text: str) -> None:
    """Say it once in a process."""
    logger.info(text)


def _outside_vocabulary(input_ids: torch.Tensor, vocab_size: int) -> str:
    bad = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    return (
        f"input_ids hold {bad[0].item()}, but this model's vocabulary has the ids 0 to {vocab_size - 1}. "
        f"Was the text encoded with this checkpoint's tokenizer? After adding tokens call "
        f"model.resize_token_embeddings(len(tokenizer))."
    )


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """The language model: the network, the output layer, generation and chat."""

    _auto_class = "AutoModelForCausalLM"
    _tp_plan = tensor_parallel_plan({"lm_head": "colwise_gather_output"})
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: QWenConfig):
        config.check()
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers would guess it from the class's name
        self.transformer = QWenModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, int8=config.int8_weights)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @can_return_tuple
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
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        The arguments of `QWenModel.forward`, and:

        Args:
            labels: int64 (B, T), the ids themselves (they are shifted here), -100 where there is no loss.
            logits_to_keep: compute logits for the last n positions only, or for those a 1-D tensor indexes; 0: all.
            skip_logits: with labels, return no logits: the loss is computed without holding those of all positions.
            kwargs: `num_items_in_batch` divides the summed loss instead of the number of labels; the rest goes to
                the attention function.

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
            return_dict=True,
            **kwargs,
        )
        loss, logits = None, None
        if skip_logits and labels is not None:
            loss = causal_lm_loss(self.lm_head, output.last_hidden_state, labels, self.config.vocab_size, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(output.last_hidden_state[:, kept])  # (B, positions kept, vocab)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        *args,
        stop_words_ids=None,
        cache_bits=None,
        **kwargs,
    ):
        """
        transformers' `generate`, and:

        stop_words_ids: lists of token ids; after any of them was generated the next token is `eos_token_id`.
        Default: `stop_words_ids` of the generation configuration.
        cache_implementation: "quantized" takes `QWenQuantizedCache`; with a `cache_config`, transformers' own.
        cache_bits: 8 or 4, of the quantised cache, which it asks for. Default: `config.cache_bits`.

        Raises IndexError for ids outside the vocabulary, ValueError for stop words that are not lists of ids and for
        contradictions about the cache.
        """
        settings = self.generation_config if generation_config is None else generation_config
        kwargs = self._with_cache(generation_config, kwargs, cache_bits)
        if stop_words_ids is None:
            stop_words_ids = getattr(settings, "stop_words_ids", None)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if torch.is_tensor(ids) and ids.numel():
            vocab_size = self.get_input_embeddings().num_embeddings
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise IndexError(_outside_vocabulary(ids, vocab_size))
        prompt_length = 0 if ids is None else ids.shape[1]
        if logits_processor is not None:
            logits_processor = [
                processor.behind(prompt_length) if hasattr(processor, "behind") else processor
                for processor in logits_processor
            ]
        if stop_words_ids is not None:
            eos = kwargs.get("eos_token_id", settings.eos_token_id)
            eos = eos.tolist() if torch.is_tensor(eos) else eos
            stop = StopWordsLogitsProcessor(
                stop_words_ids, eos[0] if isinstance(eos, (list, tuple)) else eos, prompt_length=prompt_length
            )
            logits_processor = [*(logits_processor or []), stop]
        cache = kwargs.get("past_key_values")
        try:
            output = super().generate(inputs, generation_config, logits_processor, *args, **kwargs)
            cache = getattr(output, "past_key_values", cache)
        finally:
            if getattr(cache, "prompt_lengths", None) is not None:
                cache.prompt_lengths = None  # the note was for this prompt; the cache may outlive it
        return output

    def _with_cache(self, generation_config, kwargs: dict, bits: int | None) -> dict:
        """The arguments of `generate`, with a cache of ours unless that is left to the caller or to transformers."""

        def setting(name):
            values = (
                kwargs.get(name),
                getattr(generation_config, name, None),
                getattr(self.generation_config, name, None),
            )
            return next((value for value in values if value is not None), None)

        named = setting("cache_implementation")
        unwanted = kwargs.get("past_key_values") is not None or setting("use_cache") is False
        if bits is not None and (unwanted or named not in (None, "quantized")):
            raise ValueError(
                f"cache_bits={bits} asks for a quantised cache, but there is past_key_values, use_cache=False or "
                f"cache_implementation={named!r}. Pass one of them, or past_key_values=QWenQuantizedCache({bits})."
            )
        drafts = kwargs.get("assistant_model") or setting("prompt_lookup_num_tokens") or setting("penalty_alpha")
        # transformers' own cache copies everything for every token. On a CPU SDPA reads bfloat16 slowly; on new GPUs it
        # takes cuDNN, which plans anew for every length.
        is_faster = (
            has_decode_kernel(self.device, self.dtype, self.config.kv_channels)
            and self.config._attn_implementation == "sdpa"
            and (DRAFTS_CROP_CACHES or not drafts)
        )
        if unwanted:
            return kwargs
        if bits is not None or (named == "quantized" and setting("cache_config") is None):
            cache = self._quantized_cache(bits)
        elif named is not None:
            return kwargs
        elif self.config.use_cache_quantization:
            cache = self._quantized_cache()
        elif is_faster and not self.training:
            cache = QWenCache()
        else:
            return kwargs
        _announce(f"generate keeps keys and values in {cache}")
        return {**kwargs, "past_key_values": cache, **({} if named is None else {"cache_implementation": None})}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As inherited; notes the length of the prompt, int64 (B,), on a cache that is still empty."""
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if self.config.use_dynamic_ntk and cache is not None and not cache.get_seq_length():
            positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
            if positions is not None:
                cache.prompt_lengths = positions.amax(-1) + 1
            elif mask is not None and mask.dim() == 2:
                cache.prompt_lengths = mask.long().sum(-1)
        return result

    def chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        system: str = "You are a helpful assistant.",
        stop_words_ids: list | None = None,
        generation_config=None,
        *,
        stop: str | list[str] | None = None,
        past_key_values=None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """
        Answer `query` after `history`, a list of (query, response) pairs, which is not changed.

        Args:
            stop_words_ids: lists of token ids that end the answer; they stay part of it.
            stop: a text or texts that end the answer and are not part of it.
            past_key_values: the cache of this conversation's earlier turns. What it shares with the new prompt is not
                computed again; it is extended in place. Begin with None or an empty `DynamicCache`.
            return_past_key_values: return the cache too.
            generation_config, kwargs: as for `generate`; `max_window_size` is the largest prompt in tokens.

        Returns:
            The response, and a new history that ends with this turn; with `return_past_key_values` the cache besides.

        Raises:
            ValueError: the generation configuration is not that of a chat model, the question alone is longer
                than `max_window_size`, the stop words are not lists of ids or texts, or the cache can't be shortened.

        Example:
            >>> response, history = model.chat(tokenizer, "你好", history=None)
            >>> response, history = model.chat(tokenizer, "What is the capital of Iceland?", history=history)
        """
        if return_past_key_values and past_key_values is None:
            kwargs = self._with_cache(generation_config, kwargs, kwargs.pop("cache_bits", None))
            past_key_values = kwargs.pop("past_key_values", None)
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
        turn = self._prepare_chat(
            tokenizer, query, history, system, stop_words_ids, generation_config, stop, past_key_values, kwargs
        )
        with turn.remembered() as new_tokens:
            output = self.generate(turn.input_ids, **turn.arguments())
            new_tokens += output[0, turn.input_ids.shape[1] :].tolist()
        stream = turn.text_stream()
        for token in new_tokens:
            if not stream.put(token):
                break
        response = stream.finish()
        history = [*(history or []), (query, response)]
        return (response, history, turn.cache) if return_past_key_values else (response, history)

    def chat_stream(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        system: str = "You are a helpful assistant.",
        stop_words_ids: list | None = None,
        generation_config=None,
        *,
        stop: str | list[str] | None = None,
        past_key_values=None,
        **kwargs,
    ):
        """
        `chat` as a generator of the response so far; the last one is the whole response.

        The text never ends in half a character. Closing the generator stops the computation. Arguments and errors
        are those of `chat`, and errors in the arguments are raised at the call.

        Example:
            >>> for response in model.chat_stream(tokenizer, "你好", history=None):
            ...     print(response)
        """
        turn = self._prepare_chat(
            tokenizer, query, history, system, stop_words_ids, generation_config, stop, past_key_values, kwargs
        )
        if turn.beams > 1:
            raise ValueError("chat_stream can't stream beams, which are only chosen at the end; use chat.")
        if "streamer" in kwargs:
            raise ValueError("chat_stream is a stream itself; to use a streamer call model.generate.")

        def responses():
            text = turn.text_stream()
            shown = None
            tokens = stream_generate(self, turn.input_ids, **turn.arguments())
            with turn.remembered() as new_tokens, contextlib.closing(tokens):
                for token in tokens:
                    new_tokens.append(token)
                    text.put(token)
                    if text.text != shown:
                        shown = text.text
                        yield shown
            if text.finish() != shown:
                yield text.text

        return responses()

    def _prepare_chat(
        self, tokenizer, query, history, system, stop_words_ids, generation_config, stop, cache, kwargs
    ) -> _Turn:
        """Check the arguments of a chat, and bring them together as those of `generate`."""
        settings = self.generation_config if generation_config is None else generation_config

        def setting(name, default=None):
            value = kwargs.get(name, getattr(settings, name, None))
            return default if value is None else value

        chat_format = getattr(settings, "chat_format", None)
        if chat_format != "chatml":
            found = "names no chat_format" if chat_format is None else f"has chat_format={chat_format!r}"
            raise ValueError(
                f"chat needs a chat model, but the generation configuration {found}. For a base model call "
                f"model.generate on the encoded text. If these are the weights of a chat model, set "
                f"model.generation_config.chat_format = 'chatml', or load the checkpoint's generation_config.json "
                f"with GenerationConfig.from_pretrained."
            )
        if setting("num_return_sequences", 1) > 1:
            raise ValueError("chat gives one response; for several call model.generate with num_return_sequences.")
        if stop_words_ids is not None:
            check_stop_words_ids(stop_words_ids)
        max_window_size = setting("max_window_size", 6144)
        _, shortest = make_context(tokenizer, query, None, system, max_window_size, chat_format)
        if len(shortest) > max_window_size:
            raise ValueError(
                f"The system prompt and the question take {len(shortest)} tokens, more than "
                f"max_window_size={max_window_size}. Shorten them, or pass a larger max_window_size if the model's "
                f"context of {self.config.seq_length} tokens allows it."
            )
        _, tokens = make_context(tokenizer, query, history, system, max_window_size, chat_format)

        # The tokens that end a turn are ends of the sequence for `generate`; longer stop words need a processor.
        eos = setting("eos_token_id", [])
        ends = [words[0] for words in get_stop_words_ids(chat_format, tokenizer)]
        eos = list(dict.fromkeys([tokenizer.eod_id, *(eos if isinstance(eos, (list, tuple)) else [eos]), *ends]))
        ids = torch.tensor([tokens], device=self.get_input_embeddings().weight.device)  # (1, T)
        if cache is not None:
            alpha = None
            if self.config.use_dynamic_ntk:
                alpha = ntk_alpha(torch.tensor([len(tokens)]), self.config.seq_length)
            keep_common_prefix(cache, tokens, alpha)
        kwargs = {key: value for key, value in kwargs.items() if key != "max_window_size"}
        return _Turn(
            tokenizer=tokenizer,
            input_ids=ids,
            ends=eos,
            stop=[] if stop is None else check_stop(stop),
            beams=setting("num_beams", 1),
            cache=cache,
            settings={
                "attention_mask": torch.ones_like(ids),
                "pad_token_id": setting("pad_token_id", tokenizer.eod_id),
                **kwargs,
                "generation_config": generation_config,
                "stop_words_ids": stop_words_ids,
                "eos_token_id": eos,
                "return_dict_in_generate": False,
            },
        )


@dataclasses.dataclass
class _Turn:
    """One turn of a chat: its prompt, what ends its answer, the conversation's cache, the settings of `generate`."""

    tokenizer: object
    input_ids: torch.Tensor  # (1, T)
    ends: list
    stop: list
    beams: int
    cache: object
    settings: dict

    def arguments(self) -> dict:
        """Of `generate`."""
        arguments = dict(self.settings)
        if self.cache is not None:
            arguments["past_key_values"] = self.cache
        if self.stop and self.beams == 1:  # beams go on, and the text is cut in the end
            stop = StopAtText(self.tokenizer, self.stop, self.input_ids.shape[1])
            arguments["stopping_criteria"] = [*(arguments.get("stopping_criteria") or []), stop]
        return arguments

    def text_stream(self) -> TextStream:
        return TextStream(self.tokenizer, self.ends, self.stop)

    @contextlib.contextmanager
    def remembered(self):
        """
        Gives a list for the generated tokens; afterwards the cache remembers which tokens its keys are of.

        If the turn breaks off the cache is as it was before: some layers may have had a token more than others.
        """
        if self.cache is None:
            yield []
            return
        length, tokens, new_tokens = int(self.cache.get_seq_length()), self.input_ids[0].tolist(), []
        try:
            yield new_tokens
        except BaseException:
            crop_cache(self.cache, length)
            self.cache.token_ids = tokens[:length]
            raise
        self.cache.token_ids = (tokens + new_tokens)[: int(self.cache.get_seq_length())]


def keep_common_prefix(cache, tokens: list[int], alpha: torch.Tensor | None) -> None:
    """
    Shorten the cache of a conversation to what it shares with the prompt `tokens`, all of it but the last token.

    Nothing is shared if the prompt's NTK scale is another: its keys are rotated otherwise.

    Raises ValueError for a cache that holds keys of unknown tokens, or can't be shortened.
    """
    length = int(cache.get_seq_length())
    known = getattr(cache, "token_ids", [])
    if len(known) != length:
        raise ValueError(
            f"past_key_values holds {length} tokens that chat has not seen. Pass the cache that an earlier turn of "
            f"this conversation has filled, or an empty one."
        )
    shared = 0
    if alpha is None or getattr(cache, "ntk_alpha", None) is None or bool((cache.ntk_alpha.cpu() == alpha).all()):
        limit = min(length, len(tokens) - 1)
        shared = next((i for i in range(limit) if known[i] != tokens[i]), limit)
    crop_cache(cache, shared)
    cache.token_ids = tokens[:shared]
