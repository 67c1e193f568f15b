"""
How a checkpoint becomes a model: precision, attention function, quantised matrices, native sources, missing weights.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import cached_file, logging

from .configuration_qwen import AUTO_MAP, CHECKED_KEYS, PRECISION_FLAGS, QWenConfig, check_precision
from .cpp_kernels import copy_source, set_source_folder
from .qwen_quantization import (
    Int8Linear,
    check_learning,
    check_state,
    check_tensors,
    give_back_quantization,
    holds_codes,
    is_quantized,
    leave_out,
    loading_quantized,
    replace_matrices,
    round_output_layer,
    take_quantization,
)
from .transformers_compat import (
    DTYPE,
    FLASH_MIXES_ROWS,
    PreTrainedModel,
    cpu_supports_fp16,
    drop_old_arguments,
    forget_device_map,
    gpu_supports_bf16,
    has_mps,
    is_flash_attn_2_available,
    is_fsdp_unit,
    load_config,
    loading_defaults,
    named_attention,
    named_dtype,
    pop_dtype,
    set_attention,
    tensor_names,
)

logger = logging.get_logger("transformers.models.qwen.qwen_loading")

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # keys of the configuration, which generation reads


class QWenPreTrainedModel(PreTrainedModel):
    """How a Qwen model is made and loaded: weights, precision, attention kernel."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    # Objects that every block shares: a cache moves by layer itself, a list is appended to.
    _skip_keys_device_placement = ["past_key_values", "cache", "attention_weights"]
    # Tables that early checkpoints carry and that are computed here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"logn_tensor$"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As inherited; raises ValueError for a model with an output layer in int8 or of GPTQ."""
        asked = (new_num_tokens, *args[:1], kwargs.get("pad_to_multiple_of"))
        has_codes = getattr(self.get_output_embeddings(), "HOLDS_CODES", False)
        is_int8 = self.config.int8_weights or self.config.int8_lm_head
        if (is_int8 or has_codes) and any(n is not None for n in asked):
            raise ValueError(
                f"A model with {'int8 weights' if is_int8 else 'a quantised output layer'} can't get other embeddings: "
                f"resize the model that it was made from, before tools/quantize_weights.py or int8_lm_head."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those that write to the residual stream smaller by `sqrt(2 * layers)`, as in GPT-2."""
        std = self.config.initializer_range
        if getattr(module, "into_residual", False):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        if getattr(module, "HOLDS_CODES", False):  # a checkpoint with them may lack the bias
            if module.bias is not None and not getattr(module.bias, "_is_hf_initialized", False):
                nn.init.zeros_(module.bias)
            if isinstance(module, Int8Linear):
                module.draw(std)
            return
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def post_init(self) -> None:
        """As inherited, at the end of the construction; codes take the place of weights where a checkpoint has them."""
        replace_matrices(self)
        super().post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, strict=True, **kwargs):
        """
        Load a checkpoint; the arguments are those of transformers' `from_pretrained`, and:

        bf16, fp16, fp32: at most one True; the precision of the weights. Without one, and without `dtype`, the
        checkpoint's own (config.json's `dtype`) if the device has it, else bfloat16, on GPUs that lack it float16.
        strict: a weight that this architecture has and the checkpoint lacks, or the reverse, is an error. False
        leaves it at transformers' warning, for experiments with a changed configuration; so does
        `output_loading_info=True`, which returns the lists.

        Raises ValueError for a contradiction in the configuration, RuntimeError for weights that don't fit it.
        """
        _check_has_config(pretrained_model_name_or_path, config)
        _check_generation_config(pretrained_model_name_or_path)
        kwargs = dict(kwargs)
        drop_old_arguments(kwargs)
        tokens = {name: kwargs.pop(name) for name in TOKEN_IDS if name in kwargs}
        # The class of one that AutoConfig made may be of another copy of this code.
        given = config if isinstance(config, PretrainedConfig) else None
        config, kwargs = load_config(cls.config_class, config, pretrained_model_name_or_path, kwargs)
        if given is not None:
            config = cls._settle(given, kwargs)
        cls._find_kernels(config, pretrained_model_name_or_path, kwargs)
        config = take_quantization(config, pretrained_model_name_or_path, kwargs)
        device_map = kwargs.get("device_map")
        on_accelerator = _goes_to_accelerator(device_map)
        dtype = pop_dtype(kwargs)
        if pretrained_model_name_or_path is not None:
            loading_defaults(kwargs)
        elif dtype is None:
            dtype = "auto"  # that of the `state_dict`
        kwargs[DTYPE] = cls._choose_dtype(config, dtype, on_accelerator)
        main = kwargs[DTYPE].get("", "auto") if isinstance(kwargs[DTYPE], dict) else kwargs[DTYPE]
        cls._warn_of_precision(main, on_accelerator)
        attention, reason = named_attention(config, kwargs), ""
        if attention is None:
            attention, reason = cls._choose_attention(config, main, on_accelerator)
        set_attention(config, kwargs, attention)
        info_wanted = kwargs.pop("output_loading_info", False)
        with loading_quantized(config, pretrained_model_name_or_path, kwargs):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        check_tensors(model, info, pretrained_model_name_or_path, are_given=kwargs.get("state_dict") is not None)
        give_back_quantization(model)
        forget_device_map(model, device_map)
        for name, value in tokens.items():
            setattr(model.config, name, value)
            if getattr(model, "generation_config", None) is not None:  # a QWenModel has none
                setattr(model.generation_config, name, getattr(model.config, name))
        model._forget_precision_flags()
        chosen = model.config._attn_implementation
        why = f" ({reason})" if reason else ""
        logger.info(f"{cls.__name__}: weights in {model.dtype}, attention by {chosen}{why}")
        if strict and not info_wanted:
            model._check_loaded(info, pretrained_model_name_or_path)
        return (model, info) if info_wanted else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, *args, **kwargs):
        """As inherited: read the tensors of a checkpoint into a model, here without those that it may leave out."""
        if not args or not holds_codes(model.config):  # without, and all by name, it is called for an adapter
            return super()._load_pretrained_model(model, state_dict, *args, **kwargs)
        leave_out(model, tensor_names(state_dict, args[0]))
        loaded = super()._load_pretrained_model(model, state_dict, *args, **kwargs)
        round_output_layer(model)
        return loaded

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

    def requires_grad_(self, requires_grad: bool = True):
        """As inherited; raises ValueError for codes, which can't learn."""
        if requires_grad:
            check_learning(self)
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As inherited; raises RuntimeError for codes in the place of weights, with strict=False too."""
        check_state(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As inherited. The code is saved beside the weights, and the configuration names it for every auto class."""
        self.config.auto_map = dict(AUTO_MAP)  # loaded from a hub, it names the code's repository there
        if kwargs.get("is_main_process", True):
            copy_source(save_directory)
        made = type(self)
        if is_fsdp_unit(self):  # a class of FSDP2's own is before the model's
            self.__class__ = made.__mro__[2]
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = made

    @staticmethod
    def _settle(config: QWenConfig, kwargs: dict) -> QWenConfig:
        """
        A configuration that the caller brings, with the values of its keys that are passed beside it, which are taken
        out of `kwargs`, and without its precision flag if a precision is. The caller's own stays as it is.
        """
        values = {key: kwargs.pop(key) for key in CHECKED_KEYS if key in kwargs}
        wanted = named_dtype(kwargs.get("dtype") or kwargs.get("torch_dtype"))
        flags = [flag for flag in PRECISION_FLAGS if values.get(flag)]
        for flag in flags:
            check_precision(flag, wanted)
        has_precision = bool(flags) or wanted not in (None, "auto")
        if not (values or has_precision):
            return config
        config = copy.deepcopy(config)
        for key, value in {**dict.fromkeys(PRECISION_FLAGS if has_precision else (), False), **values}.items():
            setattr(config, key, value)
        config.check()
        return config

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
        # A CPU takes it without instructions for it, too: a token reads half the bytes of float32, and products of many
        # rows are no slower (`qwen_ops.own_products`).
        supported = gpu_supports_bf16() if on_accelerator and torch.cuda.is_available() else True
        # GPTQ checkpoints all name float16, which is slow on a CPU; their codes are exact in any precision.
        slow = own == torch.float16 and not on_accelerator and is_quantized(config)
        if own is not None and not slow and (own != torch.bfloat16 or supported):
            return own
        return torch.bfloat16 if supported else torch.float16

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
            supported = {torch.float16: cpu_supports_fp16()}
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

    def _check_loaded(self, info, source) -> None:
        """Raise RuntimeError if weights of this architecture were missing from or left over in the checkpoint."""

        def ours(key: str) -> bool:  # heads of subclasses and of other projects are left to transformers' warning
            base = self.base_model_prefix + "."
            return key.startswith((base, "lm_head.", "wte.", "h.", "ln_f."))

        missing, unexpected = set(info["missing_keys"]), info["unexpected_keys"]
        if getattr(self, "hf_quantizer", None) is not None:  # has names of its own for what a weight becomes
            missing, unexpected = self._without_weight(missing), ()
        missing, unexpected = (sorted(filter(ours, keys)) for keys in (missing, unexpected))
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
        if any(key.endswith(".qweight") for key in unexpected):
            raise RuntimeError(
                f"The checkpoint {source} holds quantised weights (qweight, as GPTQ and AWQ name them), but its "
                f"configuration names no quantisation. Don't pass quantization_config=None, which has transformers "
                f"ignore what config.json says; if config.json has none, fetch the one that belongs to these files."
            )
        if problems:
            raise RuntimeError(
                f"The checkpoint {source} does not fit its configuration: {'; '.join(problems)}. Compare its "
                f"config.json (num_hidden_layers, no_bias) with its weight files, and see that every file is there. "
                f"To load it all the same, with new values for what is missing, pass strict=False."
            )

    def _without_weight(self, missing: set) -> list:
        """Weights of which nothing was found, under whatever names: all that a layer holds but its bias is missing."""
        found = []
        for name, module in self.named_modules():
            tensors = [*module._parameters.items(), *module._buffers.items()]
            held = [f"{name}.{key}" for key, tensor in tensors if tensor is not None and key != "bias"]
            if held and missing.issuperset(held):
                found.append(f"{name}.weight")
        return found


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


def _check_has_config(path, config) -> None:
    """
    Raise ValueError for the folder of an adapter without a model's configuration, which transformers takes for the
    default one: a random Qwen-7B would be made.
    """
    folder = str(path or "")
    is_adapter = os.path.isfile(os.path.join(folder, "adapter_config.json"))
    if config is None and is_adapter and not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(
            f"{path} holds an adapter, and no model. Load it, with its base, by AutoModelForCausalLM.from_pretrained, "
            f"or by peft's PeftModel.from_pretrained(model, {folder!r})."
        )


def _check_generation_config(path) -> None:
    """Raise OSError if a folder's generation_config.json can't be read: transformers would do without it, silently."""
    if path is not None and os.path.isfile(os.path.join(path, "generation_config.json")):
        GenerationConfig.from_pretrained(path)


def _goes_to_accelerator(device_map) -> bool:
    """Whether a model loaded with this `device_map` will run on a GPU; without a map it will if there is one."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if all(str(place) in ("cpu", "disk", "meta") for place in places):
        return False
    if torch.cuda.is_available() or has_mps():
        return True
    return any(str(place).split(":")[0] in ("mps", "xpu", "npu") for place in places)
