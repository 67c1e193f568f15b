"""
The kernels for GPUs, in Triton: which operations of qwen_ops.py they compute, and what CUDA graphs are made of.

qwen_ops.py imports this module when the first tensor on a GPU comes. triton_attention.py attends over caches and writes
to them, triton_products.py multiplies, and triton_launch.py compiles and launches.
"""

from __future__ import annotations

import torch

from .triton_attention import (
    HEADER,
    decode_attention,
    quantize_append,
    quantized_decode_attention,
    rotate_and_attend,
)
from .triton_launch import compile_together, triton
from .triton_products import (
    GPTQ_MAX_ROWS,
    PRODUCT_ROWS,
    gptq_dequantize,
    gptq_linear,
    gptq_product,
    int8_product,
    linear,
    product,
    rms_norm,
    takes_gptq,
)

__all__ = [
    "GPTQ_MAX_ROWS",
    "HEADER",
    "PRODUCT_ROWS",
    "compile_together",
    "gptq_product",
    "int8_product",
    "product",
    "register",
    "rms_norm",
    "rotate_and_attend",
    "takes_gptq",
]


def register(library, device="cuda") -> str:
    """
    Make these the operators' kernels on GPUs; their name.

    Raises RuntimeError, which says why, if Triton can't compile and run one here.
    """
    codes, params, x = (torch.zeros(1, 1, 1, n, device=device) for n in (32, 4, 32))
    try:
        quantize_append(codes.byte(), params.byte(), x, 0)
    except Exception as error:  # whatever a missing compiler, an old card or an old driver cause
        raise RuntimeError(
            f"Triton {triton.__version__} does not work here: {type(error).__name__}: {error}"
        ) from error
    for operation in (
        *(decode_attention, quantize_append, quantized_decode_attention),
        *(linear, gptq_linear, gptq_dequantize),
    ):
        library.impl(operation.__name__, operation, "CUDA")
    return f"Triton {triton.__version__}"
