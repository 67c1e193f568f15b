"""Figures of the model card, base models (https://huggingface.co/Qwen/Qwen-72B): percent; perplexity on arXiv."""

from __future__ import annotations

NAMES = ("mmlu", "ceval", "gsm8k", "math", "humaneval", "mbpp", "bbh", "agieval", "gaokao", "cmmlu")
BENCHMARKS = {
    "Qwen-7B": dict(zip(NAMES, (58.2, 63.5, 51.7, 11.6, 29.9, 31.6, 45.0, 45.3, 62.5, 62.2))),
    "Qwen-14B": dict(zip(NAMES, (66.3, 72.1, 61.3, 24.8, 32.3, 40.8, 53.4, 51.9, 52.7, 71.0))),
    "Qwen-72B": dict(zip(NAMES, (77.4, 83.3, 78.9, 35.2, 35.4, 52.2, 67.7, 62.5, 87.6, 83.6))),
}
PERPLEXITY = {"Qwen-72B": {8192: 2.828, 16384: 2.734, 32768: 2.717}}
SIZES = {(4096, 32): "Qwen-7B", (5120, 40): "Qwen-14B", (8192, 80): "Qwen-72B"}  # hidden_size, layers


def of_card(config) -> str | None:
    """The card's model of this size."""
    return SIZES.get((config.hidden_size, config.num_hidden_layers))
