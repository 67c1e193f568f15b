"""
GPTQ (https://arxiv.org/abs/2210.17323): matrices in 4 or 8 bits, rounded so that the outputs of a calibration text
change least. `quantize_weights.py --bits` is the command; this is what it does with a checkpoint.

One block at a time is on the device, read from the source's files and written to the target's, so that 72B needs no
more than a block and the hidden states of the calibration text. These are kept in the unfinished folder between blocks:
a run that was stopped goes on from there.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import init_empty_weights
from checkpoint_files import (
    INDEX,
    ROOT,
    Problem,
    check_folder,
    copy_companions,
    from_code,
    full_precision_config,
    going_on,
    only_run,
    open_weights,
    save_weights,
    weight_shapes,
    write_file,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from upgrade_checkpoint import check_weights, load_tokenizer, planned, try_loading

QWenConfig = from_code("configuration_qwen.QWenConfig")
QWenLMHeadModel = from_code("modeling_qwen.QWenLMHeadModel")

# The matrices of a block in the order of its computation; those of a line have one input.
STAGES = (("attn.c_attn",), ("attn.c_proj",), ("mlp.w1", "mlp.w2"), ("mlp.c_proj",))
HEAD_ROWS = 8192  # of the output layer on the device at a time: it is larger than any matrix of a block
SYSTEM = "You are a helpful assistant."


# --- One matrix --------------------------------------------------------------------------------------------------


def grid(weight: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scale, as float16 holds it, and zero of each row of a group: float32 (out, 1) each. weight: (out, group size).

    A zero is at least 1: the format stores one less, and readers differ about what is below 0.
    """
    top = 2**bits - 1
    if sym:
        scale, zero = weight.abs().amax(1, keepdim=True) * 2 / top, None
    else:
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
    scale = scale.clamp(min=2**-14).half().float()
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    zero = (-low / scale).round().clamp(1, top)
    # with a zero that had to move the step must reach as far as before
    return torch.maximum(scale, (high / (top - zero).clamp(min=1)).half().float()), zero


def encode(weight, scale, zero, bits):
    """Codes, float32, of weights of any shape that scale and zero fit."""
    return (weight / scale + zero).round().clamp(0, 2**bits - 1)


