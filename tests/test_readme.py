"""What README.md and README_CN.md say: snippets run, tables are those of the programs, both say the same."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import CODE, PIPELINES_TAKE_MESSAGES, ROOT, python

PAGES = ("README.md", "README_CN.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def module(path: str):
    """A program of the repository as a module."""
    sys.path.insert(0, str((ROOT / path).parent))  # for what lies beside it
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def table(page: str, *headings: str) -> dict[str, list[str]]:
    """The rows of the table that has these headings, by their first cell; the headings are the row ""."""
    for text in re.findall(r"(?:^\|.*\|$\n?)+", read(page), re.MULTILINE):
        first, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
        if set(headings) <= set(first):
            return {"": first[1:], **{name: cells for name, *cells in rows}}
    raise LookupError(f"{page} has no table with {headings}")


@pytest.mark.parametrize("page", PAGES)
def test_the_python_snippets_run_in_order_and_print_what_is_said(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        if "pipe(messages)" in block and not PIPELINES_TAKE_MESSAGES:
            continue
        exec(compile(block, page, "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        promised = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        if promised[-1:] == ["..."]:
            promised.pop()
            printed = printed[: len(promised)]
        assert printed == promised, block


def test_quickstart(tmp_path):
    done = subprocess.run(
        [*python(), ROOT / "examples" / "quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "埃塞俄比亚的首都是亚的斯亚贝巴（Addis Ababa）" in done.stdout
    assert done.stdout.count("assistant:") == 7
    for answer in ("巴黎", "Nairobi", "7", "Peru"):
        assert answer in done.stdout


def test_the_head_is_the_cards():
    head = re.match(r"---\n(.*?)\n---\n", read("README.md"), re.DOTALL).group(1)
    for line in ("language:\n- zh\n- en", "tags:\n- qwen", "pipeline_tag: text-generation", "inference: false"):
        assert f"\n{line}\n" in f"\n{head}\n"
    assert "\nlicense: apache-2.0\n" in head
    assert "Apache License" in read("LICENSE").strip().splitlines()[0]


@pytest.mark.parametrize("page", PAGES)
def test_the_files_to_copy_are_those_that_the_code_needs(page):
    """The copy command names the code, which names every module that another one imports."""
    command = re.search(r"^cp ([^`]*?) CHECKPOINT/", read(page), re.MULTILINE).group(1).replace("\\\n", " ").split()
    command = [path.name for pattern in command for path in ROOT.glob(pattern)]
    assert sorted(command) == sorted(CODE)
    for name in command:
        for imported in re.findall(r"^ *from \.(\w+) import", read(name), re.MULTILINE):
            assert f"{imported}.py" in command


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_sizes_and_memory(page):
    """The table of shapes, and that of memory for 2,048 tokens, are what tools/estimate_memory.py computes."""
    tool = module("tools/estimate_memory.py")
    shapes, together, weights = [], {}, {}
    for size, shape in tool.SIZES.items():
        for bits in (None, 8, 4):
            config = tool.QWenConfig(**dict(zip(tool.SHAPE, shape)))
            if bits:
                config.quantization_config = {"quant_method": "gptq", "bits": bits, "group_size": 128}
            need = tool.memory(config, "bf16", 2048)
            together.setdefault(f"Qwen-{size}", []).append(f"{sum(need.values()) / tool.GB:.2f}")
            weights[size, bits] = f"{need['weights'] / tool.GB:.2f}"
        width, layers, heads, halves, rows = shape
        billions = f"{tool.parameters(config) / 1e9:.2f}"
        shapes.append([str(n) for n in (layers, heads, width, halves // 2, billions, 151851, rows)])
    memory = table(page, "bfloat16, float16" if page == "README.md" else "bfloat16、float16")
    assert {name: cells for name, cells in memory.items() if name} == together
    assert f"{weights['72B', None]} " in read(page)
    assert f"{weights['72B', 4]} GB" in read(page)
    assert float(together["Qwen-72B"][2]) <= 48  # what the card asks for
    model = table(page, "Qwen-1.8B", "Qwen-72B")
    assert [list(column) for column in zip(*list(model.values())[1:8])] == shapes


@pytest.mark.parametrize("page", PAGES)
def test_the_cards_figures(page):
    """The card's results: those of our models in evaluation/card.py, and all of them in the card, where it is."""
    card, scores = module("evaluation/card.py"), table(page, "MMLU", "CMMLU")
    for name, figures in card.BENCHMARKS.items():
        assert scores[name][1:] == [str(score) for score in figures.values()]
    lengths = card.PERPLEXITY["Qwen-72B"]
    perplexity = table(page, *map(str, lengths))
    assert perplexity["Qwen-72B"] == [str(figure) for figure in lengths.values()]
    published = ROOT.parent / "shared" / "qwen-72b-model-card.md"
    if not published.exists():
        pytest.skip("needs the published model card")
    text = re.sub(r"[\s*]+", "", published.read_text(encoding="utf-8"))
    models = [name for name in scores if re.fullmatch(r"[A-Za-z0-9]+-\d+B", name)]
    assert len(models) == 9
    for name in models:
        assert f"|{name}|{'|'.join(scores[name])}|" in text


@pytest.mark.parametrize("page", PAGES)
def test_versions_of_the_requirements(page):
    """The table of what each Python gets, and requirements.txt."""
    pins = re.findall(
        r'^(torch|transformers)==(\S+?); python_version (>=|==) "3\.(\d+)"$', read("requirements.txt"), re.MULTILINE
    )
    assert len(pins) == 7

    def installed(minor: int) -> list[str]:
        return [
            version
            for package in ("torch", "transformers")
            for name, version, sign, number in pins
            if name == package and (minor >= int(number) if sign == ">=" else minor == int(number))
        ]

    said = {re.sub(r"\D+3\.13$", "", name): cells for name, cells in table(page, "Python", "torch").items()}
    assert installed(11) == installed(12) == installed(13)
    for minor in (8, 9, 10, 11):
        assert said[f"3.{minor}"] == installed(minor)


def test_the_index_is_the_same_in_both_languages():
    english, chinese = (
        [cells[0] for name, cells in table(page, *headings).items() if name]
        for page, headings in zip(PAGES, (("I want to …", "command"), ("我想……", "命令")))
    )
    assert len([command for command in english if command.startswith("`")]) >= 20
    assert english == chinese
