"""The documents: snippets run and print what they say, commands have their options, languages agree, links lead on."""

from __future__ import annotations

import importlib.util
import inspect
import io
import re
import subprocess
import tokenize
from dataclasses import fields

import pytest
import transformers
from conftest import HAS_STATIC, ROOT, lacks, python

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "README_CN.md", ROOT / "benchmarks" / "RESULTS.md", *DOCS]
# Whose snippets other tests run: test_tokenization_docs.py, test_finetune.py, test_faq.py, test_deployment.py.
ELSEWHERE = {"tokenization", "finetuning", "faq", "deployment"}


def read(page) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page, language: str = r"\w*") -> list[tuple[str, str]]:
    """(language, code) of a page's blocks of code."""
    return re.findall(rf"^ *```({language})\n(.*?)^ *```$", read(page), re.DOTALL | re.MULTILINE)


def subject(page) -> str:
    return page.stem[:-3] if page.stem.endswith("_zh") else page.stem


# --- Snippets and commands ---------------------------------------------------------------------------------------


def snippets(page) -> list[str]:
    """A page's blocks of Python; none if they are those of the page in English."""
    found, english = blocks(page, "python"), page.with_name(f"{subject(page)}.md")
    return [] if page != english and found == blocks(english, "python") else [block for _, block in found]


@pytest.mark.parametrize(
    "page", [page for page in DOCS if subject(page) not in ELSEWHERE and snippets(page)], ids=lambda page: page.stem
)
def test_snippets(page, capsys, monkeypatch, tmp_path):
    """In order, in one namespace. Comments at the beginning of a line are what a snippet prints."""
    if not hasattr(transformers, "DynamicCache"):
        lacks("has no DynamicCache for the pages of docs/")
    if subject(page) == "loading" and not HAS_STATIC:
        lacks("has no static cache for all layers")
    if "from llama_cpp import" in read(page):
        pytest.importorskip("llama_cpp")
    monkeypatch.chdir(ROOT)
    namespace: dict = quantised(tmp_path) if subject(page) == "quantisation" else {}
    for block in snippets(page):
        exec(compile(block, page.name, "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        promised = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert printed == promised, block


def quantised(folder) -> dict:
    """The names that the page about 8 and 4 bits takes for granted: a checkpoint, and one in 4 bits."""
    peft = pytest.importorskip("peft")
    command = [*python(), ROOT / "tools" / "quantize_weights.py", "demo", folder / "int4", "--bits", "4"]
    subprocess.run([*command, "--method", "rtn"], check=True, timeout=600)
    paths = {"PATH": str(ROOT / "demo"), "PATH_INT4": str(folder / "int4")}
    classes = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "LoraConfig": peft.LoraConfig}
    return {**paths, **classes, "get_peft_model": peft.get_peft_model}


PROGRAM = r"(?:tools|examples|evaluation|finetune|benchmarks|demo|tests)/\w+\.(?:py|sh)"


def lines_of_code(page) -> str:
    """The lines of a page's blocks of code, and what stands in back quotes in its text, a line each."""
    texts = [code.replace("\\\n", " ") for _, code in blocks(page)]
    prose = re.sub(r"^ *```.*?^ *```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return "\n".join([*texts, *(code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose))])


def commands(page) -> list[tuple[str, str]]:
    """(program, arguments) of each of our programs that a page calls."""
    return re.findall(rf"\b(?:python|bash) ({PROGRAM})([^#|;&\n]*)", lines_of_code(page))


def options(program: str) -> set[str]:
    """The options that a program knows, as its source and that of its imports from the same folder name them."""
    source = read(ROOT / program)
    beside = (ROOT / program).parent
    imported = [beside / f"{name}.py" for name in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)]
    source += "".join(read(file) for file in imported if file.exists())
    found = set(re.findall(r"[\"'](--?[a-z][\w-]*)[\"']", source))
    if program.startswith("finetune/finetune"):
        source = read(ROOT / "finetune" / "finetune.py")
        found |= {f"--{name}" for name in re.findall(r"^    (\w+): ", source, re.MULTILINE)}
        found |= {f"--{field.name}" for field in fields(transformers.TrainingArguments)} | {"-m", "-d"}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_know_the_options_that_are_named(page):
    unknown = []
    for program, arguments in commands(page):
        if program in ("tools/serve.py", "evaluation/qwen_lm.py"):  # take those of `transformers serve` and `lm_eval`
            continue
        named = re.findall(r"(?<=\s)--?[a-zA-Z][\w-]*", arguments)
        unknown += [f"{program} {option}" for option in named if option not in options(program)]
    assert not unknown


def test_commands_are_found():
    """The test above has something to look at."""
    found = commands(ROOT / "README.md")
    assert ("tools/upgrade_checkpoint.py", " CHECKPOINT --write --end-at-im-end") in found
    programs = {"tools/quantize_weights.py", "finetune/finetune_lora_single_gpu.sh", "evaluation/evaluate.py"}
    assert programs <= {program for program, _ in found}
    assert "--bits" in options("tools/quantize_weights.py")
    assert {"--q_lora", "--num_train_epochs"} <= options("finetune/finetune_qlora_single_gpu.sh")
    assert "--no-such-option" not in options("tools/quantize_weights.py")


def test_the_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    calls = [re.findall(r"^(?:\w+=\S+ )*make ([a-z-]+)", lines_of_code(page), re.MULTILINE) for page in PAGES]
    named = {name for names in calls for name in names}
    assert {"demo", "test", "docs"} <= named
    assert named <= targets


def test_no_benchmark_has_the_name_of_a_package_that_transformers_looks_for():
    """It would be taken for that package by a program beside it."""
    looked_for = re.findall(r"_available\(\"(\w+)\"", inspect.getsource(transformers.utils.import_utils))
    assert "sentencepiece" in looked_for
    assert not {path.stem for path in (ROOT / "benchmarks").glob("*.py")} & set(looked_for)


# --- Both languages ----------------------------------------------------------------------------------------------


def same_for_both(language: str, code: str) -> list[str]:
    """A block without comments, and with each text and each word in Chinese replaced by one word."""
    if language == "python":
        texts = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        left_out = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        return ["TEXT" if t.type in texts else t.string for t in tokens if t.type not in left_out]
    code = re.sub(r"(^|\s)#.*$", "", code, flags=re.MULTILINE)
    code = re.sub(r"\"[^\"\n]*\"|'[^'\n]*'|[^\s\"']*[^\x00-\x7f]\S*", "TEXT", code)
    return code.split()


def in_chinese(page):
    return page.with_name("README_CN.md" if page.stem == "README" else f"{page.stem}_zh.md")


@pytest.mark.parametrize("page", [page for page in PAGES if in_chinese(page).exists()], ids=lambda page: page.name)
def test_both_languages_show_the_same_code(page):
    english, chinese = (
        [(language, same_for_both(language, code)) for language, code in blocks(one)]
        for one in (page, in_chinese(page))
    )
    assert english == chinese


def test_what_may_differ_between_languages_and_what_may_not():
    same = same_for_both("python", 'print(chat("Hi", n=1))  # says hello\n# Hello!')
    assert same == same_for_both("python", 'print(chat("你好", n=1))  # 问好\n# 你好！')
    assert same != same_for_both("python", 'print(chat("你好", n=2))')
    same = same_for_both("bash", 'python tools/a.py FILE --b "a text"  # why')
    assert same == same_for_both("bash", 'python tools/a.py FILE --b "文字"  # 原因')
    assert same != same_for_both("bash", "python tools/a.py FILE --c TEXT")


# --- Figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "engines"), [("cpu", 5), ("gpu", 3)])
def test_the_charts_show_the_tables(name, engines):
    """docs/cpu.svg and docs/gpu.svg have every engine and speed that benchmarks/chart.py finds, in their order."""
    spec = importlib.util.spec_from_file_location("chart", ROOT / "benchmarks" / "chart.py")
    chart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chart)
    parts = getattr(chart, name)()
    assert [len(part) for part in parts.values()] == [engines] * 2
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", read(ROOT / "docs" / f"{name}.svg"))
    for title, part in parts.items():
        speeds = [f"{speed:.1f}" for speed in reversed(list(part.values()))]
        assert any(texts[at : at + len(speeds)] == speeds for at in range(len(texts)))
        assert {title, *part} <= set(texts)


