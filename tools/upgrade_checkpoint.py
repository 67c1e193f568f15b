"""
Put this code into a checkpoint folder that has the published one.

    python tools/upgrade_checkpoint.py PATH              say what would change, and whether the files fit together
    python tools/upgrade_checkpoint.py PATH --write      do it; what is replaced is kept in a dated folder inside
    python tools/upgrade_checkpoint.py PATH --restore    undo the last --write exactly
    python tools/upgrade_checkpoint.py PATH --copy-to NEW    make an upgraded copy, for folders of a shared cache

Exit status: 0 nothing to do, or done; 1 there is something to do (--check); 2 the checkpoint has a problem, or the
folder can't be written. Weights are never written, and never read beyond their headers.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent.parent
# In the order of writing: until modeling_qwen.py is replaced the old model runs with the new modules beside it, which
# have every name that it imports, but those of the published cpp_kernels.py, whose lack it takes for a lack of kernels;
# from then on everything is new. So a checkpoint loads whenever writing stops.
MODULES = (
    "cpp_kernels.cpp",
    "cpp_kernels.py",
    "triton_kernels.py",
    "transformers_compat.py",
    "qwen_cache.py",
    "qwen_loss.py",
    "configuration_qwen.py",
    "qwen_generation_utils.py",
    "tokenization_qwen.py",
    "modeling_qwen.py",
)
AUTO_MAPS = {"config.json": ROOT / "config.json", "tokenizer_config.json": ROOT / "tokenizer_config.json"}
VOCABULARY = "qwen.tiktoken"
OFFICIAL_VOCABULARY = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
BACKUP_PREFIX = "before_upgrade_"
MANIFEST = "manifest.json"


class Problem(Exception):
    """Something the user has to look at; the message says what was found and what to do."""


# --- Reading -----------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{path.name} is missing. It comes with the checkpoint; copy it into the folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Problem(f"{path.name} is not valid JSON ({error}). Copy it again.") from None


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...] | None]:
    """
    Names of the weights with their shapes; None where only an index of .bin files tells the name, and nothing for a
    single .bin file: it would have to be unpickled, which can execute anything.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        by_file: dict[str, set[str]] = {}
        for name, file in read_json(index)["weight_map"].items():
            by_file.setdefault(file, set()).add(name)
    elif (folder / "model.safetensors").exists():
        by_file = {"model.safetensors": set()}
    elif (folder / "pytorch_model.bin.index.json").exists():
        weight_map = read_json(folder / "pytorch_model.bin.index.json")["weight_map"]
        lacking = sorted({file for file in weight_map.values() if not (folder / file).exists()})
        if lacking:
            raise Problem(f"{len(lacking)} weight files are missing: {', '.join(lacking[:4])}. Copy them again.")
        return dict.fromkeys(weight_map)
    elif (folder / "pytorch_model.bin").exists():
        return {}
    else:
        raise Problem("There are no weights: neither model.safetensors nor pytorch_model.bin nor an index of files.")

    shapes: dict[str, tuple[int, ...] | None] = {}
    for file, names in tqdm(sorted(by_file.items()), desc="weight headers", unit="file", disable=len(by_file) < 2):
        try:
            with safe_open(folder / file, framework="pt") as weights:
                found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise Problem(f"The weight file {file} is missing. Copy it again.") from None
        except SafetensorError as error:
            raise Problem(f"The weight file {file} is damaged ({error}). Copy it again.") from None
        if names - found.keys():
            raise Problem(f"{file} lacks {sorted(names - found.keys())[0]}, which the index says is in it.")
        shapes.update(found)
    return shapes


def check_weights(folder: Path) -> str:
    """Compare the weights with what the configuration makes of our model; a line that says they fit."""
    config_class = get_class_from_dynamic_module("configuration_qwen.QWenConfig", str(ROOT))
    model_class = get_class_from_dynamic_module("modeling_qwen.QWenLMHeadModel", str(ROOT))
    try:
        config = config_class.from_dict(read_json(folder / "config.json"))
    except ValueError as error:
        raise Problem(f"config.json: {error}") from None
    if getattr(config, "quantization_config", None):
        return "weights: quantised, not compared"
    with init_empty_weights():
        expected = {name: tuple(p.shape) for name, p in model_class(config).named_parameters()}
    found = weight_shapes(folder)
    if not found:
        return "weights: in pytorch_model.bin, which is not opened"
    ours = {name for name in found if name.startswith(("transformer.", "lm_head."))}
    computed = re.compile("|".join(model_class._keys_to_ignore_on_load_unexpected))
    for names, what in (
        (expected.keys() - ours, "are missing"),
        ({name for name in ours - expected.keys() if not computed.search(name)}, "have no place in the model"),
        (
            {name for name in ours & expected.keys() if found[name] not in (None, expected[name])},
            "have another shape than config.json says",
        ),
    ):
        if names:
            name = sorted(names)[0]
            shapes = f": {found[name]}, not {expected[name]}" if name in expected and name in found else ""
            raise Problem(f"{len(names)} weights {what}, such as {name}{shapes}. Compare config.json with the weights.")
    return f"weights: all {len(expected)} are there" + (
        ", in the shapes of config.json" if None not in found.values() else ""
    )


