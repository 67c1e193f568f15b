"""
Run the test suite with other releases of transformers, and with other versions of Python and PyTorch.

    python tests/matrix.py                   every release in RELEASES, with the Python and the torch that run this: the
                                             files of ACCEPTANCE
    python tests/matrix.py 4.32.0 4.57.6     all but LEFT_OUT with these, printing the table only;
                          --core 4.37.2      CORE with these, beside them
    python tests/matrix.py newest            with the newest release that the package index has
    python tests/matrix.py newest-torch      with the newest PyTorch that it has; downloads several GB
    python tests/matrix.py --others          OTHERS, the whole suite: other Pythons and PyTorches; downloads several GB

Every run has an environment of its own in `.cache/`, made once. Those of releases see the packages of the current
environment, torch among them, behind their own. The full runs, and those with what is newest, go into the record,
docs/compatibility_record.tsv, of which compatibility_page.py makes the tables of docs/compatibility.md. The exit
status is 1 if the suite fails with anything but a newest one that is not listed here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import compatibility_page
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"

# How a test begins the reason for a skip that is due to the release; the rest goes into the table.
LACKING = "this release of transformers "

# The last patch of every minor release, and 4.32.0, which the model card names.
RELEASES = (
    *("4.32.0", "4.32.1", "4.33.3", "4.34.1", "4.35.2", "4.36.2", "4.37.2", "4.38.2", "4.39.3", "4.40.2", "4.41.2"),
    *("4.42.4", "4.43.4", "4.44.2", "4.45.2", "4.46.3", "4.47.1", "4.48.3", "4.49.0", "4.50.3", "4.51.3", "4.52.4"),
    *("4.53.3", "4.54.1", "4.55.4", "4.56.2", "4.57.6"),
    *("5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0", "5.10.4", "5.11.0"),
    *("5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2"),
    *("5.23.0", "5.24.0"),
)
# (Python, torch, transformers): the model card's floor, the newest that each Python has, and one between.
OTHERS = (
    ("3.8", "1.12.1", "4.32.0"),
    ("3.8", "2.4.1", "4.46.3"),
    ("3.9", "2.0.1", "4.37.2"),
    ("3.9", "2.8.0", "4.57.6"),
    ("3.12", "2.6.0", "4.52.4"),
    ("3.13", "2.13.0", "5.23.0"),
)

# What every release must pass: the card's commands, the network, caches, generation, chat, tokenizer. Loading by every
# route, hubs, tools and examples besides where releases are named.
ACCEPTANCE = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("configuration_qwen", "model_card", "flash_attention", "modeling_qwen", "combinations", "qwen_cache"),
        *("generation", "chat", "qwen_generation_utils", "tokenization_qwen", "releases"),
    )
)
FEW = "not more and not slow"  # of many cases of one kind the first, see `sampled` in conftest.py
# What some releases run at every merge: what every release must pass, checkpoints by all routes, 4 and 8 bits.
CORE = (*ACCEPTANCE, "tests/test_loading.py", "tests/test_quantization.py", "-m", FEW)
# What chosen releases need not run again. Files that use nothing of transformers, which test_code.py holds them to;
INDEPENDENT = ("check_kernels", "cpp_kernels", "demo_facts", "triton_kernels")
# what is for the release of requirements.txt: tuning, evaluation, graphs, export, estimates, questions, deployment, the
# code's own rules, and what of the tokenizer is slow;
ONE_RELEASE = (
    *("code", "cuda_graph", "deployment", "estimate_memory", "evaluation", "export_gguf", "faq", "finetune"),
    *("finetune_data", "gptq", "lm_eval", "tokenization_docs", "tokenization_growth", "tool_files"),
)
# what is slow, and most cases of one kind.
LEFT_OUT = (*(f"--ignore=tests/test_{name}.py" for name in (*INDEPENDENT, *ONE_RELEASE)), "-m", FEW)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def newest(package: str) -> str:
    """The newest version of a package that the package index has; CalledProcessError if it doesn't answer."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    return first_version(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def first_version(answer: str) -> str:
    """Of what `pip index versions` prints: 'torch (2.13.0+cpu)' and more lines."""
    found = re.match(r"[\w-]+ \((\d[^)+]*)", answer)
    if found is None:
        raise ValueError(f"pip does not say which versions there are: {answer[:200]!r}")
    return found.group(1)


