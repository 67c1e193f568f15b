"""
Speed of Qwen on an NVIDIA GPU beside transformers' Qwen2, and beside what the GPU can do at all.

    python benchmarks/gpu.py [--size 7B] [--quick]     a table in Markdown; --quick: a small model, to try the script

Random weights of the true shapes; both models share them in memory (Qwen2's projections are views of c_attn), so they
compute the same. Ours and Qwen2 are measured in turn; figures are medians. A prefill is compared with the arithmetic
that it needs and the measured rate of a bf16 matrix product, a decoding step with the bytes that it reads (weights and
keys and values) and the measured bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import statistics
import sys
import time
import traceback

import torch
import transformers
from kv_cache import modeling, qwen2_of
from transformers import DynamicCache

QWenConfig = modeling.QWenConfig

# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size
SIZES = {
    "1.8B": (2048, 24, 16, 11008, 151936),
    "7B": (4096, 32, 32, 22016, 151936),
    "14B": (5120, 40, 40, 27392, 152064),
    "72B": (8192, 80, 64, 49152, 152064),
    "tiny": (256, 2, 4, 512, 4096),
}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(function) -> float:
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def medians(functions: dict, repetitions: int) -> dict[str, float]:
    """Median seconds of each function, called in turn; the first call of each is not counted."""
    for function in functions.values():
        seconds(function)
    taken = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            taken[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_memory(function) -> float:
    """Gigabytes on the GPU at the highest, weights included; 0 without one."""
    if not CUDA:
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 1e9


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    size = 2**32 if CUDA else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, 20)["copy"]


def arithmetic_rate() -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    n = 8192 if CUDA else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / medians({"product": lambda: a @ b}, 20)["product"]


def make_models(size: str):
    """Ours and Qwen2 with the same random weights, in bfloat16 on the device."""
    hidden, layers, heads, intermediate, vocab = SIZES[size]
    config = QWenConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        kv_channels=hidden // heads,
        intermediate_size=intermediate,
        seq_length=32768,
        max_position_embeddings=32768,
        use_dynamic_ntk=False,
        use_logn_attn=False,
    )
    with torch.device("meta"):
        ours = modeling.QWenLMHeadModel(config).to(torch.bfloat16)
    ours.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "ln_" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return ours.eval(), qwen2_of(ours)


def weight_bytes(model) -> int:
    """What a decoding step reads of the weights: all but the embedding."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "wte" not in name)


def prefill_operations(config, length: int) -> float:
    """Of one sequence: two a weight and token, and the causal half of the attention scores and sums."""
    hidden, width = config.hidden_size, config.intermediate_size // 2
    weights = config.num_hidden_layers * (4 * hidden**2 + 3 * hidden * width)
    return length * 2 * weights + config.num_hidden_layers * 2 * hidden * length**2 + 2 * hidden * config.vocab_size


class Table:
    def __init__(self, *columns: str):
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def row(self, *cells) -> None:
        print(f"| {' | '.join(f'{c:.2f}' if isinstance(c, float) else str(c) for c in cells)} |", flush=True)


@torch.inference_mode()
def prefills(ours, theirs, lengths, attentions, rate: float, repetitions: int) -> None:
    table = Table(
        "prefill",
        "attention",
        "ours ms",
        "Qwen2 ms",
        "ours / Qwen2",
        "of the arithmetic rate",
        "peak GB",
        "Qwen2 peak GB",
    )
    for length in lengths:
        ids = torch.randint(0, ours.config.vocab_size, (1, length), device=DEVICE)
        for attention in attentions:
            for model in (ours, theirs):
                model.set_attn_implementation(attention)

            def prefill(model, ids=ids):
                return model(ids, use_cache=True, logits_to_keep=1)

            taken = medians({"ours": lambda: prefill(ours), "theirs": lambda: prefill(theirs)}, repetitions)
            peaks = [peak_memory(lambda m=model: prefill(m)) for model in (ours, theirs)]
            share = prefill_operations(ours.config, length) / taken["ours"] / rate
            ratio = taken["theirs"] / taken["ours"]
            times = taken["ours"] * 1e3, taken["theirs"] * 1e3
            table.row(length, attention, *times, f"{ratio:.2f}×", f"{share:.0%}", *peaks)


