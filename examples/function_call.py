"""
Let a model call tools through a server with OpenAI's interface: what the published function_call_examples.py shows.

    pip install openai
    python tools/serve.py CHECKPOINT          in another terminal
    python examples/function_call.py [--address http://127.0.0.1:8000/v1] "What is 17 * 23?" "And plus 9?"

Several questions are one conversation.
"""

from __future__ import annotations

import argparse
import json

import openai
from toolbox import FUNCTIONS, TOOLS, call


def result(function, functions: dict) -> str:
    """What a call of the model gives, or in words what is wrong with it."""
    try:
        arguments = json.loads(function.arguments)
    except ValueError as error:
        return f"The arguments are not JSON: {error}"
    if not isinstance(arguments, dict):
        return f"The arguments are not a JSON object: {function.arguments}"
    return call(function.name, arguments, functions)


def answer(client, model: str, messages: list, tools: list, functions: dict, max_steps: int = 8) -> str:
    """
    Ask until there is an answer; the messages, which end with a question, become the whole conversation.

    Raises RuntimeError if there is no answer after `max_steps` calls.
    """
    for _ in range(max_steps):
        said = client.chat.completions.create(model=model, messages=messages, tools=tools).choices[0].message
        messages.append(said.model_dump(exclude_none=True))
        if not said.tool_calls:
            return said.content
        for made in said.tool_calls:
            content = result(made.function, functions)
            messages.append({"role": "tool", "tool_call_id": made.id, "content": content})
    raise RuntimeError(f"There was no answer after {max_steps} calls of tools.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a served model call a calculator and a calendar.")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--address", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--api-key", default="none", help="with --api-auth: base 64 of USER:PASSWORD")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.address, api_key=arguments.api_key)
    try:
        model = client.models.list().data[0].id
    except openai.APIConnectionError:
        raise SystemExit(
            f"No server answers at {arguments.address}. Start one in another terminal: python tools/serve.py CHECKPOINT"
        ) from None
    except openai.AuthenticationError:
        raise SystemExit(
            f"The server at {arguments.address} asks for a user and a password: pass --api-key with base 64 of "
            f"USER:PASSWORD."
        ) from None
    except openai.NotFoundError:
        raise SystemExit(
            f"The server has no models at {arguments.address}. Pass --address http://HOST:PORT/v1."
        ) from None
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    messages: list = []
    for question in arguments.questions:
        known = len(messages)
        messages.append({"role": "user", "content": question})
        answer(client, model, messages, tools, FUNCTIONS)
        for message in messages[known:]:
            calls = [call["function"] for call in message.get("tool_calls", [])]
            made = "".join(f" [{call['name']} {call['arguments']}]" for call in calls)
            print(f"{message['role'] + ':':10} {message['content']}{made}")


if __name__ == "__main__":
    main()
