"""What the tests share: the modules of the repository as a package, small models, the official vocabulary."""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from matrix import LACKING

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
os.environ.setdefault("PYTHONIOENCODING", "utf-8")  # of the programs that tests start
if "PYTEST_XDIST_WORKER" in os.environ:  # they would copy remote code to one place at once
    os.environ["HF_MODULES_CACHE"] = str(ROOT / ".cache" / "modules" / os.environ["PYTEST_XDIST_WORKER"])
transformers = importlib.import_module("transformers")

# What begins first where several processes share the tests: files that take 20 seconds or more, the longest first.
LONG = (
    *("finetune", "triton_kernels", "cuda_graph", "cpp_kernels", "check_kernels", "parallel", "tokenization_qwen"),
    *("export_gguf", "vocabulary_tools", "upgrade_checkpoint", "compile", "generation", "qwen_cache", "serving", "faq"),
)

# The models are tiny: threads would only wait for each other. The variable is for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Without a GPU its kernels run in an interpreter, which must be chosen before anything imports Triton.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if TRITON_DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# The modules import each other relatively, as remote code does; a package whose path is the root holds them.
package = types.ModuleType("qwen")
package.__path__ = [str(ROOT)]
sys.modules["qwen"] = package
configuration_qwen = importlib.import_module("qwen.configuration_qwen")
modeling_qwen = importlib.import_module("qwen.modeling_qwen")
qwen_loading = importlib.import_module("qwen.qwen_loading")
tokenization_qwen = importlib.import_module("qwen.tokenization_qwen")

compat = importlib.import_module("qwen.transformers_compat")
needs_sdpa = pytest.mark.skipif(not compat.HAS_SDPA, reason="needs the fused attention of torch 2.1")
PIPELINES_TAKE_MESSAGES = hasattr(importlib.import_module("transformers.pipelines.text_generation"), "Chat")

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 192,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # so that attention is far from uniform and a wrong mask shows
}


def lacks(what: str) -> None:
    """Skip a test of what the release of transformers can't do; the table of `make matrix` says so."""
    pytest.skip(LACKING + what)


def sampled(cases) -> list:
    """Cases of one kind, as `parametrize` takes them: all, but with the releases that `make matrix` names the first."""
    first, *others = cases
    return [first, *(pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.more) for c in others)]


def tiny_config(**changes):
    return configuration_qwen.QWenConfig(**{**TINY, **changes})


