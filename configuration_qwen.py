"""Configuration of the first-generation Qwen models: the keys of a checkpoint's config.json."""

from __future__ import annotations

import json
import math
import os

from .transformers_compat import PretrainedConfig, named_dtype, tensor_parallel_plan

PRECISION_FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # as torch calls them
AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModel": "modeling_qwen.QWenModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
# The code that travels with a checkpoint, each file behind those that it imports.
CODE_FILES = (
    "cpp_kernels.cpp",
    "cpp_kernels.py",
    "transformers_compat.py",
    "qwen_ops.py",
    "triton_launch.py",
    "triton_attention.py",
    "triton_products.py",
    "triton_kernels.py",
    "qwen_cache.py",
    "qwen_plain.py",
    "qwen_quantization.py",
    "configuration_qwen.py",
    "qwen_generation_utils.py",
    "qwen_chat.py",
    "qwen_sampling.py",
    "qwen_cuda_graph.py",
    "qwen_graphed_generation.py",
    "qwen_attention.py",
    "qwen_decode.py",
    "qwen_loading.py",
    "qwen_loss.py",
    "tokenization_qwen.py",
    "modeling_qwen.py",
)


def _is_integer(value, smallest: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value):
    """A scalar of NumPy's or PyTorch's, or those in a list or dictionary, as Python's, which JSON can hold."""
    if getattr(value, "shape", None) == ():
        return value.item()
    if type(value) is dict:
        return {key: _plain(entry) for key, entry in value.items()}
    return list(map(_plain, value)) if type(value) is list else value


def _is_gptq(config_dict: dict) -> bool:
    method = config_dict.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == "gptq"


_POSITIVE_INTEGER = ("a positive integer", _is_integer)
_POSITIVE_NUMBER = ("a number above 0", lambda value: _is_number(value) and value > 0)
_PROBABILITY = ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_TOKEN = ("the id of a token, or null", lambda value: value is None or _is_integer(value, -1))
# Each key of ours: what it must be, in words, and whether a value is that.
_VALUES = {
    "vocab_size": _POSITIVE_INTEGER,
    "hidden_size": _POSITIVE_INTEGER,
    "intermediate_size": (
        "an even integer, both halves of the SwiGLU together",
        lambda value: _is_integer(value, 2) and value % 2 == 0,
    ),
    "num_hidden_layers": _POSITIVE_INTEGER,
    "num_attention_heads": _POSITIVE_INTEGER,
    "kv_channels": _POSITIVE_INTEGER,
    "max_position_embeddings": _POSITIVE_INTEGER,
    "seq_length": ("an integer of at least 2", lambda value: _is_integer(value, 2)),  # LogN divides by its logarithm
    "rotary_pct": ("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1),
    "rotary_emb_base": _POSITIVE_NUMBER,
    "layer_norm_epsilon": _POSITIVE_NUMBER,
    "initializer_range": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "emb_dropout_prob": _PROBABILITY,
    "attn_dropout_prob": _PROBABILITY,
    "cache_bits": ("8 or 4", lambda value: _is_integer(value) and value in (4, 8)),
    "use_flash_attn": ("'auto', true or false", lambda value: isinstance(value, bool) or value == "auto"),
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": (
        "the id of a token, a list of ids, or null",
        lambda value: value is None or all(_is_integer(i, -1) for i in (value if isinstance(value, list) else [value])),
    ),
    **dict.fromkeys(
        (
            *("scale_attn_weights", "use_cache", "bf16", "fp16", "fp32", "use_dynamic_ntk", "use_logn_attn", "no_bias"),
            *("use_cache_quantization", "use_cache_kernel", "softmax_in_fp32", "int8_weights", "int8_lm_head"),
            "tie_word_embeddings",
        ),
        _FLAG,
    ),
}
CHECKED_KEYS = tuple(_VALUES)


