"""
Speed of Qwen on an NVIDIA GPU as a user gets it, beside transformers' Qwen2, and beside what the memory allows.

    python benchmarks/gpu.py [--size 7B] [--gpt-fast FOLDER] [--sections generate batch prefill] [--quick]

--sections int4: the same shapes with random codes of GPTQ, 4 bits, 128 inputs a group, beside bfloat16.
--sections continuous: 64 requests by `generate_batch`. stream: `chat_stream` beside `generate`, with the vocabulary of
the checkpoint in demo/. drafts: prompt look-up and an assistant, with weights that make
the model say the same 64 tokens over and over (so name it last).
--gpt-fast: a checkout of gpt-fast (https://github.com/pytorch-labs/gpt-fast), whose compiled loop is run with the same
shapes. --seconds: what would begin later is left out, and said so. --quick: a small model on any device, to try this.

Random weights of the true shapes; both models share them in memory (Qwen2's projections are views of c_attn), so they
compute the same. A token is what `generate` takes longer for n tokens than for one, over n - 1. Its share of the
bandwidth counts what the step must read, weights and keys and values, against a sum over 4 GB in the same run. "Cold"
is the first call of its kind, in seconds, over the same call warm. Qwen2's lengths are planned before (cuDNN takes
45 ms for every new one). A prefill is compared with the measured rate of a bf16 matrix product.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import itertools
import statistics
import sys
import time
import traceback

import torch
import transformers
from kv_cache import ROOT, kernels, modeling, qwen2_of
from transformers import AutoTokenizer, GenerationConfig

QWenConfig = modeling.QWenConfig
quantization = importlib.import_module(modeling.__name__.rpartition(".")[0] + ".qwen_quantization")
utils = importlib.import_module(modeling.__name__.rpartition(".")[0] + ".qwen_generation_utils")
quantized_sizes = kernels.quantized_sizes

# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size
SIZES = {
    "1.8B": (2048, 24, 16, 11008, 151936),
    "7B": (4096, 32, 32, 22016, 151936),
    "14B": (5120, 40, 40, 27392, 152064),
    "72B": (8192, 80, 64, 49152, 152064),
    "tiny": (256, 2, 4, 512, 4096),
}
GREEDY = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
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
        function()
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 1e9


def read_bandwidth() -> float:
    """Bytes a second of a sum over 4 GB."""
    x = torch.empty((2**32 if CUDA else 2**26) // 8, dtype=torch.int64, device=DEVICE).random_()
    return 8 * x.numel() / medians({"sum": x.sum}, 20)["sum"]


def arithmetic_rate() -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    n = 8192 if CUDA else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / medians({"product": lambda: a @ b}, 20)["product"]


def config_of(size: str):
    hidden, layers, heads, intermediate, vocab = SIZES[size]
    return QWenConfig(
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


def make_models(size: str):
    """Ours and Qwen2 with the same random weights, in bfloat16 on the device."""
    ours = make_model(config_of(size))
    return ours, qwen2_of(ours)


def randomize_codes(module, generator=None) -> None:
    """Of a quantised matrix, in place, so that weights deviate by 0.02."""
    if not hasattr(module, "format"):  # int8
        module.codes.random_(-127, 128, generator=generator)
        module.weight_scale.fill_(0.02 / 73.3)
        return
    bits = module.format.bits
    module.qweight.random_(-(2**31), 2**31 - 1, generator=generator)
    module.qzeros.fill_(sum((2 ** (bits - 1) - 1) << at for at in range(0, 32, bits)))
    module.scales.uniform_(0.8, 1.2, generator=generator).mul_(0.07 / 2**bits)


@torch.no_grad()
def make_model(config):
    """Ours in bfloat16 on the device; random weights, or codes where the configuration asks for GPTQ."""
    with torch.device("meta"):
        model = modeling.QWenLMHeadModel(config).to(torch.bfloat16)
        quantization.replace_matrices(model)
    model.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            parameter.fill_(1)
        elif parameter.dtype == torch.bfloat16:
            parameter.normal_(std=0.02, generator=generator)
    for module in model.modules():
        if getattr(module, "HOLDS_CODES", False):
            randomize_codes(module, generator)
        if isinstance(module, quantization.QuantizedLinear):
            module.derive_groups()
            module.set_order()
            module.bias = module.bias if module.needs_bias else None
    quantization.give_back_quantization(model)
    model.generation_config = GREEDY
    return model.eval()


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
def prefills(ours, theirs, lengths, rate: float, repetitions: int) -> None:
    attentions = ["sdpa"] + ["flash_attention_2"] * transformers.utils.is_flash_attn_2_available()
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


def cached_bytes(config, rows: int, tokens: float, bits: int = 16) -> float:
    """Of keys and values; scales of a quantised cache included."""
    hd = config.hidden_size // config.num_attention_heads
    width = 2 * hd if bits == 16 else sum(quantized_sizes(hd, bits))
    return 2 * rows * tokens * config.num_hidden_layers * config.num_attention_heads * width


def prompt(config, rows: int, length: int) -> dict:
    ids = torch.randint(0, config.vocab_size, (rows, length), device=DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def token_seconds(model, rows: int, length: int, tokens: int, **settings) -> tuple[float, float, float]:
    """Of a token, of the prompt and the first token, and how much longer the first call took than the next."""

    def generate(n):
        inputs = prompt(model.config, rows, length)
        return seconds(lambda: model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, **settings))

    cold = generate(tokens)
    # The least of several: a collection of Python's garbage alone takes 40 ms, as long as half of a prompt.
    first, many = (min(generate(n) for _ in range(repetitions)) for n, repetitions in ((1, 6), (tokens, 3)))
    return (many - first) / (tokens - 1), first, cold - many


def who_generates(ours, theirs, compiled: bool, flash: bool) -> list:
    """Name, model, attention, settings of `generate`, bits of the cache."""
    found = [("ours", ours, "sdpa", {}, 16), ("ours, int8 cache", ours, "sdpa", {"cache_bits": 8}, 8)]
    found += [("ours, int4 cache", ours, "sdpa", {"cache_bits": 4}, 4), ("Qwen2", theirs, "sdpa", {}, 16)]
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.8}
    found.append(("ours, sampling", ours, "sdpa", sampling, 16))
    if flash:
        found += [
            (f"{name}, flash attention", m, "flash_attention_2", {}, 16)
            for name, m in (("ours", ours), ("Qwen2", theirs))
        ]
    if compiled:
        static = {"cache_implementation": "static"}
        found += [
            ("ours, static, compiled", ours, "sdpa", static, 16),
            ("Qwen2, static, compiled", theirs, "sdpa", static, 16),
        ]
    return found


def generates(ours, theirs, cases, bandwidth: float, tokens: int, deadline: float) -> None:
    """cases: rows, length, and whether compiled models take part."""
    table = Table("generate", "rows", "behind", "ms a token", "of the bandwidth", "prompt ms", "cold s", "peak GB")
    flash = transformers.utils.is_flash_attn_2_available()
    for rows, length, compiled in cases:
        for name, model, attention, settings, bits in who_generates(ours, theirs, compiled, flash):
            if time.perf_counter() > deadline:
                print(f"left out for lack of time: {name}, {rows} rows behind {length}", flush=True)
                continue
            model.set_attn_implementation(attention)
            try:
                peak, found = 0.0, []
                peak = peak_memory(lambda: found.append(token_seconds(model, rows, length, tokens, **settings)))  # noqa: B023
                step, first, cold = found[0]
            except torch.OutOfMemoryError:
                table.row(name, rows, length, "out of memory", *[""] * 4)
                continue
            read = weight_bytes(ours) + cached_bytes(ours.config, rows, length + tokens / 2, bits)
            table.row(name, rows, length, step * 1e3, f"{read / step / bandwidth:.0%}", first * 1e3, cold, peak)


def quantised(ours, size: str, length: int, rows, bandwidth: float, tokens: int) -> None:
    """With GPTQ matrices of 4 bits beside ours: the prompt, a token behind it, memory without the other model."""
    table = Table("matrices", "weights GB", "rows", "prompt ms", "ms a token", "of the bandwidth", "peak GB")
    models = {"bfloat16": ours}
    for name, head in (("GPTQ, 4 bits", 16), ("with int8_lm_head", 8), ("the output layer, too", 4)):
        config = config_of(size)
        config.int8_lm_head = head == 8
        method = {"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": head == 4}
        setattr(config, quantization.HELD, method)
        models[name] = make_model(config)
    held = {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()}
    ids = prompt(ours.config, 1, length)["input_ids"]
    runs = {name: lambda m=model: m(ids, use_cache=True, logits_to_keep=1) for name, model in models.items()}
    with torch.inference_mode():
        prompts = medians(runs, 5)
        peaks = {name: peak_memory(run) for name, run in runs.items()}
    for name, model in models.items():
        other = sum(held.values()) - held[name]
        for n in rows:
            found = []
            peak = peak_memory(lambda: found.append(token_seconds(model, n, length, tokens)))  # noqa: B023
            peak = max(peak, peaks[name]) - other / 1e9
            read = weight_bytes(model) + cached_bytes(ours.config, n, length + tokens / 2)
            share = f"{read / found[0][0] / bandwidth:.0%}"
            table.row(name, held[name] / 1e9, n, prompts[name] * 1e3, found[0][0] * 1e3, share, peak)


def lengths_of(rows: int, longest: int) -> torch.Tensor:
    """Of prompts: a third to the whole of the longest, which is the first."""
    lengths = torch.randint(longest // 3, longest + 1, (rows,), generator=torch.Generator().manual_seed(0))
    lengths[0] = longest
    return lengths


def batches(ours, theirs, rows: int, longest: int, tokens: int) -> None:
    """Left-padded prompts of `lengths_of`."""
    table = Table("padded batch", "rows", "attention", "tokens/s", "peak GB")
    lengths = lengths_of(rows, longest)
    inputs = prompt(ours.config, rows, longest)
    real = torch.arange(longest)[None] >= longest - lengths[:, None]
    inputs["attention_mask"] = real.long().to(DEVICE)
    flash = ["flash_attention_2"] if transformers.utils.is_flash_attn_2_available() else []
    for (name, model), attention in itertools.product((("ours", ours), ("Qwen2", theirs)), ["sdpa", *flash]):
        model.set_attn_implementation(attention)

        def generate(n=tokens, model=model):
            model.generate(**inputs, max_new_tokens=n, min_new_tokens=n)

        try:
            generate(2)
            peak = peak_memory(generate)
            table.row(name, rows, attention, rows * tokens / seconds(generate), peak)
        except torch.OutOfMemoryError:
            table.row(name, rows, attention, "out of memory", "")


def continuous(ours, theirs, rows: int, longest: int, tokens: int) -> None:
    """The requests of `batches` by `generate_batch`."""
    table = Table("generate_batch", "requests", "attention", "tokens/s", "first call s")
    requests = [torch.randint(0, ours.config.vocab_size, (n,)).tolist() for n in lengths_of(rows, longest).tolist()]
    settings = GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False, max_new_tokens=tokens)
    flash = ["flash_attention_2"] if transformers.utils.is_flash_attn_2_available() else []
    for (name, model), attention in itertools.product((("ours", ours), ("Qwen2", theirs)), ["sdpa", *flash]):
        model.set_attn_implementation(attention)

        def generate(requests, model=model):
            return model.generate_batch(requests, generation_config=settings, progress_bar=False)

        first, found = seconds(lambda: generate(requests[:2])), []
        took = seconds(lambda: found.append(generate(requests)))  # noqa: B023
        new = sum(len(output.generated_tokens) for output in found[0].values())
        table.row(name, rows, attention, new / took, first)


def streams(model, length: int, tokens: int, repetitions: int) -> None:
    """A token of `chat_stream`, text included, and of `generate` with the same prompt and settings, by turns."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo", trust_remote_code=True)
    model.lm_head.weight[len(tokenizer) :] = 0  # other ids have no text
    query = "word " * (length // len(tokenizer.encode("word ")))
    ids = torch.tensor([utils.make_context(tokenizer, query, system="")[1]], device=DEVICE)
    known = GenerationConfig(chat_format="chatml", eos_token_id=tokenizer.im_end_id, pad_token_id=0, do_sample=False)
    known.max_window_size = 2 * length

    def settings(n: int):
        config = copy.deepcopy(known)
        config.max_new_tokens = config.min_new_tokens = n
        return config

    def generate(n: int):
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings(n))

    def stream(n: int):
        for _ in model.chat_stream(tokenizer, query, None, system="", generation_config=settings(n)):
            pass

    ways = {"generate": generate, "chat_stream": stream}
    calls = {(name, n): functools.partial(way, n) for name, way in ways.items() for n in (1, tokens)}
    taken = medians(calls, repetitions)
    table = Table("stream", "behind", "ms a token", "times generate")
    a_token = {name: (taken[name, tokens] - taken[name, 1]) / (tokens - 1) for name in ways}
    for name, took in a_token.items():
        table.row(name, ids.shape[1], took * 1e3, took / a_token["generate"])


