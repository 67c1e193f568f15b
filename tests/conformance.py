"""
What other software makes of these models: quantisers, exporters, transformers' own tests, vLLM.

    python tests/conformance.py                        everything but vLLM, with the releases in GPTQ
    python tests/conformance.py 5.23.0                 with this release of transformers
    python tests/conformance.py --quick                what takes little, with the release that is installed
    python tests/conformance.py --vllm                 and what vLLM serves (downloads 1 GB)
    LLAMA_CPP=FOLDER python tests/conformance.py       and what llama.cpp's converter of that checkout writes

Every release has an environment of its own in .cache/, made once, behind which the packages of the present one are
seen, torch among them. That of --quick has QUICK only, so that what needs other packages is skipped. The exit status
is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

from matrix import CACHE, ROOT, packages

# What is tested, in the versions that it was last seen with.
ECOSYSTEM = (
    *("bitsandbytes==0.50.2", "torchao==0.18.0", "optimum-quanto==0.2.7", "parameterized==0.9.0"),
    *("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", "gguf==0.19.0", "sentencepiece"),
    *("langchain==1.5.2", "langchain-openai==1.7.4", "langchain-huggingface==1.2.3"),
)
# What installs and runs in a minute or two; the kernels of quanto are compiled for minutes.
QUICK = tuple(name for name in ECOSYSTEM if name.startswith(("bitsandbytes", "torchao", "parameterized")))
# For each release of transformers, the gptqmodel and the optimum that work with it. They name a torch of their own;
# ours stays, and what they import besides follows.
GPTQ = {"5.23.0": ("gptqmodel==7.7.0", "optimum==2.3.0"), "4.57.6": ("gptqmodel==5.7.0", "optimum==2.1.0")}
DATASETS = {"4.57.6": "datasets<5"}  # newer ones import from a newer huggingface_hub
GPTQ_IMPORTS = (
    *("defuser", "device-smi", "logbar", "tokenicer", "pypcre", "threadpoolctl", "protobuf", "pillow"),
    *("maturin", "pyarrow", "dill"),
)
# transformers' tests have marks that its own conftest.py registers, and its source distribution lacks.
SETTINGS = ("-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", "-o", "addopts=-q")
SETTINGS += ("-W", "ignore::pytest.PytestUnknownMarkWarning")


def install(release: str | None) -> Path:
    """The Python of an environment with ECOSYSTEM and this release of transformers; None: QUICK and the present one."""
    folder = CACHE / f"conformance-{release or 'quick'}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--no-warn-conflicts"]
        if release is None:
            subprocess.run([*pip, "setuptools", *QUICK], check=True)
            (folder / "installed").touch()
            return python
        names = [*ECOSYSTEM, *GPTQ_IMPORTS, DATASETS.get(release, "datasets"), *packages(release)]
        subprocess.run([*pip, "setuptools", "wheel", *names], check=True)
        environment = {**os.environ, "BUILD_CUDA_EXT": "0"}
        own_torch = ["--no-deps", "--no-build-isolation", *GPTQ.get(release, ())]
        if release in GPTQ:
            subprocess.run([*pip, *own_torch], check=True, env=environment)
        (folder / "installed").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help=f"of transformers (default: {' '.join(GPTQ)})")
    parser.add_argument("--quick", action="store_true", help="with the packages of QUICK only")
    parser.add_argument("--vllm", action="store_true", help="run tests/serve_with_vllm.py too")
    arguments = parser.parse_args()
    releases = [None] if arguments.quick else arguments.releases or GPTQ
    failed = []
    for release in releases:
        python = install(release)
        environment = {**os.environ, "QWEN_EXPECT_TRANSFORMERS": release or version("transformers")}
        environment["HF_MODULES_CACHE"] = str(python.parent.parent / "modules")
        files = ["tests/conformance_ecosystem.py"]
        if release in (None, next(iter(GPTQ))):  # the suites of other releases ask for other things
            files.append("tests/conformance_transformers.py")
        for file in files:
            print(f"transformers {environment['QWEN_EXPECT_TRANSFORMERS']}: {file}", flush=True)
            command = [python, "-m", "pytest", *SETTINGS, "-rs", ROOT / file]
            with tempfile.TemporaryDirectory() as folder:  # gptqmodel writes where it is called
                done = subprocess.run(command, cwd=folder, env=environment)
            if done.returncode:
                failed.append(f"{file} with transformers {environment['QWEN_EXPECT_TRANSFORMERS']}")
    serving = [sys.executable, ROOT / "tests" / "serve_with_vllm.py", "--install"]
    if arguments.vllm and subprocess.run(serving).returncode:
        failed.append("vLLM")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
