"""
What the tools share: which files a checkpoint has, and writing that is complete or leaves nothing. Every program that
loads a checkpoint asks here first whether it was named rightly.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Callable, Iterable, Iterator

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent.parent
INDEX = "model.safetensors.index.json"
CONFIG, TOKENIZER, ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"
WITH_AUTO_MAP = (CONFIG, TOKENIZER)
OF_TOKENIZERS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
PRECISIONS = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}


class Problem(Exception):
    """Something the user has to look at; the message says what was found and what to do."""


def print_any_text() -> None:
    """From here on `print` writes what the encoding of the output lacks as \\uXXXX; an error would lose the answers."""
    with contextlib.suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")


def exit_status(work: Callable[..., int | None], *arguments) -> int:
    """
    Call `work(*arguments)`: what it returns, 0 for None; 2, after a line about it, for what the user can mend; 130,
    after a line, for Ctrl-C.

    An OSError names the file that can't be read or written; safetensors reports a full disk in its own way.
    """
    print_any_text()
    try:
        return work(*arguments) or 0
    except (Problem, OSError, SafetensorError) as problem:
        print(f"problem: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {str(interrupt) or 'the same command begins again'}", file=sys.stderr)
        return 130


@contextlib.contextmanager
def going_on(kept: object) -> Iterator[None]:
    """Ctrl-C in the block says, by `exit_status`, that the same command goes on from what is kept there."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on from what is in {kept}") from None


def from_code(name: str):
    """
    MODULE.NAME of this repository's code, which transformers copies into the user's cache first, as a checkpoint's.
    Ends the program, after a line about it, if that can't be written.
    """
    try:
        return get_class_from_dynamic_module(name, str(ROOT))
    except OSError as error:
        advice = "transformers copies code to there before it runs it. Set HF_MODULES_CACHE to a folder of your own."
        print(f"problem: {error}: {advice}", file=sys.stderr)
        sys.exit(2)


# --- What was named ----------------------------------------------------------------------------------------------


def check_folder(named: str | Path, holds: str = CONFIG) -> None:
    """Problem unless it is the folder of a checkpoint or, with `holds=ADAPTER`, of an adapter."""
    folder = Path(named)
    wanted, other = ("an adapter", CONFIG) if holds == ADAPTER else ("a checkpoint", ADAPTER)
    if folder.is_file():
        raise Problem(f"{named} is a file. Name the folder of {wanted}.")
    if not folder.is_dir():
        raise Problem(f"There is no folder {named}.")
    if (folder / holds).exists():
        return
    if not (folder / other).exists():
        raise Problem(f"{named} has no {holds}, so it is not {wanted}.")
    if holds == ADAPTER:
        raise Problem(f"{named} is a checkpoint, not an adapter: name the adapter first, and this with --base.")
    raise Problem(f"{named} is an adapter, not a checkpoint: merge it first with tools/merge_adapter.py.")


def check_loadable(path: str, adapters: bool = False) -> None:
    """
    Problem unless it is the folder of a checkpoint with this code or may be a name on the hub, OWNER/NAME.

    adapters: the folder of an adapter will do if its base does.
    """
    folder = Path(path)
    if not folder.exists() and _may_be_on_hub(path):
        return
    if adapters and (folder / ADAPTER).exists():
        try:
            check_loadable(str(read_json(folder / ADAPTER).get("base_model_name_or_path")))
        except Problem as problem:
            raise Problem(f"The base of the adapter {path}: {problem}") from None
        return
    check_folder(path)
    _check_code(folder)
    if not (folder / TOKENIZER).exists():  # transformers would look for other tokenizers, and ask for sentencepiece
        raise Problem(f"{path} has no {TOKENIZER}. It comes with the checkpoint; copy it into the folder.")


def _check_code(folder: Path) -> None:
    """Problem if a file of the code in a folder is that of 2023, which no longer loads, or one is missing."""
    texts = {file.name: file.read_text("utf-8", errors="replace") for file in folder.glob("*.py")}
    published = [name for name, text in texts.items() if text.startswith("# Copyright (c) Alibaba Cloud")]
    if "SOURCE_SHA256" not in texts.get("cpp_kernels.py", "SOURCE_SHA256"):
        published.append("cpp_kernels.py")
    if "modeling_qwen.py" in texts and "qwen_loading.py" not in texts:
        published.append("modeling_qwen.py")
    named = json.dumps(read_json(folder / CONFIG).get("auto_map"))  # and of a repository of the hub, owner/name--module
    needed = {*re.findall(r'"(\w+)\.\w+"', named)}.union(
        *(re.findall(r"^from \.(\w+) import", t, re.M) for t in texts.values())
    )
    lacking = sorted({f"{name}.py" for name in needed} - texts.keys())
    if published:
        found = f"holds the code published in 2023 ({', '.join(sorted({*published}))}), which no longer loads"
    elif lacking:
        found = f"lacks files of the code: {', '.join(lacking)}"
    else:
        return
    raise Problem(f"{folder} {found}. Type once: python tools/upgrade_checkpoint.py {folder} --write")


