"""
Native kernels for CPUs, `cpp_kernels.cpp`: building, finding and loading them. qwen_ops.py has the operations.

The source is compiled at the first call, once for a machine, and what can't be compiled costs speed and one warning,
never an answer.

    QWEN_NATIVE_KERNELS=0    don't build or load native kernels
    CXX                      the compiler (default: g++, c++ or clang++)
    TORCH_EXTENSIONS_DIR     where the compiled library is kept (default: torch_extensions in the user's cache); a
                             folder that other users can change is not used
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger("transformers.models.qwen.cpp_kernels")

# Only this very file is compiled, wherever it is found. `tools/build_kernels.py --pin` renews the line.
SOURCE_SHA256 = "9f12a66d87738e412509d1d8b9f4bec77d47fe8ad6a79200323c5013d23e044a"
PARTS = 4  # of the source, which are compiled at once
# Another source may have other operators: each has its own namespace, so that two versions live in one process.
NAMESPACE = f"qwen_{SOURCE_SHA256[:12]}"


# Copies of this module (transformers makes one a checkpoint) share the operators, and so they share this.
_state = sys.modules.setdefault(f"{NAMESPACE}_state", types.ModuleType(f"{NAMESPACE}_state"))
if not hasattr(_state, "lock"):
    _state.lock = threading.RLock()
    _state.folders = [Path(__file__).resolve().parent]
    _state.loaded = None  # whether the native kernels are; None: not tried yet
    _state.reason = None  # why they are not
    _state.path = None
    _state.library = None
    with contextlib.suppress(ValueError):  # torch up to 2.0 has no such kind: the references run
        _state.library = torch.library.Library(NAMESPACE, "FRAGMENT")


class _Unavailable(Exception):
    """Why native kernels can't be had, and what to do about it."""


def set_source_folder(folder) -> None:
    """
    Look for `cpp_kernels.cpp` in this folder too: transformers copies only .py files of a checkpoint's code.

    Loading a model calls this with the checkpoint's folder or hub snapshot. Nothing is compiled that is not the very
    source this module was written for.
    """
    with _state.lock:
        folder = Path(folder).absolute()  # the working directory may change before the source is wanted
        if folder not in _state.folders:
            _state.folders.append(folder)
            if _state.loaded is False:
                _state.loaded = None  # try once more


def copy_source(folder) -> None:
    """Put `cpp_kernels.cpp` into a folder that a model is saved to, so that the saved code is whole."""
    try:
        source = _source()
    except _Unavailable as error:
        logger.info(f"cpp_kernels.cpp is not saved with the code: {error}")
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "cpp_kernels.cpp").write_bytes(source)


def _operators():
    return getattr(torch.ops, NAMESPACE)


def library():
    """The torch.library.Library for operators of this source; None on torch up to 2.0, which has none to share."""
    return _state.library


def is_loaded() -> bool | None:
    """Whether the native kernels are in use; None if that was not tried yet."""
    return _state.loaded


def implementation() -> str:
    """What computes on a CPU, in words; nothing is built for the answer."""
    if _state.loaded is None:
        return "native kernels, not built yet"
    return f"native, {_operators().cpu_level('')}" if _state.loaded else f"PyTorch ({_state.reason})"


def load() -> bool:
    """Whether the native kernels are in use; the first call builds and loads them, and says if it can't."""
    if _state.loaded is None:
        with _state.lock:
            if _state.loaded is None:
                _state.loaded = _load()
    return _state.loaded


def kernels_in_use() -> dict:
    """
    What runs on a CPU: "native" (bool), "instructions" ("avx512_bf16", "avx512", "avx2" or "portable", on ARM
    "neon_bf16" or "neon", or None), "library" (path or None) and "reason" (why not native, or None). Builds if nothing
    was built yet.
    """
    native = load()
    return {
        "native": native,
        "instructions": _operators().cpu_level("") if native else None,
        "library": _state.path,
        "reason": _state.reason,
    }


def set_instructions(name: str) -> str:
    """
    Use the native kernels of this instruction set from now on, for tests and benchmarks; returns its name.

    Raises RuntimeError, which says what there is, if this CPU does not have it.
    """
    return _operators().cpu_level(name)