def tiny_model(seed: int = 0, **changes):
    """A random model in float32 and evaluation mode; biases and norms random too, so that none is a no-op."""
    torch.manual_seed(seed)
    model = modeling_qwen.QWenLMHeadModel(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def needs_offsets() -> None:
    """Skip with a library for fast tokenizers that gives wrong offsets for what no merge has made."""
    if version("tokenizers").startswith("0.19."):
        lacks("brings tokenizers 0.19, whose offsets are wrong")


def needs_prefill_in_chunks() -> None:
    if not hasattr(transformers.GenerationConfig(), "prefill_chunk_size"):
        lacks("has no prefill in chunks")
    if transformers.__version__.startswith("5.2."):
        lacks("computes a prefill in chunks wrongly, with Qwen2 too")


StaticCache = getattr(transformers, "StaticCache", None)
HAS_STATIC = hasattr(StaticCache, "reset")  # from 4.41; before that it holds a single layer


def static_cache(config, length: int, batch_size: int = 1, dtype=torch.float32):
    """A StaticCache for `length` tokens; skips where the release has none."""
    if not HAS_STATIC:
        lacks("has no static cache for all layers")
    parameters = inspect.signature(StaticCache.__init__).parameters
    if "config" in parameters and "max_batch_size" not in parameters and "batch_size" not in parameters:
        return StaticCache(config=config, max_cache_len=length)
    size = {"batch_size" if "batch_size" in parameters else "max_batch_size": batch_size}
    return StaticCache(config=config, max_cache_len=length, device="cpu", dtype=dtype, **size)


def in_large_programs(monkeypatch) -> None:
    """Launches for the interpreter of Triton, where the number of operations counts and not their size."""
    importlib.import_module("interpreter").patch_once_a_launch()
    attention, products = (importlib.import_module(f"qwen.triton_{name}") for name in ("attention", "products"))
    for entry in attention.TUNING.values():
        monkeypatch.setitem(entry, "N", 64)
    launches = [launch for of_size in products.GPTQ_ROW.values() for launch in of_size.values()]
    for entry in (*products.PRODUCT.values(), *launches):
        monkeypatch.setitem(entry, "BN", 64)
    monkeypatch.setitem(products._FLOAT32, "BN", 256)


def random_ids(*shape: int, seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


CODE = configuration_qwen.CODE_FILES


ENVIRONMENT: dict[str, str] = {}  # when all tests are imported and none has begun


@functools.lru_cache(maxsize=None)
def python() -> tuple[str, ...]:
    """
    The beginning of a command that runs a program: Python itself, or what gives the program a process that has imported
    torch and transformers, see warm.py. For programs that look at what imports do, or at all of their memory, take
    `sys.executable`.
    """
    if sys.platform != "linux" or not hasattr(socket, "send_fds") or TRITON_DEVICE == "cuda":  # which does not fork
        return (sys.executable,)
    folder = tempfile.mkdtemp(prefix="warm-")
    program, path = str(ROOT / "tests" / "warm.py"), os.path.join(folder, "socket")
    server = subprocess.Popen(
        [sys.executable, program, "--serve", path],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,  # it ends with this process
        stdout=subprocess.PIPE,
    )

    @atexit.register
    def end():
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    if server.stdout.readline() != b"ready\n":
        raise RuntimeError("the server of tests/warm.py did not start")
    return (sys.executable, "-IS", program, path)


def run(code: str, cwd: Path, fresh: bool = False, **environment) -> str:
    """Run Python code in a process of its own, offline; its standard output. `fresh`: with all imports to be done."""
    done = subprocess.run(
        [*([sys.executable] if fresh else python()), "-W", "ignore", "-c", code],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def publish(cache: Path, repository: str, files: dict[str, Path], revision: str = "main") -> Path:
    """Put files into a hub cache as if they had been downloaded at this revision; returns the snapshot's folder."""
    folder = cache / ("models--" + repository.replace("/", "--"))
    commit = hashlib.sha1((repository + revision).encode()).hexdigest()
    snapshot = folder / "snapshots" / commit
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    for name, source in files.items():
        blob = folder / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        shutil.copyfile(source, blob)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def _named(variable: str, is_there) -> Path | None:
    """What an environment variable names; an error if it is not there, rather than other files in its place."""
    value = os.environ.get(variable)
    if not value:
        return None
    if not is_there(Path(value)):
        raise pytest.UsageError(f"{variable}={value} names nothing that is there. Set it to another path, or unset it.")
    return Path(value)


def golden_folder() -> Path | None:
    """Recorded outputs of the published implementation, where a developer has them."""
    folder = _named("QWEN_GOLDEN", Path.is_dir) or ROOT.parent / "shared" / "golden"
    return folder if folder.is_dir() else None


def official_vocabulary() -> Path | None:
    """The 151,643 tokens of the published checkpoints: from a developer's folder, or the dashscope package."""
    named = _named("QWEN_VOCAB", Path.is_file)
    if named is not None:
        return named
    places = [ROOT.parent / "shared" / "vocab" / "qwen.tiktoken"]
    spec = importlib.util.find_spec("dashscope")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "resources" / "qwen.tiktoken")
    return next((place for place in places if place.is_file()), None)


@pytest.fixture(scope="session")
def official_tokenizer():
    path = official_vocabulary()
    if path is None:
        pytest.skip("needs the official qwen.tiktoken: set QWEN_VOCAB to it, or install dashscope")
    return tokenization_qwen.QWenTokenizer(str(path))


@pytest.fixture(scope="session")
def demo_tokenizer():
    return tokenization_qwen.QWenTokenizer(str(ROOT / "demo" / "qwen.tiktoken"))


@pytest.fixture
def caplog(caplog, monkeypatch):
    """pytest's, with what transformers and our modules log, each record once: transformers passes its records on to
    Python's own logger only where the variable CI is set."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def pytest_configure(config):
    """Stop if the release under test is not the one that was asked for."""
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin the longest files, of few tests, last
        config.option.loadscopereorder = False
    expected = os.environ.get("QWEN_EXPECT_TRANSFORMERS", transformers.__version__)
    if transformers.__version__ != expected:
        raise pytest.UsageError(f"asked for transformers {expected}, found {transformers.__version__}")


def pytest_collection_modifyitems(items):
    last = len(LONG)
    order = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, last))


# Up to 4.45 every loading collects garbage, a second each time where what is imported is looked at.
LOADING_COLLECTS = "gc.collect()" in inspect.getsource(importlib.import_module("transformers.modeling_utils"))


def pytest_collection_finish(session):
    gc.freeze()
    ENVIRONMENT.update(os.environ)


@pytest.fixture(autouse=True)
def _leave_the_environment_as_it_was():
    """Some packages set variables when they are imported, in the middle of a test."""
    before = dict(os.environ)
    yield
    for name in {*before, *os.environ}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(scope="module", autouse=True)
def _leave_what_is_imported_out_of_garbage_collection():
    yield
    if LOADING_COLLECTS:
        gc.collect()
        gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Say in one line how many tests were skipped for want of a file, and how to have them run."""
    skipped = [r.longrepr[2] for r in terminalreporter.stats.get("skipped", ()) if isinstance(r.longrepr, tuple)]
    reasons = Counter(reason[len("Skipped: ") :] if reason.startswith("Skipped: ") else reason for reason in skipped)
    files = [f"{n} need{reason[5:]}" for reason, n in reasons.most_common() if re.match(r"needs .*\bQWEN_", reason)]
    others = sum(n for reason, n in reasons.items() if not re.match(r"needs .*\bQWEN_", reason))
    files += [f"{others} need what is not here (pytest -rs lists it)"] * bool(others)
    if files:
        terminalreporter.write_line(f"Skipped tests: {'; '.join(files)}.")