def quantize(
    weight: torch.Tensor,
    bits: int,
    group_size: int = 128,
    *,
    sym: bool = True,
    hessian: torch.Tensor | None = None,
    desc_act: bool = False,
    damp: float = 0.01,
    block: int = 128,
) -> dict[str, torch.Tensor]:
    """
    The tensors of a GPTQ checkpoint for a matrix (out, in): qweight, qzeros, scales, g_idx.

    hessian: float32 (in, in), the sum of x x^T over inputs x; None rounds each weight to the nearest. desc_act: inputs
    in the order of their weight in the Hessian. damp: share of its mean diagonal that is added to the diagonal.

    Raises ValueError for a matrix that can't be packed, or one or a Hessian that is not finite, or beyond float16.
    """
    out, width = weight.shape
    n = 32 // bits
    if out % n or width % n:
        raise ValueError(f"{bits} bits are packed {n} to an integer; {out} outputs and {width} inputs can't be.")
    w = weight.detach().to(torch.float32).clone()
    group_size = width if group_size == -1 else group_size
    groups = -(-width // group_size)
    if group_size % block:  # no group begins in one block and ends in the next, which is not up to date then
        block = max(1, block // group_size) * group_size
    order = torch.arange(width, device=w.device)
    if hessian is not None:
        h = hessian.to(w.device, torch.float32).clone()
        diagonal = h.diagonal()
        if not bool(torch.isfinite(h).all()):
            raise ValueError("the calibration text gives activations that are not finite; load the model and see why.")
        unused = diagonal == 0
        diagonal[unused] = 1
        w[:, unused] = 0
        if desc_act:
            order = torch.argsort(diagonal, descending=True)
            w, h = w[:, order], h[order][:, order]
        h.diagonal().add_(damp * h.diagonal().mean())
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scales, zeros = (torch.zeros(out, groups, device=w.device) for _ in range(2))
    codes = torch.zeros_like(w)
    if hessian is None:
        for g in range(groups):
            where = slice(g * group_size, (g + 1) * group_size)
            scales[:, g : g + 1], zeros[:, g : g + 1] = scale, zero = grid(w[:, where], bits, sym)
            codes[:, where] = encode(w[:, where], scale, zero, bits)
    for first in range(0, width if hessian is not None else 0, block):
        last = min(first + block, width)
        errors = torch.zeros(out, last - first, device=w.device)
        for i in range(first, last):
            g = i // group_size
            if i % group_size == 0:
                scale, zero = grid(w[:, i : i + group_size], bits, sym)
                scales[:, g : g + 1], zeros[:, g : g + 1] = scale, zero
            scale, zero = scales[:, g], zeros[:, g]
            codes[:, i] = encode(w[:, i], scale, zero, bits)
            errors[:, i - first] = (w[:, i] - scale * (codes[:, i] - zero)) / inverse[i, i]
            w[:, i:last] -= errors[:, i - first, None] * inverse[i, i:last]
        w[:, last:] -= errors @ inverse[first:last, last:]
    if not bool(torch.isfinite(w).all() & torch.isfinite(scales).all()):
        raise ValueError("a matrix holds numbers that are not finite, or steps that float16 can't hold.")
    place = torch.argsort(order)
    g_idx = (torch.arange(width, device=w.device) // group_size)[place]
    return {
        "qweight": pack(codes[:, place].t(), bits),
        "qzeros": pack(zeros - 1, bits).t().contiguous(),
        "scales": scales.half().t().contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, columns) as int32 (rows * bits / 32, columns), the first row in the lowest bits."""
    n = 32 // bits
    parts = codes.to(torch.int64).unflatten(0, (-1, n))
    words = (parts << (torch.arange(n, device=codes.device) * bits)[:, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


# --- Calibration -------------------------------------------------------------------------------------------------


def calibration_samples(tokenizer, path: Path, samples: int, length: int) -> list[list[int]]:
    """
    Token ids of at most `samples` samples of at most `length` tokens.

    path: plain text, which is cut into samples; or JSON or JSON lines: a list of texts, {"text": ...} or conversations
    in any form that finetuning takes, {"conversations": [{"from": "user", "value": ...}, ...]} or {"messages": ...}.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"The calibration text can't be read: {error}") from None
    if path.suffix not in (".json", ".jsonl"):
        ids = tokenizer(text, verbose=False)["input_ids"]
        cut = [ids[i : i + length] for i in range(0, len(ids), length)]
        found = [sample for sample in cut if len(sample) == length] or cut[:1]
    else:
        try:
            # As finetune/data.py reads them; str.splitlines would also split a text at a U+2028 within.
            is_list = path.suffix == ".json" and text.lstrip().startswith("[")
            entries = json.loads(text) if is_list else [json.loads(x) for x in text.split("\n") if x.strip()]
            found = [sample_of(tokenizer, entry)[:length] for entry in entries[:samples]]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise Problem(
                f"{path} is not a list of texts, {{'text': ...}}, {{'conversations': [{{'from', 'value'}}, ...]}} or "
                f"{{'messages': ...}}: {type(error).__name__}: {error}"
            ) from None
    found = [sample for sample in found if sample][:samples]
    if not found:
        raise Problem(f"{path} has no text.")
    return found


@lru_cache(maxsize=None)
def finetuning_data():
    """finetune/data.py, which knows all forms of conversations; the container image is without it."""
    sys.path.append(str(ROOT / "finetune"))
    return importlib.import_module("data")


def sample_of(tokenizer, entry) -> list[int]:
    if isinstance(entry, str):
        return tokenizer(entry)["input_ids"]
    if "text" in entry:
        if not isinstance(entry["text"], str):
            raise TypeError(f"a text is a {type(entry['text']).__name__}")
        return tokenizer(entry["text"])["input_ids"]
    has_more = any(map(entry.get, ("messages", "system", "tools", "functions")))
    if has_more or entry["conversations"][0]["from"] == "system":
        reader = finetuning_data()
        messages, tools = reader.messages_of(entry)
        return reader.encode(messages, tokenizer, None, tools=tools)["input_ids"]
    start, end, newline = tokenizer.im_start_id, tokenizer.im_end_id, tokenizer("\n")["input_ids"]
    # Here, and not by what finetuning reads, for conversations without an answer.
    turns = [("system", SYSTEM), *((turn["from"], turn["value"]) for turn in entry["conversations"])]
    ids: list[int] = []
    for role, content in turns:
        ids += [start, *tokenizer(role)["input_ids"], *newline]
        ids += [*tokenizer.encode(content, allowed_special=set()), end, *newline]
    return ids


# --- A checkpoint ------------------------------------------------------------------------------------------------


class Weights:
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places = {name: file for file, names in weight_shapes(folder).items() for name in names}

    def __getitem__(self, name: str) -> torch.Tensor:
        with open_weights(self.folder / self.places[name]) as weights:
            return weights.get_tensor(name)


def usable(named: str) -> torch.device:
    """The device of this name; Problem if there is none, or one on which nothing is quantised."""
    try:
        device = torch.device(named)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"--device {named}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise Problem(f"--device {named}: blocks are quantised on cpu, or on a GPU as cuda or cuda:1.")
    return device


def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    result = tensor.to(torch.float16)
    if not bool(torch.isfinite(result).all()):
        raise Problem(f"{name} has values that float16 can't hold; the format has no other precision.")
    return result.contiguous()


@contextmanager
def block_on_device(model, weights: Weights, index: int, device, dtype):
    """The model with this one block, and nothing behind it, so that hidden states go in and come out."""
    block = model.transformer.h[index].to_empty(device=device).to(dtype)
    state = {name: weights[f"transformer.h.{index}.{name}"].to(dtype) for name in block.state_dict()}
    block.load_state_dict(state)
    blocks, norm = model.transformer.h, model.transformer.ln_f
    model.transformer.h, model.transformer.ln_f = nn.ModuleList([block]), nn.Identity()
    layer_idx, block.attn.layer_idx = block.attn.layer_idx, 0
    try:
        yield block
    finally:
        model.transformer.h, model.transformer.ln_f = blocks, norm
        block.attn.layer_idx = layer_idx
        block.to("meta")


def through(model, hidden: list[torch.Tensor], device, dtype) -> list[torch.Tensor]:
    """Hidden states (T, hidden) behind the block that is on the device."""
    return [
        model.transformer(inputs_embeds=x[None].to(device, dtype), use_cache=False)
        .last_hidden_state[0]
        .to("cpu", x.dtype)
        for x in hidden
    ]


def hessians(model, modules: list[nn.Module], hidden, device, dtype) -> torch.Tensor:
    """The sum of x x^T over the inputs of these modules, which are the same for all of them: float32 (in, in)."""
    total = torch.zeros(modules[0].in_features, modules[0].in_features, device=device)

    def count(module, inputs):
        x = inputs[0].flatten(0, -2).float()
        total.addmm_(x.t(), x)

    handle = modules[0].register_forward_pre_hook(count)
    try:
        through(model, hidden, device, dtype)
    finally:
        handle.remove()
    return total


def quantize_block(model, block, settings: dict, hidden, device, dtype) -> dict[str, torch.Tensor]:
    """The block's tensors as they are stored; its weights become what the codes stand for, for what comes next."""
    tensors = {}
    options = {key: settings[key] for key in ("bits", "group_size", "sym", "desc_act")}
    for stage in STAGES:
        modules = [block.get_submodule(name) for name in stage]
        hessian = hessians(model, modules, hidden, device, dtype) if settings["method"] == "gptq" else None
        for name, module in zip(stage, modules):
            parts = quantize(module.weight, hessian=hessian, **options)
            with torch.no_grad():
                module.weight.copy_(dequantized(parts, settings["bits"]))
            bias = torch.zeros(module.out_features) if module.bias is None else module.bias
            parts["bias"] = half(f"{name}.bias", bias)
            tensors.update({f"{name}.{part}": tensor.cpu() for part, tensor in parts.items()})
    for name in ("ln_1.weight", "ln_2.weight"):
        tensors[name] = half(name, block.get_parameter(name)).cpu()
    return tensors


def quantize_head(model, weights, settings: dict, hidden, device) -> dict[str, torch.Tensor]:
    """The output layer as it is stored; its inputs are hidden states (T, hidden) behind the last norm."""
    hessian = None
    if settings["method"] == "gptq":
        norm = model.transformer.ln_f.to_empty(device=device).float()
        norm.load_state_dict({"weight": weights["transformer.ln_f.weight"].float()})
        inputs = (norm(x.to(device).float()) for x in hidden)  # one sample on the device at a time
        hessian = sum(x.t() @ x for x in inputs)
        norm.to("meta")
    options = {key: settings[key] for key in ("bits", "group_size", "sym", "desc_act")}
    weight, parts = weights["lm_head.weight"], []
    for rows in tqdm(weight.split(HEAD_ROWS), desc="output layer", unit="part", disable=None):
        quantised = quantize(rows.to(device), hessian=hessian, **options)
        parts.append({name: tensor.cpu() for name, tensor in quantised.items()})
    tensors = {name: torch.cat([part[name] for part in parts], 1) for name in ("qweight", "qzeros", "scales")}
    tensors["g_idx"], tensors["bias"] = parts[0]["g_idx"], torch.zeros(len(weight), dtype=torch.float16)
    return {f"lm_head.{name}": tensor for name, tensor in tensors.items()}


def dequantized(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """float32 (out, in)."""
    shifts = torch.arange(0, 32, bits, device=parts["qweight"].device)
    codes = (parts["qweight"][:, None] >> shifts[:, None] & 2**bits - 1).flatten(0, 1)
    zeros = (parts["qzeros"][:, :, None] >> shifts & 2**bits - 1).flatten(1) + 1
    g_idx = parts["g_idx"].long()
    return ((codes - zeros[g_idx]) * parts["scales"].float()[g_idx]).t()


def save(tensors: dict, path: Path) -> None:
    """In one step: there is the whole file, or none."""
    temporary = path.with_name(f".{path.name}.new")
    save_weights(tensors, temporary)
    temporary.replace(path)


def make(
    source: Path,
    target: Path,
    *,
    bits: int,
    method: str = "gptq",
    group_size: int = 128,
    calibration: Path | None = None,
    samples: int = 128,
    length: int = 2048,
    sym: bool = True,
    desc_act: bool = False,
    lm_head: bool = False,
    device: str | None = None,
) -> None:
    """Quantise the checkpoint in `source` into `target`; `Problem` says what does not go, and leaves no `target`."""
    check_folder(source)
    if target.exists():
        raise Problem(f"{target} exists. Name a folder that does not exist yet.")
    config = full_precision_config(source)
    if method == "gptq" and calibration is None:
        raise Problem(
            "GPTQ needs a text that is like what the model will be used for: --calibration FILE, a few hundred kB of "
            "plain text or conversations. Without one, --method rtn rounds to the nearest, which is less exact."
        )
    if desc_act and method == "rtn":
        raise Problem("--desc-act orders inputs by the calibration text, and --method rtn has none. Leave it out.")
    if lm_head and config.get("tie_word_embeddings"):
        raise Problem("--lm-head: the output layer of this checkpoint is its embedding. Leave --lm-head out.")
    print(check_weights(source))
    settings = {"bits": bits, "method": method, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    settings["lm_head"] = lm_head
    weights = Weights(source)
    # A checkpoint that was made anew in this folder has files of the same sizes, and other blocks.
    stats = {name: (source / name).stat() for name in sorted(set(weights.places.values()))}
    stamp: dict = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    if calibration is not None:
        if not calibration.is_file():
            raise Problem(f"There is no calibration text {calibration}.")
        text = hashlib.sha256(calibration.read_bytes()).hexdigest()
        stamp = {**stamp, "calibration": [text, samples, length]}
    # Every run with these settings finds the same folder. It is nothing that loads until it is complete.
    key = json.dumps([str(source.resolve()), target.name, settings, stamp, config], sort_keys=True)
    partial = target.parent / f"quantizing_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    device = usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    qwen = QWenConfig.from_dict(config)
    with init_empty_weights():
        model = QWenLMHeadModel(qwen).eval()
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    layers = qwen.num_hidden_layers
    files = [f"model-{i + 1:05}-of-{layers + 1:05}.safetensors" for i in range(layers + 1)]

    def begin() -> list[torch.Tensor]:
        return first_hidden(source, weights, calibration, samples, length) if method == "gptq" else []

    with TemporaryDirectory() as trial:  # what is wrong beside the weights is found before hours of work
        make_loadable(source, Path(trial), config, settings)
    with torch.no_grad(), ExitStack() as held:
        first = None if partial.exists() else begin()  # a wrong calibration text leaves no folder
        partial.mkdir(parents=True, exist_ok=True)
        held.enter_context(only_run(partial, target))
        held.enter_context(going_on(partial))
        done, hidden = resume(partial, files[1:])
        if hidden is None:
            hidden = begin() if first is None else first
        if done:
            print(f"{done} of {layers} blocks are there from an earlier run, in {partial}")
        for index in tqdm(range(layers), desc="blocks", unit="block", initial=done, disable=None):
            if index < done:
                continue
            with block_on_device(model, weights, index, device, dtype) as block:
                try:
                    tensors = quantize_block(model, block, settings, hidden, device, dtype)
                except ValueError as error:
                    raise Problem(f"block {index}: {error}") from None
                hidden = through(model, hidden, device, dtype)
            save({f"transformer.h.{index}.{name}": t for name, t in tensors.items()}, partial / files[index + 1])
            save({str(i): x for i, x in enumerate(hidden)}, partial / f"hidden-{index + 1:05}.safetensors")
            (partial / f"hidden-{index:05}.safetensors").unlink(missing_ok=True)
        head = {}
        if lm_head:
            try:
                head = quantize_head(model, weights, settings, hidden, device)
            except ValueError as error:
                raise Problem(f"lm_head: {error}") from None
        names = ("transformer.wte.weight", "transformer.ln_f.weight", *(() if lm_head else ("lm_head.weight",)))
        rest = [name for name in names if name in weights.places]  # an embedding may be the output layer, too
        save({**{name: half(name, weights[name]) for name in rest}, **head}, partial / files[0])
        finish(source, partial, config, settings, files)
        partial.rename(target)
    size = sum((target / name).stat().st_size for name in files)
    print(f"{target}: {layers * 5 + lm_head} matrices in {bits} bits, {size / 1e9:.2f} GB")


def first_hidden(source: Path, weights: Weights, calibration: Path, samples: int, length: int) -> list[torch.Tensor]:
    """The embeddings of the calibration text, float16 (T, hidden) for each sample."""
    tokenizer = load_tokenizer(source)
    embedding = weights["transformer.wte.weight"]
    dtype = torch.float16 if embedding.dtype != torch.bfloat16 else torch.bfloat16
    dtype = torch.float32 if embedding.dtype == torch.float32 else dtype
    found = calibration_samples(tokenizer, calibration, samples, length)
    print(f"calibration: {len(found)} samples, {sum(map(len, found)):,} tokens")
    return [embedding[torch.tensor(ids)].to(dtype) for ids in found]


def resume(partial: Path, files: list[str]) -> tuple[int, list[torch.Tensor] | None]:
    """Blocks that an earlier run finished, and the hidden states behind them (None at the beginning)."""
    states = sorted(partial.glob("hidden-*.safetensors"))
    if not states:
        return 0, None
    done = int(states[-1].stem.split("-")[1])
    lacking = [file for file in files[:done] if not (partial / file).exists()]
    if lacking:
        raise Problem(f"{partial} lacks {lacking[0]}, which an earlier run wrote. Delete the folder to begin anew.")
    stored = load_file(states[-1])
    return done, [stored[str(i)] for i in range(len(stored))]


def finish(source: Path, partial: Path, config: dict, settings: dict, files: list[str]) -> None:
    """Everything but the weights: index, configuration, tokenizer, generation settings, code."""
    places, total = {}, 0
    for file in files:
        with safe_open(partial / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                places[name] = file
        total += (partial / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_file(partial / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    make_loadable(source, partial, config, settings)
    for path in partial.glob("hidden-*.safetensors"):  # last, so that a run that is stopped before goes on from them
        path.unlink()


def make_loadable(source: Path, folder: Path, config: dict, settings: dict) -> None:
    """Configuration, tokenizer, generation settings and code into a folder; Problem if it then does not load."""
    copy_companions(source, folder)
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    config.update(bf16=False, fp16=False, fp32=False, torch_dtype="float16")
    config["quantization_config"] = {
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "damp_percent": 0.01,
        "desc_act": settings["desc_act"],
        "static_groups": False,
        "sym": settings["sym"],
        "true_sequential": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **({"lm_head": True} if settings["lm_head"] else {}),
    }
    write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    for name, content in planned(folder).items():
        write_file(folder / name, content)
    try_loading(folder)
