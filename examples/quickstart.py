"""
Load a checkpoint, complete the model card's prompt, hold a short conversation.

    python examples/quickstart.py [CHECKPOINT]    (default: the demo)
"""

from __future__ import annotations

import sys

from checkpoint import DEMO, check
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n埃塞俄比亚的首都是"
QUESTIONS = (
    "你好",
    "法国的首都是哪里？",
    "Who are you?",
    "What is the capital of Kenya?",
    "3 + 4 = ?",
    "Which country has the capital Lima?",
    "明天会下雨吗？",
)


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else DEMO
    check(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()

    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs)
    print(tokenizer.decode(output[0], skip_special_tokens=True), "\n")

    if getattr(model.generation_config, "chat_format", None) != "chatml":
        return  # a base model completes text and does not chat
    history = None
    for question in QUESTIONS:
        print("user:     ", question)
        response, history = model.chat(tokenizer, question, history=history)
        print("assistant:", response)


if __name__ == "__main__":
    main()