def tables(page) -> list[list[list[str]]]:
    """The cells of a page's tables that are figures, without the lines of headings."""
    found = []
    for table in re.findall(r"(?:^\|.*\|$\n?)+", read(page), re.MULTILINE):
        lines = [line.strip("|").split("|") for line in table.splitlines()[2:]]
        found.append([[cell.strip() for cell in line if re.fullmatch(r"[\s\d.,%±+-]+", cell)] for line in lines])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if in_chinese(page).exists()], ids=lambda page: page.name)
def test_both_languages_have_the_same_figures(page):
    assert tables(page) == tables(in_chinese(page))


def names(page) -> list[list[list[str]]]:
    """The code, and the files and addresses that are linked, in each cell of a page's tables, sorted."""
    name = r"`[^`]+`|\]\(([^)\s]+)\)|<https?://[^>]+>"
    rows = [re.split(r"(?<!\\)\|", line) for line in re.findall(r"^\|(.*)\|$", read(page), re.MULTILINE)]
    return [[sorted(named(*match) for match in re.findall(f"({name})", cell)) for cell in row] for row in rows]


def named(text: str, link: str) -> str:
    """What is named, with a link to a page in Chinese as one to the page in English, wherever in it."""
    return link.replace("README_CN.md", "README.md").replace("_zh.md", ".md").partition("#")[0] if link else text


@pytest.mark.parametrize("page", [page for page in PAGES if in_chinese(page).exists()], ids=lambda page: page.name)
def test_both_languages_have_the_same_names_and_links_in_tables(page):
    assert names(page) == names(in_chinese(page))


def test_what_is_a_name_in_a_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("| `a\\|b`, [c](d_zh.md#e) | <https://f> g |\n", encoding="utf-8")
    assert names(page) == [[["`a\\|b`", "d.md"], ["<https://f>"]]]


# --- Links -------------------------------------------------------------------------------------------------------

# Named in our pages, but programs of QwenLM/Qwen.
PUBLISHED = re.compile(
    r"examples/(react_prompt\.md|react_demo|vllm_wrapper|function_call_examples|langchain_tooluse|tokenizer_showcase|add_merges)"
)


def _anchors(page) -> set[str]:
    """What GitHub calls the headings of a page in links; a second heading of a name gets -1, and so on."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found[f"{name}-{found[name]}" if name in found else name] = 0
        found[name] += 1
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_resolve(page):
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
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
    text = read(page)
    folders = "tools|examples|finetune|evaluation|benchmarks|tests|docs|demo"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\.(?:py|sh|md|json|tsv|svg|yaml|ipynb))\b", text)
    named += re.findall(r"`((?:qwen_|modeling_|triton_|cpp_|transformers_)\w+\.(?:py|cpp))`", text)
    named += re.findall(r"\brequirements[\w-]*\.txt", text)
    assert not [name for name in named if not PUBLISHED.match(name) and not (ROOT / name).exists()]
