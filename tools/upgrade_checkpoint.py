"""
Put this code into a checkpoint folder that has the published one.

    python tools/upgrade_checkpoint.py PATH              say what would change, and whether the files fit together
    python tools/upgrade_checkpoint.py PATH --write      do it; what is replaced is kept in a dated folder inside
    python tools/upgrade_checkpoint.py PATH --restore    undo the last --write exactly
    python tools/upgrade_checkpoint.py PATH --copy-to NEW    make an upgraded copy, for folders of a shared cache

--end-at-im-end, with each of them, has the generation_config.json of a chat model end answers at <|im_end|>, for
pipelines and servers.

Exit status: 0 nothing to do, or done; 1 there is something to do, and --write was not given; 2 the checkpoint has a
problem, or the folder can't be written: it is as it was then, and there is no NEW. Weights are never written, and never
read beyond their headers; --copy-to copies them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from accelerate import init_empty_weights
from checkpoint_files import (
    ROOT,
    Problem,
    advice_about_name,
    check_file_names,
    exit_status,
    from_code,
    new_folder,
    read_json,
    staged,
    weight_files,
    weight_shapes,
    with_value,
    write_file,
)
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# In the order of writing: until modeling_qwen.py is replaced the old model runs with the new modules beside it, which
# have every name that it imports, but those of the published cpp_kernels.py, whose lack it takes for a lack of kernels;
# from then on everything is new. So a checkpoint loads whenever writing stops.
MODULES = from_code("configuration_qwen.CODE_FILES")
AUTO_MAPS = {"config.json": ROOT / "config.json", "tokenizer_config.json": ROOT / "tokenizer_config.json"}
VOCABULARY, SETTINGS = "qwen.tiktoken", "generation_config.json"
OFFICIAL_VOCABULARY = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
BACKUP_PREFIX = "before_upgrade_"
MANIFEST, FINISHED = "manifest.json", "finished.json"  # the second takes the place of the first in the end


# --- Reading -----------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shapes_by_name(folder: Path) -> dict[str, tuple[int, ...] | None]:
    """
    Names of the weights with their shapes; None where only an index of .bin files tells the name, and nothing for a
    single .bin file: it would have to be unpickled, which can execute anything.
    """
    files = weight_files(folder)
    if not all(file.endswith(".safetensors") for file in files):
        return dict.fromkeys(name for names in files.values() for name in names)
    return {name: shape for shapes in weight_shapes(folder).values() for name, shape in shapes.items()}


def check_weights(folder: Path) -> str:
    """Compare the weights with what the configuration makes of our model; a line that says they fit."""
    config_class = from_code("configuration_qwen.QWenConfig")
    model_class = from_code("modeling_qwen.QWenLMHeadModel")
    try:
        config = config_class.from_dict(read_json(folder / "config.json"))
    except ValueError as error:
        raise Problem(f"config.json: {error}") from None
    if getattr(config, "quantization_config", None):
        return "weights: quantised, not compared"
    with init_empty_weights():
        expected = {name: tuple(p.shape) for name, p in model_class(config).named_parameters()}
    found = shapes_by_name(folder)
    if not found:
        return "weights: in pytorch_model.bin, which is not opened"
    ours = {name for name in found if name.startswith(("transformer.", "lm_head."))}
    if config.tie_word_embeddings:  # the embedding is the output layer; it may be stored for both
        expected.pop("lm_head.weight", None)
        ours.discard("lm_head.weight")
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


def load_vocabulary(folder: Path) -> dict[bytes, int]:
    load = from_code("tokenization_qwen.load_tiktoken_bpe")
    try:
        return load(str(folder / VOCABULARY))
    except (FileNotFoundError, ValueError) as error:
        raise Problem(str(error)) from None


def load_tokenizer(folder: Path):
    """Our tokenizer with the vocabulary and the settings in a folder; Problem if they are missing or damaged."""
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    tokenizer_class = from_code("tokenization_qwen.QWenTokenizer")
    try:
        return tokenizer_class.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Problem(str(error)) from None


def check_vocabulary(folder: Path) -> str:
    """A line about the vocabulary; Problem if it is damaged or larger than the model's."""
    size, rows = len(load_vocabulary(folder)) + 208, read_json(folder / "config.json").get("vocab_size", 0)
    if size > rows:
        raise Problem(f"{VOCABULARY} has {size} tokens with the special ones, more than the model's {rows} embeddings.")
    official = file_digest(folder / VOCABULARY) == OFFICIAL_VOCABULARY
    return f"vocabulary: {size} tokens, {'the official one' if official else 'not the official one'}"


