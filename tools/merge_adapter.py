"""
Merge a LoRA adapter into its base: a checkpoint of its own, which needs no peft.

    python tools/merge_adapter.py ADAPTER TARGET [--base BASE] [--dtype float32]

ADAPTER is a folder that finetune/finetune.py, the published script or peft has written, TARGET a folder that does not
exist yet. BASE is the folder of a checkpoint in safetensors; by default the one that the adapter names. After Q-LoRA
name the checkpoint in full precision: a merged matrix does not fit into 4 bits again. One weight file is read at a
time; sums are computed in float32 and stored in the base's precision, or in that of --dtype.

Exit status: 0 done; 2 adapter or base have a problem, or TARGET can't be written, and there is no TARGET.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import torch
from checkpoint_files import (
    ADAPTER,
    INDEX,
    Problem,
    check_folder,
    copy_companions,
    exit_status,
    full_precision_config,
    new_folder,
    open_weights,
    precision,
    read_json,
    save_weights,
    weight_shapes,
    write_file,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from upgrade_checkpoint import planned, try_loading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What peft may have done besides `weight + scale * B @ A`.
NOT_PLAIN = (
    *("use_dora", "use_bdlora", "use_qalora", "lora_bias", "fan_in_fan_out", "alpha_pattern", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "velora_config"),
)
# Ways to begin by which peft takes something out of the base: what was trained is added to another matrix.
CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
EMBEDDING_AND_HEAD = ("transformer.wte.weight", "lm_head.weight")
# What torch.load raises, by where a file is damaged or what else it holds.
DAMAGED = (pickle.UnpicklingError, struct.error, EOFError, RuntimeError, LookupError, TypeError, ValueError)
BY_PEFT = "Merge it with peft: PeftModel.from_pretrained(...).merge_and_unload()."


def read_adapter(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The adapter's configuration and its tensors, under the names that they have in the base."""
    check_folder(folder, holds=ADAPTER)
    config = read_json(folder / ADAPTER)
    if config.get("peft_type") != "LORA":
        raise Problem(f"{folder} is an adapter of the type {config.get('peft_type')!r}; only LoRA can be merged here.")
    special = [name for name in NOT_PLAIN if config.get(name)]
    if special:
        raise Problem(f"{folder} has {special[0]}={config[special[0]]!r}, which is not plain LoRA. {BY_PEFT}")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGING_THE_BASE):
        raise Problem(f"{folder} has init_lora_weights={begun!r}, by which peft changes the base too. {BY_PEFT}")
    if (folder / "adapter_model.safetensors").exists():
        try:
            tensors = load_file(folder / "adapter_model.safetensors")
        except SafetensorError as error:
            raise Problem(f"{folder}/adapter_model.safetensors is damaged ({error}). Copy it again.") from None
    elif (folder / "adapter_model.bin").exists():
        try:
            tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
            tensors = {name: tensors[name] for name in tensors}
        except DAMAGED as error:
            kind = type(error).__name__
            raise Problem(f"{folder}/adapter_model.bin can't be read ({kind}). Copy it again.") from None
    else:
        raise Problem(f"{folder} has no adapter_model.safetensors. Is the training that wrote it over?")
    return config, {
        re.sub(r"^base_model\.model\.", "", name).replace(".base_layer.", "."): t for name, t in tensors.items()
    }


