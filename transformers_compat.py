"""
What differs between releases of transformers, and nothing else.

The other modules are written for today's transformers and import from here what an older release lacks
or calls differently. Every entry is chosen by feature, never by version number, and names the releases
that need it: raising the floor is deleting lines.
"""

from __future__ import annotations

import inspect

import torch
from transformers import PretrainedConfig, masking_utils

_MASK_PARAMETERS = inspect.signature(masking_utils.create_causal_mask).parameters
# Up to 4.57 a cache is told where to write; from 5.0 it counts for itself.
_CACHE_WANTS_POSITIONS = "cache_position" in _MASK_PARAMETERS


def cache_kwargs(cache_position: torch.Tensor) -> dict:
    """Further keyword arguments of `Cache.update`; `cache_position`: int64 (T,), where to write (up to 4.57)."""
    return {"cache_kwargs": {"cache_position": cache_position}} if _CACHE_WANTS_POSITIONS else {}


def create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, cache_position):
    """transformers' `create_causal_mask` under its present signature and, for releases up to 4.57, `cache_position`."""
    if not _CACHE_WANTS_POSITIONS:
        return masking_utils.create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
    return masking_utils.create_causal_mask(  # up to 4.57
        config=config,
        input_embeds=inputs_embeds,
        attention_mask=attention_mask,
        cache_position=cache_position,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "use_auth_token",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
)


def load_config(config_class, config, path, kwargs: dict):
    """
    What `PreTrainedModel.from_pretrained` does with its configuration, done before it, so that loading
    choices can depend on it: `(config, keyword arguments that are not configuration keys)`.
    """
    if isinstance(config, PretrainedConfig):
        return config, kwargs
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    # The data type is an argument of loading, not a key for the configuration to swallow.
    dtype = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in dtype}
    config, unused = config_class.from_pretrained(path if config is None else config, return_unused_kwargs=True, **rest)
    return config, {**hub, **unused, **dtype}


def pop_dtype(kwargs: dict):
    """Take `dtype`, or `torch_dtype` (its name up to 4.55), out of `kwargs`; None when neither is given."""
    dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    dtype = torch_dtype if dtype is None else dtype
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"dtype={dtype!r} is not a torch data type; pass for example dtype='bfloat16'.")
        return named
    return dtype
