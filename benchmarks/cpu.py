"""
Speed of Qwen-1.8B's shape on a CPU: ours, transformers' Qwen2 and llama.cpp on the very same weights.

    pip install gguf llama-cpp-python       for llama.cpp; it is left out where these are missing
    python benchmarks/cpu.py --threads 2
    python benchmarks/cpu.py --threads 1 2 4 8 16       with each number of threads
    python benchmarks/cpu.py --threads 2 --disturbed    beside another process that computes, and without it, instead
    python benchmarks/cpu.py --threads 2 --prompts 512 4096 --contexts    prompts alone
    python benchmarks/cpu.py --threads 2 --engines ours llama.cpp         two of the three
    python benchmarks/cpu.py --threads 2 --memory       how much memory ours takes at most, instead
    python benchmarks/cpu.py --threads 2 --drafts       prompt look-up on code and on prose, instead

Ours and Qwen2 decode through `generate`, greedily, with the caches that they choose; llama.cpp takes its own defaults
(a cache in float16) and decodes in a loop that takes the largest logit. With each number of threads everything runs
once a round, in turn; figures are medians. A decoding step is compared with the bytes that it reads, weights and keys
and values, and those with what the sum of a large tensor reads in the same rounds with as many threads.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from kv_cache import ROOT, QWenCache, kernels, medians, modeling, qwen2_of, random_model

quantization = importlib.import_module(modeling.__name__.replace("modeling_qwen", "qwen_quantization"))
HAS_LLAMA = all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp"))


class Ours:
    """A model of transformers with a cache that has been filled; also Qwen2."""

    def __init__(self, model, make_cache):
        self.model, self.make_cache = model, make_cache

    def use(self, threads: int) -> None:
        torch.set_num_threads(threads)

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

    def decode(self, tokens: int) -> None:
        new = self.model.generate(
            self.ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, past_key_values=self.cache
        )
        assert new.shape[1] == self.ids.shape[1] + tokens
        self.forget()


class Llama:
    """llama.cpp on a GGUF file."""

    def __init__(self, path: Path, context: int):
        import llama_cpp

        self.api = llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)  # it would be collected
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def use(self, threads: int) -> None:
        torch.set_num_threads(threads)  # for the largest logit
        self.api.llama_set_n_threads(self.context, threads, threads)

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

    def decode(self, tokens: int) -> None:
        token = self.last
        for _ in range(tokens):
            token = self.run([token]).argmax().item()
        self.forget(self.length)


def int8_of(model):
    """The model with the int8 weights that tools/quantize_weights.py makes."""
    config = copy.deepcopy(model.config)
    config.int8_weights = True
    with torch.device("meta"):
        other = modeling.QWenLMHeadModel(config)
    state = dict(model.state_dict())
    to_int8(other, state)
    other.load_state_dict(state, strict=True, assign=True)
    return other.eval()


def to_int8(other, state: dict) -> None:
    """Round the tensors of a state dict that are int8 in the other model."""
    for name, parameter in other.named_parameters():
        if parameter.dtype == torch.int8:
            state[name], state[f"{name}_scale"] = quantization.round_to_int8(state[name])


def int4_of(model, lm_head: bool = False, int8_lm_head: bool = False):
    """The model with matrices in 4 bits, groups of 128, as GPTQ stores them, rounded to the nearest."""
    sys.path.insert(0, str(ROOT / "tools"))
    quantize = importlib.import_module("gptq").quantize
    config = copy.deepcopy(model.config)
    config.int8_lm_head = int8_lm_head
    setattr(config, quantization.HELD, {"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": lm_head})
    with torch.device("meta"):
        other = modeling.QWenLMHeadModel(config)
    state = dict(model.state_dict())
    to_int8(other, state)
    for name, module in other.named_modules():
        if isinstance(module, quantization.QuantizedLinear):
            parts = quantize(state.pop(f"{name}.weight"), 4)
            state.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            state.setdefault(f"{name}.bias", torch.zeros(module.out_features, dtype=model.dtype))
    other.load_state_dict(state, strict=True, assign=True)
    for module in other.modules():
        if isinstance(module, quantization.QuantizedLinear):
            module.put_side_by_side()  # as loading does
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
    tensors = model.state_dict()
    kept = {name: gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"] for name, tensor in tensors.items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        stored = pool.map(lambda name: gguf.quants.quantize(tensors[name].float().numpy(), kept[name]), tensors)
        for name, data in zip(tensors, stored):
            module, _, last = name.rpartition(".")
            writer.add_tensor(f"{names[module]}.{last}", data, raw_dtype=kept[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_read(model) -> int:
    """Bytes of the weights that a token goes through: all but the embedding."""
    return sum(t.nbytes for name, t in model.state_dict().items() if "wte" not in name)


def random_ids(config, length: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def all_engines(model, wanted: list[str], context: int, folder: Path) -> dict:
    """Name to engine and the bytes of weights that it reads, of those whose names begin with one that is wanted."""
    read = weights_read(model)
    made = {
        "ours, bfloat16": lambda: (Ours(model, QWenCache), read),
        "ours, int8": lambda: ours(int8_of(model)),
        "ours, int4": lambda: ours(int4_of(model)),
        "ours, int4 and int8": lambda: ours(int4_of(model, int8_lm_head=True)),  # the output layer
        "ours, all in int4": lambda: ours(int4_of(model, lm_head=True)),
        "Qwen2, bfloat16": lambda: (Ours(qwen2_of(model), transformers.DynamicCache), read),
        "llama.cpp, bfloat16": lambda: llama("BF16", 64),
        "llama.cpp, q8_0": lambda: llama("Q8_0", 34),
        "llama.cpp, q4_0": lambda: llama("Q4_0", 18),
    }

    def ours(other):
        return Ours(other, QWenCache), weights_read(other)

    def llama(kind: str, bytes_of_32: int):
        path = folder / f"{kind}.gguf"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_gguf(model, path.with_suffix(".part"), kind)
            path.with_suffix(".part").rename(path)
        return Llama(path, context), read * bytes_of_32 // 64

    wanted = [name for name in made if name.startswith(tuple(wanted)) and (HAS_LLAMA or "llama" not in name)]
    return {name: made[name]() for name in wanted}


def prompts(engines: dict, config, threads: list[int], lengths: list[int], rounds: int) -> None:
    """Seconds for a prompt of each length, and the speed relative to that of the first engine."""
    ids = random_ids(config, max(lengths))
    print("\nprompts\n\n| tokens | threads | | seconds | tokens/s | times the first |\n|---|---|---|---|---|---|")
    for length in lengths:
        for number in threads:

            def prefill(engine, number=number, length=length):
                engine.use(number)
                engine.prefill(ids[:, :length])

            taken = medians({name: lambda e=e: prefill(e) for name, (e, _) in engines.items()}, rounds, "cpu")
            first = next(iter(taken.values()))
            for name, seconds in taken.items():
                row = f"{seconds:.2f} | {length / seconds:.0f} | {first / seconds:.2f}"
                print(f"| {length} | {number} | {name} | {row} |", flush=True)


def decoding(engines: dict, config, threads: list[int], contexts: list[int], tokens: int, rounds: int) -> None:
    """Tokens a second behind each context, and how much of what the memory gives that is."""
    ids, source = random_ids(config, max(contexts)), torch.ones(1 << 28)
    for S in contexts:
        logits = {}
        for name, (engine, _) in engines.items():
            engine.use(max(threads))
            logits[name] = engine.fill(ids[:, :S])
        expected = next(iter(logits.values()))
        keys = 4 * config.num_hidden_layers * config.hidden_size * (S + tokens // 2)
        print(f"\ndecoding behind {S} tokens; sum: what the sum of a large tensor reads\n")
        print("| threads | sum, GB/s | | tokens/s | GB/s | share of the sum's | logits differ from the first's by |")
        print("|---|---|---|---|---|---|---|")
        for number in threads:

            def decode(engine, number=number):
                engine.use(number)
                engine.decode(tokens)

            torch.set_num_threads(number)
            functions = {name: lambda e=e: decode(e) for name, (e, _) in engines.items()}
            taken = medians({"memory": source.sum, **functions}, rounds, "cpu")
            memory = source.nbytes / taken.pop("memory") / 1e9
            for name, seconds in taken.items():
                speed = (engines[name][1] + keys) * tokens / seconds / 1e9
                error = ((logits[name] - expected).norm() / expected.norm()).item()
                row = f"{tokens / seconds:.2f} | {speed:.1f} | {speed / memory:.0%} | {error:.1%}"
                print(f"| {number} | {memory:.1f} | {name} | {row} |", flush=True)


def disturbed(engines: dict, config, threads: int, context: int, tokens: int, rounds: int) -> None:
    """Decoding beside a process that spins on one of the cores that this one has, against the same alone, in turn."""
    cores = os.sched_getaffinity(0)
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def beside(function):
        os.kill(spinning.pid, signal.SIGCONT)
        try:
            function()
        finally:
            os.kill(spinning.pid, signal.SIGSTOP)

    try:
        os.sched_setaffinity(spinning.pid, {max(cores)})
        os.kill(spinning.pid, signal.SIGSTOP)
        cases = {}
        for name, (engine, _) in engines.items():
            engine.use(threads)
            engine.fill(random_ids(config, context))
            cases[name, "alone"] = lambda engine=engine: engine.decode(tokens)
            cases[name, "beside"] = lambda engine=engine: beside(lambda: engine.decode(tokens))
        taken = medians(cases, rounds, "cpu")
    finally:
        spinning.kill()
        spinning.wait()
    print(f"\ndecoding behind {context} tokens, {threads} threads on {len(cores)} cores, tokens/s\n")
    print("| | alone | beside a process that spins | share |\n|---|---|---|---|")
    for name in engines:
        alone, beside_it = (tokens / taken[name, how] for how in ("alone", "beside"))
        print(f"| {name} | {alone:.2f} | {beside_it:.2f} | {beside_it / alone:.2f} |", flush=True)


class Clock(transformers.generation.BaseStreamer):
    """When `generate` had how many tokens, step by step; begins with the prompt."""

    def __init__(self):
        self.times, self.tokens = [], []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(value.numel())

    def end(self) -> None:
        pass


class Says(transformers.LogitsProcessor):
    """Makes a model say these ids, whatever it computes."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.full_like(scores, -torch.inf)
        said[:, self.ids[input_ids.shape[1]]] = 0
        return said


