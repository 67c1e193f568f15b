"""docs/faq.md: every block runs, every error comes about and is what the page says, both languages say the same."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid

import pytest
import torch
import transformers
from conftest import CODE, ROOT, python, run
from matrix import numbers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

if numbers(transformers.__version__) < (4, 57):
    pytest.skip("docs/faq.md is tested with transformers 4.57 and newer", allow_module_level=True)

DEMO = str(ROOT / "demo")
REMOTE = {"trust_remote_code": True}
QUESTION, ANSWER = "What is the capital of Kenya?", "The capital of Kenya is Nairobi."
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 2561218\n"
CODE_TEXT = "".join((ROOT / name).read_text(encoding="utf-8") for name in CODE)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(name: str) -> list[tuple[str, str, str]]:
    """The entries of a page: the heading of the group, that of the entry, and what stands below it."""
    found, group, heading = [], "", ""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    # A comment in a block begins like a heading.
    for part in re.split(
        r"^(?=#{2,3} \S)", BLOCK.sub(lambda block: block.group().replace("\n#", "\n\0#"), text), flags=re.M
    ):
        title, _, body = part.partition("\n")
        body = body.replace("\0", "")
        if title.startswith("## "):
            group, heading = title[3:], ""
        elif title.startswith("### "):
            heading = title[4:]
        found.append((group, heading, body))
    return found


ENGLISH, CHINESE = sections("faq.md"), sections("faq_zh.md")
HEADINGS = [heading for _, heading, _ in ENGLISH if heading]


# --- The pages ---------------------------------------------------------------------------------------------------


def test_both_languages_have_the_same_entries():
    def spans(text):
        return re.findall(r"``.+?``(?!`)|`[^`\n]+`", text)

    def links(text):
        return [link.replace("_zh", "").partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]

    assert len(HEADINGS) >= 40
    assert len(ENGLISH) == len(CHINESE)
    groups = {}
    for (group, heading, body), (their_group, their_heading, their_body) in zip(ENGLISH, CHINESE):
        assert groups.setdefault(group, their_group) == their_group
        assert sorted(spans(heading)) == sorted(spans(their_heading)), heading
        assert BLOCK.findall(body) == BLOCK.findall(their_body), heading
        if heading:
            assert links(body) == links(their_body), heading
            assert re.search("[\u4e00-\u9fff]", their_body), heading
    assert len(set(groups.values())) == len(groups)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder like the root of the repository, with the copy of a checkpoint, CHECKPOINT, and conversations."""
    for name in ("demo", "tools", "finetune", "examples", *CODE):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "demo", tmp_path / "CHECKPOINT", ignore=shutil.ignore_patterns("__pycache__"))
    conversation = [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": ANSWER}]
    (tmp_path / "conversations.json").write_text(
        json.dumps([{"conversations": conversation * 8}] * 4), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_run_and_print_what_is_said(workshop, capfd, monkeypatch):
    """`python` and `bash`, in order; `shell` takes a network, a GPU or a checkpoint that is not here."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace: dict = {}
    done: set[str] = set()
    counts = {"python": 0, "bash": 0}
    for _, heading, body in ENGLISH:
        for language, block in BLOCK.findall(body):
            if language not in counts:
                assert language == "shell", heading
                continue
            counts[language] += 1
            if language == "bash":
                if block in done:  # such as the upgrade, which many entries advise
                    continue
                done.add(block)
                shutil.rmtree("fast", ignore_errors=True)
                command = re.sub(r"^python ", f"{shlex.join(python())} ", block, flags=re.MULTILINE)
                ended = subprocess.run(["bash", "-euc", command], timeout=600, capture_output=True, text=True)
                # 1: it does not fit, or there would be something to do
                assert ended.returncode == 0 or (ended.returncode == 1 and "estimate_memory" in block), ended.stderr
                continue
            capfd.readouterr()
            exec(compile(block, heading, "exec"), namespace)
            promised = [line[2:] for line in block.splitlines() if line.startswith("# ")]
            assert capfd.readouterr().out.splitlines() == promised, heading
    assert counts["python"] >= 20
    assert counts["bash"] >= 10


# --- The errors --------------------------------------------------------------------------------------------------

# Headings that begin with the text of an error, and are not brought about here.
UNTESTED = {
    "`[Errno 13] Permission denied`": "a user who can't write everywhere",
    "`CUDA out of memory`": "a GPU",
    "`Expected all tensors to be on the same device`": "a GPU",
    "`CUDA out of memory` while tuning": "a GPU",
    "`QWenLMHeadModel was supported in vLLM": "vLLM; tests/serve_with_vllm.py",
    "`There is no model 'gpt-3.5-turbo' here`": "a server; tests/test_deployment.py",
    "`transformers serve` does not load it": "a server; tests/test_serving.py has that of tools/serve.py",
}
SHOWN: dict[str, str] = {}


def shows(*beginnings: str):
    """The test shows what the entries say whose headings begin so."""

    def remember(test):
        for beginning in beginnings:
            assert beginning not in SHOWN
            SHOWN[beginning] = test.__name__
        return test

    return remember


def test_every_error_is_brought_about():
    def matching(heading):
        return [beginning for beginning in (*SHOWN, *UNTESTED) if heading.startswith(beginning)]

    errors = [heading for heading in HEADINGS if heading.startswith("`")]
    assert not [heading for heading in errors if not matching(heading)]
    found = {beginning for heading in HEADINGS for beginning in matching(heading)}
    assert found == {*SHOWN, *UNTESTED}


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the demo to spoil."""
    folder = tmp_path / tmp_path.name  # transformers takes code in folders of one name for the same
    return shutil.copytree(ROOT / "demo", folder, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, device_map="cpu", dtype=torch.float32, **REMOTE).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, padding_side="left", **REMOTE)


@pytest.fixture
def warnings(caplog):
    """The log, with what is said once only said again."""
    transformers_logging.warning_once.cache_clear()
    return caplog


@pytest.fixture
def upgrade(monkeypatch):
    """`tools/upgrade_checkpoint.py FOLDER OPTIONS`; returns the exit status."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("upgrade_checkpoint")
    return lambda folder, *options: tool.main([str(folder), *options])


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **{**REMOTE, **arguments})


def answers(model, tokenizer) -> bool:
    return model.chat(tokenizer, QUESTION, None)[0] == ANSWER


def change_json(path, change) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


@shows("`transformers_stream_generator`, `tiktoken`")
def test_code_that_needs_a_package_which_is_not_there(checkpoint, tokenizer, upgrade):
    if importlib.util.find_spec("transformers_stream_generator"):
        pytest.skip("transformers_stream_generator is installed")
    modeling = checkpoint / "modeling_qwen.py"
    modeling.write_text(
        "import transformers_stream_generator\n" + modeling.read_text(encoding="utf-8"), encoding="utf-8"
    )
    text = "requires the following packages that were not found in your environment: transformers_stream_generator"
    with pytest.raises(ImportError, match=text):
        load(checkpoint)
    assert upgrade(checkpoint, "--write") == 0
    assert answers(load(checkpoint), tokenizer)


@shows("`cannot import name 'SampleOutput'", "`'int' object has no attribute 'device'`")
def test_streams_without_the_old_package():
    found = run(
        f"""
import sys
sys.modules["transformers_stream_generator"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({DEMO!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({DEMO!r}, trust_remote_code=True)
print([*model.chat_stream(tokenizer, {QUESTION!r}, None)][-1])
""",
        ROOT,
    )
    assert found == ANSWER


@shows("`contains custom code which must be executed")
def test_code_that_is_not_trusted():
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="contains custom code which must be executed to correctly load the model"):
            kind.from_pretrained(DEMO, trust_remote_code=False)


@shows("`Transformers does not recognize this architecture`")
def test_a_configuration_without_auto_map(checkpoint, tokenizer, upgrade):
    change_json(checkpoint / "config.json", lambda values: values.pop("auto_map"))
    text = (
        "checkpoint you are trying to load has model type `qwen` but Transformers does not recognize this architecture"
    )
    with pytest.raises(ValueError, match=text):
        load(checkpoint)
    assert upgrade(checkpoint, "--write") == 0
    assert answers(load(checkpoint), tokenizer)


@shows("`Unrecognized configuration class`, `for this kind of AutoModel")
def test_a_configuration_without_the_bare_model(checkpoint, upgrade):
    change_json(checkpoint / "config.json", lambda values: values["auto_map"].pop("AutoModel"))
    with pytest.raises(
        ValueError, match=r"Unrecognized configuration class[^.]*.* for this kind of AutoModel: AutoModel\."
    ):
        AutoModel.from_pretrained(checkpoint, **REMOTE)
    assert upgrade(checkpoint, "--write") == 0
    assert type(AutoModel.from_pretrained(checkpoint, **REMOTE)).__name__ == "QWenModel"


@shows("`Tokenizer class QWenTokenizer does not exist")
def test_a_tokenizer_without_auto_map(checkpoint, upgrade):
    change_json(checkpoint / "tokenizer_config.json", lambda values: values.pop("auto_map"))
    old, new = (
        "Tokenizer class QWenTokenizer does not exist or is not currently imported",
        "Couldn't instantiate the backend",
    )
    with pytest.raises(ValueError, match=old if numbers(transformers.__version__) < (5, 0) else new):
        AutoTokenizer.from_pretrained(checkpoint, **REMOTE)
    assert upgrade(checkpoint, "--write") == 0
    assert len(AutoTokenizer.from_pretrained(checkpoint, **REMOTE)) == 4096


@shows("`No module named 'transformers_modules.Qwen-1'`")
def test_a_folder_with_a_point_in_its_name(checkpoint, tokenizer, upgrade, capsys):
    folder = checkpoint.rename(checkpoint.parent / "Qwen-1.8B-Chat")
    assert answers(load(folder), tokenizer)  # up to 4.56 it does not load
    upgrade(folder)
    told = capsys.readouterr().out
    assert "transformers up to 4.56 can't load the code in it" in told
    assert "Qwen-1_8B-Chat" in told


@shows("`qwen.tiktoken` is not found")
def test_a_vocabulary_that_is_not_there(checkpoint):
    (checkpoint / "qwen.tiktoken").unlink()
    with pytest.raises(OSError, match=r"There is no vocabulary file .*comes with the checkpoint"):
        AutoTokenizer.from_pretrained(checkpoint, **REMOTE)


@shows("`expected 'base64-of-the-token rank', found b'version")
def test_a_vocabulary_that_is_a_pointer(checkpoint):
    (checkpoint / "qwen.tiktoken").write_text(POINTER)
    heading = next(heading for heading in HEADINGS if heading.startswith("`expected 'base64"))
    with pytest.raises(ValueError, match=re.escape(heading.strip("`"))):
        AutoTokenizer.from_pretrained(checkpoint, **REMOTE)


@shows("`Error while deserializing header`")
@pytest.mark.parametrize("content", [POINTER.encode(), None], ids=["a pointer", "cut"])
def test_weights_that_are_not_whole(checkpoint, content, upgrade, capsys):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000] if content is None else content)
    with pytest.raises(Exception, match=r"[Ee]rror while deserializing header"):
        load(checkpoint)
    assert upgrade(checkpoint) == 2
    assert "The weight file model.safetensors is damaged" in capsys.readouterr().err


@shows("`does not fit its configuration`")
def test_weights_that_config_json_does_not_promise(checkpoint):
    change_json(checkpoint / "config.json", lambda values: values.update(num_hidden_layers=5))
    with pytest.raises(RuntimeError, match=r"does not fit its configuration: .* weights missing from it"):
        load(checkpoint)
    assert len(load(checkpoint, strict=False).transformer.h) == 5


@shows("`does not appear to have a file named")
def test_code_that_is_not_whole(checkpoint, tokenizer, upgrade):
    (checkpoint / "qwen_ops.py").unlink()
    # transformers keeps copies of code by the name of its folder
    checkpoint = checkpoint.rename(checkpoint.parent / f"lacking_{uuid.uuid4().hex}")
    with pytest.raises(OSError, match=r"No such file or directory: .*qwen_ops.py"):
        load(checkpoint)
    assert upgrade(checkpoint, "--write") == 0
    assert answers(load(checkpoint), tokenizer)


@shows('`Only one of "bf16", "fp16", "fp32" can be true`')
def test_two_precisions(checkpoint):
    with pytest.raises(ValueError, match="At most one of bf16, fp16 and fp32 may be true"):
        load(checkpoint, bf16=True, fp16=True)
    change_json(checkpoint / "config.json", lambda values: values.update(bf16=True))
    assert load(checkpoint, fp32=True).dtype == torch.float32
    assert load(checkpoint, dtype=torch.float32).dtype == torch.float32


@shows(
    "`The model is automatically converting to bf16",
    "`import flash_attn rotary fail`",
    "`No such file or directory: 'cache_autogptq_cuda_256.cpp'`",
)
def test_what_only_the_published_code_says():
    for text in ("automatically converting", "import flash_attn", "cache_autogptq"):
        assert text not in CODE_TEXT


@shows("`couldn't connect to 'https://huggingface.co'")
def test_no_connection():
    found = run(
        """
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained("Qwen/there-is-no-such-model", trust_remote_code=True)
except OSError as error:
    print("couldn't connect to 'https://huggingface.co' to load the files" in str(error))
""",
        ROOT,
    )
    assert found == "True"


@shows("`We detect you are probably using the pretrained model")
def test_chat_with_a_base_model(model, tokenizer):
    raw = transformers.GenerationConfig(chat_format="raw")
    with pytest.raises(
        ValueError, match="chat needs a chat model, but the generation configuration has chat_format='raw'"
    ):
        model.chat(tokenizer, QUESTION, None, generation_config=raw)
    with pytest.raises(
        ValueError, match="chat needs a chat model, but the generation configuration names no chat_format"
    ):
        model.chat_stream(tokenizer, QUESTION, None, generation_config=transformers.GenerationConfig())


@shows("It never stops, or goes on to ask itself questions")
def test_a_published_chat_model_does_not_stop(checkpoint, tokenizer, upgrade):
    """As published sequences end at <|endoftext|> only; `chat` ends all the same, `generate` does after the tool."""
    change_json(checkpoint / "generation_config.json", lambda values: values.update(eos_token_id=tokenizer.eod_id))
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer():
        model = load(checkpoint, dtype=torch.float32)
        assert answers(model, tokenizer)
        return model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()

    assert tokenizer.im_end_id in answer()[:-1]
    assert upgrade(checkpoint, "--write", "--end-at-im-end") == 0
    assert answer() == [*tokenizer.encode(ANSWER), tokenizer.im_end_id]


@shows("`generate` answers worse than `chat`")
def test_the_template_is_what_chat_writes(model, tokenizer, monkeypatch):
    messages = [{"role": "user", "content": QUESTION}]
    templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    seen = []
    monkeypatch.setattr(type(model), "generate", lambda self, ids, **kwargs: seen.append(ids[0].tolist()) or ids)
    model.chat(tokenizer, QUESTION, None)
    assert seen == [templated]


@shows("`chat has no argument stream`")
def test_chat_with_stream(model, tokenizer):
    with pytest.raises(ValueError, match="chat has no argument stream; for the answer as it grows call chat_stream"):
        model.chat(tokenizer, QUESTION, None, stream=True)


@shows("It forgets what I said", "`The system prompt and the question take`")
def test_a_window_that_is_full(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"The system prompt and the question take .* more than max_window_size=20"):
        model.chat(tokenizer, QUESTION, None, max_window_size=20)
    seen = []
    monkeypatch.setattr(
        type(model), "generate", lambda self, ids, **kwargs: seen.append(tokenizer.decode(ids[0])) or ids
    )
    model.chat(tokenizer, QUESTION, [("the first", "a"), ("the second", "b")], max_window_size=40)
    assert "the second" in seen[0]
    assert "the first" not in seen[0]


@shows("``probability tensor contains either")
def test_logits_that_are_no_numbers(tokenizer):
    broken = load(DEMO, dtype=torch.float32)
    with torch.no_grad():
        broken.lm_head.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan` or element < 0"):
        broken.chat(tokenizer, QUESTION, None, do_sample=True)
    with torch.no_grad():
        broken.lm_head.weight[:] = float("nan")
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    assert set(broken.generate(ids, do_sample=False, max_new_tokens=3)[0, ids.shape[1] :].tolist()) == {0}


@shows("`stop_words_ids must be a non-empty list`")
def test_stop_words_of_another_form(model, tokenizer):
    for wrong in ("Observation:", []):
        with pytest.raises(ValueError, match="stop_words_ids must be a non-empty list"):
            model.chat(tokenizer, QUESTION, None, stop_words_ids=wrong)


@shows("`bos_id`, `eos_id`, `pad_id` not found")
def test_the_ends_of_a_text(tokenizer):
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.eod_id


@shows("`Adding unknown special tokens is not supported`", "`Adding regular tokens is not supported`")
def test_tokens_that_do_not_exist(tokenizer):
    with pytest.raises(ValueError, match=r"'\[PAD\]' is not a special token of this vocabulary"):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match="Adding the regular token 'Xanadu' is not supported"):
        tokenizer.add_tokens(["Xanadu"])


@shows("`'QWenTokenizer' object has no attribute 'mergeable_ranks'`")
def test_the_ranks_are_there(tokenizer):
    assert len(tokenizer.mergeable_ranks) + 208 == len(tokenizer)


@shows("An id from 151,851 on can't be decoded")
def test_an_id_without_a_token(tokenizer, warnings):
    assert tokenizer.decode([*tokenizer.encode("Hi"), 5000]) == "Hi"
    assert warnings.text.count("Ids that have no token are decoded as nothing") == 1


@shows("`index out of range in self`")
def test_an_id_beyond_the_embedding(model):
    text = f"input_ids hold 999999, but this model's vocabulary has the ids 0 to {model.config.vocab_size - 1}"
    for call in (model, model.generate):
        with pytest.raises(IndexError, match=text):
            call(torch.tensor([[1, 999999]]))


@shows("How long may a prompt be?", "`Token indices sequence length is longer")
def test_a_prompt_beyond_the_training_length(model, tokenizer, warnings):
    inputs = tokenizer("The capital of Kenya is Nairobi. " * 90, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length > model.config.seq_length
    assert (
        "Token indices sequence length is longer than the specified maximum sequence length for this model"
        in warnings.text
    )
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == length + 1


@shows("`A decoder-only architecture is being used, but right-padding")
def test_padding_on_the_right(model, tokenizer, warnings):
    texts = ["The capital of Kenya is", "法国"]
    text = "A decoder-only architecture is being used, but right-padding was detected!"
    for side in ("left", "right"):
        assert text not in warnings.text
        model.generate(**tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"), max_new_tokens=1)
    assert text in warnings.text


@shows("`Asking to pad but the tokenizer does not have a padding token`")
def test_padding_out_of_the_box():
    fresh = AutoTokenizer.from_pretrained(DEMO, **REMOTE)
    rows = fresh(["a", "a b c d e"], padding=True)["input_ids"]
    assert rows[0][-1] == fresh.eod_id
    assert len(rows[0]) == len(rows[1])


@shows("Answers in a batch differ from answers one by one", "`The attention mask is not set`")
def test_a_batch_with_and_without_a_mask(model, tokenizer, warnings):
    texts = ["The capital of Kenya is", "法国的首都是", "The capital of Kenya is Nairobi. " * 90]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eod_id)
    assert "attention mask" not in warnings.text
    for row, text in zip(output, texts):
        alone = tokenizer(text, return_tensors="pt")
        ids = model.generate(**alone, max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eod_id)[0]
        new = ids[alone["input_ids"].shape[1] :].tolist()
        assert row[batch["input_ids"].shape[1] :].tolist()[: len(new)] == new
    model.generate(batch["input_ids"][:, -8:], max_new_tokens=1)
    assert "attention mask is not set" in warnings.text
    assert "pad token is same as eos token" in warnings.text


@shows("`attention_mask has 3 columns, but there are`")
def test_a_mask_that_is_too_short(model, tokenizer):
    ids = tokenizer("The capital of Kenya is", return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="attention_mask has 3 columns, but there are 0 cached and"):
        model(ids, attention_mask=torch.ones(1, 3))


@shows(
    "I can't install flash attention", "How do I see whether flash attention is used?", "`use_flash_attn=True needs`"
)
def test_flash_attention_is_not_here():
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(ImportError, match="use_flash_attn=True needs the package flash-attn"):
        load(DEMO, use_flash_attn=True)
    found = run(
        f"""
import sys
sys.stderr = sys.stdout
import transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_info()
AutoModelForCausalLM.from_pretrained({DEMO!r}, trust_remote_code=True)
""",
        ROOT,
        fresh=True,  # transformers remembers where errors went when it was imported
    )
    assert "attention by sdpa (flash_attention_2 needs the package flash-attn" in found


@shows("`not implemented for 'Half'`")
def test_half_precision_on_a_cpu(tokenizer, warnings, monkeypatch):
    kind = type(load(DEMO, device_map="cpu"))
    loading = next(base for base in kind.__mro__ if base.__name__ == "QWenPreTrainedModel").__module__
    monkeypatch.setattr(sys.modules[loading], "cpu_supports_fp16", lambda: False)
    half = load(DEMO, device_map="cpu", fp16=True)
    assert half.dtype == torch.float16
    assert "has no instructions for torch.float16" in warnings.text


@shows("`Native CPU kernels are not in use; PyTorch computes the same, more slowly.`")
def test_no_compiler(tmp_path):
    done = subprocess.run(
        [*python(), ROOT / "tools" / "build_kernels.py"],
        env={**os.environ, "CXX": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "There is no C++ compiler" in done.stdout
    assert "Native CPU kernels are not in use; PyTorch computes the same, more slowly." in done.stderr


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    """The demo in 4 bits, as Qwen-*-Chat-Int4 are."""
    folder = tmp_path_factory.mktemp("int4") / "int4"
    command = [*python(), ROOT / "tools" / "quantize_weights.py", DEMO, folder, "--bits", "4", "--method", "rtn"]
    subprocess.run(command, check=True, timeout=600, capture_output=True)
    return folder


@shows("`No module named 'auto_gptq'`", "`Using Exllama or Exllamav2 backend")
def test_an_int4_checkpoint_on_a_cpu(int4, tokenizer):
    found = run(
        f"""
import sys
for name in ("auto_gptq", "gptqmodel", "optimum"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(int4)!r}, device_map="cpu", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(int4)!r}, trust_remote_code=True)
print(type(model.transformer.h[0].mlp.w1).__name__, model.chat(tokenizer, {QUESTION!r}, None)[0])
""",
        ROOT,
        fresh=True,
    )
    assert found == f"QuantizedLinear {ANSWER}"
    if not importlib.util.find_spec("gptqmodel"):
        with pytest.raises(ImportError):
            load(int4, quantization_config=transformers.GPTQConfig(bits=4))


@shows("`A quantised matrix has codes in place of a weight`")
def test_merging_into_codes(int4):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(int4), peft.LoraConfig(target_modules=["w1"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="A quantised matrix has codes in place of a weight"):
        adapted.merge_and_unload()


@pytest.fixture(scope="module")
def finetune():
    sys.path.insert(0, str(ROOT / "finetune"))
    try:
        yield importlib.import_module("finetune")
    finally:
        sys.path.remove(str(ROOT / "finetune"))


@shows("`cannot import name 'deepspeed' from 'transformers'`")
def test_the_published_script_is_for_old_releases(finetune):
    with pytest.raises(ImportError, match="cannot import name 'deepspeed' from 'transformers'"):
        exec("from transformers import deepspeed")
    known = [
        "--model_name_or_path",
        "a",
        "--data_path",
        "b",
        "--output_dir",
        "c",
        "--use_lora",
        "True",
        "--q_lora",
        "True",
    ]
    _model_arguments, data, training, lora = finetune.parse([*known, "--bf16", "False", "--lazy_preprocess", "True"])
    assert (data.data_path, training.use_lora, lora.q_lora) == ("b", True, True)


@shows("`Target modules {'q_proj', 'v_proj'} not found in the base model`")
def test_names_of_other_models():
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"Target modules \{'(q_proj', 'v_proj|v_proj', 'q_proj)'\} not found in the base model"
    ):
        peft.get_peft_model(load(DEMO), peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    body = next(body for _, heading, body in ENGLISH if heading.startswith("`Target modules"))
    ours = eval(BLOCK.search(body).group(2), {"LoraConfig": peft.LoraConfig})
    assert peft.get_peft_model(load(DEMO), ours).get_nb_trainable_parameters()[0] > 0


@shows("`element 0 of tensors does not require grad")
def test_checkpointing_without_gradients_of_the_inputs(tokenizer):
    peft = pytest.importorskip("peft")

    def train(reentrant, prepare=False):
        base = load(DEMO, dtype=torch.float32)
        if prepare:
            base.enable_input_require_grads()
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["w1"], task_type="CAUSAL_LM")).train()
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        inputs = tokenizer(ANSWER, return_tensors="pt")
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()

    train(True, prepare=True)
    train(False)
    if numbers(transformers.__version__) >= (5, 0):
        train(True)
        return
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad and does not have a grad_fn"):
        train(True)


@shows("`conversations are wrong`")
def test_training_does_not_begin_with_wrong_data(tmp_path):
    data = tmp_path / "data.json"
    data.write_text('[{"conversations": [{"from": "gpt", "value": "Hi"}]}]')
    command = [*python(), ROOT / "finetune" / "finetune.py", "--model_name_or_path", DEMO, "--data_path", data]
    command += ["--output_dir", tmp_path / "out", "--use_lora", "--use_cpu", "True"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "1 of 1 conversations are wrong (no. 1: message 1 has the role 'gpt'" in done.stderr


@shows("`Attempting to unscale FP16 gradients.`")
def test_what_learns_is_in_float32(finetune, tokenizer, tmp_path):
    pytest.importorskip("peft")

    def unscale(parameters):
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        scaler.unscale_(torch.optim.SGD(parameters, lr=0.1))

    half = load(DEMO, fp16=True, device_map="cpu")
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients."):
        unscale(half.parameters())
    arguments = ["--model_name_or_path", DEMO, "--data_path", "x", "--output_dir", str(tmp_path), "--use_lora", "True"]
    model_arguments, _, training, lora = finetune.parse([*arguments, "--use_cpu", "True"])
    tuned = finetune.add_adapter(half, model_arguments, training, lora)
    unscale(tuned.parameters())
    assert {parameter.dtype for parameter in tuned.parameters() if parameter.requires_grad} == {torch.float32}


@shows("`You tried to access openai.ChatCompletion")
def test_the_old_interface_of_the_client():
    openai = pytest.importorskip("openai")
    with pytest.raises(Exception, match=r"You tried to access openai.ChatCompletion, but this is no longer supported"):
        openai.ChatCompletion.create(model="demo", messages=[])
