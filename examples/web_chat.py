"""
Chat in a web browser.

    pip install gradio
    python examples/web_chat.py [CHECKPOINT] [--port 7860]    (default: the demo, on this machine only)
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import gradio
from transformers import AutoModelForCausalLM, AutoTokenizer


def text_of(content) -> str:
    """The text of a message; gradio keeps it as a text or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def pairs(messages: list) -> list:
    """gradio's messages as (query, response) pairs; a question that was stopped before its answer has an empty one."""
    history: list = []
    for message in messages:
        text = text_of(message["content"])
        if message["role"] == "user":
            history.append((text, ""))
        elif history:
            history[-1] = (history[-1][0], text)
    return history


def interface(model, tokenizer) -> gradio.ChatInterface:
    def respond(message, messages):
        # The stop button and a closed page close this generator, and with it the computation.
        with contextlib.closing(model.chat_stream(tokenizer, text_of(message), pairs(messages))) as responses:
            yield from responses

    return gradio.ChatInterface(
        respond,
        title="Qwen",
        chatbot=gradio.Chatbot(height="70vh", buttons=["copy", "copy_all"]),
        examples=["法国的首都是哪里？", "What is the capital of Kenya?"],
        cache_examples=False,
        analytics_enabled=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat in a web browser.")
    demo = Path(__file__).resolve().parent.parent / "demo"
    parser.add_argument("checkpoint", nargs="?", default=str(demo))
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    path = arguments.checkpoint
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()
    interface(model, tokenizer).queue(default_concurrency_limit=4).launch(
        server_name=arguments.host, server_port=arguments.port
    )


if __name__ == "__main__":
    main()
