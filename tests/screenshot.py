"""
The picture of the web chat in docs/: a conversation with the demo.

    python tests/screenshot.py     writes docs/web_chat.png; needs gradio, playwright and the browser chromium
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = {
    "法国的首都是哪里？": "法国的首都是巴黎。",
    "What is the capital of Kenya?": "The capital of Kenya is Nairobi.",
    "3 + 4 = ?": "3 + 4 = 7",
}
# A browser that runs as root and without a network.
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--no-first-run"]


def main() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    sys.path.insert(0, str(ROOT / "examples"))
    web_chat, checkpoint = map(importlib.import_module, ("web_chat", "checkpoint"))
    playwright = importlib.import_module("playwright.sync_api").sync_playwright
    interface = web_chat.interface(*checkpoint.load(checkpoint.DEMO, cpu_only=True))
    _, address, _ = interface.queue().launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    try:
        with playwright() as p:
            browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
            page = browser.new_page(viewport={"width": 900, "height": 780})
            page.goto(address, wait_until="domcontentloaded")
            for question, answer in QUESTIONS.items():
                page.get_by_role("textbox").first.fill(question, timeout=240_000)
                page.get_by_role("textbox").first.press("Enter")
                page.get_by_text(answer).wait_for(timeout=240_000)
                page.wait_for_function("() => !document.querySelector('button.stop-button')", timeout=240_000)
            page.mouse.move(0, 0)
            page.screenshot(path=str(ROOT / "docs" / "web_chat.png"))
            browser.close()
    finally:
        interface.close()


if __name__ == "__main__":
    main()
