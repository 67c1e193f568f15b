"""
Ways to hold the matrices in 8 and 4 bits on an NVIDIA GPU, beside bfloat16: memory, a prompt, a token, what is lost.

    python benchmarks/quantisation.py [--size 7B] [--ways "GPTQ, 4 bits" "bitsandbytes, NF4"] [--seconds 110] [--quick]

Ours need nothing; a way whose package is missing is left out, and said so. All are made of the same random weights and
loaded by `from_pretrained`, in bfloat16, those in HALF in float16. GPTQ and AWQ round to the nearest, for a calibration
text changes the codes, not what they cost. With desc_act the inputs of a group are drawn. Tokens are those of plain
`generate`, one row, timed as benchmarks/gpu.py does. Weights and peak are what the GPU holds for this model alone, 0
without one; the peak is of a prompt and of tokens behind it. The error is of the logits of a prompt, relative to
bfloat16. What would begin after --seconds is left out. --quick: a tiny model on any device.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import sys
import time
import traceback
import zlib

import torch
import transformers
from gpu import (
    CUDA,
    GREEDY,
    SIZES,
    Table,
    config_of,
    make_model,
    medians,
    peak_memory,
    prompt,
    quantization,
    token_seconds,
)
from kv_cache import ROOT, modeling

sys.path.append(str(ROOT / "tools"))
import gptq

WAYS = {
    "bfloat16": {},
    "GPTQ, 4 bits": {"bits": 4, "group_size": 128},
    "GPTQ, 4 bits, desc_act": {"bits": 4, "group_size": 128, "desc_act": True},
    "GPTQ, 8 bits": {"bits": 8, "group_size": 128},
    "int8": {},
    "bitsandbytes, NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "bitsandbytes, int8": {"load_in_8bit": True},
    "AWQ": {"bits": 4, "group_size": 128, "zero_point": True, "backend": "gemm_triton" if CUDA else "torch_awq"},
}
PACKAGES = {"bitsandbytes, NF4": "bitsandbytes", "bitsandbytes, int8": "bitsandbytes", "AWQ": "gptqmodel"}
HALF = ("bitsandbytes, int8", "AWQ")  # multiply in float16 only


def gptq_matrix(
    weight: torch.Tensor, bits: int, group_size: int, desc_act: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The tensors of a weight (out, in), rounded to the nearest; with desc_act groups are of inputs anywhere."""
    if not desc_act:
        return gptq.quantize(weight, bits, group_size)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.device)
    parts, place = gptq.quantize(weight[:, order], bits, group_size), torch.argsort(order)
    shifts = torch.arange(0, 32, bits, device=weight.device)
    codes = (parts["qweight"][:, None] >> shifts[:, None] & 2**bits - 1).flatten(0, 1)
    return {**parts, "qweight": gptq.pack(codes[place], bits), "g_idx": parts["g_idx"][place]}


def awq_matrix(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """The tensors of AWQ's format "gemm", 4 bits packed along the outputs, for a weight (out, in), rounded only."""
    groups = weight.float().reshape(-1, group_size)
    scale, zero = gptq.grid(groups, 4, sym=False)
    codes, scale, zero = (x.view(len(weight), -1).t() for x in (gptq.encode(groups, scale, zero, 4), scale, zero))

    def pack(x):  # (rows, out)
        x = x.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)
        return gptq.pack(x.t(), 4).t().contiguous()

    return {"qweight": pack(codes), "qzeros": pack(zero), "scales": scale.half().contiguous()}


