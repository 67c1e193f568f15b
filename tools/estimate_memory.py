"""
How much memory a Qwen takes, where device_map="auto" puts it, and what to do if there is too little.

    python tools/estimate_memory.py CHECKPOINT                   a folder, or its config.json
    python tools/estimate_memory.py --size 72B --bits 4 --context 2048 --devices 48GB
    python tools/estimate_memory.py --size 72B --context 8192 --batch 4 --cache int8 --devices "80GB x 2"

A GB is 10^9 bytes. The activations are those of a prefill of the whole context at once with SDPA or flash attention and
without padding, as `generate` does it. The tool reads no weights and needs no GPU. Exit status: 0 it fits, 1 it does
not, 2 something is wrong with the arguments.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from checkpoint_files import from_code

QWenConfig = from_code("configuration_qwen.QWenConfig")
QWenLMHeadModel = from_code("modeling_qwen.QWenLMHeadModel")
quantization = sys.modules[from_code("qwen_quantization.QuantizedLinear").__module__]
qwen_cache = sys.modules[from_code("qwen_cache.QWenCache").__module__]

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
SIZES = {
    "1.8B": (2048, 24, 16, 11008, 151936),
    "7B": (4096, 32, 32, 22016, 151936),
    "14B": (5120, 40, 40, 27392, 152064),
    "72B": (8192, 80, 64, 49152, 152064),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # PyTorch's, with ours
CACHES = {"full": None, "int8": 8, "int4": 4}
NOT_QUANTISED = {"load_in_8bit": True}  # or by transformers, which is not estimated
GB = 10**9
UNITS = {"g": GB, "gb": GB, "gib": 2**30, "mb": 10**6, "mib": 2**20}
RESERVE = GB  # of each device, for the driver, PyTorch's own and gaps between tensors


def parameters(config) -> int:
    """Number of parameters of a model with its output layer."""
    h, p, w = config.hidden_size, config.kv_channels * config.num_attention_heads, config.intermediate_size // 2
    biases = 3 * p + (0 if config.no_bias else 2 * h + 2 * w)
    block = 4 * h * p + 3 * h * w + biases + 2 * h
    return config.num_hidden_layers * block + 2 * config.vocab_size * h + h


def memory(config, dtype: str = "bf16", context: int = 8192, batch: int = 1, cache: str = "full") -> dict[str, int]:
    """
    Bytes of weights, of keys and values, and of the activations of a prefill, at its peak.

    dtype: "bf16", "fp16" or "fp32"; context: tokens of a row, prompt and answer; cache: "full", "int8" or "int4".

    Example:
        >>> memory(QWenConfig(), "bf16", 8192)  # Qwen-7B
        {'weights': 15442649088, 'cache': 4294967296, 'activations': 742391808}
    """
    size = 4 if dtype == "fp32" else 2
    h, nh, hd, w = config.hidden_size, config.num_attention_heads, config.kv_channels, config.intermediate_size // 2
    p, V = nh * hd, config.vocab_size
    capacity = -(-context // qwen_cache.BLOCK) * qwen_cache.BLOCK  # as QWenCache grows
    head = size * hd if CACHES[cache] is None else sum(qwen_cache.quantized_sizes(hd, CACHES[cache]))
    layer = 2 * batch * capacity * nh * head
    # What a block holds of a token, at the three times when that is most: while keys are rotated in float32 behind the
    # queries, the keys and values of the last layer not being in the cache yet; in attention (queries, keys and
    # values, the first two rotated and scaled by LogN, the output in two orders); in the MLP (the block's input, the
    # residual and its norm; both halves and their product).
    rotating = (2 * h + 5 * p) * size + p * 4 + (p * size if size < 4 else 0)
    attending = (2 * h + 7 * p) * size
    multiplying = (3 * h + 3 * w) * size
    tokens = batch * context
    activations = max(tokens * rotating - layer, tokens * max(attending, multiplying), batch * V * (size + 4))
    weights = parameters(config) * size
    gptq = quantization.check_quantization_config(getattr(config, "quantization_config", None) or NOT_QUANTISED)
    if gptq is not None:  # codes, a scale and a zero for each group and output, the group of each input, a bias

        def matrix(inputs: int, outputs: int) -> int:
            groups = 1 if gptq.group_size == -1 else -(-inputs // gptq.group_size)
            codes = (inputs + groups) * outputs * gptq.bits // 8
            return codes + 2 * groups * outputs + 4 * inputs + outputs * size

        block = 2 * h * size + sum(matrix(*shape) for shape in ((h, 3 * p), (p, h), (h, w), (h, w), (w, h)))
        head = matrix(h, V) if gptq.lm_head else V * h * size
        weights = config.num_hidden_layers * block + head + (V * h + h) * size
    if getattr(config, "int8_weights", False):  # a byte each, and a float32 for each output channel
        matrices = config.num_hidden_layers * (4 * h * p + 3 * h * w) + V * h
        weights -= matrices * (size - 1) - 4 * (config.num_hidden_layers * (3 * p + 2 * h + 2 * w) + V)
    elif getattr(config, "int8_lm_head", False):  # the same of the output layer alone
        weights -= V * h * (size - 1) - 4 * V
    return {
        "weights": weights,
        "cache": config.num_hidden_layers * layer,
        "activations": activations,
    }


def place(config, dtype: str, need: dict[str, int], devices: list[int]) -> tuple[dict, dict]:
    """
    What device_map="auto" does on `devices` (bytes each) with a `max_memory` that leaves room for all but the weights.

    Returns that max_memory and the bytes that each device holds then: weights, and beside them on a device the cache of
    its layers and activations. What has no room is on "cpu", computes on the first device, and has its cache there.
    """
    config = copy.copy(config)
    setattr(config, quantization.HELD, getattr(config, "quantization_config", None))
    with init_empty_weights():
        model = QWenLMHeadModel(config).to(DTYPES[dtype])
    layers, share = config.num_hidden_layers, need["weights"] / (need["weights"] + need["cache"])
    rooms = [n - RESERVE - need["activations"] for n in devices]
    rooms = [rooms[0] - need["cache"]] if len(devices) == 1 else [int(room * share / 10**6) * 10**6 for room in rooms]
    room = {**{i: max(n, 0) for i, n in enumerate(rooms)}, "cpu": 10**15}
    blocks = {"no_split_module_classes": list(model._no_split_modules)}
    balanced = get_balanced_memory(model, max_memory=dict(room), low_zero=False, **blocks)
    used = dict.fromkeys(range(len(devices)), need["activations"])
    for name, device in infer_auto_device_map(model, max_memory=balanced, **blocks).items():
        part = model.get_submodule(name) if name else model
        used[device] = used.get(device, 0) + sum(p.numel() * p.element_size() for p in part.state_dict().values())
        own_layers = sum(type(module).__name__ in model._no_split_modules for module in part.modules())
        used[0 if device == "cpu" else device] += own_layers * need["cache"] // layers
    return room, used


def fits(config, dtype: str, context: int, batch: int, cache: str, devices: list[int]) -> bool:
    """Whether everything is on the devices, with `RESERVE` left of each."""
    need = memory(config, dtype, context, batch, cache)
    if sum(need.values()) > sum(devices) - RESERVE * len(devices):  # placing takes time
        return False
    used = place(config, dtype, need, devices)[1]
    return "cpu" not in used and all(n <= devices[device] - RESERVE for device, n in used.items())


def in_gptq(config, bits: int):
    """The same model as a GPTQ checkpoint with groups of 128, such as the published Int8 and Int4 ones."""
    config = copy.copy(config)
    config.int8_weights = False
    config.quantization_config = {"quant_method": "gptq", "bits": bits, "group_size": 128}
    return config


def bits_of(config) -> int | None:
    """The bits of a weight in the blocks' matrices; None if they are not quantised."""
    gptq = quantization.check_quantization_config(getattr(config, "quantization_config", None) or NOT_QUANTISED)
    return 8 if getattr(config, "int8_weights", False) else gptq and gptq.bits