def filled_cache(model, batch: int, length: int, kind: str, room: int):
    """A cache of this kind with `length` random tokens."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if kind == "dynamic":
        cache = DynamicCache()
    elif kind == "QWenCache":
        cache = modeling.QWenCache()
    else:
        cache = transformers.StaticCache(config=config, max_cache_len=length + room)
    for layer in range(config.num_hidden_layers):
        key = torch.randn(batch, heads, length, width, device=DEVICE, dtype=torch.bfloat16)
        positions = {"cache_kwargs": {"cache_position": torch.arange(length, device=DEVICE)}}
        try:
            cache.update(key, torch.randn_like(key), layer)
        except TypeError:
            cache.update(key, torch.randn_like(key), layer, **positions)
    return cache


@torch.inference_mode()
def decodes(ours, theirs, cases, copy_rate: float, steps: int) -> None:
    """Time of one step, from steps in a row behind a full cache."""
    table = Table("decode", "batch", "attention, cache", "ours ms", "Qwen2 ms", "ours / Qwen2", "of the bandwidth")
    for length, batch, kinds in cases:
        # cuDNN plans anew for every length: none is used twice, and the longer ones are ours.
        begins = itertools.count(length, 6 * steps)
        for attention, kind in kinds:
            taken = {}
            for name, model, begin in (("theirs", theirs, next(begins)), ("ours", ours, next(begins))):
                model.set_attn_implementation(attention)
                own_kind = "dynamic" if name == "theirs" and kind == "QWenCache" else kind
                try:
                    taken[name] = decode_time(model, batch, begin, own_kind, steps)
                except torch.OutOfMemoryError:
                    taken[name] = float("nan")
                gc.collect()
                if CUDA:
                    torch.cuda.empty_cache()
            cached = 2 * batch * begin * ours.config.num_hidden_layers * ours.config.hidden_size * 2
            share = (weight_bytes(ours) + cached) / taken["ours"] / copy_rate
            ratio = taken["theirs"] / taken["ours"]
            name = f"{attention}, {kind}"
            table.row(length, batch, name, taken["ours"] * 1e3, taken["theirs"] * 1e3, f"{ratio:.2f}×", f"{share:.0%}")


COMPILED = {
    "static, compiled": {"mode": "reduce-overhead"},
    "static, compiled and tuned": {"options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}},
}


def decode_time(model, batch: int, length: int, kind: str, steps: int) -> float:
    """Seconds of a step, the median of five rounds."""
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=DEVICE)
    cache = filled_cache(model, batch, length, "static" if "static" in kind else kind, 6 * steps)
    forward = model
    if kind in COMPILED:
        torch._dynamo.reset()
        forward = torch.compile(model.forward, fullgraph=True, **COMPILED[kind])
    wants_position = "cache_position" in inspect.signature(model.forward).parameters  # up to 4.57
    positions = iter(range(length, length + 6 * steps))

    def step():
        position = next(positions)
        kwargs = {"cache_position": torch.tensor([position], device=DEVICE)} if wants_position else {}
        position_ids = torch.full((batch, 1), position, device=DEVICE)
        return forward(ids, past_key_values=cache, position_ids=position_ids, **kwargs).logits.argmax(-1)

    for _ in range(steps):  # compiles
        step()
    return statistics.median(seconds(lambda: [step() for _ in range(steps)]) / steps for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of Qwen on an NVIDIA GPU.")
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, on any device")
    arguments = parser.parse_args()
    size = "tiny" if arguments.quick else arguments.size
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, Qwen-{size} in bfloat16")
    copy_rate, rate = bandwidth(), arithmetic_rate()
    print(f"copy: {copy_rate / 1e12:.2f} TB/s; bf16 matrix product: {rate / 1e12:.0f} TFLOP/s")
    ours, theirs = make_models(size)
    ids = torch.randint(0, ours.config.vocab_size, (2, 50), device=DEVICE)
    with torch.inference_mode():
        difference = (ours(ids).logits.float() - theirs(ids).logits.float()).norm() / theirs(ids).logits.float().norm()
    print(f"relative difference of the logits: {difference:.1e}; weights: {weight_bytes(ours) / 1e9:.1f} GB a step")
    flash = ["flash_attention_2"] if transformers.utils.is_flash_attn_2_available() else []
    attentions = ["sdpa", *flash]
    lengths = [64, 128] if arguments.quick else [2048, 8192, 32000]
    eager = [(name, kind) for name in attentions for kind in ("QWenCache", "dynamic", "static")]
    compiled, tuned = ([("sdpa", kind)] for kind in COMPILED)
    if arguments.quick:
        cases = [(64, 1, eager), (64, 4, compiled), (64, 1, tuned)]
    else:
        cases = [(n, batch, eager + compiled) for n, batch in ((2048, 1), (2048, 16), (32000, 1))] + [(2048, 1, tuned)]
    failed = False
    for section in (
        lambda: prefills(ours, theirs, lengths, attentions, rate, 3 if arguments.quick else 5),
        lambda: decodes(ours, theirs, cases, copy_rate, 4 if arguments.quick else 8),
    ):
        try:
            section()
        except Exception:  # noqa: BLE001 (the other section is wanted all the same)
            traceback.print_exc()
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
