"""The snippets of docs/*.md run, in order, and print what they say."""

from __future__ import annotations

import importlib.util
import re

import pytest
import transformers
from conftest import HAS_STATIC, ROOT, lacks


@pytest.mark.parametrize("name", ["chat", "caches", "loading"])
def test_snippets(name, capsys, monkeypatch):
    if not hasattr(transformers, "DynamicCache"):
        lacks("has no DynamicCache for the pages of docs/")
    if name == "loading" and not HAS_STATIC:
        lacks("has no static cache for all layers")
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 7
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        promised = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert printed == promised, block


def test_the_chart_shows_the_table():
    """docs/cpu.svg has every engine and speed of the table that benchmarks/chart.py draws, in its order."""
    spec = importlib.util.spec_from_file_location("chart", ROOT / "benchmarks" / "chart.py")
    chart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chart)
    engines = chart.decoding()
    assert len(engines) == 5
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (ROOT / "docs" / "cpu.svg").read_text(encoding="utf-8"))
    for i in (0, 1):
        speeds = [f"{engines[name][i]:.1f}" for name in reversed(list(engines))]
        assert any(texts[at : at + len(speeds)] == speeds for at in range(len(texts)))
    assert set(engines) <= set(texts)
