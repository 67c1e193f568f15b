"""
Speed of Qwen on several GPUs: whole blocks on each (`device_map`), or a share of every matrix (`tp_plan`).

    python benchmarks/cards.py make FOLDER [--size 72B] [--bits 4]
    python benchmarks/cards.py run FOLDER [--whole] [--seconds 500] [--out results.jsonl]
    torchrun --nproc-per-node 2 benchmarks/cards.py run FOLDER [--seconds 280] [--out results.jsonl]

`make` writes a checkpoint of zeros that takes no disk (sparse files), with --bits one of GPTQ's, 128 inputs a group;
`run` loads it by `from_pretrained`, by torchrun with tensor parallelism, and makes the weights random in place. Results
are JSON lines, written as they come, so that a run may be stopped. What would begin after --seconds is left out, and so
are cases that do not fit into the memory that is free; both are said. The case 1x2048i8 has an int8 cache, 1x2048i4 an
int4 one. --requests N: as many by `generate_batch`. `--size small --fp32` is the check: there greedy ids must be those
of the ordinary path.

A token is the mean between the first new one and the last; the first call of as many rows, which captures the graph,
is timed apart. Its share of the bandwidth counts the weights, keys and values that it reads against what a sum over
4 GB reads: of one card if blocks follow each other, of all of them under tensor parallelism. `parts` are the graphs of
the cards alone, replayed without the loop around them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import shutil
import statistics
import struct
import sys
import time
from pathlib import Path

import torch
import transformers
from gpu import (
    CUDA,
    GREEDY,
    SIZES,
    cached_bytes,
    config_of,
    lengths_of,
    quantization,
    randomize_codes,
    read_bandwidth,
    seconds,
    synchronize,
    weight_bytes,
)
from kv_cache import modeling
from transformers import AutoModelForCausalLM, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
SIZES["small"] = (1024, 8, 8, 4096, 32000)
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PARALLEL = "RANK" in os.environ
CASES = ["1x2048", "16x2048", "1x32000", "64x2048", "16x32000", "64x32000"]


def make(folder: Path, size: str, bits: int | None) -> None:
    """A checkpoint of zeros in bfloat16, or of GPTQ's codes, a file for each block, in files without contents."""
    folder.mkdir(parents=True, exist_ok=True)
    code = [*ROOT.glob("*.py"), ROOT / "cpp_kernels.cpp"]
    for path in code:
        shutil.copy(path, folder)
    config = config_of(size)
    config.auto_map = json.loads((ROOT / "config.json").read_text())["auto_map"]
    config.save_pretrained(folder)
    scheme = {"quant_method": "gptq", "bits": bits, "group_size": 128, "sym": True, "desc_act": False}
    with torch.device("meta"):
        model = modeling.QWenLMHeadModel(config)
        if bits is not None:
            setattr(config, quantization.HELD, scheme)
            quantization.replace_matrices(model)
            written = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**written, "quantization_config": scheme}))
        tensors = dict(model.named_parameters())
    kinds = {torch.float32: ("BF16", 2), torch.float16: ("F16", 2), torch.int32: ("I32", 4)}
    files, index, total = {}, {}, 0
    for name, tensor in tensors.items():
        block = name.split(".")[2] if name.startswith("transformer.h.") else name.rpartition(".")[0]
        files.setdefault(f"model-{block}.safetensors", {})[name] = tensor
    for file, own in files.items():
        header, offset, groups = {"__metadata__": {"format": "pt"}}, 0, {}
        for name, tensor in own.items():
            kind, width = kinds[tensor.dtype]
            end = offset + width * tensor.numel()
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            if name.endswith("g_idx"):
                groups[offset] = (
                    (torch.arange(len(tensor), dtype=torch.int32) // scheme["group_size"]).numpy().tobytes()
                )
            offset, index[name] = end, file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
            for place, data in groups.items():
                out.seek(8 + len(text) + place)
                out.write(data)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(json.dumps({"made": size, "bits": bits, "GB": total / 1e9}))


class Report:
    """JSON lines, of the first process."""

    def __init__(self, path: str | None):
        self._out = open(path, "a") if path and RANK == 0 else None  # noqa: SIM115 (as long as the process)

    def __call__(self, **values) -> None:
        line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()})
        if RANK == 0:
            print(line, flush=True)
        if self._out is not None:
            self._out.write(line + "\n")
            self._out.flush()


