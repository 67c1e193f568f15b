"""int8 weights without the native kernels: PyTorch's own product where it is faster than the reference."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from conftest import ROOT, compat, run
from qwen import qwen_ops

needs_product = pytest.mark.skipif(not compat.INT8_ROWS, reason="this torch or this CPU has no fast product of int8")


@needs_product
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out", "width"), [(7, 64), (64, 192), (5, 33), (3, 1)])
def test_it_is_the_product_that_the_weights_stand_for(dtype, out, width):
    """Of any size: those that are no whole vectors, where PyTorch's would end the process, are not given to it."""
    torch.manual_seed(out)
    weight = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    scale, bias = torch.rand(out) * 0.01, torch.randn(out).to(dtype)
    for rows in range(1, 6):
        # every other row of a tensor: not contiguous
        x = torch.randn(2 * rows, width).to(dtype)[::2]
        exact = (x.double() @ weight.double().t()) * scale.double() + bias.double()
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
        for shaped in (x, x.view(1, rows, width) if rows == 1 else x[None]):
            found = qwen_ops.linear_without_kernels(shaped, weight, bias, scale)
            assert found.dtype == dtype
            assert found.shape == (*shaped.shape[:-1], out)
            torch.testing.assert_close(found.double().view_as(exact), exact, **tolerance)
        without = qwen_ops.linear_without_kernels(x, weight, None, scale)
        torch.testing.assert_close(without.double(), exact - bias.double(), **tolerance)


COUNT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, bf16=True).eval()
product, calls = torch._weight_int8pack_mm, []
torch._weight_int8pack_mm = lambda *args: calls.append(1) or product(*args)
counts = []
with torch.no_grad():
    for length in (12, 1):
        calls.clear()
        model(torch.arange(length)[None])
        counts.append(len(calls))
print(json.dumps(counts))
"""


@needs_product
def test_it_takes_one_row_where_no_kernels_can_be_built(tmp_path, monkeypatch):
    """All 21 matrices of the demo with one row, none with twelve."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    importlib.import_module("quantize_weights").make(ROOT / "demo", tmp_path / "int8")
    code = f"import sys; sys.argv = ['', {str(tmp_path / 'int8')!r}]\n" + COUNT
    assert json.loads(run(code, tmp_path, QWEN_NATIVE_KERNELS="0").splitlines()[-1]) == [0, 21]
