"""
Whether a network still computes what its weights say, so that a step can be computed from them without its layers: no
hooks, adapters, patches or exchanged modules.
"""

from __future__ import annotations

import functools

from torch import nn

from .transformers_compat import is_only_moved


def is_untouched(module: nn.Module) -> bool:
    """
    Whether calling the module is calling the forward that its class was written with, and that alone, but for
    accelerate's moving of what goes in to the module's device.
    """
    return has_no_hooks(module) and ("forward" not in vars(module) or is_only_moved(module))


def has_no_hooks(module: nn.Module) -> bool:
    """Whether the class's forward is the one it was written with, and PyTorch calls nothing around a module's."""
    kind = type(module)
    is_hooked = module._forward_hooks or module._forward_pre_hooks or _hooks_of_all[0] or _hooks_of_all[1]
    return not is_hooked and _is_of(kind.__module__, kind.forward)


@functools.lru_cache(maxsize=256)
def _is_of(home: str, forward) -> bool:
    """
    Whether a function was written in the module `home`. What functools.wraps says it is may be somebody else's; around
    a function there may be ours and transformers' decorators.
    """
    if getattr(forward, "__module__", None) != home:
        return False
    package = home.rpartition(".")[0]
    while hasattr(forward, "__wrapped__"):
        place = getattr(forward, "__globals__", {}).get("__name__", "")
        if place.partition(".")[0] != "transformers" and (not package or place.rpartition(".")[0] != package):
            return False
        forward = forward.__wrapped__
    return getattr(forward, "__globals__", {"__name__": home})["__name__"] == home


_hooks_of_all = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks


def is_as_made(network) -> bool:
    """
    Whether a `QWenModel` computes what its matrices and norms say: the layers it was made of, in their order, nothing
    exchanged, wrapped, hooked, patched or in training. What its matrices and embeddings are is not looked at.
    """
    home = type(network).__module__

    def ours(module: nn.Module, name: str) -> bool:
        return type(module).__name__ == name and type(module).__module__ == home and is_untouched(module)

    drop, blocks = network.drop, network.h
    if type(network).__name__ != "QWenModel" or type(blocks) is not nn.ModuleList or not ours(network.ln_f, "RMSNorm"):
        return False
    if len(blocks) > network.config.num_hidden_layers:  # which leaves out the rest
        return False
    if type(drop) is not nn.Dropout or drop.training or not is_untouched(drop):
        return False
    for layer_idx, block in enumerate(blocks):
        if not (ours(block, "QWenBlock") and ours(block.attn, "QWenAttention") and ours(block.mlp, "QWenMLP")):
            return False
        act = block.mlp.act
        if not (ours(block.ln_1, "RMSNorm") and ours(block.ln_2, "RMSNorm")):
            return False
        if type(act) is not nn.SiLU or not is_untouched(act):
            return False
        if block.attn.layer_idx != layer_idx or block.attn.training:
            return False
    return True