def load(way: str, config, weights: dict[str, torch.Tensor]):
    """A model of these weights, which are not changed, as a checkpoint made in this way is loaded."""
    config, options, state = copy.deepcopy(config), WAYS[way], {}
    kwargs = {"dtype": torch.float16 if way in HALF else torch.bfloat16}
    for name, tensor in weights.items():  # where there is a bias, it comes behind its weight
        is_matrix = tensor.dim() == 2 and "wte" not in name
        if way == "int8" and is_matrix:
            state[name], state[f"{name}_scale"] = quantization.round_to_int8(tensor)
        elif way.startswith("GPTQ") and is_matrix and ".h." in name:
            same_inputs = name.replace("w2", "w1")  # and so the same order
            parts = gptq_matrix(tensor, **options, seed=zlib.crc32(same_inputs.encode()))
            parts["bias"] = tensor.new_zeros(len(tensor), dtype=torch.float16)  # as published ones have
            state |= {name.replace("weight", part): value for part, value in parts.items()}
        elif way == "AWQ" and is_matrix and ".h." in name:
            parts = awq_matrix(tensor, options["group_size"])
            state |= {name.replace("weight", part): value for part, value in parts.items()}
        else:
            state[name] = tensor.clone()  # else loading shares it, and it counts for no model
    if way == "int8":
        config.int8_weights = True
    elif way.startswith("GPTQ"):
        config.quantization_config = {"quant_method": "gptq", **options}
    elif way.startswith("bitsandbytes"):
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(**options)
    elif way == "AWQ":
        config.quantization_config = {"quant_method": "awq", **options}
    kwargs["device_map"] = {"": torch.cuda.current_device() if CUDA else "cpu"}
    model = modeling.QWenLMHeadModel.from_pretrained(None, config=config, state_dict=state, **kwargs)
    model.generation_config = GREEDY
    return model.eval()


def held() -> float:
    """Gigabytes on the GPU."""
    gc.collect()
    return torch.cuda.memory_allocated() / 1e9 if CUDA else 0.0


@torch.no_grad()
def measure(table: Table, way: str, config, weights: dict, ids: torch.Tensor, tokens: int, exact):
    """A row of the table; returns the logits of the prompt `ids` (1, T), float32."""
    others, began = held(), time.perf_counter()
    model = load(way, config, weights)
    loaded, own = time.perf_counter() - began, held() - others

    def run():
        return model(ids, use_cache=True, logits_to_keep=1)

    logits, found = model(ids[:, -256:]).logits.float(), []
    prompt_ms = 1e3 * medians({"prompt": run}, 5)["prompt"]
    peak = peak_memory(lambda: found.append(token_seconds(model, 1, ids.shape[1], tokens)))
    peak = max(peak, peak_memory(run)) - others - (logits.nbytes / 1e9 if CUDA else 0)
    error = 0.0 if exact is None else float((logits - exact).norm() / exact.norm())
    table.row(way, own, peak, prompt_ms, found[0][0] * 1e3, f"{error:.1%}", loaded)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to hold the matrices of Qwen in 8 and 4 bits on a GPU.")
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, on any device")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    size, length, tokens = ("tiny", 24, 4) if arguments.quick else (arguments.size, 2048, 96)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, Qwen-{size}", flush=True)
    transformers.logging.disable_progress_bar()
    config = config_of(size)
    weights = make_model(config).state_dict()
    ids = prompt(config, 1, length)["input_ids"]
    print(f"one row, a prompt of {length} tokens, {tokens} tokens behind it")
    table = Table("matrices", "weights GB", "peak GB", "prompt ms", "ms a token", "error of logits", "loaded in s")
    exact, failed = None, False
    for way in dict.fromkeys(["bfloat16", *arguments.ways]):
        if time.perf_counter() > deadline:
            print(f"left out for lack of time: {way}", flush=True)
            continue
        if importlib.util.find_spec(PACKAGES.get(way, "torch")) is None:
            print(f"left out, the package {PACKAGES[way]} is not installed: {way}", flush=True)
            continue
        try:
            logits = measure(table, way, config, weights, ids, tokens, exact)
            exact = logits if way == "bfloat16" else exact
        except Exception:  # noqa: BLE001 (the other ways are wanted all the same)
            traceback.print_exc()
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
