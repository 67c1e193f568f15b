"""
Write a checkpoint as one GGUF file, for llama.cpp and the programs that are built on it.

    python tools/export_gguf.py CHECKPOINT OUT.gguf                 matrices as they are stored, codes included
    python tools/export_gguf.py CHECKPOINT OUT.gguf --type q8_0     all matrices in f32, bf16, f16 or q8_0

CHECKPOINT is a folder in safetensors, in full precision, GPTQ's (Int4, Int8) or with int8 weights; it is only read, a
few rows at a time. The file has the weights, the vocabulary, and the chat template of a chat model. Needs the package
gguf.

Without --type no code is rounded again. GGUF has blocks of 32 neighbouring inputs of an output, with a scale d and in
one layout a minimum m, both in float16:

    q4_0   w = d (q - 8)     GPTQ, 4 bits, with the zero 8 (symmetric): exact
    q4_1   w = d q + m       GPTQ, 4 bits, with other zeros: m = -scale * zero is rounded
    q8_0   w = d q           GPTQ, 8 bits, with the zero 128 (symmetric): exact; int8 weights: d = scale is rounded

What llama.cpp does not do: normalise text to NFC, as our tokenizer does; dynamic NTK and LogN, so that the context
length in the file ends where they would begin.

Exit status: 0 done; 2 the checkpoint has a problem, llama.cpp could not compute it, or OUT.gguf can't be written, and
there is no OUT.gguf.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from byte_pairs import byte_alphabet, recovered_pairs
from checkpoint_files import (
    CONFIG,
    Problem,
    check_folder,
    exit_status,
    from_code,
    only_run,
    open_weights,
    precision,
    read_json,
    weight_shapes,
)
from tqdm import tqdm
from upgrade_checkpoint import load_tokenizer

gguf = importlib.import_module("gguf") if importlib.util.find_spec("gguf") is not None else None

QWenConfig = from_code("configuration_qwen.QWenConfig")
QWenLMHeadModel = from_code("modeling_qwen.QWenLMHeadModel")
QWenTokenizer = from_code("tokenization_qwen.QWenTokenizer")
check_quantization_config = from_code("qwen_quantization.check_quantization_config")
tokenization_qwen = sys.modules[QWenTokenizer.__module__]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors and GGUF call them the same
TYPES = ("f32", "bf16", "f16", "q8_0")
OF_PYTORCH = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
BLOCK = 32  # inputs
ROWS_AT_ONCE = 1 << 22  # weights


# --- Matrices ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tensor:
    """
    A tensor of the file, which is made a few rows at a time when it is written.

    shape: (outputs, inputs) or (outputs,). type: a name of gguf.GGMLQuantizationType. rows: the rows from a first to
    a last one, as bytes or numbers of the file; the first is a multiple of 8.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    rows: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // block * size

    def tofile(self, file) -> None:
        """What GGUFWriter asks an array to do."""
        step = max(1, ROWS_AT_ONCE // math.prod(self.shape[1:]) // 8) * 8
        for first in range(0, self.shape[0], step):
            file.write(self.rows(first, min(first + step, self.shape[0])).tobytes())


class Checkpoint:
    """The configuration of a checkpoint and its weights, of which rows are read when they are wanted."""

    def __init__(self, folder: Path):
        check_folder(folder)
        self.folder = folder
        try:
            self.config = QWenConfig.from_dict(read_json(folder / CONFIG))
            self.gptq = self._gptq()
        except ValueError as error:
            raise Problem(re.sub("^(config.json: )?", "config.json: ", str(error), count=1)) from None
        self.places = {name: file for file, names in weight_shapes(folder).items() for name in names}
        self.files: dict = {}
        self.read: set[str] = set()
        self.changes: dict[str, float] = {}  # by rounding what goes with codes: the largest, by what it is

    def _gptq(self):
        """The format of a GPTQ checkpoint, else None; ValueError or Problem for other quantised ones."""
        found = getattr(self.config, "quantization_config", None)
        if not found and (self.folder / "quantize_config.json").exists():  # all that early checkpoints have
            found = {**read_json(self.folder / "quantize_config.json"), "quant_method": "gptq"}
        format = check_quantization_config(found) if found else None
        if found and format is None:
            raise Problem(
                f"{self.folder} is quantised by {found.get('quant_method', 'bitsandbytes')}, which this tool does not "
                f"read. Take the checkpoint in full precision, or GPTQ's."
            )
        return format

    def slice(self, name: str, *shape: int):
        """A weight that can be indexed by rows and columns; Problem if it is missing or has another shape."""
        if name not in self.places:
            raise Problem(f"The weight {name} is missing. Copy the weight files and their index again.")
        file = self.places[name]
        if file not in self.files:
            self.files[file] = open_weights(self.folder / file)
        found = self.files[file].get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise Problem(
                f"{name} is {tuple(found.get_shape())}, where config.json says {shape}. Compare them: both must come "
                f"from one checkpoint."
            )
        self.read.add(name)
        return found

    def changed(self, what: str, old: torch.Tensor, new: torch.Tensor, unit: torch.Tensor) -> None:
        change = (new.float() - old).abs() / unit.float().abs().clamp(min=torch.finfo(torch.float32).tiny)
        self.changes[what] = max(self.changes.get(what, 0.0), float(change.max()))

    def left_over(self) -> list[str]:
        """Names of weights that nothing has asked for, without what the published code stored and computes."""
        computed = re.compile("|".join(QWenLMHeadModel._keys_to_ignore_on_load_unexpected))
        return sorted(name for name in self.places.keys() - self.read if not computed.search(name))


def stored(name: str, weight: torch.Tensor, type: str) -> np.ndarray:
    """Weights in a type of GGUF that is asked for; Problem for values that it can't hold."""
    if type == "Q8_0":
        if not float(weight.abs().amax()) <= 127 * torch.finfo(torch.float16).max:
            raise Problem(f"{name} has values that q8_0 can't hold. Take --type bf16 or f32.")
        return gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    result = weight.to(DTYPES[type]).contiguous()
    if type == "F16" and not bool(torch.isfinite(result).all()):
        raise Problem(f"{name} has values that float16 can't hold. Take --type bf16 or f32.")
    return (result.view(torch.int16) if type == "BF16" else result).numpy()


def blocks(halves: list[torch.Tensor], codes: torch.Tensor) -> np.ndarray:
    """Bytes of quantised blocks. halves: each (rows, blocks), before the codes. codes: 8 bits (rows, blocks, n)."""
    parts = [half.to(torch.float16).contiguous()[..., None].view(torch.uint8) for half in halves]
    return torch.cat([*parts, codes.contiguous().view(torch.uint8)], -1).numpy()


def check_width(name: str, width: int, type: str) -> None:
    if width % BLOCK:
        raise Problem(f"{name} has {width} inputs, and {type} holds blocks of {BLOCK}. Take --type f16.")


def matrix(checkpoint: Checkpoint, ours: str, theirs: str, out: int, width: int, type: str | None) -> Tensor:
    """The matrix (out, in) of a module, in this type of GGUF; None: as it is stored."""
    if f"{ours}.qweight" in checkpoint.places:
        return gptq_matrix(checkpoint, ours, theirs, out, width, type)
    name = f"{ours}.weight"
    weight = checkpoint.slice(name, out, width)
    if weight.get_dtype() == "I8":
        return int8_matrix(checkpoint, ours, theirs, out, width, type)
    if weight.get_dtype() not in DTYPES:
        raise Problem(f"{name} is stored as {weight.get_dtype()}, which this tool does not read.")
    kept = type or weight.get_dtype()
    if kept == "Q8_0":
        check_width(name, width, "q8_0")
    return Tensor(f"{theirs}.weight", (out, width), kept, lambda first, last: stored(name, weight[first:last], kept))


def int8_matrix(checkpoint: Checkpoint, ours: str, theirs: str, out: int, width: int, type: str | None) -> Tensor:
    name = f"{ours}.weight"
    weight, scales = checkpoint.slice(name, out, width), checkpoint.slice(f"{name}_scale", out)
    if (type or "Q8_0") == "Q8_0":
        check_width(name, width, "q8_0")

    def rows(first: int, last: int) -> np.ndarray:
        codes, scale = weight[first:last], scales[first:last]
        if type is not None:
            return stored(name, codes.float() * scale[:, None], type)
        d = scale.half()
        if not bool(torch.isfinite(d).all()):
            raise Problem(f"{name} has scales that float16 can't hold. Take --type bf16 or f32.")
        checkpoint.changed("scales of int8 weights", scale, d, unit=scale)
        return blocks([d[:, None].expand(-1, width // BLOCK)], codes.unflatten(1, (-1, BLOCK)))

    return Tensor(f"{theirs}.weight", (out, width), type or "Q8_0", rows)


def gptq_matrix(checkpoint: Checkpoint, ours: str, theirs: str, out: int, width: int, type: str | None) -> Tensor:
    format = checkpoint.gptq
    if format is None:
        raise Problem(f"{ours} is quantised, but config.json has no quantization_config. Copy it again.")
    bits, n = format.bits, 32 // format.bits
    group_size = width if format.group_size == -1 else format.group_size
    groups = -(-width // group_size)
    qweight = checkpoint.slice(f"{ours}.qweight", width // n, out)
    qzeros = checkpoint.slice(f"{ours}.qzeros", groups, out // n)
    scales = checkpoint.slice(f"{ours}.scales", groups, out)
    shifts = torch.arange(0, 32, bits)

    def zeros(first: int, last: int) -> torch.Tensor:  # (groups, rows)
        packed = qzeros[:, first // n : last // n]
        return (packed[:, :, None] >> shifts & 2**bits - 1).flatten(1) + format.zero_offset & 2**bits - 1

    def codes(first: int, last: int) -> torch.Tensor:  # (in, rows)
        return (qweight[:, first:last][:, None] >> shifts[:, None] & 2**bits - 1).flatten(0, 1)

    ordered = torch.arange(width) // group_size
    group = ordered
    if f"{ours}.g_idx" in checkpoint.places:
        group = checkpoint.slice(f"{ours}.g_idx", width)[:].long()
        if not 0 <= int(group.min()) <= int(group.max()) < groups:
            raise Problem(f"{ours}.g_idx names groups that there are not. Copy the weight files again.")
    elif format.desc_act:
        raise Problem(f"The weight {ours}.g_idx is missing, which desc_act needs. Copy the weight files again.")

    if type is not None:
        if type == "Q8_0":
            check_width(ours, width, "q8_0")

        def dequantised(first: int, last: int) -> np.ndarray:
            weight = (codes(first, last) - zeros(first, last)[group]) * scales[:, first:last].float()[group]
            return stored(ours, weight.t(), type)

        return Tensor(f"{theirs}.weight", (out, width), type, dequantised)

    if not torch.equal(group, ordered):
        raise Problem(
            f"{ours} was quantised with desc_act: neighbouring inputs have different scales, for which GGUF has no "
            f"layout. Take --type q8_0 or f16, which rounds the weights again."
        )
    check_width(ours, width, f"a type of {bits} bits")
    if group_size % BLOCK and groups > 1:
        raise Problem(
            f"{ours} has groups of {group_size}, which blocks of {BLOCK} do not fit. Take --type q8_0 or f16."
        )
    middle = 2 ** (bits - 1)
    symmetric = bool((zeros(0, out) == middle).all())
    if bits == 8 and not symmetric:
        raise Problem(
            f"{ours} has zeros other than 128, and GGUF has no layout for 8 bits with a minimum. Take --type f16, "
            f"which rounds the weights again."
        )
    kept = "Q8_0" if bits == 8 else "Q4_0" if symmetric else "Q4_1"
    block_group = torch.arange(0, width, BLOCK) // group_size

    def rows(first: int, last: int) -> np.ndarray:
        q = codes(first, last).t().unflatten(1, (-1, BLOCK))  # (rows, blocks, 32)
        scale = scales[:, first:last]
        d = scale[block_group].t()
        if bits == 8:
            return blocks([d], (q - middle).to(torch.int8))
        halves = [d]
        if not symmetric:
            exact = -scale.float() * zeros(first, last)
            m = exact.half()
            checkpoint.changed("minima of 4-bit weights", exact, m, unit=scale)
            halves.append(m[block_group].t())
        q = q.to(torch.uint8)
        return blocks(halves, q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4)

    return Tensor(f"{theirs}.weight", (out, width), kept, rows)


def vector(checkpoint: Checkpoint, ours: str, theirs: str, size: int) -> Tensor:
    """A bias or the weight of a norm, which llama.cpp wants in float32."""
    weight = checkpoint.slice(ours, size)
    return Tensor(theirs, (size,), "F32", lambda first, last: weight[first:last].float().numpy())


def tensors(checkpoint: Checkpoint, type: str | None) -> Iterator[Tensor]:
    """All tensors of llama.cpp's "qwen"; Problem for a weight that is missing, left over, or that it does not add."""
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.intermediate_size // 2
    yield matrix(checkpoint, "transformer.wte", "token_embd", config.vocab_size, hidden, type)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"transformer.h.{i}", f"blk.{i}"
        yield vector(checkpoint, f"{ours}.ln_1.weight", f"{theirs}.attn_norm.weight", hidden)
        yield vector(checkpoint, f"{ours}.attn.c_attn.bias", f"{theirs}.attn_qkv.bias", 3 * hidden)
        yield vector(checkpoint, f"{ours}.ln_2.weight", f"{theirs}.ffn_norm.weight", hidden)
        for module, name, out, width in (
            ("attn.c_attn", "attn_qkv", 3 * hidden, hidden),
            ("attn.c_proj", "attn_output", hidden, hidden),
            ("mlp.w1", "ffn_up", inner, hidden),
            ("mlp.w2", "ffn_gate", inner, hidden),
            ("mlp.c_proj", "ffn_down", hidden, inner),
        ):
            yield matrix(checkpoint, f"{ours}.{module}", f"{theirs}.{name}", out, width, type)
            bias = f"{ours}.{module}.bias"
            has_bias = module != "attn.c_attn" and (bias in checkpoint.places or not config.no_bias)
            if has_bias and bool(checkpoint.slice(bias, out)[:].any()):  # GPTQ stores zeros
                raise Problem(f"{bias} is not zero, and llama.cpp adds no bias there.")
    yield vector(checkpoint, "transformer.ln_f.weight", "output_norm.weight", hidden)
    head = "transformer.wte" if config.tie_word_embeddings else "lm_head"
    yield matrix(checkpoint, head, "output", config.vocab_size, hidden, type)
    if config.tie_word_embeddings:
        checkpoint.read.add("lm_head.weight")
    left_over = checkpoint.left_over()
    if left_over:
        raise Problem(f"{len(left_over)} weights have no place in the model, such as {left_over[0]}.")


# --- Everything else ---------------------------------------------------------------------------------------------


def vocabulary(tokenizer, rows: int) -> tuple[list[str], list[int], list[str]]:
    """
    Tokens by id, as many as the model has rows; their types; merges, in the order of ranks.

    Bytes are written in the alphabet of GPT-2. Ids without a token get a name of their own and are never made of text.
    """
    if max(tokenizer.decoder) >= rows:
        raise Problem(f"The vocabulary has the id {max(tokenizer.decoder)}, and the model only {rows} embeddings.")
    alphabet = byte_alphabet()

    def text(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    names, types = [], []
    for index in range(rows):
        token = tokenizer.decoder.get(index)
        if token is None:
            names.append(f"[PAD{index}]")
            types.append(gguf.TokenType.UNUSED)
        elif isinstance(token, str):
            names.append(token)
            types.append(gguf.TokenType.CONTROL)
        else:
            names.append(text(token))
            types.append(gguf.TokenType.NORMAL)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Problem(f"The vocabulary has two tokens that read {twice[0]}, which llama.cpp can't tell apart.")
    merges = [f"{text(left)} {text(right)}" for left, right in recovered_pairs(tokenizer.mergeable_ranks)]
    return names, types, merges


def check_config(config) -> None:
    """Problem for a model that llama.cpp would compute in another way."""
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        raise Problem(
            f"{config.num_attention_heads} heads of {config.kv_channels} channels are not hidden_size "
            f"({config.hidden_size}), which llama.cpp takes for granted."
        )
    if not config.scale_attn_weights:
        raise Problem("config.json has scale_attn_weights false, and llama.cpp always scales attention scores.")


def describe(writer, checkpoint: Checkpoint, tokenizer, matrices: Counter) -> None:
    """Write into the header what llama.cpp wants to know, and print what it will do in another way."""
    config = checkpoint.config
    length = config.max_position_embeddings
    if config.use_dynamic_ntk or config.use_logn_attn:
        length = config.seq_length
        print(f"note: llama.cpp has no dynamic NTK and no LogN; the context ends where they would begin, at {length}")
    common = matrices.most_common(1)[0][0]
    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if common == "F32" else f"MOSTLY_{common}"])
    if common.startswith("Q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(length)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)  # of both halves, as ours
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_freq_base(config.rotary_emb_base)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)

    names, types, merges = vocabulary(tokenizer, config.vocab_size)
    unmade = len(tokenizer.mergeable_ranks) - 256 - len(merges)
    if unmade:
        print(f"note: no merges lead to {unmade} of the tokens; llama.cpp never makes them of text, ours does")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # the pattern that splits text is the same
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    path = checkpoint.folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    ends = settings.get("eos_token_id") or tokenizer.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    if not isinstance(end, int) or not 0 <= end < config.vocab_size:
        raise Problem(f"{path.name}: eos_token_id must be the id of a token or a list of ids, found {ends!r}.")
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.eod_id)  # else it would be 11
    writer.add_add_bos_token(False)
    if settings.get("chat_format") == "chatml":
        writer.add_eot_token_id(tokenizer.im_end_id)
        template = tokenizer.chat_template  # the default one in the form that every program reads
        writer.add_chat_template(
            tokenization_qwen.PLAIN_CHAT_TEMPLATE if template == tokenization_qwen.CHAT_TEMPLATE else template
        )


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A name to write under, `.NAME.new`, that becomes `target` in one step if the block is left without an error."""
    if target.exists():
        raise Problem(f"{target} exists. Name a file that does not exist yet.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.new")
    partial.touch()
    with only_run(partial, target):
        try:
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                partial.unlink()
            raise


def read_type(text: str) -> str:
    """The name of a type, one of TYPES, for a precision under any of its names."""
    return OF_PYTORCH.get(precision(text), text)


def export(source: Path, target: Path, type: str | None) -> None:
    if gguf is None:
        raise Problem("This tool needs the package gguf: python -m pip install gguf")
    checkpoint = Checkpoint(source)
    check_config(checkpoint.config)
    tokenizer = load_tokenizer(source)
    planned = list(tensors(checkpoint, type and type.upper()))
    matrices = Counter(tensor.type for tensor in planned if tensor.name.startswith("blk.") and len(tensor.shape) == 2)
    with new_file(target) as partial:
        needed, free = sum(tensor.nbytes for tensor in planned), shutil.disk_usage(partial.parent).free
        if needed > free:
            raise Problem(f"The file takes {needed / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB of room.")
        writer = gguf.GGUFWriter(partial, "qwen")
        try:
            describe(writer, checkpoint, tokenizer, matrices)
            for tensor in planned:
                type_of_it = gguf.GGMLQuantizationType[tensor.type]
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, type_of_it)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tqdm(planned, desc="writing", unit="tensor", disable=None):
                writer.write_tensor_data(tensor)
        finally:
            writer.close()
    for what, change in checkpoint.changes.items():
        unit = "of a step" if what.startswith("minima") else "of their size"
        print(f"note: {what} were rounded to float16: by at most {change:.2%} {unit}")
    kinds = ", ".join(f"{count} matrices in {kind.lower()}" for kind, count in matrices.items())
    print(f"{target}: {kinds}, {target.stat().st_size / 1e9:.2f} GB")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint as one GGUF file, for llama.cpp.",
        epilog="llama.cpp does not normalise text to NFC, as our tokenizer does, and has no dynamic NTK and no LogN.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint, in safetensors")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument(
        "--type", type=read_type, choices=TYPES, help="of all matrices; by default each as it is stored"
    )
    args = parser.parse_args(arguments)
    return exit_status(export, args.checkpoint, args.output, args.type)


if __name__ == "__main__":
    sys.exit(main())