def precision(text: str) -> str:
    """PyTorch's name of a precision, for the `type` of an option; other texts are left to its `choices`."""
    return PRECISIONS.get(text, text)


def _may_be_on_hub(path: str) -> bool:
    """Where a folder has the owner's name, OWNER/NAME is a misspelled path, unless this repository is in the cache."""
    part = r"\w+([.-]\w+)*"
    if not re.fullmatch(f"{part}/{part}", path, re.ASCII):
        return False
    return not Path(path).parent.is_dir() or isinstance(try_to_load_from_cache(path, CONFIG), str)


# --- Reading -----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The object in a JSON file; Problem if it is not there or is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{path.name} is missing. It comes with the checkpoint; copy it into the folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Problem(f"{path.name} is not valid JSON ({error}). Copy it again.") from None
    if not isinstance(values, dict):
        raise Problem(f"{path.name} holds {type(values).__name__}, not an object {{...}}. Copy it again.")
    return values


def check_file_names(names: Iterable[str], source: str) -> None:
    """Problem unless each name is of a file in the folder itself: a JSON file from elsewhere may name any path."""
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise Problem(f"{source} names {name!r}, which is not a file of this folder. Don't use this checkpoint.")


def weight_files(folder: Path) -> dict[str, set[str]]:
    """
    The weight files of a checkpoint, each with the names of the weights that its index says are in it.

    As transformers chooses: model.safetensors, else the files that model.safetensors.index.json names; then the same of
    pytorch_model.bin. What else lies in the folder does not belong to the checkpoint. A file without an index has no
    names here.

    Raises Problem if there are no weights, an index is not one, or a file that it names is missing or elsewhere.
    """
    for single, index in (("model.safetensors", INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / single).exists():
            return {single: set()}
        if not (folder / index).exists():
            continue
        weight_map = read_json(folder / index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise Problem(f'{index} has no "weight_map" of names and files. Copy it again.')
        files: dict[str, set[str]] = {}
        for name, file in sorted(weight_map.items(), key=lambda item: item[1]):
            files.setdefault(file, set()).add(name)
        check_file_names(files, index)
        lacking = [file for file in files if not (folder / file).is_file()]
        if lacking:
            raise Problem(f"{len(lacking)} weight files are missing: {', '.join(lacking[:4])}. Copy them again.")
        return files
    raise Problem("There are no weights: neither model.safetensors nor pytorch_model.bin nor an index of files.")


def full_precision_config(folder: Path, where: str = "") -> dict:
    """The config.json of a checkpoint; Problem for a quantised one, with `where` to name another."""
    config = read_json(folder / "config.json")
    beside = (folder / "quantize_config.json").exists()  # all that early GPTQ checkpoints have
    marks = ("int8_weights", "int8_lm_head", "quantization_config")
    if any(map(config.get, marks)) or beside:
        raise Problem(f"{folder} is quantised already. Name the checkpoint in full precision{where}.")
    return config


def open_weights(path: Path):
    """A file of safetensors as `safe_open` gives it; Problem, which names the file, if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Problem(f"The weight file {path.name} is damaged ({error}). Copy it again.") from None


def weight_shapes(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """
    The safetensors files of a checkpoint, each with the weights that are in it, as transformers loads them, and their
    shapes. Problem for other files, and if the index says that a weight is elsewhere.
    """
    files = weight_files(folder)
    if not all(file.endswith(".safetensors") for file in files):
        raise Problem(f"{folder} has no .safetensors. Load it and call save_pretrained, which writes them.")
    place = {name: file for file, names in files.items() for name in names}
    shapes = {}
    for file, names in tqdm(files.items(), desc="weight headers", unit="file", disable=len(files) < 2):
        with open_weights(folder / file) as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        if names - found.keys():
            raise Problem(f"{file} lacks {sorted(names - found.keys())[0]}, which the index says is in it.")
        for name in found:  # of two, the file that happens to be read last would win
            if place.setdefault(name, file) != file:
                raise Problem(f"{file} has {name}, which the index says is in {place[name]}. Copy both again.")
        shapes[file] = found
    return shapes


def advice_about_name(folder: Path) -> str | None:
    """What to do about a folder that not every release of transformers can load code from."""
    name = folder.resolve().name
    if "." not in name:
        return None
    return (
        f"the name of the folder, {name}, has a point, by which transformers up to 4.56 can't load the code in it "
        f"(ModuleNotFoundError); rename it, for instance to {name.replace('.', '_')}"
    )


# --- Writing -----------------------------------------------------------------------------------------------------


def copy_companions(source: Path, target: Path) -> None:
    """
    Copy what belongs to a checkpoint besides its weights, the files that links point to: settings, vocabulary, code
    that a JSON file or other code names, licences and pages about it. Data and programs that lie beside it are not.
    """
    paths = [path for path in sorted(source.iterdir()) if path.is_file()]
    readers = [path for path in paths if path.suffix == ".py" or path.name in WITH_AUTO_MAP]
    code = "\n".join(path.read_text("utf-8", errors="replace") for path in readers)
    for path in paths:
        if path.suffix == ".py":
            stem = re.escape(path.stem)
            belongs = re.search(rf'from \.{stem} import|from \. import .*\b{stem}\b|"{stem}\.\w+"', code) is not None
        elif path.suffix == ".json":
            belongs = path.name.endswith("config.json") or path.name in OF_TOKENIZERS
        else:
            belongs = path.suffix in ("", ".tiktoken", ".jinja", ".md", ".txt", ".pdf")
        if belongs:
            shutil.copy2(path, target)


def save_weights(tensors: dict, path: Path) -> None:
    """A file of safetensors that is read by whom the umask lets: 0.8 of the library makes one for its user alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it sees the old content or the new."""
    with staged(path.parent, {path.name: content}):
        pass


@contextlib.contextmanager
def staged(folder: Path, contents: dict[str, bytes | Path]) -> Iterator[None]:
    """
    Write files under other names, `.NAME.new`, and give them their own when the block is left, each in one step and in
    this order.

    contents: of each file; a path stands for a file to copy with its times and its mode. All space is taken before the
    first file is replaced: if something can't be written, or the block raises, nothing is changed and nothing is left.
    """
    paths = {name: folder / f".{name}.new" for name in contents}
    try:
        for name, content in contents.items():
            try:
                if isinstance(content, Path):
                    shutil.copy2(content, paths[name])
                    continue
                with open(paths[name], "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                error.filename = error.filename or str(paths[name])  # a full disk names none
                raise
        yield
    except BaseException:
        for path in paths.values():
            with contextlib.suppress(OSError):  # the error that is on its way says more
                path.unlink()
        raise
    for name, path in paths.items():
        os.replace(path, folder / name)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """
    Gives a folder beside `target`, which takes its place in one step when the block is left; after an error there is
    neither. What a killed run left is removed by the next run for this target.

    Raises Problem if `target` is there already, unless it is an empty folder, or another run is making it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Problem(f"{target} exists and is not an empty folder. Name a folder that does not exist yet.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Code is loaded from it, for which older releases of transformers want a name without points.
    partial = target.parent / f"partial_{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}"
    partial.mkdir(exist_ok=True)
    with only_run(partial, target):
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def only_run(partial: Path, target: Path) -> Iterator[None]:
    """Problem if another process holds this folder or file; the system lets go of what a killed one held."""
    if importlib.util.find_spec("fcntl") is None:  # Windows
        yield
        return
    fcntl = importlib.import_module("fcntl")
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"Another run is making {target}, in {partial}. Wait for it.") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


# --- JSON text ---------------------------------------------------------------------------------------------------


def with_value(text: str, key: str, value) -> str:
    """
    The text of a JSON object with `value` for `key`, everything else to the letter as it was, line ends included.

    Raises Problem if the text that would come out does not say exactly that.

    Example:
        >>> with_value('{ "a":{"b": 1},  "b":[] }', "b", 2)
        '{ "a":{"b": 1},  "b":2 }'
    """
    old = json.loads(text)
    if key in old and json.dumps(old[key]) == json.dumps(value):
        return text
    indent = re.search(r'^([ \t]+)"', text, re.MULTILINE)
    step = indent.group(1) if indent else "  "
    newline = "\r\n" if "\r\n" in text else "\n"
    written = json.dumps(value, indent=step, ensure_ascii=False).replace("\n", newline + step)
    place = _value_span(text, key)
    if place is not None:
        new = text[: place[0]] + written + text[place[1] :]
    else:
        start = text.index("{") + 1
        rest = "," + text[start:] if old else newline + text[start:].lstrip()
        new = f'{text[:start]}{newline}{step}"{key}": {written}{rest}'
    if json.dumps(json.loads(new), sort_keys=True) != json.dumps({**old, key: value}, sort_keys=True):
        raise Problem(f'"{key}" can\'t be changed in this JSON text. Set it to {json.dumps(value)} by hand.')
    return new


def _value_span(text: str, key: str) -> tuple[int, int] | None:
    """Where the value of a key of the outermost object begins and ends; of the last one, which is what counts."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    position, found = space.match(text, text.index("{") + 1).end(), None
    while text[position] == '"':
        name, position = decoder.raw_decode(text, position)
        start = space.match(text, space.match(text, position).end() + 1).end()  # behind the colon
        _, end = decoder.raw_decode(text, start)
        found = (start, end) if name == key else found
        position = space.match(text, space.match(text, end).end() + 1).end()  # behind the comma
        if position >= len(text):
            break
    return found
