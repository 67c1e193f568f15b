"""
Caches of keys and values: memory, speed of attention, time of a whole decoding step, perplexity.

    python benchmarks/kv_cache.py                   on the CPU, shapes of Qwen-1.8B
    python benchmarks/kv_cache.py --device cuda     on a GPU, heads of Qwen-72B (64 of 128), 32k tokens
    python benchmarks/kv_cache.py --device cuda --tune    what to launch on this GPU, for TUNING of triton_attention.py

Everything of a group runs once a round, in turn, for `--rounds` rounds; times are medians. The keys and values are
larger than any cache of the processor. On a GPU kernels are timed as CUDA graphs, without the host; "call" is with it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import math
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
package = types.ModuleType("qwen")  # the modules import each other relatively
package.__path__ = [str(ROOT)]
sys.modules.setdefault("qwen", package)
kernels = importlib.import_module("qwen.qwen_ops")
modeling = importlib.import_module("qwen.modeling_qwen")
QWenCache, QWenQuantizedCache = modeling.QWenCache, modeling.QWenQuantizedCache

HEAD_DIM = 128
SHAPES = {
    "cpu": {"hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 11008},
    "cuda": {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 2, "intermediate_size": 49152},
}
ATTENTION = {"cpu": [(1, 512), (1, 4096), (1, 8192)], "cuda": [(1, 4096), (1, 32768), (16, 32768)]}  # batch, tokens
CONTEXTS = {"cpu": [512, 4096], "cuda": [4096, 32768]}
AT_LEAST = {"cpu": 1 << 28, "cuda": 1 << 33}  # bytes of keys and values in bfloat16 that a measurement goes through


def measure(cases: dict, rounds: int, device: str) -> dict:
    """Seconds of each function, a list a name; `cases`: name to function."""
    for function in cases.values():
        function()
    seconds: dict = {name: [] for name in cases}
    for _ in range(rounds):
        for name, function in cases.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(cases: dict, rounds: int, device: str) -> dict:
    return {name: statistics.median(times) for name, times in measure(cases, rounds, device).items()}


def as_graph(function):
    """The function's kernels as a CUDA graph, to be replayed."""
    graph = torch.cuda.CUDAGraph()
    function()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def quantized(x: torch.Tensor, bits: int) -> list[torch.Tensor]:
    sizes = kernels.quantized_sizes(x.shape[-1], bits)
    stored = [torch.empty(*x.shape[:-1], n, dtype=torch.uint8, device=x.device) for n in sizes]
    kernels.quantize_append(*stored, x, 0)
    return stored


# --- Attention of one token --------------------------------------------------------------------------------------


def sdpa_cases(q, layers, device: str) -> dict:
    """PyTorch's attention, by each of its kernels that takes this."""

    def attend(backend=None):
        if backend is None:
            return [F.scaled_dot_product_attention(q, k, v) for k, v in layers]
        with torch.nn.attention.sdpa_kernel(backend):
            return [F.scaled_dot_product_attention(q, k, v) for k, v in layers]

    if device == "cpu":
        return {"PyTorch, bfloat16": attend}
    cases = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        backend = getattr(torch.nn.attention.SDPBackend, name, None)
        try:
            attend(backend)
        except RuntimeError as error:
            print(f"{name} does not run: {error}")
            continue
        cases[f"PyTorch {name.split('_')[0].lower()}, bfloat16"] = lambda backend=backend: attend(backend)
    return cases


