"""
Tokens a second and peak memory of tuning on a GPU, beside transformers' Qwen2 with the same Trainer.

    python benchmarks/finetune.py --sizes 1.8B 7B --methods lora qlora full --batch 1 8

Random weights of the published shapes, sequences of --length random tokens, no padding, gradient checkpointing unless
--no-checkpointing. Each line of the table is a process of its own: ours through finetune.py's batches and loss, Qwen2
with the same LoRA, optimiser, precision and attention, both through transformers' Trainer. `qlora` makes both 4-bit by
bitsandbytes; full tuning keeps float32 weights and computes in bfloat16. Figures are of the steps after --warmup.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (both halves), vocab_size
    "tiny": (64, 2, 2, 192, 4096),
    "1.8B": (2048, 24, 16, 11008, 151936),
    "7B": (4096, 32, 32, 22016, 151936),
    "14B": (5120, 40, 40, 27392, 152064),
    "72B": (8192, 80, 64, 49152, 152064),
}
LORA_TARGETS = {
    "ours": ["c_attn", "c_proj", "w1", "w2"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def configuration(engine: str, size: str, length: int):
    hidden, layers, heads, intermediate, vocabulary = SHAPES[size]
    if engine == "qwen2":
        from transformers import Qwen2Config

        return Qwen2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=intermediate // 2,
            vocab_size=vocabulary,
            max_position_embeddings=max(length, 8192),
        )
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        ROOT,
        trust_remote_code=True,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        kv_channels=hidden // heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        use_dynamic_ntk=size != "72B",
        use_logn_attn=size != "72B",
    )


def model_of(engine: str, size: str, method: str, length: int, attention: str):
    """A model with random weights on the GPU, 4-bit for `qlora`, with an adapter unless all of it is tuned."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if method == "full" else torch.bfloat16
    config = configuration(engine, size, length)
    config._attn_implementation = attention
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        if method == "qlora":
            bits = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=bits)
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):  # one at a time: 72B does not fit otherwise
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if parameter.dim() == 1:
            value = torch.zeros if leaf == "bias" else torch.ones
            new = torch.nn.Parameter(value(parameter.shape, dtype=dtype, device=device))
        elif type(parameter).__name__ == "Params4bit":
            import bitsandbytes

            weight = torch.randn(module.out_features, module.in_features, dtype=dtype) * 0.02
            new = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=module).to(device)
        else:
            new = torch.nn.Parameter(torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02)
        setattr(module, leaf, new)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            rotary = type(module)(config=config, device=device) if "config" in vars(module) else None
            module.register_buffer(leaf, getattr(rotary, leaf), persistent=False)
    model.to(device)
    if method != "full":
        from peft import LoraConfig, get_peft_model

        model.requires_grad_(False)
        lora = LoraConfig(r=64, lora_alpha=16, target_modules=LORA_TARGETS[engine], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model


def measure(args) -> dict:
    """Tokens a second, seconds a step, peak memory in bytes, and the losses, of one engine and method."""
    import torch

    sys.path.append(str(ROOT / "finetune"))
    from data import PackedBatch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    attention = args.attention
    if attention == "auto":
        has_flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if has_flash else "sdpa"
    model = model_of(args.engine, args.size, args.method, args.length, attention)
    steps = args.warmup + args.steps
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, SHAPES[args.size][4] - 300, (steps * args.batch, args.length), generator=generator).tolist()
    if args.engine == "ours":
        examples = [[{"input_ids": row, "labels": row}] for row in rows]
        collate = PackedBatch(0, attention.startswith("flash"))
    else:
        examples = [{"input_ids": row, "labels": row} for row in rows]

        def collate(batch):
            ids = torch.tensor([row["input_ids"] for row in batch])
            return {"input_ids": ids, "labels": ids.clone()}

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=args.batch,
            gradient_checkpointing=args.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=torch.cuda.is_available(),
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model, args=training, train_dataset=examples, data_collator=collate, callbacks=[Clock()]
        )
        trainer.train()
    seconds = (times[-1] - times[args.warmup - 1]) / args.steps
    return {
        "tokens/s": round(args.batch * args.length / seconds, 1),
        "seconds a step": round(seconds, 3),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
        "losses": [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry],
        "attention": attention,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second and peak memory of tuning on a GPU.")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.8B", "7B"])
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora", "full"), default=["lora", "qlora"])
    parser.add_argument("--engines", nargs="+", choices=LORA_TARGETS, default=["ours", "qwen2"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--attention", default="auto", help="flash_attention_2 if it is installed, else sdpa")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--one", nargs=3, metavar=("ENGINE", "SIZE", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.engine, args.size, args.method = args.one
        args.batch = args.batch[0]
        print("RESULT " + json.dumps(measure(args)))
        return
    print("| size | method | batch | | tokens/s | s a step | peak GB | first loss |\n|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for method in args.methods:
            for batch in args.batch:
                for engine in args.engines:
                    command = [sys.executable, __file__, "--one", engine, size, method, "--batch", str(batch)]
                    command += ["--length", str(args.length), "--steps", str(args.steps), "--warmup", str(args.warmup)]
                    command += ["--attention", args.attention]
                    command += ["--checkpointing" if args.checkpointing else "--no-checkpointing"]
                    done = subprocess.run(command, capture_output=True, encoding="utf-8")
                    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                    if not found:
                        reason = (done.stderr.strip().splitlines() or ["?"])[-1][:80]
                        print(f"| {size} | {method} | {batch} | {engine} | failed: {reason} | | | |", flush=True)
                        continue
                    result = json.loads(found[-1][7:])
                    print(
                        f"| {size} | {method} | {batch} | {engine}, {result['attention']} | {result['tokens/s']} "
                        f"| {result['seconds a step']} | {result['peak GB']} | {result['losses'][0]} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
