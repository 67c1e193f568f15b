"""What the README and the examples say can be run, is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from conftest import CODE, PIPELINES_TAKE_MESSAGES, ROOT, compat

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_snippets_run_in_order_and_print_what_is_said(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        if "pipe(messages)" in block and not PIPELINES_TAKE_MESSAGES:
            continue
        exec(compile(block, "README.md", "exec"), namespace)
        printed = capsys.readouterr().out
        promised = [line[2:] for line in block.splitlines() if line.startswith("# ") and line != "# ..."]
        for line in promised:
            assert (line if compat.HAS_SDPA else line.replace("sdpa", "eager")) in printed


def test_quickstart(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "埃塞俄比亚的首都是亚的斯亚贝巴（Addis Ababa）" in done.stdout
    assert done.stdout.count("assistant:") == 7
    for answer in ("巴黎", "Nairobi", "7", "Peru"):
        assert answer in done.stdout


def test_the_files_to_copy_are_those_that_the_code_needs():
    """The README's copy command names the code, which names every module that another one imports."""
    command = re.search(r"^cp ([^`]*?) CHECKPOINT/", README, re.MULTILINE).group(1).replace("\\\n", " ").split()
    command = [path.name for pattern in command for path in ROOT.glob(pattern)]
    assert sorted(command) == sorted(CODE)
    for name in command:
        for module in re.findall(r"^ *from \.(\w+) import", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
            assert f"{module}.py" in command
