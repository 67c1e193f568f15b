"""The snippets of docs/*.md run, in order, and print what they say."""

from __future__ import annotations

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
