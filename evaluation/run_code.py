"""
Run a program that a model wrote, where it can do no harm.

    python evaluation/run_code.py FILE

On Linux the program runs in namespaces of its own: no network, no process but its own, a file system that holds the
interpreter and the system's libraries, read-only, and an empty folder in memory. It runs as an unprivileged user that
can't gain rights, may not start processes, and has limits on time, memory and files. It sees no variable of the
environment. Where the system has no namespaces nothing is run unless `sandbox=False` asks for it, which leaves the
limits but neither the network nor the files out of its reach.

What is not prevented: a program that searches the interpreter for the word that says it has finished can claim success.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LINUX_CAPABILITY_VERSION_3 = 0x20080522
FINISHED = b"finished "


@dataclasses.dataclass(frozen=True)
class Limits:
    """seconds: of processor time, and a little more by the clock; memory, disk: bytes; files: open at once."""

    seconds: int = 10
    memory: int = 1 << 30
    disk: int = 16 << 20
    files: int = 32


DEFAULT = Limits()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """reason: "passed", or what went wrong."""

    passed: bool
    reason: str


def run_program(program: str, limits: Limits = DEFAULT, sandbox: bool | None = None) -> Outcome:
    """
    Whether a Python program runs to its end without an exception.

    sandbox: False runs it without namespaces; default: what `allow_unsafe` was told.

    Raises RuntimeError where there are no namespaces and they were not done without.
    """
    if sandbox is None:
        sandbox = not _unsafe
    if sandbox:
        problem = sandbox_problem()
        if problem:
            raise RuntimeError(
                f"Programs can't be run apart from this system here: {problem}. Run the evaluation on a Linux that "
                f"has user namespaces, or let them run with your rights, network and files (--no-sandbox)."
            )
    return _run(program, limits, sandbox)


_unsafe = False


def allow_unsafe() -> None:
    """From now on programs run without namespaces, with the rights, network and files of this process."""
    global _unsafe
    _unsafe = True


@functools.lru_cache(maxsize=None)
def sandbox_problem() -> str:
    """Why there is no sandbox; empty if there is one."""
    if sys.platform != "linux":
        return "it is not Linux"
    outcome = _run("pass", DEFAULT, sandbox=True)
    return "" if outcome.passed else outcome.reason


def _run(program: str, limits: Limits, sandbox: bool) -> Outcome:
    """Start a process that limits itself and runs the program; wait for its word, its end, or the end of its time."""
    word = secrets.token_hex(16)
    order = {"program": program, "word": word, "limits": dataclasses.asdict(limits), "sandbox": sandbox}
    with tempfile.TemporaryDirectory() as folder:
        order["folder"] = folder
        os.chmod(folder, 0o755)
        process = subprocess.Popen(
            [getattr(sys, "_base_executable", sys.executable), "-I", "-S", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/" if sandbox else folder,
            env={"RUN_CODE_ORDER": "stdin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(base64.b64encode(json.dumps(order).encode()))
                process.stdin.close()
            said = _read(process.stdout, time.monotonic() + limits.seconds + 2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
    if said == FINISHED + word.encode():
        return Outcome(True, "passed")
    if said is None:
        return Outcome(False, "took too long")
    return Outcome(False, said.decode("utf-8", "replace") or "was ended, or ended itself before its end")


def _read(stream, deadline: float) -> bytes | None:
    """What the process says until it ends, at most 300 bytes; None if it has not ended in time."""
    said = b""
    while len(said) < 300:
        ready, _, _ = select.select([stream], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return None
        piece = os.read(stream.fileno(), 300)
        if not piece:
            break
        said += piece
    return said


# From here on: in the process that runs the program.


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(libc, source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    kind_bytes = None if kind is None else kind.encode()
    result = libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), data.encode())
    _check(result, f"mount {target}")


def _bind(libc, root: str, path: str) -> None:
    """Show a file or folder below root at the same place, read-only."""
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb"):
            pass
    _mount(libc, path, target, None, MS_BIND | MS_REC)
    # What the original mount forbids can't be allowed again, so it has to be repeated.
    found = os.statvfs(path).f_flag
    kept = sum(flag for flag in (MS_NOSUID, MS_NODEV, MS_NOEXEC) if found & flag)
    if not path.startswith("/dev/"):
        kept |= MS_RDONLY
    _mount(libc, path, target, None, MS_BIND | MS_REMOUNT | kept)


def _enter_namespaces(libc, folder: str, limits: Limits) -> None:
    """New namespaces, and a root that shows the interpreter, the system's libraries and an empty /tmp."""
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    _check(libc.unshare(flags if uid == 0 else flags | CLONE_NEWUSER), "unshare")
    if uid != 0:
        for name, value in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(value)
    _mount(libc, "none", "/", None, MS_REC | MS_PRIVATE)
    root = folder
    _mount(libc, "none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    shown = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    shown += [sys.base_prefix, sys.base_exec_prefix]
    done: list[str] = []
    for path in shown:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not any(path == other or path.startswith(other + "/") for other in done):
            _bind(libc, root, path)
            done.append(path)
    os.mkdir(root + "/tmp")
    _mount(libc, "none", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={limits.disk},mode=777")
    _mount(libc, "none", root, None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chroot(root)
    os.chdir("/tmp")


def _drop_rights(libc) -> None:
    """No capability, and none to be gained: leaving the root, mounting and new namespaces need one."""
    if os.getuid() == 0:  # for whom limits on processes don't hold
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def _limit(limits: Limits, sandbox: bool) -> None:
    for name, value in (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_FSIZE, limits.disk),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, 1 if sandbox else resource.getrlimit(resource.RLIMIT_NPROC)[0]),
    ):
        resource.setrlimit(name, (value, value))


def _obey() -> None:
    """Run the program that standard input holds, with its limits; say the word if it comes to its end."""
    order = json.loads(base64.b64decode(sys.stdin.buffer.read()))
    limits, sandbox = Limits(**order["limits"]), order["sandbox"]
    answer = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    try:
        if sandbox:
            libc = ctypes.CDLL(None, use_errno=True)
            _enter_namespaces(libc, order["folder"], limits)
            if os.fork():  # what was unshared holds for children: the first is process 1 of its namespace
                os.wait()
                os._exit(0)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            child = os.fork()  # process 1 ignores signals, so the program is the second
            if child:
                os.close(answer)
                os.waitpid(child, 0)
                os._exit(0)
            _drop_rights(libc)
            os.setsid()
        os.environ.clear()
        _limit(limits, sandbox)
    except OSError as error:
        os.write(answer, str(error).encode()[:200])
        os._exit(1)
    try:
        exec(compile(order.pop("program"), "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # noqa: BLE001 - SystemExit too: a program that leaves has not come to its end
        os.write(answer, f"{type(error).__name__}: {str(error)[:100]}".encode("utf-8", "replace")[:200])
        os._exit(1)
    os.write(answer, FINISHED + order["word"].encode())
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a program that a model wrote, where it can do no harm.")
    parser.add_argument("file", help="the program, in Python")
    args = parser.parse_args()
    try:
        program = Path(args.file).read_text("utf-8")
    except FileNotFoundError:
        sys.exit(f"There is no file {args.file}.")
    outcome = run_program(program)
    print(outcome.reason)
    sys.exit(not outcome.passed)


if __name__ == "__main__":
    if os.environ.pop("RUN_CODE_ORDER", None):
        _obey()
    else:
        main()