def packages(release: str) -> list[str]:
    """What to install with a release: what the model card names, beyond the shared environment."""
    names = [f"transformers=={release}", "transformers_stream_generator==0.0.4"]
    if numbers(release) < (4, 48):  # newer ones import what 4.43 brought, or rely on imports of 4.48
        names.append("peft==0.14.0" if numbers(release) >= (4, 43) else "peft==0.12.0")
    # Newer ones import from a newer huggingface_hub than the tokenizers of 4.34 allow.
    names.append("accelerate==0.31.0" if numbers(release) == (4, 34) else "accelerate")
    return names


def install(release: str) -> Path:
    """The Python of an environment with this release of transformers in front of the current environment."""
    folder = CACHE / f"transformers-{release}"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip_install(folder, *packages(release))
    return folder / "bin" / "python"


def install_other(python: str, torch: str, release: str) -> Path:
    """The Python of an environment with its own Python, torch and transformers; LookupError without that Python."""
    folder = CACHE / f"python-{python}-torch-{torch}-transformers-{release}"
    if not (folder / "installed").exists():
        subprocess.run([interpreter(python), "-m", "venv", "--clear", folder], check=True)
        text = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt"))
        # transformers brings the tokenizers that it wants
        names = {*re.findall(r"^\w[\w-]*", text, re.MULTILINE), *packages(release)} - {"ruff", "tokenizers"}
        if numbers(torch) < (2, 3):  # built for NumPy 1; torch 1 brings no jinja2
            names |= {"numpy<2", "jinja2"}
        elif numbers(torch) < (2, 7):  # the interpreter of its Triton fails with NumPy 2.4
            names.add("numpy<2.3")
        if numbers(python) < (3, 9):  # which peft 0.14 needs: take the newest that installs
            names.discard("peft==0.14.0")
        if numbers(torch) < (1, 13):
            names = {name for name in names if not name.startswith("peft")}
        pip_install(folder, f"torch=={torch}", "setuptools", "wheel", *sorted(names))
    return folder / "bin" / "python"


def pip_install(folder: Path, *names: str) -> None:
    # Warnings would be about packages in the shared environment that ask for a newer transformers.
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-warn-conflicts"]
    subprocess.run([*pip, "--quiet", *names], check=True)
    (folder / "installed").touch()


