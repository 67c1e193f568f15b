"""
Speed of Qwen-1.8B's shape on a CPU: ours, transformers' Qwen2 and llama.cpp on the very same weights.

    pip install gguf llama-cpp-python       for llama.cpp; it is left out where these are missing
    python benchmarks/cpu.py --threads 2
    python benchmarks/cpu.py --threads 2 --disturbed    with and without another process that computes
    python benchmarks/cpu.py --threads 1 2 4 8 16       ours with each number of threads
    python benchmarks/cpu.py --threads 2 --prompts 512  ours alone, prompts of this length
    python benchmarks/cpu.py --threads 2 --memory       how much memory ours takes at most

Ours and Qwen2 decode through `generate`, greedily, with the caches that they choose; llama.cpp takes its own defaults
(a cache in float16) and decodes in a loop that takes the largest logit. Everything runs once a round, in turn; figures
are medians. A decoding step is compared with the bytes that it reads, weights and keys and values, and those with what
the sum of a large tensor reads in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from kv_cache import ROOT, QWenCache, kernels, medians, modeling, qwen2_of, random_model

PREFILL, CONTEXTS, TOKENS = 512, (512, 4096), 24
HAS_LLAMA = all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp"))


class Ours:
    """A model of transformers with a cache that has been filled; also Qwen2."""

    def __init__(self, model, make_cache):
        self.model, self.make_cache = model, make_cache

    def prefill(self, ids: torch.Tensor) -> None:
        self.model.generate(ids, max_new_tokens=1, do_sample=False, past_key_values=self.make_cache())

    def fill(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (vocabulary) behind the ids, all of which but the last stay in the cache."""
        self.ids, self.cache = ids, self.make_cache()
        for part in ids[:, :-1].split(512, 1):
            self.model(part, past_key_values=self.cache)
        logits = self.model(ids[:, -1:], past_key_values=self.cache).logits[0, -1]
        self.forget()
        return logits.float()

    def forget(self) -> None:
        self.cache.crop(self.ids.shape[1] - 1 - self.cache.get_seq_length())

    def decode(self) -> None:
        new = self.model.generate(
            self.ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, past_key_values=self.cache
        )
        assert new.shape[1] == self.ids.shape[1] + TOKENS
        self.forget()


class Llama:
    """llama.cpp on a GGUF file."""

    def __init__(self, path: Path, threads: int, context: int):
        import llama_cpp

        self.api = llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)  # it would be collected
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = context, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, ids: list[int]) -> torch.Tensor:
        tokens = (self.api.llama_token * len(ids))(*ids)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}.")
        logits = ctypes.cast(
            self.api.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float * self.vocabulary)
        )
        return torch.frombuffer(logits.contents, dtype=torch.float32)

    def forget(self, length: int) -> None:
        self.api.llama_memory_seq_rm(self.memory, 0, length, -1)

    def prefill(self, ids: torch.Tensor) -> None:
        self.forget(0)
        self.run(ids[0].tolist()).argmax().item()

    def fill(self, ids: torch.Tensor) -> torch.Tensor:
        self.forget(0)
        for part in ids[0, :-1].split(512):
            self.run(part.tolist())
        self.last, self.length = ids[0, -1].item(), ids.shape[1] - 1
        logits = self.run([self.last]).clone()
        self.forget(self.length)
        return logits

    def decode(self) -> None:
        token = self.last
        for _ in range(TOKENS):
            token = self.run([token]).argmax().item()
        self.forget(self.length)


def int8_of(model):
    """The model with the int8 weights that tools/quantize_weights.py makes."""
    sys.path.insert(0, str(ROOT / "tools"))
    quantize = importlib.import_module("quantize_weights").quantize
    config = copy.deepcopy(model.config)
    config.int8_weights = True
    with torch.device("meta"):
        other = modeling.QWenLMHeadModel(config)
    state = dict(model.state_dict())
    for name, parameter in other.named_parameters():
        if parameter.dtype == torch.int8:
            state[name], state[f"{name}_scale"] = quantize(state[name])
    other.load_state_dict(state, strict=True, assign=True)
    return other.eval()


