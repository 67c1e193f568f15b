"""
Chat in the terminal.

    python examples/chat.py [CHECKPOINT]         (default: the demo)
    echo "法国的首都是哪里？" | python examples/chat.py    a question a line, answers only

Ctrl-C stops an answer, Ctrl-D ends. The conversation keeps its keys and values, so a turn costs what is new in it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

HELP = """\
:help              this
:clear             forget the conversation
:history           show it
:seed [NUMBER]     set the seed of random numbers, or show it
:set [NAME VALUE]  set a generation setting such as temperature 0.7, or show them
:system [TEXT]     set the system prompt (forgets the conversation), or show it
:quit              end"""
SYSTEM = "You are a helpful assistant."


class Chat:
    def __init__(self, model, tokenizer, show=print):
        self.model = model
        self.tokenizer = tokenizer
        self.show = show
        self.system = SYSTEM
        self.seed = 0
        self.settings: dict = {}
        self.clear()

    def clear(self) -> None:
        self.history: list = []
        self.cache = DynamicCache()

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a colon; False if it ends the chat."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name in ("q", "quit", "exit"):
            return False
        if name in ("h", "help"):
            self.show(HELP)
        elif name == "clear":
            self.clear()
            self.show("The conversation is forgotten.")
        elif name == "history":
            for query, response in self.history:
                self.show(f"user: {query}\nassistant: {response}")
            if not self.history:
                self.show("Nothing was said yet.")
        elif name == "seed":
            if rest and not rest.lstrip("-").isdigit():
                self.show(f"A seed is a whole number, found {rest!r}.")
            elif rest:
                self.seed = int(rest)
            self.show(f"The seed is {self.seed}.")
        elif name == "set":
            key, _, value = rest.partition(" ")
            if value:
                self.settings[key] = read(value)
            self.show(f"Settings: {self.settings}")
        elif name == "system":
            if rest:
                self.system = rest
                self.clear()
            self.show(f"The system prompt is: {self.system}")
        else:
            self.show(f"There is no command :{name}; :help shows those that there are.")
        return True

    def ask(self, query: str, write) -> str:
        """The answer to a question; what is new of it goes to `write` as it comes. Ctrl-C breaks it off."""
        torch.manual_seed(self.seed)
        shown = ""
        try:
            for response in self.model.chat_stream(
                self.tokenizer, query, self.history, self.system, past_key_values=self.cache, **self.settings
            ):
                write(response[len(shown) :])
                shown = response
        except KeyboardInterrupt:
            write(" [stopped]")
        write("\n")
        self.history.append((query, shown))
        return shown


def read(value: str):
    """A setting's value: a number, true, false, or a text."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value.lower(), value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat in the terminal; :help shows the commands.")
    demo = Path(__file__).resolve().parent.parent / "demo"
    parser.add_argument("checkpoint", nargs="?", default=str(demo))
    path = parser.parse_args().checkpoint
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()
    chat = Chat(model, tokenizer)
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
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n:quit ends.")
            continue
        if line.startswith(":"):
            if not chat.command(line):
                break
        elif line:
            try:
                chat.ask(line, write)
            except ValueError as error:  # a question that does not fit the window, a setting that makes no sense
                print(error)


if __name__ == "__main__":
    main()