def of_all(value) -> list:
    """What every process has."""
    if not PARALLEL:
        return [value]
    found = [None] * PROCESSES
    torch.distributed.all_gather_object(found, value)
    return found


def agreed(value):
    """What the first process has."""
    return of_all(value)[0]


def devices() -> list[int]:
    """The cards of this process."""
    if PARALLEL and CUDA:
        return [torch.cuda.current_device()]
    return list(range(torch.cuda.device_count()))


def peaks() -> list[float]:
    """Gigabytes at the highest, of every card."""
    own = [round(torch.cuda.max_memory_allocated(i) / 1e9, 2) for i in devices()]
    return [peak for process in of_all(own) for peak in process]


@torch.no_grad()
def randomize(model) -> None:
    """In place: what is whole in every process must be the same there, and those are norms."""
    torch.manual_seed(RANK)
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if own.is_floating_point():
            own.fill_(1) if "ln_" in name else own.normal_(std=0.02)
    for module in model.modules():
        if getattr(module, "HOLDS_CODES", False):
            randomize_codes(module)


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self):
        self.times = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        synchronize()


def generate(model, rows: int, length: int, tokens: int, **settings):
    """The output, milliseconds of the prompt with its first token, and of a token behind it."""
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))
    ids = ids.to(next(model.parameters()).device)
    clock = Clock()
    synchronize()
    began = time.perf_counter()
    kwargs = {"max_new_tokens": tokens, "min_new_tokens": tokens, "return_dict_in_generate": True, **settings}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **kwargs)
    first, last = clock.times[1], clock.times[-1]  # before them is the prompt's
    return output, 1e3 * (first - began), 1e3 * (last - first) / max(tokens - 1, 1)


def fits(model, rows: int, tokens: int, bits: int | None) -> bool:
    """Whether keys, values and a prompt's intermediate results fit into every card, by an estimate."""
    if not CUDA:
        return True
    config, share = model.config, 1 / PROCESSES
    blocks = [next(block.parameters()).device.index for block in model.transformer.h]
    width = config.intermediate_size // 2
    prompt = 2 * rows * tokens * (3 * max(width, 3 * config.hidden_size) * share + 6 * config.hidden_size)
    gc.collect()
    torch.cuda.empty_cache()
    for i in devices():
        needed = prompt + share * cached_bytes(config, rows, tokens + 256, bits or 16) * blocks.count(i) / len(blocks)
        if needed + 1e9 > torch.cuda.mem_get_info(i)[0]:
            return False
    return True


def check(model, graphs, report: Report, rows: int, length: int, tokens: int) -> None:
    """Greedy ids and logits of graphs beside those of the network, up to the first id that differs."""
    if not all(of_all(fits(model, rows, length, None))):
        report(what="check", rows=rows, left_out="does not fit into the memory that is free")
        return
    found, chosen = [], graphs.DEVICES
    for places in (chosen, ()):
        graphs.DEVICES = places
        output = generate(model, rows, length, tokens, output_logits=True)[0]
        found.append((output.sequences[:, length:].cpu(), output.logits))
        del output  # and the cache
    graphs.DEVICES = chosen
    (ours, theirs), logits = zip(*found)
    same = (ours == theirs).all(0).long().cumprod(0).sum().item()
    logits = [torch.stack(each[: same + 1]).float().cpu() for each in logits]
    error = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    found = of_all(ours.tolist())
    report(
        what="check", rows=rows, behind=length, ids_equal=same == tokens, first_difference=same, of=tokens,
        logits_error=f"{error:.1e}", equal_in_all_processes=all(ids == found[0] for ids in found),
    )  # fmt: skip