def interpreter(version: str) -> str:
    """A Python of this version on the search path, or one of pyenv's; LookupError if there is none."""
    for candidate in [f"python{version}", *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([candidate, "-c", ""], check=True, stderr=subprocess.DEVNULL)
            return str(candidate)
    raise LookupError(f"There is no Python {version} here.")


@dataclass
class Result:
    name: tuple[str, ...]
    passed: int
    failed: list[str]
    lacking: list[str]
    output: str

    @property
    def cells(self) -> tuple[str, str, str]:
        """Passed, failed and lacking, as text."""
        failed = f"{len(self.failed)}: {', '.join(self.failed)}" if self.failed else "0"
        return str(self.passed), failed, "; ".join(self.lacking)


def test(name: tuple[str, ...], files: tuple[str, ...], jobs: int) -> Result:
    """Run tests, as `files` tells pytest, with a release (its name alone), or with (Python, torch, transformers)."""
    try:
        python = install(*name) if len(name) == 1 else install_other(*name)
    except (LookupError, subprocess.CalledProcessError) as error:
        return Result(name, 0, ["not run"], [], str(error))
    report = python.parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "QWEN_EXPECT_TRANSFORMERS": name[-1]}
    environment["PATH"] = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    modules = report.with_name("modules")  # releases would overwrite each other's
    shutil.rmtree(modules, ignore_errors=True)  # what was loaded from a hub is not copied anew
    environment["HF_MODULES_CACHE"] = str(modules)
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [python, "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    if not report.exists():  # the suite did not even begin
        return Result(name, 0, [output.strip().splitlines()[-1]], [], output)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [case.find("skipped").get("message") for case in cases if case.find("skipped") is not None]
    lacking = sorted({skip[len(LACKING) :] for skip in skips if skip.startswith(LACKING)})
    if done.returncode and not failed:
        failed = [f"pytest ended with status {done.returncode}"]
    return Result(name, len(cases) - len(skips) - len(failed), failed, lacking, output)


def table(results: list[Result]) -> str:
    columns = ["transformers"] if len(results[0].name) == 1 else ["Python", "torch", "transformers"]
    columns += ["passed", "failed", "what this release can't do"]
    rows = [columns, ["---"] * len(columns)]
    rows += [[*result.name, *result.cells] for result in results]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def rows(run: str, results: list[Result]) -> list[compatibility_page.Row]:
    """The results of a run as lines of the record."""
    here = (platform.python_version(), version("torch").split("+")[0])
    names = [(*here, *result.name)[-3:] for result in results]
    return [compatibility_page.Row(run, str(date.today()), *n, *r.cells) for n, r in zip(names, results)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the test suite with several releases of transformers.")
    parser.add_argument("releases", nargs="*", help="numbers, newest or newest-torch; default: all")
    parser.add_argument("--unlisted", action="store_true", help="only if it is not listed here, and so tested anyway")
    parser.add_argument("--core", nargs="+", default=[], metavar="RELEASE", help="releases that run fewer tests")
    parser.add_argument("--others", action="store_true", help="other versions of Python and torch instead")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args()
    if {"newest", "newest-torch"} & set(arguments.releases):
        sys.exit(run_newest(arguments.releases[0], arguments.unlisted))
    if arguments.core and (arguments.others or not arguments.releases):
        parser.error("--core goes with releases that are named")
    names = OTHERS if arguments.others else [(release,) for release in arguments.releases or RELEASES]
    runs = dict.fromkeys(names, () if arguments.others else LEFT_OUT if arguments.releases else ACCEPTANCE)
    runs.update({(release,): CORE for release in arguments.core})
    results = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in tqdm(pool.map(lambda run: test(*run, arguments.jobs), runs.items()), total=len(runs)):
            results.append(result)
            if result.failed:
                print(f"\n{' '.join(result.name)}\n{result.output}", flush=True)
    print(table(results))
    if arguments.others or not arguments.releases:
        compatibility_page.record(rows("others" if arguments.others else "releases", results))
    failed = [" ".join(result.name) for result in results if result.failed]
    sys.exit(f"failed with {', '.join(failed)}" if failed else 0)


def run_newest(what: str, only_unlisted: bool) -> int:
    """The whole suite with the newest release of transformers or of torch; 1 if it fails with one that is listed."""
    try:
        if what == "newest":
            name = (newest("transformers"),)
        else:
            name = (".".join(platform.python_version_tuple()[:2]), newest("torch"), RELEASES[-1])
    except (subprocess.CalledProcessError, ValueError) as error:
        print(f"The package index gives no newest release: {error}")
        return 0
    listed = name in ((release,) for release in RELEASES) or name[1:2] in ((torch,) for _, torch, _ in OTHERS)
    print(f"{what}: {' '.join(name)}, which is {'' if listed else 'not '}listed as supported", flush=True)
    if listed and only_unlisted:
        return 0
    result = test(name, LEFT_OUT if what == "newest" else (), 1)
    print(f"{result.output}\n{table([result])}")
    compatibility_page.record(rows(what, [result]))
    return int(bool(result.failed) and listed)


if __name__ == "__main__":
    main()
