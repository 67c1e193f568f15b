"""
Run the test suite with other releases of transformers: `python tests/matrix.py 4.57.6 ...`.

Each release, with the packages it needs, is installed once into `.cache/`, in front of the current environment,
whose torch all of them share. The exit status is 1 if the suite fails with any of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def install(release: str) -> Path:
    """A folder with this release of transformers and what it depends on."""
    folder = ROOT / ".cache" / f"transformers-{release}"
    stamp = folder / "installed"
    if not stamp.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder)]
        subprocess.run([*pip, f"transformers=={release}"], check=True)
        stamp.touch()
    return folder


def main() -> None:
    failed = []
    for release in sys.argv[1:]:
        path = os.pathsep.join(filter(None, [str(install(release)), os.environ.get("PYTHONPATH")]))
        print(f"transformers {release}", flush=True)
        environment = {**os.environ, "PYTHONPATH": path, "QWEN_EXPECT_TRANSFORMERS": release}
        if subprocess.run([sys.executable, "-m", "pytest"], cwd=ROOT, env=environment).returncode:
            failed.append(release)
    sys.exit(f"failed with transformers {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
