"""
Programs in processes that have imported torch and transformers already.

    python -IS tests/warm.py SOCKET PROGRAM ...     runs the program as `python PROGRAM ...` does
    python tests/warm.py --serve SOCKET             forks itself for each of them, and ends when its standard input does

To import takes 5 seconds, most of what a short program needs. The process of a program is a fork of one that has done
nothing else: all code of this repository it imports itself. Where an import may have read what differs in the
program's environment, and for `python -m`, the program is started as it is without a server.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

# What may differ: read while a program runs, by the repository's code or by nobody.
READ_LATE = {"TORCH_EXTENSIONS_DIR", "CXX", "HF_MODULES_CACHE", "PWD", "OLDPWD", "SHLVL", "_", "LINES", "COLUMNS"}


def early(environment: dict) -> dict:
    """What an import may have read."""
    return {
        name: value
        for name, value in environment.items()
        if name not in READ_LATE and not name.startswith(("QWEN_", "PYTEST_"))
    }


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


# --- The command -------------------------------------------------------------------------------------------------


def ask(path: str, arguments: list[str]) -> None:
    """Have the server run a program with this process's streams; end as it ends."""
    import json

    environment = dict(os.environ)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = json.dumps([arguments, os.getcwd(), environment]).encode()
        socket.send_fds(connection, [struct.pack("!Q", len(request))], [0, 1, 2])
        connection.sendall(request)
        try:
            (status,) = struct.unpack("!i", receive(connection, 4))
        except EOFError:
            sys.exit("the server of tests/warm.py has ended")
    if status == TO_BE_STARTED:
        os.execv(sys.executable, [sys.executable, *arguments])
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


TO_BE_STARTED = 1 << 16


# --- The server --------------------------------------------------------------------------------------------------


def serve(path: str) -> tuple:
    """Fork for every request; returns in the processes that shall run a program, with what they were asked."""
    import contextlib
    import gc
    import select

    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (with what loading a model imports)

    for name in ("modeling_utils", "masking_utils", "generation.utils", "dynamic_module_utils"):
        with contextlib.suppress(ImportError):  # in older releases
            __import__(f"{transformers.__name__}.{name}")
    own = early(dict(os.environ))
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    os.write(1, b"ready\n")
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return attend(connection, own)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def attend(connection: socket.socket, own: dict) -> tuple:
    """Start a program, and tell how it ended; kill it if nobody waits for it any more."""
    import json
    import select
    import signal

    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    arguments, folder, environment = json.loads(receive(connection, struct.unpack("!Q", header)[0]))
    if early(environment) != own or arguments[0] == "-m":
        connection.sendall(struct.pack("!i", TO_BE_STARTED))
        os._exit(0)
    child = os.fork()
    if child == 0:
        connection.close()
        return arguments, folder, environment, streams
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.01)[0]:  # nothing more is sent: this is the end
            os.kill(child, signal.SIGKILL)
            os._exit(0)
    connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(ended[1])))
    os._exit(0)


def become(arguments: list[str], folder: str, environment: dict, streams: list[int]) -> None:
    """Run a program as `python ARGUMENTS` would."""
    import builtins
    import types
    import warnings

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    modules = environment.get("HF_MODULES_CACHE")
    for module in [*sys.modules.values()] if modules else ():  # the one thing read at import that tests do change
        if "HF_MODULES_CACHE" in getattr(module, "__dict__", ()):
            module.HF_MODULES_CACHE = modules
    while arguments[0] == "-W":
        warnings.simplefilter(arguments[1])
        arguments = arguments[2:]
    main = types.ModuleType("__main__")
    main.__builtins__ = builtins
    sys.modules["__main__"] = main
    if arguments[0] == "-c":
        source, name, sys.path[0], sys.argv = arguments[1], "<string>", "", ["-c", *arguments[2:]]
    else:
        name, sys.argv = arguments[0], arguments
        main.__file__, sys.path[0] = os.path.abspath(name), os.path.dirname(os.path.realpath(name))
        with open(name, "rb") as file:
            source = file.read()
    exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        become(*serve(sys.argv[2]))
    else:
        ask(sys.argv[1], sys.argv[2:])