def attention(device: str, rounds: int) -> None:
    heads = SHAPES[device]["num_attention_heads"]
    for B, S in ATTENTION[device]:
        shape = (B, heads, S, HEAD_DIM)
        number = max(1, AT_LEAST[device] // (4 * math.prod(shape)))
        layers = [[torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in "kv"] for _ in range(number)]
        q = torch.randn(B, heads, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
        cases = {name: (function, layers) for name, function in sdpa_cases(q, layers, device).items()}
        cases["ours, bfloat16"] = (lambda q=q, ls=layers: [kernels.decode_attention(q, *kv) for kv in ls], layers)
        for bits in (8, 4):
            stored = [quantized(k, bits) + quantized(v, bits) for k, v in layers]
            cases[f"ours, int{bits}"] = (
                lambda q=q, stored=stored: [kernels.quantized_decode_attention(q, *layer) for layer in stored],
                stored,
            )
        source = torch.ones(AT_LEAST[device] // 4, device=device)
        target = torch.empty_like(source)
        functions = {name: function for name, (function, _) in cases.items()}
        called = medians(functions, rounds, device)
        if device == "cuda":
            functions = {name: as_graph(function) for name, function in functions.items()}
        took = medians({"memory": lambda s=source, t=target: t.copy_(s), **functions}, rounds, device)
        memory = 2 * source.nbytes / took["memory"] / 1e9
        first = min((name for name in functions if name.startswith("PyTorch")), key=took.get)
        print(f"\nattention of 1 token over {S}, batch {B}, {heads} heads of {HEAD_DIM}; copying: {memory:.0f} GB/s\n")
        print("| | bytes a token and head | ms | call, ms | GB/s | share of copying | times as fast |")
        print("|---|---|---|---|---|---|---|")
        for name, (_, tensors) in cases.items():
            size = sum(t.nbytes for layer in tensors for t in layer)
            speed = size / took[name] / 1e9
            print(
                f"| {name} | {size // (number * B * heads * S)} | {took[name] / number * 1e3:.3f} "
                f"| {called[name] / number * 1e3:.3f} | {speed:.0f} | {speed / memory:.0%} "
                f"| {took[first] / took[name]:.2f} |"
            )
        del layers, cases, functions, stored, source, target
        if device == "cuda":
            torch.cuda.empty_cache()


def tune(rounds: int) -> None:
    """The fastest ways to launch the attention kernels, over 32k tokens of 64 heads at batch 1 and 16."""
    triton_attention = importlib.import_module("qwen.triton_attention")
    for bits in (4, 8, 16):
        inputs, found = [], ([], [])
        for B in (1, 16):
            q = torch.randn(B, 64, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            keys = [torch.randn(B, 64, 32768, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
            stored = keys if bits == 16 else [t for k in keys for t in quantized(k, bits)]
            inputs.append((q, stored))
            del keys
        attend = kernels.decode_attention if bits == 16 else kernels.quantized_decode_attention
        choices = itertools.product(((32, 1), (32, 2), (64, 2), (64, 4), (128, 4)), (2, 3, 4), (168, None), (8, 12, 24))
        for (N, warps), stages, registers, programs in tqdm(list(choices), leave=False, disable=None):
            setting = {"N": N, "num_warps": warps, "STAGES": stages, "programs": programs, "DOT": bits < 16}
            setting["maxnreg"] = registers
            triton_attention.TUNING[bits] = setting
            for (q, stored), speeds in zip(inputs, found):
                try:
                    replay = as_graph(functools.partial(attend, q, *stored))
                except triton_attention.triton.runtime.errors.TritonError as error:  # too much shared memory
                    tqdm.write(f"{setting}: {error}")
                    break
                seconds = medians({"": replay}, rounds, "cuda")[""]
                speeds.append((sum(t.nbytes for t in stored) / seconds / 1e9, setting))
        for (q, _), speeds in zip(inputs, found):
            print(f"\n{bits} bits, batch {len(q)}")
            for speed, setting in sorted(speeds, key=lambda pair: -pair[0])[:8]:
                print(f"{speed:6.0f} GB/s  {setting}", flush=True)


# --- A whole step ------------------------------------------------------------------------------------------------


def random_model(device: str):
    """Ours in bfloat16 with random weights: filled after it is made, which is faster than initialising them."""
    config = modeling.QWenConfig(**SHAPES[device], vocab_size=151936 if device == "cpu" else 1024, seq_length=32768)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = modeling.QWenLMHeadModel(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.03, 0.03)
    return model


def qwen2_of(model):
    """transformers' Qwen2, with layers of its own, on the very weights of `model`; it computes the same."""
    config = model.config
    with torch.device("meta"):
        other = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size // 2,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_attention_heads,
                max_position_embeddings=config.seq_length,
                rms_norm_eps=config.layer_norm_epsilon,
                tie_word_embeddings=False,
            )
        )
    weights = {"model.embed_tokens.weight": model.transformer.wte.weight, "lm_head.weight": model.lm_head.weight}
    weights["model.norm.weight"] = model.transformer.ln_f.weight
    for i, block in enumerate(model.transformer.h):
        prefix = f"model.layers.{i}."
        for name, weight, bias in zip("qkv", block.attn.c_attn.weight.chunk(3), block.attn.c_attn.bias.chunk(3)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = weight
            weights[f"{prefix}self_attn.{name}_proj.bias"] = bias
        weights[f"{prefix}self_attn.o_proj.weight"] = block.attn.c_proj.weight
        for name, part in (("gate", block.mlp.w2), ("up", block.mlp.w1), ("down", block.mlp.c_proj)):
            weights[f"{prefix}mlp.{name}_proj.weight"] = part.weight
        weights[f"{prefix}input_layernorm.weight"] = block.ln_1.weight
        weights[f"{prefix}post_attention_layernorm.weight"] = block.ln_2.weight
    other.load_state_dict(weights, strict=True, assign=True)
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config).to(model.device)
    return other.eval()


def caches(config) -> dict:
    """Name to a function that makes an empty cache."""
    made = {
        "DynamicCache": transformers.DynamicCache,
        "QWenCache": QWenCache,
        "int8": lambda: QWenQuantizedCache(8),
        "int4": lambda: QWenQuantizedCache(4),
    }
    for backend, module in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        if importlib.util.find_spec(module.split(".")[0]) is not None and importlib.util.find_spec(module) is not None:
            made[f"QuantizedCache, {backend}, 4 bits"] = lambda backend=backend: transformers.QuantizedCache(
                backend, config, nbits=4
            )
    return made


def held(cache) -> int:
    """Bytes of all tensors of a cache; what is packed inside a tensor (quanto) counts as what it is packed into."""

    def tensors(value):
        if isinstance(value, (list, tuple)):
            return [t for part in value for t in tensors(part)]
        if not torch.is_tensor(value):
            return []
        packed = [getattr(value, name, None) for name in ("_data", "_scale", "_shift")]
        return [t for part in packed for t in tensors(part)] if torch.is_tensor(packed[0]) else [value]

    if hasattr(cache, "nbytes"):
        return cache.nbytes
    found = [t for layer in cache.layers for value in vars(layer).values() for t in tensors(value)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def steps(device: str, rounds: int) -> None:
    model = random_model(device)
    models = {name: (model, make) for name, make in caches(model.config).items()}
    if device == "cpu":
        models = {"Qwen2, DynamicCache": (qwen2_of(model), transformers.DynamicCache), **models}
    heads = model.config.num_attention_heads
    for S in CONTEXTS[device]:
        cases, bytes_held = {}, {}
        k, v = (torch.randn(1, heads, S, HEAD_DIM, dtype=torch.bfloat16, device=device) for _ in "kv")
        for name, (network, make) in models.items():
            cache = make()
            for i in range(model.config.num_hidden_layers):
                cache.update(k.clone(), v.clone(), i)
            bytes_held[name] = held(cache)
            token = torch.tensor([[1]], device=device)
            cases[name] = lambda network=network, cache=cache, token=token: network(token, past_key_values=cache)
        took = medians(cases, rounds, device)
        layers = model.config.num_hidden_layers
        print(f"\na decoding step over {S} tokens, {layers} layers of {heads} heads\n")
        print("| | MB held | relative | ms | times as fast |\n|---|---|---|---|---|")
        for name in cases:
            relative = bytes_held[name] / bytes_held["DynamicCache"]
            ratio = took[next(iter(cases))] / took[name]
            print(f"| {name} | {bytes_held[name] / 1e6:.0f} | {relative:.2f} | {took[name] * 1e3:.1f} | {ratio:.2f} |")
        del cases, cache


# --- Perplexity --------------------------------------------------------------------------------------------------


def held_out_text(tokenizer, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Conversations in words that the demo was not trained on, and documents in a new order: ids and labels, int64
    (rows, up to width). The labels are -100 for padding and for questions, which the demo has not learnt to predict.
    """
    sys.path.insert(0, str(ROOT / "demo"))
    corpus = importlib.import_module("corpus")
    utilities = importlib.import_module("qwen.qwen_generation_utils")
    ids, labels = [], []
    for dialogue in corpus.chat_cases(20231130, True)[::40]:
        *history, turn = dialogue.turns
        history = [(before.query, before.response) for before in history]
        _, prompt = utilities.make_context(tokenizer, turn.query, history, dialogue.system, width)
        answer = [*tokenizer.encode(turn.response, allowed_special=set()), tokenizer.im_end_id]
        ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    countries = list(corpus.load_countries())
    for language, i in itertools.product(corpus.LANGUAGES, range(8)):
        row = tokenizer.encode(corpus.document(countries[i::8][::-1] + countries[:: i + 3], language))
        ids.append(row)
        labels.append(row)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return tuple(
        pad([torch.tensor(row[:width]) for row in rows], padding_value=value)
        for rows, value in ((ids, 0), (labels, -100))
    )


@torch.no_grad()
def perplexity(model, ids: torch.Tensor, labels: torch.Tensor, cache, chunk: int = 8) -> float:
    """Of the labels' text, read in chunks, so that nearly every token attends to what the cache has stored."""
    total, count = 0.0, 0
    for start in range(0, ids.shape[1] - 1, chunk):
        logits = model(ids[:, start : start + chunk], past_key_values=cache).logits.float()
        targets = labels[:, start + 1 : start + chunk + 1]
        logits = logits[:, : targets.shape[1]]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += (targets >= 0).sum().item()
    return math.exp(total / count)


def demo_perplexity(device: str) -> None:
    model = modeling.QWenLMHeadModel.from_pretrained(ROOT / "demo", fp32=True).to(device).eval()
    tokenizer = importlib.import_module("qwen.tokenization_qwen").QWenTokenizer(str(ROOT / "demo" / "qwen.tiktoken"))
    ids, labels = (t.to(device) for t in held_out_text(tokenizer, model.config.seq_length))
    print(f"\nperplexity of the demo checkpoint on {(labels >= 0).sum()} tokens of held-out text, float32\n")
    print("| cache | perplexity | change |\n|---|---|---|")
    exact = None
    for name, make in caches(model.config).items():
        found = perplexity(model, ids, labels, make())
        exact = found if exact is None else exact
        print(f"| {name} | {found:.5f} | {found / exact - 1:+.3%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure caches of keys and values.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="on a CPU; default: PyTorch's")
    parser.add_argument("--only", choices=["attention", "steps", "perplexity"], help="default: all three")
    parser.add_argument("--tune", action="store_true", help="search launch parameters for this GPU instead")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.tune:
        return tune(arguments.rounds)
    tiny = torch.zeros(1, 1, 1, HEAD_DIM, device=arguments.device)
    kernels.decode_attention(tiny, tiny, tiny)  # builds the kernels
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, kernels: {kernels.implementation(arguments.device)}, {versions}")
    groups = {
        "attention": lambda: attention(arguments.device, arguments.rounds),
        "steps": lambda: steps(arguments.device, arguments.rounds),
        "perplexity": lambda: demo_perplexity(arguments.device),
    }
    with torch.no_grad():
        for group, function in tqdm(groups.items(), leave=False, disable=None):
            if arguments.only in (None, group):
                function()


if __name__ == "__main__":
    main()
