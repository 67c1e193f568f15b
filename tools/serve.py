"""
`transformers serve` for a checkpoint with this code: an HTTP server with OpenAI's interface.

    python tools/serve.py CHECKPOINT --host 127.0.0.1 --port 8000    every option of `transformers serve`

`transformers serve` (5.23.0) looks for a model's class among transformers' own, although it has an option
--trust-remote-code, and streams through the Rust form of a tokenizer. This command provides both in its own process and
hands over. It needs `pip install transformers[serving]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

from export_fast_tokenizer import tokenizer_json
from tokenizers import Tokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    if importlib.util.find_spec("transformers.cli") is None:
        sys.exit("This needs transformers 5: the release here has no command `transformers serve`.")
    path = str(Path(arguments[0]).resolve()) if Path(arguments[0]).is_dir() else arguments[0]
    # A name bound by `import transformers` may be another object: the module replaces itself by a lazy one.
    sys.modules["transformers"].QWenLMHeadModel = get_class_from_dynamic_module("modeling_qwen.QWenLMHeadModel", path)
    tokenizer_class = get_class_from_dynamic_module("tokenization_qwen.QWenTokenizer", path)
    make_index = tokenizer_class._index_vocabulary

    def with_rust_form(tokenizer) -> None:
        """The server streams through `tokenizer.tokenizer._tokenizer`."""
        make_index(tokenizer)
        tokenizer.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))

    tokenizer_class._index_vocabulary = with_rust_form
    sys.argv = ["transformers", "serve", path, "--trust-remote-code", *arguments[1:]]
    sys.exit(importlib.import_module("transformers.cli.transformers").main())


if __name__ == "__main__":
    main()