def drafts(model, vocabulary: Path, context: int, tokens: int, rounds: int) -> None:
    """Prompt look-up where the answer is a text that is known, so that as many drafts are right as that text has."""
    tokenization = importlib.import_module(modeling.__name__.replace("modeling_qwen", "tokenization_qwen"))
    tokenizer = tokenization.QWenTokenizer(vocabulary)
    code, prose = ((ROOT / name).read_text("utf-8") for name in ("qwen_cache.py", "docs/architecture.md"))
    answer = tokens + 16  # drafts go beyond
    code = code[code.index("    def ") :]
    prompt, going_on = tokenizer.encode(code)[:context], tokenizer.encode(prose)[: context + answer]
    renamed = re.sub(r"\bself\b", "cache", tokenizer.decode(prompt))
    texts = {
        "code said again, a name changed": prompt + tokenizer.encode(renamed)[:answer],
        "prose that goes on": going_on,
    }
    print(f"\nprompt look-up behind {context} tokens, {tokens} new ones\n")
    print("| | drafts | tokens a step | tokens/s | times without |\n|---|---|---|---|---|")
    for name, text in texts.items():
        ids, found = torch.tensor([text]), {}
        for _ in range(rounds):
            for number in (0, 3, 7, 15):
                clock = Clock()
                settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "streamer": clock}
                settings |= {"prompt_lookup_num_tokens": number} if number else {}
                model.generate(ids[:, :context], logits_processor=[Says(ids[0])], **settings)
                # The first step reads the prompt.
                speed = sum(clock.tokens[2:]) / (clock.times[-1] - clock.times[1])
                found.setdefault(number, []).append((speed, sum(clock.tokens[1:]) / len(clock.tokens[1:])))
        speeds = {number: statistics.median(speed for speed, _ in each) for number, each in found.items()}
        for number, speed in speeds.items():
            row = f"{found[number][0][1]:.2f} | {speed:.2f} | {speed / speeds[0]:.2f}"
            print(f"| {name} | {number} | {row} |", flush=True)


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS, now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(context: int, tokens: int) -> None:
    """Prefill in one piece and decoding, against weights and cache."""
    warm = torch.ones(1, 64, dtype=torch.bfloat16)
    kernels.linear(warm, warm)  # builds or loads the kernels
    gc.collect()
    before = resident("VmRSS")
    model = random_model("cpu")
    cache = QWenCache()
    ids = torch.randint(model.config.vocab_size, (1, context))
    model.generate(ids, max_new_tokens=tokens, do_sample=False, past_key_values=cache)
    weights = sum(t.nbytes for t in model.state_dict().values())
    peak = resident("VmHWM") - before
    print(f"\n{context} tokens and {tokens} new ones: at most {peak / 1e9:.2f} GB above the {before / 1e9:.2f} before")
    both = weights + cache.nbytes
    print(f"weights {weights / 1e9:.2f} GB, cache {cache.nbytes / 1e9:.2f} GB: {peak / both:.3f} of both")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding on a CPU.")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="default: PyTorch's")
    parser.add_argument("--prompts", type=int, nargs="*", default=[512], metavar="LENGTH", help="default: 512")
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[512, 4096], metavar="LENGTH", help="to decode behind"
    )
    parser.add_argument("--tokens", type=int, default=24, help="to decode at a time; default: %(default)s")
    parser.add_argument(
        "--engines", nargs="+", default=[""], metavar="NAME", help="the beginnings of names; default: all"
    )
    parser.add_argument("--disturbed", action="store_true", help="beside a process that spins, instead")
    parser.add_argument("--memory", action="store_true", help="the most memory that ours takes, instead")
    parser.add_argument("--drafts", action="store_true", help="prompt look-up, instead")
    parser.add_argument(
        "--vocabulary", type=Path, default=ROOT / "demo" / "qwen.tiktoken", help="for drafts; default: %(default)s"
    )
    parser.add_argument("--folder", type=Path, help="keeps the GGUF files, 5.5 GB; default: a temporary one")
    args = parser.parse_args()
    if len(args.threads) > 1 and (args.disturbed or args.memory or args.drafts):
        parser.error("--disturbed, --memory and --drafts take one number of threads.")
    transformers.utils.logging.set_verbosity_error()
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        if args.memory:
            torch.set_num_threads(args.threads[0])
            memory(max(args.prompts, default=512), args.tokens)
        elif args.drafts:
            torch.set_num_threads(args.threads[0])
            drafts(random_model("cpu"), args.vocabulary, min(args.contexts), 4 * args.tokens, args.rounds)
        else:
            torch.manual_seed(0)  # a file that was kept has these weights
            model, longest = random_model("cpu"), max([*args.prompts, *args.contexts], default=0)
            folder = args.folder or Path(temporary)
            engines = all_engines(model, args.engines, longest + args.tokens, folder)
            if args.disturbed:
                disturbed(engines, model.config, args.threads[0], min(args.contexts), args.tokens, args.rounds)
            elif args.prompts:
                prompts(engines, model.config, args.threads, args.prompts, args.rounds)
            if args.contexts and not args.disturbed:
                decoding(engines, model.config, args.threads, args.contexts, args.tokens, args.rounds)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\nkernels: {kernels.implementation('cpu')}, {versions}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