def replayed(model, graphs, rows: int) -> list[float]:
    """Milliseconds of the graph of every part, by itself, behind the caches that it was last used with."""
    found = graphs._FREE.get(model, (None, []))[1]
    steps = next((steps for kind, steps in reversed(found) if kind[0] == rows), None)
    if steps is None or steps.parts[0].graph is None:
        return []
    took = []
    for part in steps.parts:
        with torch.cuda.device(part.input.device):
            took.append(1e3 * statistics.median(seconds(part.graph.replay) for _ in range(5)))
    return took


def measure(model, graphs, report: Report, case: str, tokens: int, bandwidth: float) -> None:
    rows, length, bits = (int(n) if n else None for n in re.fullmatch(r"(\d+)x(\d+)(?:i([48]))?", case).groups())
    name = {"what": "generate", "rows": rows, "behind": length, "cache": f"int{bits}" if bits else "full"}
    if not all(of_all(fits(model, rows, length, bits))):
        report(**name, left_out="does not fit into the memory that is free")
        return
    for i in devices():
        torch.cuda.reset_peak_memory_stats(i)
    began = time.perf_counter()
    generate(model, rows, 16, 3, cache_bits=bits)
    cold = time.perf_counter() - began
    output, prompt_ms, token_ms = generate(model, rows, length, tokens, cache_bits=bits)
    read = weight_bytes(model) + cached_bytes(model.config, rows, length + tokens / 2, bits or 16)
    share = read / (token_ms / 1e3) / (bandwidth * PROCESSES)
    report(
        **name, ms_a_token=token_ms, tokens_a_second=1e3 * rows / token_ms, of_the_bandwidth=share, prompt_ms=prompt_ms,
        first_call_s=cold, peak_GB=peaks(), parts_ms=of_all([round(ms, 3) for ms in replayed(model, graphs, rows)]),
    )  # fmt: skip
    del output


def continuous(model, report: Report, requests: int, longest: int, tokens: int) -> None:
    """`generate_batch`, of prompts of a third to the whole of `longest` tokens; two requests before, apart."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()  # it takes a share of what is free
    for i in devices():
        torch.cuda.reset_peak_memory_stats(i)
    draw = torch.Generator().manual_seed(requests)
    prompts = [
        torch.randint(0, model.config.vocab_size, (n,), generator=draw).tolist()
        for n in lengths_of(requests, longest).tolist()
    ]
    settings = GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False, max_new_tokens=tokens)
    kwargs = {"generation_config": settings, "progress_bar": False}
    if not CUDA:  # where every process would take nine tenths
        kwargs["continuous_batching_config"] = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    took = []
    for some in (prompts[:2], prompts):
        synchronize()
        began = time.perf_counter()
        output = model.generate_batch(some, **kwargs)
        took.append(time.perf_counter() - began)
    found = of_all([request.generated_tokens for request in output.values()])
    new = sum(map(len, found[0]))
    report(
        what="generate_batch", requests=len(output), of=requests, longest=longest, new_tokens=new,
        tokens_a_second=new / took[1], first_call_s=took[0], peak_GB=peaks(),
        equal_in_all_processes=all(ids == found[0] for ids in found),
    )  # fmt: skip


def sums(graphs, hidden: int, rows: int, report: Report) -> None:
    """Microseconds of one of 160 sums over the processes in a graph: NCCL's, and what the graphs take."""
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16, device="cuda")
    group = torch.distributed.group.WORLD
    kinds = {"nccl": lambda x: torch.distributed.all_reduce(x), "peer memory": None}
    kinds["peer memory"] = graphs.peer_memory(group, x.numel(), x.dtype, x.device)
    for kind, total in kinds.items():
        if total is None:
            report(what="sum over processes", kind=kind, left_out="not here")
            continue
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            total(x)
            stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(160):
                total(x)
            graph.capture_end()
        took = statistics.median(seconds(graph.replay) for _ in range(20))
        report(what="sum over processes", kind=kind, bytes=x.numel() * 2, us=1e6 * took / 160)
        del graph  # before the group of processes