class QWenConfig(PretrainedConfig):
    """
    The keys of a Qwen checkpoint's `config.json`; the defaults are those of Qwen-7B.

    Args:
        vocab_size: rows of the embedding and of the output layer; the tokenizer's size padded up.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: attention heads; every head has its own keys and values.
        kv_channels: width of one head.
        intermediate_size: width of **both** halves of the SwiGLU together; `w1` and `w2` have half of it each.
        emb_dropout_prob: dropout on the embeddings.
        attn_dropout_prob: dropout on the attention weights.
        layer_norm_epsilon: epsilon of the RMS norms.
        initializer_range: standard deviation of newly made weights.
        seq_length: training context in tokens. Dynamic NTK and LogN begin beyond it.
            Default: `max_position_embeddings`.
        max_position_embeddings: what other software reads as the context length.
        scale_attn_weights: scale attention scores by `1 / sqrt(kv_channels)`.
        use_cache: return keys and values for the next call.
        bf16, fp16, fp32: precision of the weights, at most one; none leaves the choice to loading.
        rotary_pct: share of each head's channels that is rotated.
        rotary_emb_base: base of the rotary embedding.
        use_dynamic_ntk: raise the rotary base for prompts longer than `seq_length` (inference only).
        use_logn_attn: scale queries at positions beyond `seq_length` (inference only).
        use_flash_attn: `"auto"`, True (flash attention 2 or an error) or False.
        no_bias: no bias in attention output and MLP. `c_attn` always has one.
        use_cache_quantization: keep keys and values quantised (`QWenQuantizedCache`).
        use_cache_kernel: attend over the quantised keys and values themselves. As published it is off by default:
            they are read back at every step then, which is slow.
        cache_bits: of the quantised cache, 8 or 4.
        softmax_in_fp32: accepted as published; the softmax is always taken in float32.
        int8_weights: the matrices of the checkpoint but the embedding are int8, as `tools/quantize_weights.py` writes.
        int8_lm_head: the output layer is int8. Loading rounds it, if the checkpoint has it in full precision.
        bos_token_id, eos_token_id, pad_token_id: for other software; generation reads generation_config.json.

    Raises:
        ValueError: for a value no Qwen model can have, a number or a flag in quotes among them; the message names the
            key and what it may be.

    Example:
        >>> QWenConfig(hidden_size=2048, num_attention_heads=16).head_dim
        128
    """

    model_type = "qwen"
    _auto_class = "AutoConfig"  # saving copies this module and what it imports
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = tensor_parallel_plan(
        {
            "wte": "embedding_rowwise",
            "h.*.attn.c_attn": "colwise_fused_heads",
            "h.*.attn.c_proj": "rowwise",
            "h.*.mlp.w1": "colwise",
            "h.*.mlp.w2": "colwise",
            "h.*.mlp.c_proj": "rowwise",
        }
    )
    base_model_fsdp_plan = {"wte": "free_full_weight", "h.*": "free_full_weight", "ln_f": "keep_full_weight"}
    base_model_pp_plan = {
        "wte": (["input_ids"], ["inputs_embeds"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        emb_dropout_prob=0.0,
        attn_dropout_prob=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
        max_position_embeddings=8192,
        scale_attn_weights=True,
        use_cache=True,
        bf16=False,
        fp16=False,
        fp32=False,
        kv_channels=128,
        rotary_pct=1.0,
        rotary_emb_base=10000,
        use_dynamic_ntk=True,
        use_logn_attn=True,
        use_flash_attn="auto",
        intermediate_size=22016,
        no_bias=True,
        tie_word_embeddings=False,
        use_cache_quantization=False,
        use_cache_kernel=False,
        cache_bits=8,
        softmax_in_fp32=False,
        int8_weights=False,
        int8_lm_head=False,
        seq_length=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.emb_dropout_prob = emb_dropout_prob
        self.attn_dropout_prob = attn_dropout_prob
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.seq_length = max_position_embeddings if seq_length is None else seq_length
        self.scale_attn_weights = scale_attn_weights
        self.use_cache = use_cache
        self.bf16 = bf16
        self.fp16 = fp16
        self.fp32 = fp32
        self.kv_channels = kv_channels
        self.rotary_pct = rotary_pct
        self.rotary_emb_base = rotary_emb_base
        self.use_dynamic_ntk = use_dynamic_ntk
        self.use_logn_attn = use_logn_attn
        self.use_flash_attn = use_flash_attn
        self.no_bias = no_bias
        self.use_cache_quantization = use_cache_quantization
        self.use_cache_kernel = use_cache_kernel
        self.cache_bits = cache_bits
        self.softmax_in_fp32 = softmax_in_fp32
        self.int8_weights = int8_weights
        self.int8_lm_head = int8_lm_head
        # Before transformers meets them.
        named_dtype(kwargs.get("dtype") or kwargs.get("torch_dtype"))
        method = kwargs.get("quantization_config")
        if method is not None and not isinstance(method, dict) and not hasattr(method, "to_dict"):
            raise ValueError(f"config.quantization_config must be an object {{...}}, found {method!r}.")
        tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **tokens, **kwargs)
        self.check()

    @property
    def head_dim(self) -> int:
        """Width of one head under the name transformers uses."""
        return self.kv_channels

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values: as many as of queries."""
        return self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.kv_channels * self.rotary_pct)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As inherited; early GPTQ checkpoints say how they are quantised in quantize_config.json, or ValueError."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        beside = os.path.join(str(pretrained_model_name_or_path), "quantize_config.json")
        if not config_dict.get("quantization_config") and os.path.isfile(beside):
            try:
                with open(beside, encoding="utf-8") as file:
                    config_dict["quantization_config"] = dict(json.load(file), quant_method="gptq")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{beside} is no JSON object ({error}). Copy it anew from the checkpoint.") from None
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As inherited; a precision that the caller names replaces the one in the file.

        Raises ValueError for one that PyTorch has not, for two that contradict each other, and for two such choices of
        the attention kernel.
        """
        flash, attention = kwargs.get("use_flash_attn"), kwargs.get("attn_implementation")
        if attention is not None and flash in (True, False) and flash != str(attention).startswith("flash_attention"):
            raise ValueError(f"use_flash_attn={flash} contradicts attn_implementation={attention!r}; pass one of them.")
        dtype = named_dtype(kwargs.get("dtype") or kwargs.get("torch_dtype"))
        flags = [flag for flag in PRECISION_FLAGS if kwargs.get(flag)]
        for flag in flags:
            check_precision(flag, dtype)
        if flags or dtype:
            config_dict = {**config_dict, **dict.fromkeys(PRECISION_FLAGS, False)}
        elif _is_gptq(config_dict) and config_dict.get("fp16"):
            # As published, for GPUs: it is what the file holds, not a choice for every device.
            config_dict = {"torch_dtype": "float16", **config_dict, "fp16": False}
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, key, value):
        """As inherited; NumPy's and PyTorch's scalars become Python's, at construction, at loading and later."""
        super().__setattr__(key, _plain(value))

    def check(self) -> None:
        """
        Raise ValueError if a value has another type or is out of range, or values contradict each other.

        Called at construction, and again when a model is built:
        `from_pretrained` sets keywords (`bf16=True`) on a configuration that exists already.
        """
        for key, (what, is_right) in _VALUES.items():
            value = getattr(self, key)
            if not is_right(value):
                raise ValueError(f"config.{key} must be {what}, found {value!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config.hidden_size ({self.hidden_size}) must be a multiple of "
                f"config.num_attention_heads ({self.num_attention_heads})."
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"config.kv_channels * config.rotary_pct must be an even number of channels between 2 and "
                f"{self.kv_channels}, found {self.kv_channels} * {self.rotary_pct}."
            )
        if self.use_dynamic_ntk and self.rotary_dim == 2:  # the exponent of the scale is d / (d - 2)
            raise ValueError(
                f"config.use_dynamic_ntk needs at least 4 rotated channels, found {self.kv_channels} * "
                f"{self.rotary_pct} = 2. Set it to false, or kv_channels or rotary_pct higher."
            )
        if self.cache_bits == 4 and self.use_cache_quantization and self.kv_channels % 16:
            raise ValueError(
                f"config.cache_bits must be 8, or 4 with kv_channels that 16 divides, found 4 with {self.kv_channels}."
            )
        int8 = [name for name in ("int8_weights", "int8_lm_head") if getattr(self, name)]
        if self.tie_word_embeddings and int8:
            raise ValueError(f"config.{int8[0]} needs tie_word_embeddings=False: lm_head is int8, wte is not.")
        flags = [flag for flag in PRECISION_FLAGS if getattr(self, flag)]
        if len(flags) > 1:
            raise ValueError(
                f"At most one of bf16, fp16 and fp32 may be true, found {' and '.join(flags)}. "
                f"Pass the one you want and set the others to False."
            )


def check_precision(flag: str, dtype) -> None:
    """Raise ValueError if `dtype` (a torch.dtype, its name, "auto" or None) contradicts a flag that is true."""
    if dtype not in (None, "auto") and str(dtype).replace("torch.", "") != PRECISION_FLAGS[flag]:
        raise ValueError(f"{flag}=True contradicts dtype={dtype}; pass one of them.")