def changes(config: dict, tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """
    For each weight of the base that changes: its new value or None, and (B, A, scale) of what is added or None.

    Raises Problem for a tensor that is none of these.
    """
    changed = {name: (tensor, None) for name, tensor in tensors.items() if ".lora_" not in name}
    factors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    alpha = config.get("lora_alpha")
    if factors and type(alpha) not in (int, float):
        raise Problem(f"The adapter's {ADAPTER} has lora_alpha={alpha!r}, not a number. Copy it again.")
    for suffix in (".lora_A.weight", ".lora_embedding_A"):
        for name in [name for name in factors if name.endswith(suffix)]:
            module, other = name[: -len(suffix)], name.replace(suffix, suffix.replace("_A", "_B"))
            if other not in factors:
                raise Problem(f"The adapter has {name}, but not {other}. Copy it again.")
            a, b = factors.pop(name), factors.pop(other)
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise Problem(f"{name} and {other} are {shapes}, which are no factors of one matrix. Copy it again.")
            rank = a.shape[0]
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            # peft saves the weight of an adapted embedding or head too.
            new, _ = changed.get(f"{module}.weight", (None, None))
            # An embedding (vocabulary, width) is used turned round: its factors are (rank, vocabulary), (width, rank).
            b, a = (b, a) if suffix == ".lora_A.weight" else (a.t(), b.t())
            changed[f"{module}.weight"] = (new, (b, a, scale))
    if factors:
        raise Problem(f"The adapter has {sorted(factors)[0]}, which is not plain LoRA. {BY_PEFT}")
    return changed


def merged(name: str, weight: torch.Tensor, new: torch.Tensor | None, added: tuple | None) -> torch.Tensor:
    """weight: (out, in). Returns it changed, in float32; Problem if the change has another shape."""
    shapes = [] if new is None else [tuple(new.shape)]
    if added is not None:
        b, a, scale = added
        shapes.append((b.shape[0], a.shape[1]))
    wrong = [shape for shape in shapes if shape != tuple(weight.shape)]
    if wrong:
        raise Problem(f"{name} is {wrong[0]} in the adapter and {tuple(weight.shape)} in the base.")
    weight = (weight if new is None else new).float()
    weight = weight if added is None else weight + scale * (b.float() @ a.float())
    if not bool(torch.isfinite(weight).all()):
        raise Problem(f"{name} would hold numbers that are not finite: the training diverged, or a file is damaged.")
    return weight


def make(adapter: Path, target: Path, base: Path | None = None, dtype: str | None = None) -> None:
    config, tensors = read_adapter(adapter)
    base = Path(config.get("base_model_name_or_path") or "") if base is None else base
    if not base.is_dir() or base == Path():
        raise Problem(f"There is no folder {base}, the adapter's base. Name it with --base.")
    check_folder(base)
    base_config = full_precision_config(base, " with --base")
    changed, files = changes(config, tensors), weight_shapes(base)
    if base_config.get("tie_word_embeddings") and any(name in changed for name in EMBEDDING_AND_HEAD):
        raise Problem(
            f"The head of {base} is its embedding, and the adapter changes them apart: merged, they would be one "
            f"again. Use the adapter as it is."
        )
    lost = sorted(set(changed) - {name for names in files.values() for name in names})
    if lost or not changed:
        what = f"{len(lost)} weights of the adapter ({lost[0]}, ...)" if lost else "The adapter's weights"
        raise Problem(f"{what} have no place in {base}. Is it the adapter's base?")

    with new_folder(target) as partial:
        copy_companions(base, partial)
        if (adapter / "generation_config.json").exists():  # a base model tuned to chat has become one
            shutil.copy2(adapter / "generation_config.json", partial)
        if dtype is not None:
            base_config = {**base_config, "torch_dtype": dtype, **({"dtype": dtype} if "dtype" in base_config else {})}
            write_file(partial / "config.json", (json.dumps(base_config, indent=2) + "\n").encode())
        for name, content in planned(partial).items():
            write_file(partial / name, content)
        try_loading(partial)
        size = 0
        for file, names in tqdm(files.items(), desc="weight files", unit="file", disable=None):
            written = {}
            with open_weights(base / file) as weights:
                for name in names:
                    weight = weights.get_tensor(name)
                    kind = weight.dtype if dtype is None or not weight.is_floating_point() else DTYPES[dtype]
                    if name in changed:
                        weight = merged(name, weight, *changed[name])
                    written[name] = weight.to(kind).contiguous()
            save_weights(written, partial / file)
            size += sum(tensor.numel() * tensor.element_size() for tensor in written.values())
        if list(files) != ["model.safetensors"]:  # beside which an index would name other files
            places = {name: file for file, names in files.items() for name in names}
            index = {**read_json(base / INDEX), "metadata": {"total_size": size}, "weight_map": places}
            write_file(partial / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    print(f"{target}: {len(changed)} weights of {base} changed, {size / 1e9:.2f} GB")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into its base.")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("target", type=Path, help="the folder to make")
    parser.add_argument("--base", type=Path, help="folder of the base; by default the one that the adapter names")
    parser.add_argument("--dtype", type=precision, choices=DTYPES, help="precision to store; by default the base's")
    args = parser.parse_args(arguments)
    return exit_status(make, args.adapter, args.target, args.base, args.dtype)


if __name__ == "__main__":
    sys.exit(main())
