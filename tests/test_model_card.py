"""The commands of the published model card, word for word; a hub cache has the demo under the published name."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from conftest import CODE, ROOT, lacks, publish, run
from qwen.qwen_generation_utils import make_context

QUICKSTART = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationConfig

# Note: The default behavior now has injection attack prevention off.
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-72B", trust_remote_code=True)

# use bf16
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-72B", device_map="auto", trust_remote_code=True, bf16=True).eval()
# use fp16
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-72B", device_map="auto", trust_remote_code=True, fp16=True).eval()
# use cpu only
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-72B", device_map="cpu", trust_remote_code=True).eval()
# use auto mode, automatically select precision based on the device.
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-72B", device_map="auto", trust_remote_code=True).eval()

# Specify hyperparameters for generation. But if you use transformers>=4.32.0, there is no need to do this.
# model.generation_config = GenerationConfig.from_pretrained("Qwen/Qwen-72B", trust_remote_code=True)

inputs = tokenizer('蒙古国的首都是乌兰巴托（Ulaanbaatar）\\n冰岛的首都是雷克雅未克（Reykjavik）\\n埃塞俄比亚的首都是', return_tensors='pt')
inputs = inputs.to(model.device)
pred = model.generate(**inputs)
print(tokenizer.decode(pred.cpu()[0], skip_special_tokens=True))
# 蒙古国的首都是乌兰巴托（Ulaanbaatar）\\n冰岛的首都是雷克雅未克（Reykjavik）\\n埃塞俄比亚的首都是亚的斯亚贝巴（Addis Ababa）...
"""  # noqa: E501
ANSWER = (
    "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n"
    "埃塞俄比亚的首都是亚的斯亚贝巴（Addis Ababa）"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache in which the demo checkpoint goes by the name Qwen/Qwen-72B."""
    home = tmp_path_factory.mktemp("hub")
    names = [*CODE, "config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"]
    publish(home / "hub", "Qwen/Qwen-72B", {name: ROOT / "demo" / name for name in [*names, "model.safetensors"]})
    return home


def uncommented(code: str, *beginnings: str) -> str:
    for beginning in beginnings:
        assert code.count(f"# {beginning}") >= 1
        code = code.replace(f"# {beginning}", beginning)
    return code


def test_quickstart_word_for_word(hub, tmp_path):
    """Every way to load that the card shows, and its generation configuration, one after the other."""
    lines = QUICKSTART.splitlines()
    ways = [line[2:] for line in lines if line.startswith("# model = ")]
    assert len(ways) == 3
    automatic = next(line for line in lines if line.startswith("model = "))
    settings = uncommented(QUICKSTART, "model.generation_config")
    if not cpu_has_fp16():
        ways = [way for way in ways if "fp16" not in way]
    codes = [QUICKSTART, *(settings.replace(automatic, way) for way in ways)]
    script = "\nprint('=====')\n".join(f"{code}\nprint(model.dtype)" for code in codes)
    outputs = run(script, tmp_path, HF_HOME=str(hub)).split("=====")
    assert len(outputs) == len(codes)
    for way, output in zip([automatic, *ways], outputs):
        assert output.strip().startswith(ANSWER)
        dtype = "torch.bfloat16" if "bf16" in way else "torch.float16" if "fp16" in way else "torch."
        assert output.strip().splitlines()[-1].startswith(dtype)


def cpu_has_fp16() -> bool:
    """Whether this torch can multiply float16 matrices on a CPU; up to 2.1 it can't."""
    try:
        torch.ones(1, 1, dtype=torch.float16).mm(torch.ones(1, 1, dtype=torch.float16))
    except RuntimeError:
        return False
    return True


@pytest.fixture
def card() -> str:
    """The published model card, where a developer has it."""
    file = ROOT.parent / "shared" / "qwen-72b-model-card.md"
    if not file.exists():
        pytest.skip("needs the published model card")
    return file.read_text(encoding="utf-8")


def test_the_card_is_quoted_word_for_word(card):
    assert QUICKSTART in card


# --- docs/model_card.md and docs/model_card_zh.md ----------------------------------------------------------------

# What the page of each language calls what is not served.
OUT_OF_SCOPE = {"model_card.md": "out of scope: ", "model_card_zh.md": "不提供："}
TABLES = {page: (ROOT / "docs" / page).read_text(encoding="utf-8") for page in OUT_OF_SCOPE}
COMMANDS = (
    "pip install transformers==4.32.0 accelerate tiktoken einops scipy transformers_stream_generator==0.0.4 "
    "peft deepspeed",
    "git clone https://github.com/Dao-AILab/flash-attention",
    "cd flash-attention && pip install .",
    "pip install csrc/layer_norm",
    "pip install csrc/rotary",
)


def rows(page: str) -> list[list[str]]:
    """The cells of the tables, headings and all."""
    return [line.strip("| ").split(" | ") for line in TABLES[page].splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("page", TABLES)
def test_every_link_and_command_of_the_card_is_in_the_table(page, card):
    table = TABLES[page]
    links = set(re.findall(r"https?://[^\s\"')>]+", card))
    assert len(links) >= 15
    assert not {
        link for link in links if f"{link}>" not in table and f"{link}`" not in table and f"{link})" not in table
    }
    installs = re.findall(r"^(?:# )?((?:pip|git|cd) .*)$", card, re.MULTILINE)
    assert sorted(installs) == sorted(COMMANDS)
    assert not [command for command in COMMANDS if f"`{command}`" not in table]


@pytest.mark.parametrize("page", TABLES)
def test_the_tests_that_the_table_names_exist(page):
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", TABLES[page])
    assert len(named) >= 25
    for file, function in named:
        assert f"def {function}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, function)


@pytest.mark.parametrize("page", TABLES)
def test_every_statement_is_served_or_out_of_scope(page):
    assert len(rows(page)) >= 40
    assert not [row for row in rows(page) if len(row) < 2 or not row[1].strip()]


def test_the_same_statements_are_out_of_scope_in_both_languages():
    """Names, links and figures of the rows: test_docs.py."""
    english, chinese = ([OUT_OF_SCOPE[page] in "".join(row) for row in rows(page)] for page in OUT_OF_SCOPE)
    assert english.count(True) >= 5
    assert english == chinese


@pytest.mark.parametrize("page", ["README.md", "README_CN.md"])
def test_the_citation_is_the_cards(page, card):
    citation = re.search(r"^@article.*?^}$", card, re.DOTALL | re.MULTILINE).group()
    assert citation in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "README_CN.md"])
