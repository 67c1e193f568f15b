"""
Run the test suite with other releases of transformers, which share the torch of the current environment.

    python tests/matrix.py                   every release in RELEASES; writes docs/compatibility.md
    python tests/matrix.py 4.32.0 4.57.6     these, printing the table only

Each release is installed once, with what it needs in other versions, into an environment of its own in `.cache/` that
sees the packages of the current one behind its own. The exit status is 1 if the suite fails with any release.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
DOCUMENT = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- make matrix writes from here -->", "<!-- to here -->"

# How a test begins the reason for a skip that is due to the release; the rest goes into the table.
LACKING = "this release of transformers "

# The last patch of every minor release, and 4.32.0, which the model card names.
RELEASES = (
    *("4.32.0", "4.32.1", "4.33.3", "4.34.1", "4.35.2", "4.36.2", "4.37.2", "4.38.2", "4.39.3", "4.40.2", "4.41.2"),
    *("4.42.4", "4.43.4", "4.44.2", "4.45.2", "4.46.3", "4.47.1", "4.48.3", "4.49.0", "4.50.3", "4.51.3", "4.52.4"),
    *("4.53.3", "4.54.1", "4.55.4", "4.56.2", "4.57.6"),
    *("5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0", "5.10.4", "5.11.0"),
    *("5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2"),
    "5.23.0",
)


def packages(release: str) -> list[str]:
    """What to install with a release: what the model card names, beyond the shared environment."""
    names = [f"transformers=={release}", "transformers_stream_generator==0.0.4"]
    minor = tuple(map(int, release.split(".")[:2]))
    if minor < (4, 48):  # newer ones import what 4.43 brought, or rely on imports of 4.48
        names.append("peft==0.14.0" if minor >= (4, 43) else "peft==0.12.0")
    # Newer ones import from a newer huggingface_hub than the tokenizers of 4.34 allow.
    names.append("accelerate==0.31.0" if minor == (4, 34) else "accelerate")
    return names


def install(release: str) -> Path:
    """The Python of an environment with this release of transformers in front of the current environment."""
    python = CACHE / f"transformers-{release}" / "bin" / "python"
    stamp = python.parent.parent / "installed"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", stamp.parent], check=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(stamp.parent)}))
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # Warnings of pip would be about packages in the shared environment that ask for a newer transformers.
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-warn-conflicts"]
        subprocess.run([*pip, *packages(release)], check=True)
        stamp.touch()
    return python


@dataclass
class Result:
    release: str
    passed: int
    failed: list[str]
    lacking: list[str]
    output: str


def test(release: str, jobs: int) -> Result:
    """Run the suite with one release."""
    python = install(release)
    report = CACHE / f"transformers-{release}" / "report.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "QWEN_EXPECT_TRANSFORMERS": release}
    environment["PATH"] = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment["HF_MODULES_CACHE"] = str(report.with_name("modules"))  # releases would overwrite each other's
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [python, "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    if not report.exists():  # the suite did not even begin
        return Result(release, 0, [output.strip().splitlines()[-1]], [], output)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [case.find("skipped").get("message") for case in cases if case.find("skipped") is not None]
    lacking = sorted({skip[len(LACKING) :] for skip in skips if skip.startswith(LACKING)})
    if done.returncode and not failed:
        failed = [f"pytest ended with status {done.returncode}"]
    return Result(release, len(cases) - len(skips) - len(failed), failed, lacking, output)


def table(results: list[Result]) -> str:
    rows = ["| transformers | passed | failed | what this release can't do |", "|---|---|---|---|"]
    for result in results:
        failed = f"{len(result.failed)}: {', '.join(result.failed)}" if result.failed else "0"
        rows.append(f"| {result.release} | {result.passed} | {failed} | {'; '.join(result.lacking)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the test suite with several releases of transformers.")
    parser.add_argument("releases", nargs="*", help="default: all, and the table goes into docs/compatibility.md")
    parser.add_argument("--jobs", type=int, default=2, help="releases at a time (default: %(default)s)")
    arguments = parser.parse_args()
    results = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = pool.map(lambda release: test(release, arguments.jobs), arguments.releases or RELEASES)
        for result in tqdm(pending, total=len(arguments.releases or RELEASES), unit="release"):
            results.append(result)
            if result.failed:
                print(f"\ntransformers {result.release}\n{result.output}", flush=True)
    print(table(results))
    if not arguments.releases:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        torch = version("torch").split("+")[0]
        machine = f"Python {platform.python_version()}, torch {torch}, {platform.system()} {platform.machine()}"
        DOCUMENT.write_text(f"{before}{BEGIN}\n{machine}:\n\n{table(results)}{END}{after}", encoding="utf-8")
    failed = [result.release for result in results if result.failed]
    sys.exit(f"failed with transformers {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