def check_vocabulary(folder: Path) -> str:
    """A line about the vocabulary; Problem if it is damaged or larger than the model's."""
    path = folder / VOCABULARY
    load = get_class_from_dynamic_module("tokenization_qwen.load_tiktoken_bpe", str(ROOT))
    try:
        ranks = load(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise Problem(str(error)) from None
    size, rows = len(ranks) + 208, read_json(folder / "config.json").get("vocab_size", 0)
    if size > rows:
        raise Problem(f"{VOCABULARY} has {size} tokens with the special ones, more than the model's {rows} embeddings.")
    official = file_digest(path) == OFFICIAL_VOCABULARY
    return f"vocabulary: {size} tokens, {'the official one' if official else 'not the official one'}"


# --- What would change -------------------------------------------------------------------------------------------


def merged_auto_map(text: str, auto_map: dict) -> str:
    """The text of a JSON object with these entries in its "auto_map", everything else to the letter as it was."""
    old = json.loads(text)
    merged = {**old.get("auto_map", {}), **auto_map}
    if old.get("auto_map") == merged:
        return text
    indent = re.search(r'^([ \t]+)"', text, re.MULTILINE)
    step = indent.group(1) if indent else "  "
    value = json.dumps(merged, indent=step).replace("\n", "\n" + step)
    decoder = json.JSONDecoder()
    key = re.search(r'"auto_map"\s*:\s*', text)
    if key:
        _, end = decoder.raw_decode(text, key.end())
        return text[: key.end()] + value + text[end:]
    start = text.index("{") + 1
    return f'{text[:start]}\n{step}"auto_map": {value}{"," if old else ""}{text[start:] if old else chr(10) + "}"}'


def planned(folder: Path) -> dict[str, bytes]:
    """Files to write, in order, with their new content; empty when everything is as it should be."""
    contents = {name: (ROOT / name).read_bytes() for name in MODULES}
    for name, source in AUTO_MAPS.items():
        read_json(folder / name)
        text = (folder / name).read_text(encoding="utf-8")
        contents[name] = merged_auto_map(text, json.loads(source.read_text(encoding="utf-8"))["auto_map"]).encode()
    return {
        name: content
        for name, content in contents.items()
        if not (folder / name).exists() or (folder / name).read_bytes() != content
    }


def inspect(folder: Path) -> dict[str, bytes]:
    """Print what is found and what would change; returns the plan."""
    print(check_weights(folder))
    print(check_vocabulary(folder))
    plan = planned(folder)
    for name in plan:
        print(f"{'would replace' if (folder / name).exists() else 'would add':13} {name}")
    settings = folder / "generation_config.json"
    if settings.exists():
        values = read_json(settings)
        eos = values.get("eos_token_id")
        if values.get("chat_format") == "chatml" and isinstance(eos, int):
            print(
                f"advice: generation_config.json ends sequences at {eos} only; for pipelines and servers "
                f'set "eos_token_id": [{eos}, {eos + 2}], so that an answer ends with <|im_end|>'
            )
    return plan


# --- Writing -----------------------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def refuse_links(folder: Path, names) -> None:
    linked = [name for name in names if (folder / name).is_symlink()]
    inside = folder.resolve().parent
    if linked or (inside.name == "snapshots" and inside.parent.name.startswith("models--")):
        what = f"{linked[0]} is a symbolic link" if linked else "the folder is a snapshot of a hub cache"
        raise Problem(
            f"{what}: writing here would change files that other programs share. "
            f"Make an upgraded copy instead: --copy-to NEW_FOLDER."
        )


def backups(folder: Path) -> list[Path]:
    """Folders with what earlier runs replaced, the latest last."""
    return sorted(path for path in folder.glob(BACKUP_PREFIX + "*") if (path / MANIFEST).exists())


def remove_leftovers(folder: Path) -> None:
    """What a killed run left half-written, under the names that only this program uses."""
    for name in (*MODULES, *AUTO_MAPS):
        (folder / f".{name}.new").unlink(missing_ok=True)
    for path in (*folder.glob(f".{BACKUP_PREFIX}*"), *folder.glob(f"{BACKUP_PREFIX}*/.{MANIFEST}.new")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(folder: Path, plan: dict[str, bytes]) -> None:
    """Carry out the plan. A run that was interrupted is continued: its backup has the originals."""
    refuse_links(folder, plan)
    remove_leftovers(folder)
    unfinished = [path for path in backups(folder) if not read_json(path / MANIFEST)["finished"]]
    if unfinished:
        backup = unfinished[-1]
        manifest = read_json(backup / MANIFEST)
        if not {*manifest["replaced"], *manifest["added"]} >= plan.keys():
            raise Problem(f"{backup.name} is of an interrupted run with other files; --restore first, then --write.")
    else:
        replaced = [name for name in plan if (folder / name).exists()]
        manifest = {
            "replaced": replaced,
            "added": [name for name in plan if name not in replaced],
            "finished": False,
        }
        backup = folder / f"{BACKUP_PREFIX}{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
        temporary = folder / f".{backup.name}"
        temporary.mkdir()
        for name in replaced:
            shutil.copy2(folder / name, temporary / name)
        write_file(temporary / MANIFEST, json.dumps(manifest, indent=2).encode())
        os.rename(temporary, backup)
    written = {name: hashlib.sha256(content).hexdigest() for name, content in plan.items()}
    manifest["written"] = {**manifest.get("written", {}), **written}
    write_file(backup / MANIFEST, json.dumps(manifest, indent=2).encode())
    for name, content in plan.items():
        write_file(folder / name, content)
        print(f"wrote {name}")
    write_file(backup / MANIFEST, json.dumps({**manifest, "finished": True}, indent=2).encode())
    print(f"what was replaced is in {backup.name}")


def restore(folder: Path) -> None:
    """Undo the last --write: the old model first, so that the folder loads whenever this stops."""
    if not backups(folder):
        remove_leftovers(folder)
        raise Problem("There is nothing to restore: no folder " + BACKUP_PREFIX + "... with a manifest.")
    backup = backups(folder)[-1]
    manifest = read_json(backup / MANIFEST)
    written = manifest.get("written", {})
    refuse_links(folder, written)
    for name, digest in written.items():
        path, original = folder / name, backup / name
        known = {digest} | ({file_digest(original)} if original.exists() else set())
        if path.exists() and file_digest(path) not in known:
            raise Problem(f"{name} was changed after the upgrade. Rename it to keep it, then --restore again.")
    remove_leftovers(folder)
    for name in reversed(manifest["replaced"]):
        temporary = folder / f".{name}.new"
        shutil.copy2(backup / name, temporary)
        os.replace(temporary, folder / name)
        print(f"restored {name}")
    for name in reversed(manifest["added"]):
        (folder / name).unlink(missing_ok=True)
        print(f"removed {name}")
    os.rename(backup, folder / f".{backup.name}")  # in one step: half a backup could not be restored again
    remove_leftovers(folder)


def copy_to(folder: Path, target: Path) -> None:
    """A copy with real files; weights are hard links where the file system allows, which costs no space."""
    if target.exists() and any(target.iterdir()):
        raise Problem(f"{target} is not empty. Name a folder that does not exist yet.")
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in tqdm(files, desc="copying", unit="file"):
        source, to = path.resolve(), target / path.name
        if path.suffix in (".safetensors", ".bin"):
            try:
                os.link(source, to)
                continue
            except OSError:
                pass  # another file system
        shutil.copy2(source, to)


def try_loading(folder: Path) -> None:
    """Load configuration, tokenizer and, without its weights, the model, as a user would."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    except Exception as error:
        raise Problem(f"The folder does not load ({type(error).__name__}: {error}). --restore undoes it.") from error
    count = sum(p.numel() for p in model.parameters())
    print(f"loads: {type(model).__name__} with {count / 1e9:.2f} billion parameters, {len(tokenizer)} tokens")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put this code into a checkpoint folder that has the published one.")
    parser.add_argument("path", type=Path, help="folder of the checkpoint")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="only say what would change (default)")
    action.add_argument("--write", action="store_true", help="write this code into the folder")
    action.add_argument("--restore", action="store_true", help="undo the last --write")
    action.add_argument("--copy-to", type=Path, metavar="NEW", help="make an upgraded copy in the folder NEW")
    args = parser.parse_args(arguments)
    folder: Path = args.path
    try:
        if not folder.is_dir():
            raise Problem(f"There is no folder {folder}.")
        if args.restore:
            restore(folder)
            return 0
        plan = inspect(folder)
        if args.copy_to is not None:
            copy_to(folder, args.copy_to)
            folder = args.copy_to
            plan = planned(folder)
        elif not args.write:
            print("everything is up to date" if not plan else "run again with --write to do it")
            return 1 if plan else 0
        if plan:
            write(folder, plan)
        else:
            print("everything is up to date")
        try_loading(folder)
        return 0
    except (Problem, OSError) as problem:  # OSError names the file that can't be read or written
        print(f"problem: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