def test_the_cards_commands_are_in_the_readme(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not [command for command in COMMANDS[:3] if f"\n{command}\n" not in text]


@pytest.fixture
def init_stream_support():
    """That of transformers_stream_generator, which the card installs; its patches are undone afterwards."""
    try:
        from transformers_stream_generator import init_stream_support
    except ImportError as error:
        if getattr(error, "name", None) == "transformers_stream_generator":
            pytest.skip("transformers_stream_generator is not installed")
        lacks("lacks what transformers_stream_generator imports")
    patched = ("generate", "sample_stream")
    before = {name: vars(transformers.PreTrainedModel).get(name) for name in patched}
    yield init_stream_support
    for name, original in before.items():
        if original is not None:
            setattr(transformers.PreTrainedModel, name, original)
        elif name in vars(transformers.PreTrainedModel):
            delattr(transformers.PreTrainedModel, name)


def test_stream_generator(init_stream_support):
    path = str(ROOT / "demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, fp32=True)
    ids = torch.tensor([make_context(tokenizer, "法国的首都是哪里？", system="You are a helpful assistant.")[1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**inputs)[0, ids.shape[1] :].tolist()
    assert expected[-1] == tokenizer.im_end_id  # the second of the demo's two end tokens
    response, _ = model.chat(tokenizer, "法国的首都是哪里？", None)

    init_stream_support()
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, bos_token_id=8, eos_token_id=8)
    )
    two = torch.tensor([[1, 2]])
    try:  # any model will do to see whether the package works with this release
        list(gpt2.generate(two, attention_mask=torch.ones_like(two), do_sample=True, do_stream=True, max_new_tokens=2))
    except (TypeError, AttributeError):
        lacks("breaks transformers_stream_generator")

    streamed = torch.cat(list(model.generate(**inputs, do_sample=True, do_stream=True, top_k=1, seed=0))).tolist()
    assert streamed == [*expected, tokenizer.eod_id]  # the package knows one end token; it follows the other
    # What does not ask for a stream is transformers' own again.
    assert model.generate(**inputs)[0, -len(expected) :].tolist() == expected
    assert model.chat(tokenizer, "法国的首都是哪里？", None)[0] == response
    assert list(model.chat_stream(tokenizer, "法国的首都是哪里？", None))[-1] == response