def repeating(model, period: int):
    """In place: a model that computes all it did, and says `period` tokens over and over."""
    for block in model.transformer.h:
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()
    ids = torch.arange(period, device=model.lm_head.weight.device)
    model.lm_head.weight[(ids + 1) % period] = model.transformer.wte.weight[ids]
    return model


def drafts(ours, length: int, tokens: int) -> None:
    """On text that repeats itself, all drafts of which are right: what checking them costs, and brings at most."""
    small = config_of("1.8B" if CUDA else "tiny")
    ours, assistant = repeating(ours, 64), repeating(make_model(small), 64)
    ours.set_attn_implementation("sdpa")
    inputs = {"input_ids": (torch.arange(length, device=DEVICE) % 64)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ways = {"plain": {}}
    ways |= {f"prompt look-up, {n} drafts": {"prompt_lookup_num_tokens": n} for n in (4, 10, 15)}
    ways |= {f"{n} drafts of a {assistant.num_parameters() / 1e9:.1f}B": n for n in (4, 15)}
    table = Table("drafts", "behind", "accepted tokens/s", "times plain", "ids equal")
    plain, speed = None, {}
    for name, settings in ways.items():
        if isinstance(settings, int):
            assistant.generation_config.num_assistant_tokens = settings
            settings = {"assistant_model": assistant}

        def generate(n=tokens, settings=settings):
            found = ours.generate(**inputs, max_new_tokens=n, min_new_tokens=n, **settings)
            return found[0, length:].tolist()

        found = generate()
        plain = plain or found
        first, many = (min(seconds(lambda: generate(n)) for _ in range(2)) for n in (1, tokens))  # noqa: B023
        speed[name] = (tokens - 1) / (many - first)
        table.row(name, length, speed[name], speed[name] / speed["plain"], str(found == plain))


def launches(models: dict, length: int, tokens: int) -> None:
    """What a token costs host and GPU: of a generation less that of one token."""
    table = Table("a token", "behind", "calls of CUDA by the host", "kernels", "GPU busy ms")
    profiler = torch.profiler
    for name, model in models.items():
        model.set_attn_implementation("sdpa")
        inputs, counts = prompt(model.config, 1, length), []
        for n in (1, tokens):
            model.generate(**inputs, max_new_tokens=n, min_new_tokens=n)
            with profiler.profile(activities=profiler.supported_activities()) as profile:
                model.generate(**inputs, max_new_tokens=n, min_new_tokens=n)
                synchronize()
            events = profile.key_averages()
            on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
            calls = sum(
                e.count for e in events if e.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy"))
            )
            busy = sum(e.self_device_time_total for e in on_gpu)
            counts.append((calls, sum(e.count for e in on_gpu), busy / 1e3))
        table.row(name, length, *((b - a) / (tokens - 1) for a, b in zip(*counts)))


def gpt_fast(folder: str, size: str, length: int, bandwidth: float, read: float) -> None:
    """The compiled loop of gpt-fast with these shapes, one row."""
    sys.path.insert(0, folder)
    arguments, sys.argv = sys.argv, sys.argv[:1]  # it parses them when it is imported
    network, decode = importlib.import_module("model"), importlib.import_module("generate").decode_one_token
    sys.argv = arguments
    hidden, layers, heads, intermediate, vocab = SIZES[size]
    shape = {"n_layer": layers, "n_head": heads, "dim": hidden, "intermediate_size": intermediate // 2}
    settings = network.ModelArgs(block_size=32768, vocab_size=vocab, **shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = network.Transformer(settings).eval()
        model.setup_caches(1, length + 256)
    torch.set_default_dtype(torch.float32)
    torch._inductor.config.coordinate_descent_tuning = True
    step = torch.compile(decode, mode="reduce-overhead", fullgraph=True)
    token, position = (torch.full((1, 1), n, dtype=torch.int, device=DEVICE) for n in (0, length))
    position = position.view(1)

    def steps(n):
        nonlocal token, position
        for _ in range(n):
            found, _ = step(model, token, position)
            token, position = found.clone().view(1, 1), position + 1

    began = time.perf_counter()
    with torch.no_grad():
        steps(6)
        cold = time.perf_counter() - began
        took = seconds(lambda: steps(100)) / 100
    table = Table("gpt-fast", "behind", "ms a token", "of the bandwidth", "compiling s")
    table.row(f"Qwen-{size}", length, took * 1e3, f"{read / took / bandwidth:.0%}", cold)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of Qwen on an NVIDIA GPU.")
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--sections", nargs="+", default=["generate", "launches", "batch", "prefill"])
    parser.add_argument(
        "--cases", nargs="+", help="rows x tokens before, as 1x2048, with c behind it: compiled models too"
    )
    parser.add_argument("--gpt-fast", help="the folder of a checkout")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, on any device")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    size = "tiny" if arguments.quick else arguments.size
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, Qwen-{size} in bfloat16")
    bandwidth, rate = read_bandwidth(), arithmetic_rate()
    print(f"a sum reads {bandwidth / 1e12:.2f} TB/s; bf16 matrix product: {rate / 1e12:.0f} TFLOP/s")
    ours, theirs = make_models(size)
    theirs.generation_config = GREEDY
    with torch.inference_mode():
        ids = prompt(ours.config, 2, 50)["input_ids"]
        expected = theirs(ids).logits.float()
        difference = (ours(ids).logits.float() - expected).norm() / expected.norm()
    print(f"relative difference of the logits: {difference:.1e}; weights: {weight_bytes(ours) / 1e9:.1f} GB a step")
    cases = arguments.cases or ["1x128", "1x2048c", "1x8192", "1x32000", "8x2048", "16x2048", "64x512"]
    long, tokens = (256, 64) if not arguments.quick else (24, 4)
    if arguments.quick:
        cases = ["1x32", "3x16"]
    cases = [(*map(int, case.rstrip("c").split("x")), case.endswith("c")) for case in cases]
    context = cases[0][1] if arguments.quick else 2048
    sections = {
        "generate": lambda: generates(ours, theirs, cases, bandwidth, tokens, deadline),
        "launches": lambda: launches({"ours": ours, "Qwen2": theirs}, context, 9),
        "batch": lambda: batches(ours, theirs, 4 if arguments.quick else 64, 3 * long, tokens * 2),
        "continuous": lambda: continuous(ours, theirs, 4 if arguments.quick else 64, 3 * long, tokens * 2),
        "stream": lambda: streams(ours, context, 2 * tokens, 5),
        "drafts": lambda: drafts(ours, context, 4 * tokens),
        "int4": lambda: quantised(ours, size, context, [1, 4] if arguments.quick else [1, 4, 16], bandwidth, tokens),
        "prefill": lambda: prefills(ours, theirs, [64] if arguments.quick else [2048, 8192, 32000], rate, 5),
    }
    failed = False
    with torch.no_grad():
        for section in arguments.sections:
            try:
                sections[section]()
            except Exception:  # noqa: BLE001 (the other sections are wanted all the same)
                traceback.print_exc()
                failed = True
        if arguments.gpt_fast:
            read = weight_bytes(ours) + cached_bytes(ours.config, 1, context + 256)  # it reads all of its cache
            del ours, theirs
            sections.clear()
            gc.collect()
            gpt_fast(arguments.gpt_fast, size, context, bandwidth, read)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
