"""
`transformers serve` for a checkpoint with this code: an HTTP server with OpenAI's interface.

    python tools/serve.py CHECKPOINT --host 127.0.0.1 --port 8000    every option of `transformers serve`

`transformers serve` (seen up to 5.23.0) looks for a model's class among transformers' own, although it has an option
--trust-remote-code. This command puts the class there, in its own process, and hands over. It needs
`pip install transformers[serving]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    path = str(Path(arguments[0]).resolve()) if Path(arguments[0]).is_dir() else arguments[0]
    try:
        from transformers.cli.transformers import main as transformers_command
    except ImportError as error:
        sys.exit(f"This needs a newer transformers: there is no command `transformers serve` here ({error}).")
    transformers.QWenLMHeadModel = get_class_from_dynamic_module("modeling_qwen.QWenLMHeadModel", path)
    sys.argv = ["transformers", "serve", path, "--trust-remote-code", *arguments[1:]]
    sys.exit(transformers_command())


if __name__ == "__main__":
    main()
