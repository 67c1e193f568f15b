"""What the code that travels with a checkpoint may not do, read from its source."""

from __future__ import annotations

import ast
import functools
import re
import subprocess

import pytest
import torch
from conftest import CODE, ROOT, modeling_qwen, sampled, tiny_config
from matrix import CORE, INDEPENDENT, LEFT_OUT, ONE_RELEASE, interpreter

MODULES = [name for name in CODE if name.endswith(".py")]
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in MODULES}
PROGRAMS = sorted((*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("examples/*.py")))
# The one module that runs a compiler and writes what it made, at the first use of a kernel: nothing of it elsewhere.
BUILDS = "cpp_kernels.py"
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imported(node):
    """Modules in import statements that no `try` guards."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module
    elif not isinstance(node, ast.Try):
        for child in ast.iter_child_nodes(node):
            yield from imported(child)


@pytest.mark.parametrize("name", MODULES)
def test_import_statements_name_only_what_is_always_installed(name):
    """
    transformers refuses remote code with import statements, even inside functions, of packages that are not installed,
    unless `try` guards them. Loading from a local folder does not show it: only the first module is looked at there.
    """
    standard = {
        *("ast", "base64", "codecs", "collections", "concurrent", "contextlib", "contextvars", "copy", "dataclasses"),
        *("functools", "hashlib", "importlib", "inspect", "itertools", "json", "math", "os", "pathlib", "platform"),
        *("queue", "re", "shlex", "shutil", "stat", "subprocess", "sys", "tempfile", "threading", "time", "types"),
        *("__future__", "typing", "unicodedata", "weakref"),
    }
    packages = {module.split(".")[0] for module in imported(TREES[name])}
    assert packages <= standard | {"torch", "transformers", "tiktoken"}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_executed_written_fetched_or_printed(name):
    names = {node.id for node in ast.walk(TREES[name]) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__", "print", "input"}
    modules = {module.split(".")[0] for module in imported(TREES[name])}
    forbidden = {"subprocess", "socket", "urllib", "requests", "httpx", "pickle", "shutil", "ctypes", "tempfile"}
    assert modules & forbidden == ({"subprocess", "shutil", "tempfile"} if name == BUILDS else set())
    assert not re.search(r"torch\.(load|hub)\b", SOURCES[name])
    writes = re.findall(r"open\([^)]*[\"'][wax]b?[\"'].*|.*\.write_(?:bytes|text)\(.*", SOURCES[name])
    allowed = {
        "tokenization_qwen.py": ["paths[-1]"],  # saving the vocabulary, when asked to
        # a lock, the source to compile, what the compiler says; the source beside a model that is saved
        BUILDS: ["open(path", "file.write_bytes(source)", "log.write_bytes(", '"cpp_kernels.cpp").write_bytes(source)'],
    }.get(name, [])
    assert len(writes) == len(allowed)
    for place in allowed:
        assert any(place in line for line in writes), place


def test_the_model_imports_every_module_itself():
    """transformers up to 4.57 copies from a local folder what modeling_qwen.py imports, not what that imports."""
    own = set(re.findall(r"^ *from \.(\w+) import", SOURCES["modeling_qwen.py"], re.MULTILINE))
    assert own | {"modeling_qwen", "tokenization_qwen"} == {name[:-3] for name in MODULES}


# Which rooms a room may enter when it is imported.
ARROWS = {
    "cpp_kernels": set(),
    "transformers_compat": set(),
    "configuration_qwen": {"transformers_compat"},
    "qwen_ops": {"cpp_kernels", "transformers_compat"},
    "triton_launch": set(),
    "triton_attention": {"qwen_ops", "triton_launch"},
    "triton_products": {"qwen_ops", "triton_launch"},
    "triton_kernels": {"triton_attention", "triton_launch", "triton_products"},
    "qwen_cache": {"qwen_ops", "transformers_compat"},
    "qwen_plain": {"transformers_compat"},
    "qwen_attention": {"qwen_cache", "qwen_plain", "transformers_compat"},
    "qwen_quantization": {"qwen_ops", "transformers_compat"},
    "qwen_generation_utils": {"transformers_compat"},
    "tokenization_qwen": {"transformers_compat", "qwen_generation_utils"},
    "qwen_loading": {"configuration_qwen", "cpp_kernels", "qwen_quantization", "transformers_compat"},
    "qwen_sampling": set(),
    "qwen_cuda_graph": {"qwen_cache", "qwen_ops", "qwen_plain", "qwen_quantization", "transformers_compat"},
    "qwen_graphed_generation": {"qwen_cache", "qwen_cuda_graph", "qwen_sampling", "transformers_compat"},
    "qwen_decode": {
        *("qwen_attention", "qwen_cache", "qwen_cuda_graph", "qwen_generation_utils", "qwen_graphed_generation"),
        *("qwen_ops", "qwen_plain", "qwen_quantization", "transformers_compat"),
    },
    "qwen_chat": {"qwen_generation_utils", "transformers_compat"},
    "qwen_loss": {"transformers_compat"},
    "modeling_qwen": {
        *("configuration_qwen", "qwen_attention", "qwen_cache", "qwen_chat", "qwen_decode", "qwen_generation_utils"),
        *("qwen_loading", "qwen_loss", "transformers_compat"),
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_rooms_are_entered_in_one_direction(name):
    """Imports of a module's own statements; those within functions and for readers of the file don't run with it."""
    entered = {node.module for node in TREES[name].body if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert entered <= ARROWS[name[:-3]], "a new arrow"
    # Releases up to 4.37 or so, which look for import statements anywhere in a file, follow circles of them forever.
    named = set(re.findall(r"^ *from \.(\w+) import", SOURCES[name], re.MULTILINE))
    order = [name[:-3] for name in MODULES]
    assert all(order.index(module) < order.index(name[:-3]) for module in named), "CODE_FILES has it too early"


def test_the_network_is_plain():
    """It names no kernel, device, release or checkpoint, and its matrices are exactly nn.Linear."""
    source = SOURCES["modeling_qwen.py"].split("class RMSNorm")[1]
    source = re.sub("gradient_?checkpointing", "", source, flags=re.IGNORECASE).replace("checkpoint's tokenizer", "")
    for word in ("cuda", "gpu", "triton", "native", "kernel", "compil", "safetensors", "checkpoint", "release"):
        assert not re.search(word, source, re.IGNORECASE), word
    with torch.device("meta"):
        model = modeling_qwen.QWenLMHeadModel(tiny_config())
    kinds = {type(module).__name__: type(module) for module in model.modules() if list(module.parameters(False))}
    assert set(kinds) == {"Linear", "Embedding", "RMSNorm"}
    assert kinds["Linear"] is torch.nn.Linear
    assert kinds["Embedding"] is torch.nn.Embedding


def test_kernels_are_built_within_functions_only():
    """Importing runs no compiler and writes nothing: no statement of the module's own calls what does."""
    for node in TREES[BUILDS].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
            continue
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
        called = {ast.get_source_segment(SOURCES[BUILDS], call.func) for call in calls}
        assert not called & {"load", "_load", "_library", "_build", "_run", "kernels_in_use"}
        assert not any(name.startswith(("subprocess", "shutil", "tempfile", "open")) for name in called)


