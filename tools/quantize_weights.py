"""
Make a checkpoint with weights of 8 or 4 bits: a half or a quarter of the memory, and faster decoding.

    python tools/quantize_weights.py SOURCE TARGET                                       int8
    python tools/quantize_weights.py SOURCE TARGET --bits 4 --calibration TEXT           GPTQ, as Qwen-*-Chat-Int4
    python tools/quantize_weights.py SOURCE TARGET --bits 8 --method rtn                 the same format, rounded only

SOURCE is the folder of a checkpoint in safetensors, TARGET a folder that does not exist yet; it gets this code and
loads like any other checkpoint.

Without --bits every matrix but the embedding is stored as int8 with a scale, float32, for each output channel: the
largest magnitude of the channel is 127 steps. One weight file is read at a time.

With --bits the matrices of the blocks are stored in the format of GPTQ, 4 or 8 bits with a scale, float16, for each
output and --group-size inputs, the rest in float16. --method gptq rounds so that the outputs for the calibration text
change least, rtn each weight to the nearest. --lm-head does so with the output layer, too, which published checkpoints
leave in float16. One block at a time is in memory. A run that was stopped goes on where it was when it is started again
with the same arguments.

Exit status: 0 done; 2 the checkpoint has a problem, or TARGET can't be written, and there is no TARGET.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from checkpoint_files import (
    INDEX,
    Problem,
    advice_about_name,
    check_folder,
    copy_companions,
    exit_status,
    from_code,
    full_precision_config,
    new_folder,
    open_weights,
    save_weights,
    weight_files,
    write_file,
)
from gptq import make as make_gptq
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from upgrade_checkpoint import check_weights, planned, try_loading

round_to_int8 = from_code("qwen_quantization.round_to_int8")


def quantize_file(source: Path, target: Path, names: set[str]) -> dict[str, int]:
    """Write one weight file, the matrices in `names` quantised; returns the bytes of each tensor written."""
    tensors = {}
    with open_weights(source) as weights:
        for name in tqdm(weights.keys(), desc=source.name, unit="tensor", leave=False, disable=None):
            tensors[name] = weights.get_tensor(name)
            if name in names:
                try:
                    tensors[name], tensors[f"{name}_scale"] = round_to_int8(tensors[name])
                except ValueError as error:
                    raise Problem(f"{name} can't be rounded: {error}. Copy {source.name} again.") from None
    save_weights(tensors, target)
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def int8_names(folder: Path) -> set[str]:
    """The weights that are int8 in a model of the checkpoint in this folder."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.int8}


def make(source: Path, target: Path) -> None:
    check_folder(source)
    if target.exists():
        raise Problem(f"{target} exists. Name a folder that does not exist yet.")
    config = full_precision_config(source)
    if config.get("tie_word_embeddings"):
        raise Problem(
            "The output layer of this checkpoint is its embedding, which int8 does not go with. Take --bits 8."
        )
    files = [source / name for name in weight_files(source)]
    if not all(file.suffix == ".safetensors" for file in files):
        raise Problem(f"{source} has no .safetensors. Load it and call save_pretrained, which writes them.")
    print(check_weights(source))

    with new_folder(target) as partial:
        copy_companions(source, partial)
        write_file(partial / "config.json", (json.dumps({**config, "int8_weights": True}, indent=2) + "\n").encode())
        for name, content in planned(partial).items():
            write_file(partial / name, content)
        try_loading(partial)
        names = int8_names(partial)
        sizes, places = {}, {}
        for file in tqdm(files, desc="weight files", unit="file", disable=None):
            written = quantize_file(file, partial / file.name, names)
            sizes.update(written)
            places.update(dict.fromkeys(written, file.name))
        if [file.name for file in files] != ["model.safetensors"]:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            write_file(partial / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    before = sum(file.stat().st_size for file in files)
    print(f"{target}: {len(names)} matrices in int8, {before / 1e9:.2f} GB became {sum(sizes.values()) / 1e9:.2f}")
    advice = advice_about_name(target)
    if advice is not None:
        print(f"advice: {advice}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a checkpoint with weights of 8 or 4 bits.")
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("target", type=Path, help="the folder to make")
    gptq = parser.add_argument_group("GPTQ")
    gptq.add_argument("--bits", type=int, choices=(4, 8), help="write the format of GPTQ with so many bits")
    gptq.add_argument("--method", choices=("gptq", "rtn"), default="gptq", help="default: %(default)s")
    gptq.add_argument("--group-size", type=int, default=128, help="inputs with one scale, -1: all (default: 128)")
    gptq.add_argument("--calibration", type=Path, metavar="FILE", help="plain text, .json or .jsonl of conversations")
    gptq.add_argument("--samples", type=int, default=128, help="of the calibration text (default: %(default)s)")
    gptq.add_argument("--length", type=int, default=2048, help="tokens of a sample (default: %(default)s)")
    gptq.add_argument("--asymmetric", action="store_true", help="a zero of its own for each group")
    gptq.add_argument("--desc-act", action="store_true", help="take the inputs that matter most first")
    gptq.add_argument("--lm-head", action="store_true", help="the output layer, too")
    gptq.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    args = parser.parse_args(arguments)
    options = {key: value for key, value in vars(args).items() if key not in ("source", "target", "bits")}
    if args.bits is None and any(value != parser.get_default(key) for key, value in options.items()):
        parser.error("the options of GPTQ need --bits 4 or --bits 8")
    if args.group_size != -1 and args.group_size < 1:
        parser.error(f"--group-size must be -1 or positive, found {args.group_size}")
    if args.samples < 1 or args.length < 1:
        parser.error("--samples and --length must be at least 1")
    if args.bits is None:
        return exit_status(make, args.source, args.target)
    sym = not options.pop("asymmetric")
    return exit_status(partial(make_gptq, bits=args.bits, sym=sym, **options), args.source, args.target)


if __name__ == "__main__":
    sys.exit(main())
