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


PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
# Named in our pages, but programs of QwenLM/Qwen.
PUBLISHED = re.compile(r"examples/(react_prompt\.md|react_demo|vllm_wrapper|function_call_examples|tokenizer_showcase)")


def _anchors(page) -> set[str]:
    """What GitHub calls the headings of a page in links; a second heading of a name gets -1, and so on."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found[f"{name}-{found[name]}" if name in found else name] = 0
        found[name] += 1
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Programs and folders in the text and in the commands: `tools/serve.py`, `examples/chat.py` and the like."""
    text = page.read_text(encoding="utf-8")
    folders = "tools|examples|finetune|evaluation|benchmarks|tests|docs|demo"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\.(?:py|sh|md|json|tsv|svg|yaml))\b", text)
    named += re.findall(r"`((?:qwen_|modeling_|triton_|cpp_|transformers_)\w+\.(?:py|cpp))`", text)
    named += re.findall(r"\brequirements[\w-]*\.txt", text)
    assert not [name for name in named if not PUBLISHED.match(name) and not (ROOT / name).exists()]


def test_the_index_is_the_same_in_both_languages():
    """Every command of the README's index stands in its Chinese part, too."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    english, chinese = (part.split("\n\n#")[0] for part in re.split(r"## I want to …|### 我想……", text)[1:])

    def commands(part):
        return [re.sub(r"\W*(FILE|文件)$", "", c) for c in re.findall(r"^\|[^|]*\| `([^`]*)`", part, re.MULTILINE)]

    assert len(commands(english)) >= 10
    assert set(commands(english)) <= set(commands(chinese))