# --- What would change -------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a JSON object, line ends as they are; Problem if it is something else."""
    read_json(path)
    return path.read_bytes().decode("utf-8")


def merged_auto_map(text: str, auto_map: dict) -> str:
    """The text of a JSON object with these entries in its "auto_map", everything else to the letter as it was."""
    old = json.loads(text).get("auto_map") or {}
    if not isinstance(old, dict):
        raise Problem(
            f'"auto_map" must be an object {{...}}, found {old!r}. Remove it; --write puts in what belongs there.'
        )
    return with_value(text, "auto_map", {**old, **auto_map})


def ends_of_answers(folder: Path) -> list[int] | None:
    """
    The "eos_token_id" of a chat model that ends its answers at <|im_end|>, and wherever sequences end now; None where
    they end there already, and for other models.
    """
    if not (folder / SETTINGS).exists():
        return None
    values = read_json(folder / SETTINGS)
    if values.get("chat_format") != "chatml":
        return None
    endoftext = len(load_vocabulary(folder))  # <|im_start|> and <|im_end|> follow
    eos = values.get("eos_token_id")
    eos = [endoftext] if eos is None else eos if isinstance(eos, list) else [eos]
    return None if endoftext + 2 in eos else [*eos, endoftext + 2]


def planned(folder: Path, end_at_im_end: bool = False) -> dict[str, bytes]:
    """Files to write, in order, with their new content; empty when everything is as it should be."""
    contents = {name: (ROOT / name).read_bytes() for name in MODULES}
    for name, source in AUTO_MAPS.items():
        contents[name] = merged_auto_map(read_text(folder / name), read_json(source)["auto_map"]).encode()
    if end_at_im_end:
        found = read_json(folder / SETTINGS).get("chat_format")
        if found != "chatml":
            raise Problem(f'--end-at-im-end is for chat models, but {SETTINGS} has "chat_format": {json.dumps(found)}.')
        ends = ends_of_answers(folder)
        if ends is not None:
            contents[SETTINGS] = with_value(read_text(folder / SETTINGS), "eos_token_id", ends).encode()
    return {
        name: content
        for name, content in contents.items()
        if not (folder / name).exists() or (folder / name).read_bytes() != content
    }


def inspect(folder: Path, end_at_im_end: bool, is_carried_out: bool) -> dict[str, bytes]:
    """Print what is found and, unless `write` is going to name the files, what would change; returns the plan."""
    print(check_weights(folder))
    print(check_vocabulary(folder))
    plan = planned(folder, end_at_im_end)
    for name in () if is_carried_out else plan:
        print(f"{'would replace' if (folder / name).exists() else 'would add':13} {name}")
    ends = None if end_at_im_end else ends_of_answers(folder)
    if ends is not None:
        print(
            f"advice: {SETTINGS} does not end sequences at <|im_end|>, where an answer ends; for pipelines and "
            f'servers add --end-at-im-end, which sets "eos_token_id": {ends}'
        )
    return plan


