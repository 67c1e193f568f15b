"""
Chat in the terminal.

    python examples/chat.py [CHECKPOINT]         (default: the demo)
    echo "法国的首都是哪里？" | python examples/chat.py    a question a line, answers only

Ctrl-C stops an answer, Ctrl-D ends. The conversation keeps its keys and values, so a turn costs what is new in it.
Commands and options are those of the published cli_demo.py, and `:system` and `:set` besides.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import NamedTuple

import torch
import transformers
from checkpoint import add_arguments, load

new_cache = getattr(transformers, "DynamicCache", lambda: None)  # before 4.36 each turn computes the whole conversation

HELP = """\
:help, :h                  this
:exit, :quit, :q           end
:clear, :cl                clear the screen
:clear-his, :clh           forget the conversation
:history, :his             show it
:seed [NUMBER]             set the seed of random numbers, or show it
:conf [NAME=VALUE ...]     set how answers are chosen, such as temperature=0.7, or show it (:set NAME VALUE, too)
:reset-conf                choose answers as the checkpoint says again
:system [TEXT]             set the system prompt (forgets the conversation), or show it"""
SYSTEM = "You are a helpful assistant."
CLEAR_SCREEN = "\033[H\033[2J\033[3J"


class Setting(NamedTuple):
    """The values that one can have: numbers in a range, or true and false."""

    kind: type
    low: float = 0
    high: float = 1

    def __str__(self) -> str:
        if self.kind is bool:
            return "true or false"
        return f"a {'whole ' if self.kind is int else ''}number from {self.low} to {self.high}"

    def read(self, name: str, text: str):
        """The value that a text means; ValueError if it is none."""
        value = None
        with contextlib.suppress(ValueError):
            value = {"true": True, "false": False}.get(text.lower()) if self.kind is bool else self.kind(text)
        if value is None or not self.low <= value <= self.high:
            raise ValueError(f"{name} must be {self}, found {text!r}.")
        return value


# What `generate` takes and no question can make wrong. Within these bounds no probability leaves the range of floats.
SETTINGS = {
    "do_sample": Setting(bool),
    "temperature": Setting(float, 0.01, 100),
    "top_k": Setting(int, 0, 1_000_000),
    "top_p": Setting(float, 0, 1),
    "repetition_penalty": Setting(float, 0.1, 10),
    "no_repeat_ngram_size": Setting(int, 0, 32768),
    "max_new_tokens": Setting(int, 1, 32768),
}


def seed(text: str) -> int:
    """The seed that a text means; ValueError if it is none."""
    return Setting(int, 0, 2**32 - 1).read("The seed", text)


def read_settings(text: str) -> dict:
    """
    The settings of "NAME=VALUE ..." or "NAME VALUE".

    Raises ValueError for an unknown name, a value that the setting can't have, or text of another form.
    """
    pair = r"([^\s=]+)(?:\s*=\s*|\s+)([^\s=]+)"
    rest = re.sub(pair, "", text).strip()
    if rest:
        raise ValueError(f"Write NAME=VALUE, such as temperature=0.7; found {rest!r}.")
    pairs = re.findall(pair, text)
    for name, _ in pairs:
        if name not in SETTINGS:
            known = "\n".join(f"  {name}: {setting}" for name, setting in SETTINGS.items())
            raise ValueError(f"There is no setting {name!r}. These can be set:\n{known}")
    return {name: SETTINGS[name].read(name, value) for name, value in pairs}


class Chat:
    def __init__(self, model, tokenizer, show=print, seed: int = 1234):
        self.model = model
        self.tokenizer = tokenizer
        self.show = show
        self.system = SYSTEM
        self.seed = seed
        self.settings: dict = {}
        self.forget()

    def forget(self) -> None:
        self.history: list = []
        self.cache = new_cache()

    def show_settings(self) -> None:
        def value(name):
            return self.settings.get(name, getattr(self.model.generation_config, name, None))

        for name, setting in SETTINGS.items():
            shown = "as transformers has it" if value(name) is None else str(value(name)).lower()
            self.show(f"{name} = {shown}   ({setting})")
        if not value("do_sample"):
            self.show("Every token is the likeliest one: temperature, top_k and top_p count with do_sample=true only.")

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a colon; False if it ends the chat. What can't be read changes nothing."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name in ("q", "quit", "exit"):
            return False
        if name in ("h", "help"):
            self.show(HELP)
        elif name in ("cl", "clear"):
            if sys.stdout.isatty():
                self.show(CLEAR_SCREEN)
            self.show("The conversation goes on; :clear-his forgets it.")
        elif name in ("clh", "clear-his"):
            self.forget()
            self.show("The conversation is forgotten.")
        elif name in ("his", "history"):
            for query, response in self.history:
                self.show(f"user: {query}\nassistant: {response}")
            if not self.history:
                self.show("Nothing was said yet.")
        elif name == "seed":
            self.seed = seed(rest) if rest else self.seed
            self.show(f"The seed is {self.seed}.")
        elif name in ("conf", "set"):
            self.settings.update(read_settings(rest))
            self.show_settings()
        elif name == "reset-conf":
            self.settings.clear()
            self.show_settings()
        elif name == "system":
            if rest:
                self.system = rest
                self.forget()
            self.show(f"The system prompt is: {self.system}")
        else:
            self.show(f"There is no command :{name}; :help shows those that there are.")
        return True

    def ask(self, query: str, write) -> str:
        """
        The answer to a question; what is new of it goes to `write` as it comes.

        Ctrl-C breaks it off: the conversation keeps what was said of it, or nothing if nothing was.
        """
        torch.manual_seed(self.seed)
        shown = ""
        stopped = False
        try:
            responses = self.model.chat_stream(
                self.tokenizer, query, self.history, self.system, past_key_values=self.cache, **self.settings
            )
            with contextlib.closing(responses):
                for response in responses:
                    write(response[len(shown) :])
                    shown = response
        except KeyboardInterrupt:
            stopped = True
            write(" [stopped]")
        write("\n")
        if shown or not stopped:
            self.history.append((query, shown))
        return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat in the terminal; :help shows the commands.")
    parser.add_argument("checkpoint", nargs="?", help="the same as --checkpoint-path")
    add_arguments(parser)
    parser.add_argument("-s", "--seed", type=seed, default=1234, help="of random numbers (default: %(default)s)")
    arguments = parser.parse_args()
    path = arguments.checkpoint or arguments.checkpoint_path
    chat = Chat(*load(path, arguments.cpu_only), seed=arguments.seed)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (makes input() editable)
        print(f"{path}: say something, or :help.")

    def write(text: str) -> None:
        print(text, end="", flush=True)

    while True:
        try:
            line = input("> " if interactive else "").strip()
            if line.startswith(":"):
                if not chat.command(line):
                    break
            elif line:
                chat.ask(line, write)
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n:quit ends.")
        except ValueError as error:  # bytes that are no text, a value that can't be set, a question that is too long
            print(error)


if __name__ == "__main__":
    main()
