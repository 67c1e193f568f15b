"""Matrices in 8 bits: what takes the place of `nn.Linear` where a checkpoint holds codes instead of weights."""

from __future__ import annotations

import torch
from torch import nn

from .qwen_ops import linear, linear_reference
from .transformers_compat import is_compiling


class Int8Linear(nn.Module):
    """
    `nn.Linear` whose weight is int8 (out, in), constant, times `weight_scale`, float32 (out,).

    `tools/quantize_weights.py` makes such weights. (..., in) to (..., out), accumulated in float32.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Codes come from a checkpoint; without one they are zeros."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight_scale.fill_(1)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (linear_reference if is_compiling() else linear)(x, self.weight, self.bias, self.weight_scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def replace_matrices(model: nn.Module) -> None:
    """Put an `Int8Linear` in the place of every `nn.Linear` of the model, in place; their weights are to be loaded."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is nn.Linear:
                quantised = Int8Linear(module.in_features, module.out_features, module.bias is not None)
                quantised.to(device=module.weight.device)
                if module.bias is not None:
                    quantised.bias.data = quantised.bias.data.to(module.bias.dtype)
                setattr(parent, name, quantised)
