"""The figures of docs/long_context.md and of its Chinese page, against the tool and the functions that they are of."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT, modeling_qwen
from test_estimate_memory import GB, published, tool


@pytest.fixture(params=["long_context.md", "long_context_zh.md"])
def page(request) -> str:
    return (ROOT / "docs" / request.param).read_text(encoding="utf-8")


def test_keys_and_values(page):
    for size in tool.SIZES:
        held = [
            tool.memory(published(size), "bf16", context, 1, cache)["cache"]
            for context in (8192, 32768)
            for cache in tool.CACHES
        ]
        assert f"| Qwen-{size} | " + " | ".join(f"{n / GB:.2f}" for n in held) + " |" in page


def test_ntk(page):
    """The table of alpha and base, at the ends of its ranges and one token beyond."""
    number = r" \| [^|]*?([\d,]+)"
    rows = re.findall(rf"^\| [^|]*?(\d) ×[^|]*?{number * 4} \|$", page, re.MULTILINE)
    assert [(row[0], row[1]) for row in rows] == [("1", "1"), ("2", "3"), ("4", "7")]
    for times, alpha, base, *ends in rows:
        for end, seq_length in zip(ends, (8192, 2048)):
            end = int(end.replace(",", ""))
            assert end == int(times) * seq_length
            found = modeling_qwen.ntk_alpha(torch.tensor([end, end + 1]), seq_length)
            assert found[0] == int(alpha) < found[1]
        assert round(10000 * int(alpha) ** (128 / 126)) == int(base.replace(",", ""))


def test_logn(page):
    said = re.findall(r"\b1\.1\d\d\b", page)
    found = [
        modeling_qwen.logn_scale(torch.tensor([[last]]), seq).item() for last, seq in ((32767, 8192), (8191, 2048))
    ]
    assert said == [f"{scale:.3f}" for scale in found]
