"""docs/tokenization.md and docs/tokenization_zh.md: every command and every snippet, in order."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from conftest import ROOT, needs_offsets, python


@pytest.mark.parametrize("name", ["tokenization.md", "tokenization_zh.md"])
def test_the_snippets_run_and_print_what_is_said(name, capfd, monkeypatch, tmp_path):
    needs_offsets()
    for folder in ("demo", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 11
    for language, block in blocks:
        if language == "bash":
            command = re.sub(r"^python ", f"{shlex.join(python())} ", block, flags=re.MULTILINE)
            subprocess.run(["bash", "-euc", command], check=True, timeout=600)
            continue
        capfd.readouterr()
        exec(compile(block, name, "exec"), namespace)
        printed = capfd.readouterr().out
        for line in block.splitlines():
            if line.startswith("# "):
                assert line[2:] in printed.splitlines()