@pytest.mark.parametrize("path", PROGRAMS)
def test_only_one_module_asks_for_a_release(path):
    if path.name == "transformers_compat.py":
        return
    source = path.read_text(encoding="utf-8")
    if path.name == BUILDS:  # what is compiled is for one torch
        source = source.replace("torch.__version__", "key")
    if path.name == "triton_kernels.py":  # for the report of what runs
        source = source.replace("triton.__version__", "name")
    for pattern in ("__version__", r"version\.parse", r"packaging", r"inspect\.signature", r"hasattr\(transformers"):
        assert not re.search(pattern, source), pattern
    handled = [
        ast.dump(node.type) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler) and node.type
    ]
    guarded = [handler for handler in handled if "ImportError" in handler or "ModuleNotFoundError" in handler]
    assert len(guarded) == (path.name == BUILDS)  # torch.utils.cpp_extension without setuptools


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_syntax_and_methods_of_python_38(path):
    """Names that came with Python 3.9 to 3.13, of those that a program here could want."""
    source = path.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    newer = r"\.(removeprefix|removesuffix|is_relative_to|with_stem|hardlink_to|pairwise|batched|bit_count|lcm)\("
    newer += r"|BooleanOptionalAction|waitstatus_to_exitcode|zip\(.*strict=|functools\.cache\b"
    assert not re.search(newer, source)