def run(folder: str, arguments) -> None:
    deadline, report = time.perf_counter() + arguments.seconds, Report(arguments.out)
    transformers.logging.disable_progress_bar()
    if CUDA and PARALLEL:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    bandwidth, began = read_bandwidth(), time.perf_counter()
    placement = {"tp_plan": "auto"} if PARALLEL else {"device_map": {"": 0} if arguments.whole else "auto"}
    options = {"fp32": True} if arguments.fp32 else {"bf16": True}
    options.update(placement, int8_lm_head=arguments.int8_lm_head)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
    synchronize()
    loaded = time.perf_counter() - began
    graphs = sys.modules[type(model).__module__.rpartition(".")[0] + ".qwen_cuda_graph"]
    if not CUDA and os.environ.get("TRITON_INTERPRET") == "1":
        graphs.DEVICES = ("cpu",)
        for entry in graphs._kernels().PRODUCT.values():  # few large programs are faster there
            entry["BN"] = 512
    randomize(model)
    model.generation_config = GREEDY
    with torch.no_grad():
        report(
            what="loaded", size=folder, placement=next(iter(placement)), processes=PROCESSES,
            card=torch.cuda.get_device_name() if CUDA else "CPU", cards=torch.cuda.device_count(),
            torch=torch.__version__, transformers=transformers.__version__, seconds=loaded,
            sum_TB_a_second=bandwidth / 1e12, weights_GB=weight_bytes(model) / 1e9, peak_GB=peaks(),
            parts=[[str(device), part.stop - part.start] for device, part in graphs.parts_of(model)],
            is_plain=graphs.is_plain(model),
        )  # fmt: skip
        quick = folder.endswith("tiny")
        cases = ["1x32", "3x16"] if quick else arguments.cases
        work = [lambda: check(model, graphs, report, 1, *((20, 4) if quick else (300, 32)))]
        work += [lambda: check(model, graphs, report, 3, *((20, 3) if quick else (300, 32)))]
        new = 4 if quick else arguments.tokens
        work += [lambda case=case: measure(model, graphs, report, case, new, bandwidth) for case in cases]
        if arguments.requests:
            work.append(lambda: continuous(model, report, arguments.requests, *((24, 4) if quick else (768, 128))))
        if CUDA and PARALLEL:
            work += [lambda rows=rows: sums(graphs, model.config.hidden_size, rows, report) for rows in (1, 16)]
        for i, task in enumerate(work):
            left = agreed(deadline - time.perf_counter())
            if left < 0:
                report(what="left out for lack of time", number=len(work) - i)
                break
            task()
    report(what="end", seconds=arguments.seconds - math.floor(deadline - time.perf_counter()))
    if PARALLEL:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of Qwen on several GPUs.")
    parser.add_argument("command", choices=["make", "run"])
    parser.add_argument("folder", help="of the checkpoint; its name ends with the size")
    parser.add_argument("--size", choices=SIZES, default="72B")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="of `make`: GPTQ's codes")
    parser.add_argument("--whole", action="store_true", help='on the first card, of which "auto" leaves a tenth free')
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--int8-lm-head", action="store_true", help="the output layer in int8")
    parser.add_argument("--cases", nargs="+", default=CASES, help="rows x tokens before, as 1x2048")
    parser.add_argument("--requests", type=int, help="of `generate_batch`: prompts of 256 to 768, 128 new tokens each")
    parser.add_argument("--tokens", type=int, default=48, help="new ones, that are timed")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--out", help="a file that the results are added to")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.command == "make":
        make(Path(arguments.folder), arguments.size, arguments.bits)
    else:
        run(arguments.folder.rstrip("/"), arguments)


if __name__ == "__main__":
    main()
