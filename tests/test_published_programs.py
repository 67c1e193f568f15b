"""
Every name of this package that the published programs use, called as they call it.

    python tests/test_published_programs.py    writes the table of docs/published_programs.md and its Chinese page

The programs are those of github.com/QwenLM/Qwen (commit 2df8e8a): cli_demo.py, web_demo.py, openai_api.py, utils.py,
run_gptq.py, finetune.py, and those of eval/ and examples/.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
WORKS = "works"
WORKS_WITH_FLASH = "works with flash-attn and a GPU; without them an error says so"
# The pages with the table, and their words for its headings and states.
ENGLISH = {word: word for word in ("what is called", "by", "state", WORKS, WORKS_WITH_FLASH)}
CHINESE = {
    "what is called": "调用",
    "by": "哪些程序",
    "state": "状态",
    WORKS: "可用",
    WORKS_WITH_FLASH: "有 flash-attn 和 GPU 时可用；缺少时报错并说明原因",
}
PAGES = {
    ROOT / "docs" / "published_programs.md": ENGLISH,
    ROOT / "docs" / "published_programs_zh.md": CHINESE,
}
TABLE = re.compile(r"(?<=<!-- table begins -->\n).*(?=<!-- table ends -->)", re.DOTALL)
DEMO = str(ROOT / "demo")
KENYA, NAIROBI = "What is the capital of Kenya?", "The capital of Kenya is Nairobi."
HISTORY = [["法国的首都是哪里？", "法国的首都是巴黎。"]]  # lists of two, as openai_api.py has them

USES: list[tuple[str, str, str, object]] = []


def use(call: str, programs: str, state: str = WORKS):
    """Registers a function that makes this call and looks at what it gives."""

    def register(function):
        USES.append((call, programs, state, function))
        return function

    return register


def load(kind=AutoModelForCausalLM, **kwargs):
    return kind.from_pretrained(DEMO, trust_remote_code=True, **kwargs)


# Loading


@use(
    "AutoTokenizer.from_pretrained(path, trust_remote_code=True, resume_download=True)",
    "cli_demo, web_demo, openai_api, eval/*, examples/*",
)
def _(model, tokenizer):
    assert load(AutoTokenizer, resume_download=True).encode("Kenya") == tokenizer.encode("Kenya")


@use(
    "AutoTokenizer.from_pretrained(path, pad_token='<\\|extra_0\\|>', eos_token='<\\|endoftext\\|>', "
    "padding_side='left', trust_remote_code=True)",
    "eval/evaluate_ceval, evaluate_cmmlu, evaluate_mmlu",
)
def _(model, tokenizer):
    other = load(AutoTokenizer, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left")
    assert other.pad_token_id == other.special_tokens["<|extra_0|>"]
    assert other.eos_token_id == other.eod_id
    ids = other(["a", "the capital of Kenya"], padding="longest")["input_ids"]
    assert ids[0][0] == other.pad_token_id
    assert len(ids[0]) == len(ids[1])


@use(
    "AutoTokenizer.from_pretrained(path, cache_dir=None, model_max_length=n, padding_side='right', use_fast=False, "
    "trust_remote_code=True)",
    "finetune",
)
def _(model, tokenizer):
    other = load(AutoTokenizer, cache_dir=None, model_max_length=99, padding_side="right", use_fast=False)
    assert (other.model_max_length, other.padding_side) == (99, "right")


@use(
    "AutoTokenizer.from_pretrained(path, trust_remote_code=True, extra_vocab_file=file)", "examples/tokenizer_showcase"
)
def _(model, tokenizer):
    import base64
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "qwen_extra.tiktoken"
        file.write_bytes(base64.b64encode("Nairobi的".encode()) + b" %d\n" % len(tokenizer))
        extended = load(AutoTokenizer, extra_vocab_file=str(file))
    assert len(extended) == len(tokenizer) + 1
    assert extended.decode(extended.encode("Nairobi的")) == "Nairobi的"


@use(
    "AutoModelForCausalLM.from_pretrained(path, device_map='auto' or 'cpu', trust_remote_code=True, "
    "resume_download=True).eval()",
    "cli_demo, web_demo, openai_api, utils, eval/*, examples/*",
)
def _(model, tokenizer):
    pytest.importorskip("accelerate")
    for device_map in ("auto", "cpu"):
        other = load(device_map=device_map, resume_download=True).eval()
        assert other.chat(tokenizer, KENYA, None)[0] == NAIROBI


@use("AutoModelForCausalLM.from_pretrained(path, pad_token_id=id, ...)", "eval/evaluate_ceval, _cmmlu, _mmlu")
def _(model, tokenizer):
    other = load(pad_token_id=5)  # a key of the configuration up to transformers 4
    assert 5 in (getattr(other.config, "pad_token_id", None), other.generation_config.pad_token_id)
    assert not hasattr(load(AutoModel, pad_token_id=5), "lm_head")  # without a configuration of generation


@use("AutoModelForCausalLM.from_pretrained(path, bf16=True or fp16=True, ...)", "eval/evaluate_chat_*; examples/*")
def _(model, tokenizer):
    assert load(bf16=True).dtype == torch.bfloat16
    assert load(fp16=True).dtype == torch.float16


@use(
    "AutoModelForCausalLM.from_pretrained(path, bf16=True, use_flash_attn=True, ...)",
    "eval/evaluate_chat_mmlu, _chat_ceval, _plugin",
    WORKS_WITH_FLASH,
)
def _(model, tokenizer):
    if importlib.util.find_spec("flash_attn") and torch.cuda.is_available():
        assert load(bf16=True, use_flash_attn=True).dtype == torch.bfloat16
    else:
        with pytest.raises(ImportError, match="needs the package flash-attn"):
            load(bf16=True, use_flash_attn=True)


@use(
    "AutoConfig.from_pretrained(path, trust_remote_code=True), config.use_cache = False, "
    "AutoModelForCausalLM.from_pretrained(path, config=config, quantization_config=None, ...)",
    "finetune",
)
def _(model, tokenizer):
    config = load(AutoConfig, cache_dir=None)
    config.use_cache = False
    other = load(config=config, cache_dir=None, device_map=None, quantization_config=None)
    assert other(torch.tensor([[1, 2]])).past_key_values is None


@use(
    "GenerationConfig.from_pretrained(path, trust_remote_code=True, resume_download=True, pad_token_id=id), "
    "model.generation_config = config",
    "cli_demo, web_demo, openai_api, eval/*, examples/*",
)
def _(model, tokenizer):
    config = GenerationConfig.from_pretrained(DEMO, trust_remote_code=True, resume_download=True, pad_token_id=5)
    assert (config.pad_token_id, config.chat_format) == (5, "chatml")
    before = model.generation_config
    try:
        model.generation_config = config
        assert model.chat(tokenizer, KENYA, None)[0] == NAIROBI
    finally:
        model.generation_config = before


@use(
    "model.generation_config.do_sample, .top_p, .top_k, .repetition_penalty = ...; "
    "copy.deepcopy(model.generation_config)",
    "cli_demo, eval/*, examples/react_demo, react_prompt.md",
)
def _(model, tokenizer):
    before = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.do_sample, model.generation_config.top_k = True, 1  # only the most likely one
        model.generation_config.top_p, model.generation_config.repetition_penalty = 0.5, 1.0
        assert model.chat(tokenizer, KENYA, None)[0] == NAIROBI
        assert '"top_p": 0.5' in str(model.generation_config)
    finally:
        model.generation_config = before


# Chat


@use(
    "model.chat(tokenizer, query, history=None or [(query, response), ...])",
    "eval/evaluate_chat_*, _plugin; examples/*",
)
def _(model, tokenizer):
    response, history = model.chat(tokenizer, KENYA, history=None)
    assert (response, history) == (NAIROBI, [(KENYA, NAIROBI)])
    response, history = model.chat(tokenizer, HISTORY[0][0], history=history)
    assert response == HISTORY[0][1]
    assert len(history) == 2


@use(
    "model.chat(tokenizer, query, history=history, system=text, stop_words_ids=ids or None, top_k=, temperature=, "
    "top_p=, max_length=)",
    "openai_api, examples/langchain_tooluse",
)
def _(model, tokenizer):
    def chat(**arguments):
        return model.chat(tokenizer, KENYA, history=HISTORY, system="You are a helpful assistant.", **arguments)[0]

    assert chat(stop_words_ids=None, top_k=1, temperature=0.5, top_p=0.8, max_length=400) == NAIROBI
    words = [tokenizer.encode(text) for text in (" Nairobi", "Observation:")]
    assert chat(stop_words_ids=words) == "The capital of Kenya is Nairobi"


@use("model.chat_stream(tokenizer, query, history=history, generation_config=config)", "cli_demo, web_demo")
def _(model, tokenizer):
    history: list = []
    config = GenerationConfig.from_pretrained(DEMO, trust_remote_code=True)
    for response in model.chat_stream(tokenizer, KENYA, history=history, generation_config=config):
        assert NAIROBI.startswith(response)
    assert response == NAIROBI
    history.append((KENYA, response))
    *_, response = model.chat_stream(tokenizer, HISTORY[0][0], history=history, generation_config=config)
    assert response == HISTORY[0][1]


@use(
    "model.chat_stream(tokenizer, query, history=history, stop_words_ids=ids or None, system=text, top_k=, ...)",
    "openai_api",
)
def _(model, tokenizer):
    stream = model.chat_stream(
        tokenizer,
        KENYA,
        history=HISTORY,
        stop_words_ids=None,
        system="You are a helpful assistant.",
        top_k=1,
        top_p=0.8,
    )
    assert list(stream)[-1] == NAIROBI


# Generation and the network


@use("model.generate(ids, stop_words_ids=ids, **settings).tolist()[0]", "openai_api, examples/react_demo")
def _(model, tokenizer):
    ids = torch.tensor([tokenizer.encode("The capital of Kenya is")]).to(model.device)
    output = model.generate(
        ids, stop_words_ids=[tokenizer.encode(" Nairobi"), [tokenizer.im_end_id]], top_k=1
    ).tolist()[0]
    text = tokenizer.decode(output, errors="ignore")
    assert text.startswith("The capital of Kenya is Nairobi")
    assert text.endswith(("<|endoftext|>", "<|im_end|>"))


@use("model.generate(ids)", "eval/evaluate_gsm8k, evaluate_humaneval")
def _(model, tokenizer):
    ids = torch.tensor([tokenizer.tokenizer.encode("The capital of Kenya is")]).to(model.device)
    tokens = model.generate(ids, max_new_tokens=2)[0].cpu().numpy().tolist()
    assert tokenizer.tokenizer.decode(tokens[ids.shape[1] :]).startswith(" Nairobi")


@use("model(ids, attention_mask=mask)['logits'], model.device", "eval/evaluate_ceval, _cmmlu, _mmlu")
def _(model, tokenizer):
    other = load(AutoTokenizer, pad_token="<|extra_0|>", padding_side="left")
    ids = torch.tensor(other(["a", "the capital of Kenya"], padding="longest")["input_ids"], device=model.device)
    with torch.no_grad():
        logits = model(ids, attention_mask=ids.ne(other.pad_token_id))["logits"]
        alone = model(torch.tensor([other.encode("a")]))["logits"]
    assert logits.shape == (*ids.shape, model.config.vocab_size)
    torch.testing.assert_close(logits[0, -1], alone[0, -1], atol=1e-4, rtol=1e-4)


@use("model.config.num_hidden_layers; the modules transformer.wte, transformer.h.N, transformer.ln_f, lm_head", "utils")
def _(model, tokenizer):
    names = dict(model.named_modules())
    blocks = [f"transformer.h.{i}" for i in range(model.config.num_hidden_layers)]
    assert {"transformer.wte", "transformer.ln_f", "lm_head", *blocks} <= set(names)
    assert f"transformer.h.{len(blocks)}" not in names


@use("model.named_parameters(), model.state_dict(), model.enable_input_require_grads()", "finetune")
def _(model, tokenizer):
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())
    other = copy.deepcopy(model)
    other.enable_input_require_grads()
    assert other.get_input_embeddings()(torch.tensor([[1]])).requires_grad


@use(
    "LoraConfig(target_modules=['c_attn', 'c_proj', 'w1', 'w2'], modules_to_save=['wte', 'lm_head'], "
    "task_type='CAUSAL_LM', ...), get_peft_model(model, config)",
    "finetune",
)
def _(model, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj", "w1", "w2"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        modules_to_save=["wte", "lm_head"],
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    weights = [name for name, weight in adapted.named_parameters() if weight.requires_grad and "lora_A" in name]
    trained = {name.split(".")[-4] for name in weights}
    assert trained == {"c_attn", "c_proj", "w1", "w2"}
    ids = torch.tensor([[1, 2, 3]])
    adapted(input_ids=ids, labels=ids).loss.backward()


# The tokenizer


@use("tokenizer(text).input_ids, tokenizer('\\n').input_ids", "finetune, run_gptq, eval/evaluate_*")
def _(model, tokenizer):
    assert tokenizer("\n").input_ids == tokenizer.encode("\n")
    assert tokenizer("<|im_start|>user").input_ids[0] == tokenizer.im_start_id
    assert len(tokenizer("A")["input_ids"]) == len(tokenizer(" B")["input_ids"]) == 1


@use("tokenizer.eod_id, .im_start_id, .im_end_id; tokenizer.pad_token_id = tokenizer.eod_id", "finetune, run_gptq")
def _(model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token_id = other.eod_id
    assert other.pad_token_id == other.eod_id
    assert other.decode([other.eod_id, other.im_start_id, other.im_end_id]) == "<|endoftext|><|im_start|><|im_end|>"


@use("tokenizer.eos_token_id = id", "examples/vllm_wrapper")
def _(model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token_id = other.im_end_id
    assert other.eos_token == "<|im_end|>"


@use(
    "tokenizer.encode(text), .encode(text, allowed_special=set(), disallowed_special=() or 'all' or [token])",
    "openai_api, examples/react_demo, vllm_wrapper, tokenizer_showcase",
)
def _(model, tokenizer):
    text = "<|im_start|>print('<|extra_0|>')<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text)[0] == tokenizer.im_start_id
    plain = tokenizer.encode(text, allowed_special=set(), disallowed_special=())
    assert max(plain) < tokenizer.eod_id
    assert tokenizer.encode(text, disallowed_special=["<|endoftext|>"]) == tokenizer.encode(text)
    with pytest.raises(ValueError, match="disallowed special token"):
        tokenizer.encode(text, allowed_special=set(), disallowed_special="all")
    with pytest.raises(ValueError, match="disallowed special token"):
        tokenizer.encode(text + "<|endoftext|>", disallowed_special=["<|endoftext|>"])


@use("tokenizer.decode(ids, errors='ignore')", "openai_api, examples/react_demo")
def _(model, tokenizer):
    assert tokenizer.decode(tokenizer.encode("龘")[:1], errors="ignore") == ""


@use("tokenizer.tokenizer.encode(text), tokenizer.tokenizer.decode(ids)", "eval/evaluate_gsm8k, evaluate_humaneval")
def _(model, tokenizer):
    ids = tokenizer.tokenizer.encode("The capital")
    assert ids == tokenizer.encode("The capital")
    assert tokenizer.tokenizer.decode([*ids, tokenizer.eod_id]) == "The capital<|endoftext|>"


@use(
    "tokenizer.convert_ids_to_tokens(ids), token.decode('utf-8', errors='replace'), .convert_tokens_to_string(tokens)",
    "eval/evaluate_plugin, examples/tokenizer_showcase",
)
def _(model, tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("法国的首都"))
    assert "".join(token.decode("utf-8", errors="replace") for token in tokens) == "法国的首都"
    assert tokenizer.convert_tokens_to_string([*tokens, "<|extra_0|>"]) == "法国的首都<|extra_0|>"


@use(
    "tokenizer.special_tokens[token], len(tokenizer), ._convert_id_to_token(id), ._convert_token_to_id(token), "
    ".unk_token",
    "examples/tokenizer_showcase",
)
def _(model, tokenizer):
    last = len(tokenizer) - 1
    assert tokenizer._convert_id_to_token(last) == "<|extra_204|>"
    assert tokenizer._convert_token_to_id("<|extra_204|>") == tokenizer.special_tokens["<|extra_204|>"] == last
    assert tokenizer.unk_token is None


@use("tokenizer.save_pretrained(path)", "run_gptq")
def _(model, tokenizer):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).encode("Kenya") == tokenizer.encode(
            "Kenya"
        )


@pytest.fixture(scope="module")
def tokenizer():
    return load(AutoTokenizer)


@pytest.fixture(scope="module")
def model():
    return load(fp32=True).eval()


@pytest.mark.parametrize("function", [use[-1] for use in USES], ids=[use[0] for use in USES])
def test_every_name_as_it_is_called(model, tokenizer, function):
    function(model, tokenizer)


def table(words: dict[str, str]) -> str:
    """The table with the headings and states of one language; calls and programs are names and stay."""
    rows = [(words["what is called"], words["by"], words["state"]), ("---",) * 3]
    rows += [(f"`{call}`", programs.replace("*", "\\*"), words[state]) for call, programs, state, _ in USES]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_table_has_every_call(page):
    assert TABLE.search(page.read_text(encoding="utf-8")).group() == table(PAGES[page])


if __name__ == "__main__":
    for page, words in PAGES.items():
        before = page.read_text(encoding="utf-8")
        found = TABLE.search(before)
        assert found, f"{page} has no marks of where the table begins and ends"
        page.write_text(before[: found.start()] + table(words) + before[found.end() :], encoding="utf-8")
