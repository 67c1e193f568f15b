"""docs/tokenization.md: every command and every snippet, in order, once in each language."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

DOCUMENT = (ROOT / "docs" / "tokenization.md").read_text(encoding="utf-8")
ENGLISH, CHINESE = DOCUMENT.split("\n# 分词器\n")


@pytest.mark.parametrize("part", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_snippets_run_and_print_what_is_said(part, capfd, monkeypatch, tmp_path):
    for name in ("demo", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    blocks = re.findall(r"```(python|bash)\n(.*?)```", part, re.DOTALL)
    assert len(blocks) >= 11
    for language, block in blocks:
        if language == "bash":
            command = re.sub(r"^python ", f"{sys.executable} ", block, flags=re.MULTILINE)
            subprocess.run(["bash", "-euc", command], check=True, timeout=120)
            continue
        capfd.readouterr()
        exec(compile(block, "tokenization.md", "exec"), namespace)
        printed = capfd.readouterr().out
        for line in block.splitlines():
            if line.startswith("# "):
                assert line[2:] in printed.splitlines()


def test_both_languages_have_the_same_code():
    def code(part):
        blocks = re.findall(r"```\w+\n(.*?)```", part, re.DOTALL)
        names = [re.findall(r"tokenizer\.\w+|\w+=|tools/\w+\.py|import \w+", block) for block in blocks]
        return [set(block) for block in names]

    english, chinese = code(ENGLISH), code(CHINESE)
    assert len(english) == len(chinese)
    for one, other in zip(english, chinese):
        assert other <= one