# --- Writing -----------------------------------------------------------------------------------------------------


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
    for name in (*MODULES, *AUTO_MAPS, SETTINGS):
        (folder / f".{name}.new").unlink(missing_ok=True)
    for path in (*folder.glob(f".{BACKUP_PREFIX}*"), *folder.glob(f"{BACKUP_PREFIX}*/.*.new")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(folder: Path, plan: dict[str, bytes]) -> None:
    """
    Carry out the plan, or change nothing if there is no room for all of it. A run that was killed is continued: its
    backup has the originals.
    """
    refuse_links(folder, plan)
    remove_leftovers(folder)
    unfinished = [path for path in backups(folder) if not read_json(path / MANIFEST)["finished"]]
    if unfinished:
        backup = place = unfinished[-1]
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
        place = folder / f".{backup.name}"  # until it is complete
    written = {name: hashlib.sha256(content).hexdigest() for name, content in plan.items()}
    manifest["written"] = {**manifest.get("written", {}), **written}
    try:
        with staged(folder, plan):
            if not unfinished:
                place.mkdir()
                for name in manifest["replaced"]:
                    shutil.copy2(folder / name, place / name)
            write_file(place / MANIFEST, json.dumps(manifest, indent=2).encode())
            write_file(place / FINISHED, json.dumps({**manifest, "finished": True}, indent=2).encode())
            os.replace(place, backup)
        os.replace(backup / FINISHED, backup / MANIFEST)
    except OSError:
        with contextlib.suppress(OSError):
            remove_leftovers(folder)
        raise
    for name in plan:
        print(f"wrote {name}")
    if manifest["replaced"]:
        print(f"what was replaced is in {backup.name}")


def restore(folder: Path) -> None:
    """Undo the last --write: the old model first, so that the folder loads whenever this stops."""
    if not backups(folder):
        remove_leftovers(folder)
        raise Problem("There is nothing to restore: no folder " + BACKUP_PREFIX + "... with a manifest.")
    backup = backups(folder)[-1]
    manifest = read_json(backup / MANIFEST)
    written = manifest.get("written", {})
    check_file_names((*written, *manifest["replaced"], *manifest["added"]), f"{backup.name}/{MANIFEST}")
    refuse_links(folder, written)
    for name, digest in written.items():
        path, original = folder / name, backup / name
        known = {digest} | ({file_digest(original)} if original.exists() else set())
        if path.exists() and file_digest(path) not in known:
            raise Problem(f"{name} was changed after the upgrade. Rename it to keep it, then --restore again.")
    remove_leftovers(folder)
    with staged(folder, {name: backup / name for name in reversed(manifest["replaced"])}):
        pass
    for name in reversed(manifest["added"]):
        (folder / name).unlink(missing_ok=True)
    os.rename(backup, folder / f".{backup.name}")  # in one step: half a backup could not be restored again
    remove_leftovers(folder)
    for done, names in (("restored", manifest["replaced"]), ("removed", manifest["added"])):
        for name in names:
            print(f"{done} {name}")


def copy_to(folder: Path, target: Path, end_at_im_end: bool) -> None:
    """
    An upgraded copy that shares nothing with the original: a hard link would be written through, as `save_pretrained`
    into the copy does with safetensors up to 0.7.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    with new_folder(target) as partial:
        needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(partial).free
        if needed > free:
            raise Problem(f"A copy takes {needed / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB of room.")
        for path in tqdm(files, desc="copying", unit="file"):
            shutil.copy2(path, partial / path.name)  # the files that links point to
        write(partial, planned(partial, end_at_im_end))
        try_loading(partial)


def try_loading(folder: Path) -> None:
    """Load configuration, tokenizer and, without its weights, the model, as a user would."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    except Exception as error:
        hint = advice_about_name(folder)
        raise Problem(
            f"The folder does not load ({type(error).__name__}: {error})." + (f" Perhaps {hint}." if hint else "")
        ) from error
    count = sum(p.numel() for p in model.parameters())
    print(f"loads: {type(model).__name__} with {count / 1e9:.2f} billion parameters, {len(tokenizer)} tokens")


def upgrade(args: argparse.Namespace) -> int:
    folder: Path = args.path
    if not folder.is_dir():
        raise Problem(f"There is no folder {folder}.")
    if args.restore:
        restore(folder)
        return 0
    plan = inspect(folder, args.end_at_im_end, is_carried_out=args.write or args.copy_to is not None)
    advice = advice_about_name(folder if args.copy_to is None else args.copy_to)
    if advice is not None:
        print(f"advice: {advice}")
    if args.copy_to is not None:
        copy_to(folder, args.copy_to, args.end_at_im_end)
        return 0
    if not args.write:
        print("everything is up to date" if not plan else "run again with --write to do it")
        return 1 if plan else 0
    if plan:
        write(folder, plan)
    else:
        print("everything is up to date")
    try:
        try_loading(folder)
    except Problem as problem:
        raise Problem(f"{problem} --restore undoes a --write.") from problem
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Put this code into a checkpoint folder that has the published one.",
        epilog="Exit status: 0 nothing to do, or done; 1 there is something to do, and --write was not given; 2 the "
        "checkpoint has a problem, or the folder can't be written.",
    )
    parser.add_argument("path", type=Path, help="folder of the checkpoint")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="only say what would change (default)")
    action.add_argument("--write", action="store_true", help="write this code into the folder")
    action.add_argument("--restore", action="store_true", help="undo the last --write")
    action.add_argument("--copy-to", type=Path, metavar="NEW", help="make an upgraded copy in the folder NEW")
    parser.add_argument(
        "--end-at-im-end", action="store_true", help="have generation_config.json end answers at <|im_end|>"
    )
    return exit_status(upgrade, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