def test_a_clone_on_windows_changes_no_line_end():
    """Bash does not run a script with CRLF, and kernels whose source is not what was pinned are not built."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone")
    asked = ["git", "check-attr", "text", "--", "finetune/common.sh", "cpp_kernels.cpp"]
    answers = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.rpartition(" ")[2] for line in answers] == ["unset", "unset"]


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
def test_compiles_on_every_python_at_hand(version, tmp_path):
    """Running the modules there needs torch; `tests/matrix.py --others` does it."""
    try:
        python = interpreter(version)
    except LookupError as error:
        pytest.skip(str(error))
    for name in MODULES:
        subprocess.run([python, "-W", "error", "-c", compiling(ROOT / name)], check=True, cwd=tmp_path)


def compiling(path) -> str:
    return f"compile(open({str(path)!r}, encoding='utf-8').read(), {path.name!r}, 'exec')"


def test_every_module_logs_under_the_name_of_transformers():
    """So that `transformers.logging.set_verbosity_...` reaches what travels with a checkpoint."""
    names = {name: re.findall(r"getLogger\((.*)\)|get_logger\((.*)\)", (ROOT / name).read_text()) for name in CODE}
    found = {name: loggers for name, loggers in names.items() if loggers}
    assert len(found) > 5
    for name, loggers in found.items():
        assert loggers == [("", f'"transformers.models.qwen.{name[:-3]}"')]


# --- What tests/matrix.py leaves out -----------------------------------------------------------------------------


def names_in(tree) -> set:
    """Every name that code says: of variables, attributes, modules, and what it imports from them."""
    found = set()
    for node in ast.walk(tree):
        found |= {
            getattr(node, field) for field in ("id", "attr", "module") if isinstance(getattr(node, field, 0), str)
        }
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.name for alias in node.names}
    return {part for name in found for part in name.split(".")}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_is_left_out_as_independent_uses_nothing_of_transformers(name):
    """No models, tokenizers and caches: what of the repository it imports takes of transformers the logger alone."""
    source = (ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    forbidden = {"transformers", "from_pretrained", "generate", "tiny_model", "tiny_config", "tokenization_qwen"}
    assert not names_in(tree) & {*forbidden, "modeling_qwen", "demo_tokenizer", "official_tokenizer"}
    for module in set(re.findall(r'import_module\("qwen\.(\w+)"\)', source)):
        taken = [
            f"{node.module}.{alias.name}"
            for node in ast.walk(TREES[f"{module}.py"])
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
            for alias in node.names
            if node.module != "transformers_compat"
        ]
        assert set(taken) <= {"transformers.utils.logging"}
        assert "transformers" not in imported(TREES[f"{module}.py"])


def test_what_is_left_out_is_there_and_of_many_cases_one_stays():
    """The mark `more` is set by `sampled` alone, which leaves out the first case."""
    for name in (*INDEPENDENT, *ONE_RELEASE):
        assert f"--ignore=tests/test_{name}.py" in LEFT_OUT
        assert (ROOT / "tests" / f"test_{name}.py").exists()
    *files, option, chosen = CORE
    assert all((ROOT / file).exists() for file in files)
    assert LEFT_OUT[-2:] == (option, chosen) == ("-m", "not more and not slow")
    marking = [path.name for path in (ROOT / "tests").glob("*.py") if "mark.more" in path.read_text(encoding="utf-8")]
    assert sorted(marking) == ["conftest.py", "test_code.py"]
    first, *others = sampled([(1, 2), (3, 4)])
    assert first == (1, 2)
    assert [(case.values, [mark.name for mark in case.marks]) for case in others] == [((3, 4), ["more"])]


def test_every_test_runs_in_ci():
    """What `make test` leaves out, `make test-slow` runs, and .ci/run runs both."""
    recipes = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target, chosen in (("test", '"not slow"'), ("test-slow", "slow")):
        assert f"\n{target}: $(VENV)/dev.stamp\n\t$(PYTEST) -m {chosen}\n" in recipes
        assert re.search(
            rf"^(\S+=\S+ )?make {target}$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE
        )


FOLDERS = (".", "tools", "benchmarks", "finetune", "examples", "evaluation", "demo", "tests")
OURS = {path.stem: path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if not path.is_symlink()}


@functools.lru_cache(maxsize=None)
def tree_of(name: str) -> ast.Module:
    return ast.parse(OURS[name].read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=None)
def defined(module: str) -> set[str]:
    """What a module has names for, wherever it gives them."""
    names = {"__name__", "__file__", "__doc__", "__dict__"}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@functools.lru_cache(maxsize=None)
def modules_of_ours(program: str) -> dict[str, str]:
    """Names of a program for modules of ours: imported, also from another, or by `import_module`, with their name."""
    found = {}
    for node in ast.walk(tree_of(program)):
        if isinstance(node, ast.Import):
            found.update({alias.asname or alias.name: alias.name for alias in node.names if alias.name in OURS})
        elif isinstance(node, ast.ImportFrom) and node.module in OURS and not node.level:
            there = modules_of_ours(node.module)
            found.update({alias.asname or alias.name: there[alias.name] for alias in node.names if alias.name in there})
        elif (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name)
        ):
            called = getattr(node.value.func, "attr", getattr(node.value.func, "id", None))
            ends = {c.value.split(".")[-1] for c in ast.walk(node.value) if isinstance(getattr(c, "value", 0), str)}
            if called == "import_module" and len(ends & set(OURS)) == 1:
                found[node.targets[0].id] = (ends & set(OURS)).pop()
    return found


@pytest.mark.parametrize("program", OURS)
def test_programs_use_of_our_modules_what_is_there(program):
    """Of functions that run seldom, too: on GPUs, in benchmarks."""
    tree, names = tree_of(program), modules_of_ours(program)
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in OURS and not node.level:
            assert {alias.name for alias in node.names} - {"*"} <= defined(node.module), node.module
    for name, module in names.items():
        if name in assigned and name == module:
            continue  # a variable of the same name
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
        }
        assert used <= defined(module), (module, used - defined(module))


def test_no_program_needs_its_docstring():
    """`python -OO` leaves it out."""
    needed = re.compile(r"__doc__\.|exit\(__doc__|print\(__doc__")
    assert not [path for path in OURS.values() if needed.search(path.read_text(encoding="utf-8"))]
