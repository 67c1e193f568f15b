"""
Chat in a web browser.

    pip install gradio
    python examples/web_chat.py [CHECKPOINT] [--server-port 8000]    (default: the demo, on this machine only)

Under an answer are buttons for another one and for taking the question back, above the conversation one that clears it.
The options are those of the published web_demo.py.
"""

from __future__ import annotations

import argparse
import contextlib

import gradio
from checkpoint import add_arguments, load


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


def answers(model, tokenizer, message, messages: list):
    """The answer to a message behind gradio's messages, while it grows; each time all of it so far."""
    try:
        responses = model.chat_stream(tokenizer, text_of(message), pairs(messages))
    except ValueError as error:  # such as a question that is too long: the page shows what is wrong
        raise gradio.Error(str(error)) from None
    # The stop button and a closed page close this generator, and with it the computation.
    with contextlib.closing(responses):
        yield from responses


def interface(model, tokenizer) -> gradio.ChatInterface:
    def respond(message, messages):
        yield from answers(model, tokenizer, message, messages)

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
    parser.add_argument("checkpoint", nargs="?", help="the same as --checkpoint-path")
    add_arguments(parser)
    parser.add_argument("--share", action="store_true", help="let gradio make a public address for it")
    parser.add_argument("--inbrowser", action="store_true", help="open it in the browser")
    parser.add_argument("--server-port", "--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--server-name", "--host", default="127.0.0.1", help="0.0.0.0: for other machines too (default: %(default)s)"
    )
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.checkpoint or arguments.checkpoint_path, arguments.cpu_only)
    interface(model, tokenizer).queue(default_concurrency_limit=4).launch(
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        share=arguments.share,
        inbrowser=arguments.inbrowser,
    )


if __name__ == "__main__":
    main()
