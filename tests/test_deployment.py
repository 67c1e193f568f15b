"""docs/deployment.md: both languages, the server and its clients from what the Dockerfile copies, a hub elsewhere."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import shutil
import subprocess
import threading
from urllib.parse import urlparse

import pytest
import transformers
from conftest import CODE, ROOT, run
from matrix import numbers
from test_serving import serving

if numbers(transformers.__version__) < (5, 1):
    pytest.skip("docs/deployment.md is tested with transformers 5.1 and newer", allow_module_level=True)

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENGLISH, CHINESE = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("deployment.md", "deployment_zh.md")
)


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", ENGLISH, re.MULTILINE | re.DOTALL).group(1)


def test_both_languages_have_the_same_sections_and_blocks():
    english, chinese = (re.split(r"^## .+$", text, flags=re.MULTILINE) for text in (ENGLISH, CHINESE))
    assert len(english) == len(chinese) >= 8
    for one, other in zip(english, chinese):
        assert BLOCK.findall(one) == BLOCK.findall(other)
        assert re.findall(r"\d+\.\d+\.\d+", one) == re.findall(r"\d+\.\d+\.\d+", other)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """What the Dockerfile copies into the image."""
    folder = tmp_path_factory.mktemp("image")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            found = [*ROOT.glob(source)]
            assert found, source
            for path in found:
                if path.is_dir():
                    shutil.copytree(path, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(path, folder / target)
    return folder


@pytest.fixture(scope="module")
def address(image, tmp_path_factory):
    """The server as the image starts it, for a checkpoint of the name that the page uses."""
    pytest.importorskip("uvicorn")
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(ROOT / "demo", folder / "CHECKPOINT", ignore=shutil.ignore_patterns("__pycache__"))
    entry = json.loads(re.search(r"^ENTRYPOINT (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE).group(1))
    assert entry[0] == "python"
    with serving([image / entry[1], folder / "CHECKPOINT"], folder / "log") as address:
        yield address


def test_the_image_has_what_is_run_in_it(image):
    assert not [name for name in CODE if not (image / name).exists()]
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    named = re.findall(r"\b(tools/\w+\.py|\w+\.txt)\b", text)
    assert {"tools/build_kernels.py", "tools/serve.py", "requirements.txt"} <= set(named)
    assert not [name for name in named if not (image / name).exists()]


def test_the_clients(address, capfd):
    pytest.importorskip("openai")
    blocks = dict(BLOCK.findall(section("OpenAI clients")))
    here = {language: block.replace("http://127.0.0.1:8000", address) for language, block in blocks.items()}
    exec(compile(here["python"], "deployment.md", "exec"), {})
    promised = [line[2:] for line in here["python"].splitlines() if line.startswith("# ")]
    assert capfd.readouterr().out.splitlines() == promised
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-euc", here["bash"]], check=True, capture_output=True, text=True, timeout=600)
        message = json.loads(done.stdout)["choices"][0]["message"]
        assert message["content"] == "The capital of Kenya is Nairobi."


def test_a_model_that_is_not_served(address):
    """An entry of docs/faq.md."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match=r"There is no model 'gpt-3.5-turbo' here"):
        client.chat.completions.create(model="gpt-3.5-turbo", messages=[{"role": "user", "content": "Hi"}])
    assert "CHECKPOINT" in [model.id for model in client.models.list()]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as downloads need: files of one repository at one revision."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    asked: list[str] = []

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        path = urlparse(self.path).path
        self.asked.append(path)
        name = re.sub(r"^/me/qwen/resolve/[^/]+/", "", path)
        file = ROOT / "demo" / name
        headers = {"X-Repo-Commit": self.COMMIT}
        if path.startswith("/me/qwen/resolve/") and file.is_file():
            content, status = file.read_bytes(), 200
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        elif path.startswith("/api/models/me/qwen") and "/tree/" not in path:
            files = [{"rfilename": path.name} for path in (ROOT / "demo").iterdir() if path.is_file()]
            content, status = json.dumps({"id": "me/qwen", "sha": self.COMMIT, "siblings": files}).encode(), 200
        else:
            content, status = b"", 404
            headers["X-Error-Code"] = "EntryNotFound"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("me/qwen", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("me/qwen", trust_remote_code=True)
print(model.chat(tokenizer, "What is the capital of Kenya?", None)[0])
"""


@pytest.mark.slow
def test_a_hub_at_another_address_and_no_network_afterwards(tmp_path):
    named = re.findall(r"export (\w+)=", section("No connection to the hub"))
    assert named == ["HF_ENDPOINT", "HF_HUB_OFFLINE"]
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "no_proxy": "127.0.0.1",
    }
    try:
        assert run(LOAD, tmp_path, **{**environment, "HF_HUB_OFFLINE": "0"}) == "The capital of Kenya is Nairobi."
    finally:
        hub.shutdown()
        hub.server_close()
    assert [path for path in Hub.asked if path.endswith("/config.json")]
    assert run(LOAD, tmp_path, **{**environment, "HF_HUB_OFFLINE": "1"}) == "The capital of Kenya is Nairobi."
