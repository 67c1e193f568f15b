"""warm.py: a program finds what `python PROGRAM` gives it, but that torch and transformers are imported already."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import python

SHOW = """
import json, os, sys, warnings
warnings.warn("shown")
print(json.dumps([
    sys.argv, sys.path[0], os.getcwd(), os.environ["QWEN_SHOWN"], __name__, globals().get("__file__"), sys.stdin.read(),
    sys.modules["__main__"].__dict__ is globals(), [name for name in sys.modules if name.split(".")[0] in OURS],
]))
if len(sys.argv) > 2:
    exec(sys.argv[2])
"""
SHOW = SHOW.replace("OURS", '("conftest", "warm", "qwen", "transformers_modules")')


@pytest.fixture(autouse=True)
def is_warm():
    if len(python()) == 1:
        pytest.skip("needs Linux, Python 3.9, and no GPU, which does not fork")


def imports_torch(**environment) -> bool:
    code = "import sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    env = {**os.environ, **environment}
    found = subprocess.run([*python(), "-c", code], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"True True\n": True, "False False\n": False}[found]


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "1 / 0", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("kind", ["code", "script"])
def test_a_program_runs_as_by_itself(tmp_path, kind, ending):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "show.py").write_text(SHOW)
    program = ["-c", SHOW] if kind == "code" else ["folder/show.py"]
    ways = []
    for command in ((sys.executable,), python()):
        done = subprocess.run(
            [*command, "-W", "ignore", *program, "an argument", *[ending][: len(ending)]],
            input="typed", capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "QWEN_SHOWN": "1"},
        )  # fmt: skip
        ways.append((done.returncode, done.stdout and json.loads(done.stdout), "shown" in done.stderr))
        assert ("ZeroDivisionError" in done.stderr) == (ending == "1 / 0")
    assert ways[0] == ways[1]
    assert ways[0][0] == {"": 0, "sys.exit(3)": 3, "1 / 0": 1}.get(ending, -9)


def test_what_an_import_may_have_read_makes_it_start_afresh():
    assert imports_torch(QWEN_SHOWN="2", TORCH_EXTENSIONS_DIR="elsewhere")
    assert not imports_torch(HF_HOME="elsewhere")
    assert not imports_torch(OMP_NUM_THREADS="3")