def advice(config, dtype: str, context: int, batch: int, cache: str, devices: list[int]) -> list[str]:
    """What fits in place of what does not, one change at a time."""
    found = []
    if dtype == "fp32" and fits(config, "bf16", context, batch, cache, devices):
        found.append("bf16=True, half the weights and keys and values")
    for bits in CACHES:
        if CACHES[cache] is None and CACHES[bits] and fits(config, dtype, context, batch, bits, devices):
            found.append(f"a quantised cache: generate(..., cache_bits={CACHES[bits]})")
            break
    for bits in (8, 4):
        if bits < (bits_of(config) or 16):
            smaller = in_gptq(config, bits)
            if fits(smaller, dtype, context, batch, cache, devices):
                together = sum(memory(smaller, dtype, context, batch, cache).values())
                found.append(f"the Int{bits} checkpoint ({together / GB:.2f} GB)")
    fitting, not_fitting = 0, -(-context // qwen_cache.BLOCK)  # in blocks of the cache
    while not_fitting - fitting > 1:
        n = (fitting + not_fitting) // 2
        if fits(config, dtype, n * qwen_cache.BLOCK, batch, cache, devices):
            fitting = n
        else:
            not_fitting = n
    if fitting:
        found.append(f"a context of {fitting * qwen_cache.BLOCK:,} tokens")
    for n in range(len(devices) + 1, 17):
        if fits(config, dtype, context, batch, cache, [devices[0]] * n):
            return [*found, f"{n} such devices"]
    return found


def read_config(path: str):
    """The configuration of a checkpoint folder or a config.json; ArgumentTypeError if it is not a Qwen's."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not Path(path).exists():
        what = "file" if file.suffix == ".json" else "folder"
        raise argparse.ArgumentTypeError(f"There is no {what} {path}")
    if not file.exists():
        raise argparse.ArgumentTypeError(f"{path} has no config.json, so it is no checkpoint")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("model_type") != "qwen":
            raise ValueError('it has no "model_type": "qwen"')
        return QWenConfig.from_dict(values)
    except (OSError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file} is not the config.json of a Qwen checkpoint: {error}") from None


def read_devices(text: str) -> list[int]:
    """
    Bytes of each device.

    Example:
        >>> read_devices("80GB x 2")
        [80000000000, 80000000000]
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(?:\s*([A-Za-z]+?))?(\s*x\s*([1-9]\d?))?\s*", text)
    if match is not None and not match[2]:
        number, times = match[1], match[3] or ""
        raise argparse.ArgumentTypeError(f"{text.strip()} lacks its unit: write {number}GB{times}")
    if match is None or match[2].lower() not in UNITS:
        raise argparse.ArgumentTypeError(
            f'devices are given as "80GB" or "80GB x 2", found {text!r}; units are GB, GiB, MB and MiB'
        )
    return [int(float(match[1]) * UNITS[match[2].lower()])] * int(match[4] or 1)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 is wanted, found {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="How much memory a Qwen takes, where it goes, and what to do if there is too little.",
        epilog="A GB is 10^9 bytes. A card that nvidia-smi shows as 24564MiB is one of 25.76GB; --devices 24564MiB "
        "says the same. Exit status: 0 it fits, 1 it does not, 2 something is wrong with the arguments.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("config", nargs="?", type=read_config, metavar="PATH", help="checkpoint folder, or config.json")
    which.add_argument("--size", choices=SIZES, help="a published size, in place of PATH")
    parser.add_argument(
        "--dtype",
        type=lambda name: DTYPE_NAMES.get(name, name),
        choices=DTYPES,
        default="bf16",
        help="precision of the weights, also as bfloat16, float16, float32 (default: bf16)",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(4, 8),
        help="bits of each weight, for an Int4 or Int8 checkpoint of --size (GPTQ, groups of 128)",
    )
    parser.add_argument("--int8-lm-head", action="store_true", help="the output layer in int8 (int8_lm_head=True)")
    parser.add_argument(
        "--context", type=count, default=8192, help="tokens of a row, prompt and answer together (default: 8,192)"
    )
    parser.add_argument("--batch", type=count, default=1, help="rows (default: 1)")
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default="full",
        help="keys and values: full, as the weights (default), or quantised",
    )
    parser.add_argument("--devices", type=read_devices, metavar='"80GB x 2"', help="memory of the devices")
    args = parser.parse_args(arguments)
    config = args.config or QWenConfig(**dict(zip(SHAPE, SIZES[args.size])))
    if args.bits is not None:
        if args.config is not None:
            parser.error("--bits goes with --size; a checkpoint's own config.json says how it is quantised")
        config.quantization_config = {"quant_method": "gptq", "bits": args.bits, "group_size": 128}
    if args.int8_lm_head:
        if (getattr(config, "quantization_config", None) or {}).get("lm_head"):
            parser.error("--int8-lm-head: the checkpoint has its output layer in GPTQ's format already")
        config.int8_lm_head = True
    asked = (config, args.dtype, args.context, args.batch, args.cache)
    try:
        need = memory(*asked)
    except ValueError as error:  # a head that can't be quantised
        parser.error(str(error))
    bits = bits_of(config)
    held = f"{f'{bits} bits and ' if bits else ''}{args.dtype}"
    print(f"{parameters(config) / 1e9:.2f} billion parameters in {held}; {args.batch} x {args.context:,} tokens")
    for what, n in {**need, "together": sum(need.values())}.items():
        print(f"  {what:12}{n / GB:9.2f} GB")
    if args.devices is None:
        return 0
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it looks for the devices here
    room, used = place(config, args.dtype, need, args.devices)
    limits = [room[device] // 10**6 for device in range(len(args.devices))]
    if len(used) > 1 and any(limits):
        written = ", ".join(f"{device}: '{limit}MB'" for device, limit in enumerate(limits))
        rest = ', and "cpu" with what it has' if "cpu" in used else ""
        print(f'Weights, keys, values and activations with device_map="auto", max_memory={{{written}}}{rest}:')
    elif "cpu" in used:
        print("No weights have room on the devices beside the keys, values and activations:")
    for device, n in used.items():
        of = "for weights that have no room" if device == "cpu" else f"of {round(args.devices[device] / GB, 2):g}"
        if device != "cpu" and n > args.devices[device]:
            of += ", which is too much"
            if device == 0 and "cpu" in used:
                of += ": the keys and values of the layers on cpu are here too"
        print(f"  {f'device {device}':12}{n / GB:9.2f} GB {of}")
    if fits(*asked, args.devices):
        print("It fits.")
        return 0
    print("It does not fit. What does:", *advice(*asked, args.devices) or ["nothing tried"], sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())