def _load() -> bool:
    if os.environ.get("QWEN_NATIVE_KERNELS", "1") == "0":
        _state.reason = "QWEN_NATIVE_KERNELS=0 switches them off."
        logger.info(f"Native CPU kernels are not in use: {_state.reason}")
        return False
    if _state.library is None:
        _state.reason = f"They need PyTorch 2.1 or newer, this is {torch.__version__}."
        logger.info(f"Native CPU kernels are not in use: {_state.reason}")
        return False
    try:
        began = time.monotonic()
        _state.path = _library()
        try:
            torch.ops.load_library(str(_state.path))
        except OSError as error:
            raise _Unavailable(f"{_state.path} can't be loaded ({error}). Delete it, and it is built again.") from error
    except _Unavailable as error:
        if _state.reason is None:  # once
            logger.warning(f"Native CPU kernels are not in use; PyTorch computes the same, more slowly. {error}")
        _state.path, _state.reason = None, str(error)
        return False
    _state.reason = None
    logger.info(
        f"Native CPU kernels are in use ({_operators().cpu_level('')}), ready after {time.monotonic() - began:.1f} s: "
        f"{_state.path}"
    )
    return True


def _library() -> Path:
    """The compiled library, built now if it is not in the cache."""
    if os.name != "posix":
        raise _Unavailable(f"They are built on Linux and macOS only, this is {platform.system()}.")
    folder = _private(_cache_folder() / NAMESPACE)
    flags = _flags()
    standard = _standard_library()
    key = _digest(torch.__version__, platform.machine(), *flags, *standard)
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise _Unavailable(f"CXX is {os.environ['CXX']!r} ({error}). Set it to a compiler.") from error
    compiler = named or [found for found in map(shutil.which, ("g++", "c++", "clang++")) if found][:1]
    try:
        version = subprocess.run(
            [*compiler, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:  # built where there was a compiler, used where there is none
        built = [path for path in sorted(folder.glob(f"{key}-*.so")) if not _who_else_writes(path)]
        if built:
            return built[-1]
        why = f"{compiler[0]} does not work ({error})" if compiler else "none of g++, c++ and clang++ is on the PATH"
        raise _Unavailable(f"There is no C++ compiler: {why}. Install g++, or set CXX to a compiler.") from None
    library = folder / f"{key}-{_digest(*compiler, version)}.so"
    if library.exists() and not _who_else_writes(library):
        return library
    source = _source()
    # What g++ compiles calls the OpenMP library that PyTorch has loaded, with its threads; clang would call another,
    # and Apple's has none: there the kernels start threads by themselves.
    openmp = "parallel backend: OpenMP" in torch.__config__.parallel_info() and b"clang" not in version
    try:
        for each in (*reversed(folder.parents), folder):  # `parents=True` takes no mode for them
            each.mkdir(mode=0o755, exist_ok=True)
        if _who_else_writes(folder):  # somebody was faster
            raise OSError(f"other users can change {_who_else_writes(folder)}")
        with _only_process(library.with_suffix(".lock")):
            if not library.exists() or _who_else_writes(library):
                _build(source, compiler, [*flags, *(["-fopenmp"] if openmp else [])], standard, library)
    except OSError as error:
        raise _Unavailable(
            f"The folder {folder} can't be written ({error}). Set TORCH_EXTENSIONS_DIR to one that can."
        ) from error
    return library


def _cache_folder() -> Path:
    """Where torch.utils.cpp_extension keeps what it builds on Linux."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    except RuntimeError as error:
        raise _Unavailable("This user has no home folder. Set TORCH_EXTENSIONS_DIR to a folder.") from error


def _private(folder: Path) -> Path:
    """This folder if only its user can change what is in it, else one of which that is true; loading runs the file."""
    folder = Path(os.path.realpath(folder))  # others may turn a link elsewhere
    others = _who_else_writes(folder)
    if not others:
        return folder
    places = [Path(os.path.realpath(tempfile.gettempdir())) / f"qwen_kernels_{os.geteuid()}" / NAMESPACE]
    with contextlib.suppress(RuntimeError):  # no home
        places.insert(0, Path(os.path.realpath(Path.home())) / ".cache" / "torch_extensions" / NAMESPACE)
    place = next((place for place in places if not _who_else_writes(place)), None)
    advice = f"Other users can change {others}, so what lies in {folder} is not loaded"
    if place is None:
        raise _Unavailable(f"{advice}. Set TORCH_EXTENSIONS_DIR to a folder of your own.")
    logger.warning_once(f"{advice}; native CPU kernels are kept in {place}. TORCH_EXTENSIONS_DIR names another place.")
    return place


def _who_else_writes(path: Path) -> str | None:
    """
    The first of this file or folder and the folders above it, as far as they exist, that others than this user and
    root can change; in words. In a folder with the sticky bit, such as /tmp, others can't touch what is not theirs.
    """
    trusted = {0, os.geteuid()}
    for each in (path, *path.parents):
        try:
            status = os.lstat(each)
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{each} ({error})"
        writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if each != path and status.st_mode & stat.S_ISVTX:
            writable = 0
        if writable == stat.S_IWGRP and _is_own_group(status.st_gid):
            writable = 0
        # In a user namespace root may have another number: that of the owner of "/".
        if writable or status.st_uid not in (trusted if each == path else {*trusted, os.stat("/").st_uid}):
            return f"{each} (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _is_own_group(gid: int) -> bool:
    """Whether a group is that of this user alone: many systems make one for each, with a umask that lets it write."""
    users, groups = map(importlib.import_module, ("pwd", "grp"))  # not import statements: see `_only_process`
    try:
        user, group = users.getpwuid(os.geteuid()), groups.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _digest(*parts) -> str:
    text = b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return hashlib.sha256(text).hexdigest()[:16]


def _flags() -> list:
    settings = torch.__config__.show()
    return [
        "-O3",
        "-fPIC",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-w",
        f"-std={'c++20' if 'C++ Version: 202' in settings else 'c++17'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-DQWEN_NAMESPACE={NAMESPACE}",
    ]


def _source() -> bytes:
    """The source, checked against the pin."""
    others = []
    for folder in _state.folders:
        try:
            source = (folder / "cpp_kernels.cpp").read_bytes()
        except OSError:
            continue
        if hashlib.sha256(source).hexdigest() == SOURCE_SHA256:
            return source
        others.append(str(folder))
    if others:
        raise _Unavailable(
            f"cpp_kernels.cpp in {' and '.join(others)} belongs to another version of cpp_kernels.py. "
            f"Copy both files from one version."
        )
    searched = " and ".join(map(str, _state.folders))
    raise _Unavailable(f"cpp_kernels.cpp is not in {searched}. Copy it beside the model's other code.")


@contextlib.contextmanager
def _only_process(path: Path):
    """One process at a time; the system lets go of the lock of a process that dies."""
    # Not an import statement: transformers refuses code that imports what Windows lacks.
    fcntl = importlib.import_module("fcntl")
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: two may build, which does no harm
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _standard_library() -> list:
    """
    The path of the C++ library that this process has loaded, on Linux.

    Named to the linker first, it is the one that the kernels call. A compiler that finds no shared one would put a
    second one into them, and a process crashes on two of them as soon as an error message is written.
    """
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in mapped}
    return sorted(path for path in paths if "/libstdc++.so" in path and os.path.exists(path))[:1]


def _build(source: bytes, compiler: list, flags: list, standard: list, library: Path) -> None:
    """Compile in a folder of its own; the library appears in one step, complete."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise _Unavailable(f"torch.utils.cpp_extension can't be imported ({error}): pip install setuptools.") from error

    # A warning, because a program that says nothing for so long is taken for one that hangs.
    logger.warning("Compiling the CPU kernels, once on this machine: half a minute to two minutes.")
    for left in library.parent.glob(f"{library.stem}.*.building"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{library.stem}.", suffix=".building", dir=library.parent) as folder:
        file, built = (Path(folder) / name for name in ("cpp_kernels.cpp", "kernels.so"))
        file.write_bytes(source)
        paths = [f"-I{path}" for path in include_paths()]
        libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
        log = library.with_suffix(".log")
        objects = [str(file.with_suffix(f".{part}.o")) for part in range(PARTS)]
        with ThreadPoolExecutor(min(PARTS, os.cpu_count() or 1)) as pool:  # of processes that are waited for
            start = [*compiler, *flags, *paths, "-c", str(file)]
            commands = [[*start, f"-DQWEN_PART={part}", "-o", name] for part, name in enumerate(objects)]
            failed = threading.Event()  # by Ctrl-C, too, which the compilers get: then no other is started

            def compile_part(command):
                if not failed.is_set():
                    try:
                        _run(command, log)
                    except BaseException:
                        failed.set()
                        raise

            list(pool.map(compile_part, commands))
        _run([*compiler, "-shared", *objects, "-o", str(built), *libraries, *standard], log)
        built.chmod(built.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
        os.replace(built, library)


def _run(command: list, log: Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        log.write_bytes(shlex.join(command).encode() + b"\n" + done.stdout)
        lines = done.stdout.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise _Unavailable(f"{command[0]} can't compile them: {first.strip()}. Everything it says is in {log}.")