def int4_of(model):
    """The model with matrices in 4 bits, groups of 128, as GPTQ stores them, rounded to the nearest."""
    sys.path.insert(0, str(ROOT / "tools"))
    quantize = importlib.import_module("gptq").quantize
    quantization = importlib.import_module(modeling.__name__.replace("modeling_qwen", "qwen_quantization"))
    config = copy.deepcopy(model.config)
    setattr(config, quantization.HELD, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    with torch.device("meta"):
        other = modeling.QWenLMHeadModel(config)
    state = dict(model.state_dict())
    for name, module in other.named_modules():
        if isinstance(module, quantization.QuantizedLinear):
            parts = quantize(state.pop(f"{name}.weight"), 4)
            state.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            state.setdefault(f"{name}.bias", torch.zeros(module.out_features, dtype=model.dtype))
    other.load_state_dict(state, strict=True, assign=True)
    return other.requires_grad_(False).eval()


def write_gguf(model, path: Path, kind: str) -> None:
    """The weights of ours in llama.cpp's format; kind: "BF16", "Q8_0" or "Q4_0", for matrices."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen")
    writer.add_context_length(config.seq_length)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_freq_base(config.rotary_emb_base)
    writer.add_rope_dimension_count(config.kv_channels)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"transformer.wte": "token_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}
    for i in range(config.num_hidden_layers):
        layer = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm"}
        layer |= {"mlp.w1": "ffn_up", "mlp.w2": "ffn_gate", "mlp.c_proj": "ffn_down"}
        names |= {f"transformer.h.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in layer.items()}
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        kept = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        data = gguf.quants.quantize(tensor.float().numpy(), kept)
        writer.add_tensor(f"{names[module]}.{last}", data, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_read(model) -> int:
    """Bytes of the weights that a token goes through: all but the embedding."""
    return sum(t.nbytes for name, t in model.state_dict().items() if "wte" not in name)


def random_ids(config, length: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def our_engines(model) -> dict:
    """Name to engine and the bytes of weights that it reads, in three precisions."""
    models = {"ours, bfloat16": model, "ours, int8": int8_of(model), "ours, int4": int4_of(model)}
    return {name: (Ours(each, QWenCache), weights_read(each)) for name, each in models.items()}


def other_engines(model, threads: int, context: int, folder: Path, kinds: tuple) -> dict:
    """The same of Qwen2 and, where it is installed, of llama.cpp with matrices of these kinds."""
    read = weights_read(model)
    engines = {"Qwen2, bfloat16": (Ours(qwen2_of(model), transformers.DynamicCache), read)}
    for kind in kinds if HAS_LLAMA else ():
        path = folder / f"{kind}.gguf"
        write_gguf(model, path, kind)
        name = f"llama.cpp, {kind.lower().replace('bf16', 'bfloat16')}"
        engines[name] = Llama(path, threads, context + TOKENS), read * {"BF16": 64, "Q8_0": 34, "Q4_0": 18}[kind] // 64
    return engines


def speeds(threads: int, rounds: int, folder: Path) -> None:
    model = random_model("cpu")
    config = model.config
    both = {**our_engines(model), **other_engines(model, threads, max(CONTEXTS), folder, ("BF16", "Q8_0", "Q4_0"))}
    engines, read = ({name: each[i] for name, each in both.items()} for i in range(2))
    ids = random_ids(config, max(CONTEXTS))
    source = torch.ones(1 << 28)

    taken = medians({name: lambda e=e: e.prefill(ids[:, :PREFILL]) for name, e in engines.items()}, rounds, "cpu")
    print(f"\nprefill of {PREFILL} tokens\n\n| | seconds | tokens/s |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {seconds:.2f} | {PREFILL / seconds:.0f} |", flush=True)

    for S in CONTEXTS:
        logits = {name: engine.fill(ids[:, :S]) for name, engine in engines.items()}
        expected = logits["ours, bfloat16"]
        functions = {name: engine.decode for name, engine in engines.items()}
        taken = medians({"memory": source.sum, **functions}, rounds, "cpu")
        memory = source.nbytes / taken.pop("memory") / 1e9
        print(f"\ndecoding behind {S} tokens; the sum of a large tensor reads {memory:.1f} GB/s\n")
        print("| | tokens/s | GB/s | share of the sum's | logits differ from ours by |\n|---|---|---|---|---|")
        for name, seconds in taken.items():
            keys = 4 * config.num_hidden_layers * config.hidden_size * (S + TOKENS // 2)
            speed = (read[name] + keys) * TOKENS / seconds / 1e9
            error = ((logits[name] - expected).norm() / expected.norm()).item()
            print(f"| {name} | {TOKENS / seconds:.2f} | {speed:.1f} | {speed / memory:.0%} | {error:.1%} |", flush=True)


def disturbed(threads: int, rounds: int, folder: Path) -> None:
    """Decoding beside a process that spins on one core, against the same alone, in turn."""
    model, context = random_model("cpu"), min(CONTEXTS)
    engines = {"ours, bfloat16": (Ours(model, QWenCache), weights_read(model))}
    engines |= other_engines(model, threads, context, folder, ("BF16",))
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def beside(function):
        os.kill(spinning.pid, signal.SIGCONT)
        try:
            function()
        finally:
            os.kill(spinning.pid, signal.SIGSTOP)

    try:
        os.kill(spinning.pid, signal.SIGSTOP)
        cases = {}
        for name, (engine, _) in engines.items():
            engine.fill(random_ids(model.config, context))
            cases[name, "alone"] = engine.decode
            cases[name, "beside"] = lambda engine=engine: beside(engine.decode)
        taken = medians(cases, rounds, "cpu")
    finally:
        spinning.kill()
        spinning.wait()
    print(f"\ndecoding behind {context} tokens, {threads} threads on {os.cpu_count()} cores, tokens/s\n")
    print("| | alone | beside a process that spins | share |\n|---|---|---|---|")
    for name in engines:
        alone, beside_it = (TOKENS / taken[name, how] for how in ("alone", "beside"))
        print(f"| {name} | {alone:.2f} | {beside_it:.2f} | {beside_it / alone:.2f} |")


def by_threads(numbers: list[int], rounds: int) -> None:
    """Ours with each number of threads, and what the sum of a large tensor reads with as many."""
    engines, context, source = our_engines(random_model("cpu")), min(CONTEXTS), torch.ones(1 << 28)

    def with_threads(number, function):
        torch.set_num_threads(number)
        function()

    functions = {"memory": source.sum}
    for name, (engine, _) in engines.items():
        engine.fill(random_ids(engine.model.config, context))
        functions[name] = engine.decode
    cases = {
        (name, number): lambda function=function, number=number: with_threads(number, function)
        for number in numbers
        for name, function in functions.items()
    }
    taken = medians(cases, rounds, "cpu")
    config = next(iter(engines.values()))[0].model.config
    keys = 4 * config.num_hidden_layers * config.hidden_size * (context + TOKENS // 2)
    print(f"\ndecoding behind {context} tokens: tokens/s, and the share of what the sum of a large tensor reads\n")
    print(f"| threads | memory, GB/s | {' | '.join(engines)} |\n|---|---|{'---|' * len(engines)}")
    for number in numbers:
        memory = source.nbytes / taken["memory", number] / 1e9
        row = []
        for name, (_, read) in engines.items():
            speed = TOKENS / taken[name, number]
            row.append(f"{speed:.2f} ({(read + keys) * speed / 1e9 / memory:.0%})")
        print(f"| {number} | {memory:.1f} | {' | '.join(row)} |")


def prompts(lengths: list[int], rounds: int) -> None:
    """Ours in every precision, prompts of each length."""
    engines = our_engines(random_model("cpu"))
    engines = {name: engine for name, (engine, _) in engines.items()}
    ids = random_ids(next(iter(engines.values())).model.config, max(lengths))
    cases = {
        (name, length): lambda engine=engine, length=length: engine.prefill(ids[:, :length])
        for length in lengths
        for name, engine in engines.items()
    }
    taken = medians(cases, rounds, "cpu")
    print("\nprompts: seconds, tokens/s, and the speed as a share of bfloat16's\n")
    print(f"| tokens | {' | '.join(engines)} |\n|---|{'---|' * len(engines)}")
    for length in lengths:
        of_bfloat16 = taken["ours, bfloat16", length]
        seconds = [taken[name, length] for name in engines]
        row = [f"{each:.2f} s, {length / each:.0f} ({of_bfloat16 / each:.2f})" for each in seconds]
        print(f"| {length} | {' | '.join(row)} |")


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS, now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(context: int) -> None:
    """Prefill in one piece and decoding, against weights and cache."""
    warm = torch.ones(1, 64, dtype=torch.bfloat16)
    kernels.linear(warm, warm)  # builds or loads the kernels
    gc.collect()
    before = resident("VmRSS")
    model = random_model("cpu")
    cache = QWenCache()
    ids = torch.randint(model.config.vocab_size, (1, context))
    model.generate(ids, max_new_tokens=TOKENS, do_sample=False, past_key_values=cache)
    weights = sum(t.nbytes for t in model.state_dict().values())
    peak = resident("VmHWM") - before
    print(f"\n{context} tokens and {TOKENS} new ones: at most {peak / 1e9:.2f} GB above the {before / 1e9:.2f} before")
    both = weights + cache.nbytes
    print(f"weights {weights / 1e9:.2f} GB, cache {cache.nbytes / 1e9:.2f} GB: {peak / both:.3f} of both")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding on a CPU.")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="default: PyTorch's")
    parser.add_argument("--disturbed", action="store_true", help="beside a process that spins, instead")
    parser.add_argument("--prompts", type=int, nargs="+", metavar="LENGTH", help="prompts of ours alone, instead")
    parser.add_argument("--memory", action="store_true", help="the most memory that ours takes, instead")
    parser.add_argument("--folder", type=Path, help="for the GGUF files, 5.5 GB; default: a temporary one")
    arguments = parser.parse_args()
    threads = arguments.threads[0]
    if len(arguments.threads) > 1 and (arguments.disturbed or arguments.memory or arguments.prompts):
        parser.error("--disturbed, --memory and --prompts take one number of threads.")
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.memory:
            memory(PREFILL)
        elif arguments.prompts:
            prompts(arguments.prompts, arguments.rounds)
        elif arguments.disturbed:
            disturbed(threads, arguments.rounds, Path(folder))
        elif len(arguments.threads) > 1:
            by_threads(arguments.threads, arguments.rounds)
        else:
            speeds(threads, arguments.rounds, Path(folder))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{', '.join(map(str, arguments.threads))} threads, kernels: {kernels.implementation('cpu')}, {versions}")


if __name__ == "__main__":
    main()
