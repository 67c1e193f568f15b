"""
Tune a Qwen checkpoint on conversations: all of its weights, LoRA or Q-LoRA, on one device or many.

    python finetune/finetune.py --model_name_or_path CHECKPOINT --data_path DATA.json --output_dir OUTPUT --use_lora

The arguments are the published script's and all of transformers' TrainingArguments; docs/finetuning.md explains them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import List, Optional

import torch
import transformers
from data import ROOT, SYSTEM, TRAIN_ON, Conversations, DataError, PackedBatch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, set_seed

sys.path.append(str(ROOT / "tools"))
checkpoint_files = importlib.import_module("checkpoint_files")
ADAPTER, CONFIG = checkpoint_files.ADAPTER, checkpoint_files.CONFIG
Problem = checkpoint_files.Problem  # tuning can't begin; the message says why and what to do

RUN = "finetune_run.json"  # beside the checkpoints of a run: what it was begun with
BY_LENGTH = ["group_by_length", "batch_rebalance"]  # of transformers' train_sampling_strategy
POSITIVE = ["model_max_length", "num_train_epochs", "gradient_accumulation_steps"]
POSITIVE += ["per_device_train_batch_size", "per_device_eval_batch_size", "dataloader_prefetch_factor"]
NOT_NEGATIVE = ["learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "dataloader_num_workers"]
NOT_NEGATIVE += ["neftune_noise_alpha"]
BELOW = {"seed": 2**32, "data_seed": 2**32, "adam_beta1": 1, "adam_beta2": 1}  # and not negative
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota; a file may not be larger
LEARNED_BY_BASE = ["wte", "lm_head"]  # of a base model the tokens of ChatML have no meaning yet


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="Qwen/Qwen-7B", metadata={"help": "A folder or a name on the hub."})
    attn_implementation: Optional[str] = field(
        default=None, metadata={"help": "Attention kernel by transformers' name; by default the model chooses."}
    )


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "Conversations to learn: JSON, or JSON lines."})
    eval_data_path: Optional[str] = field(default=None, metadata={"help": "Conversations to evaluate on."})
    lazy_preprocess: bool = field(default=False, metadata={"help": "Encode again what is drawn, to save memory."})
    packing: bool = field(
        default=False, metadata={"help": "An example is as many conversations as model_max_length holds, not one."}
    )
    train_on: str = field(
        default="published", metadata={"choices": TRAIN_ON, "help": "Which tokens have labels; see finetune/data.py."}
    )
    system: str = field(default=SYSTEM, metadata={"help": "System prompt of conversations that have none."})
    control_tokens: bool = field(
        default=False, metadata={"help": "Read <|im_start|> and the like in the data as the tokens of that name."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: Optional[str] = field(default=None, metadata={"help": "Folder for what is downloaded."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimiser; adamw_8bit needs bitsandbytes."})
    model_max_length: int = field(default=8192, metadata={"help": "Longer conversations are cut off, and counted."})
    use_lora: bool = field(default=False, metadata={"help": "Learn low-rank adapters instead of all weights."})
    report_to: Optional[str] = field(
        default_factory=lambda: "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        metadata={"help": "Where to log; TensorBoard if it is installed."},
    )


@dataclass
class LoraArguments:
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "What they add is multiplied by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the inputs of the adapter."})
    lora_target_modules: List[str] = field(
        default_factory=lambda: ["c_attn", "c_proj", "w1", "w2"],
        metadata={"help": "Modules that get an adapter, by the ends of their names."},
    )
    lora_modules_to_save: Optional[List[str]] = field(
        default=None,
        metadata={"help": "Modules that learn whole beside the adapter; by default wte and lm_head of a base model."},
    )
    lora_weight_path: str = field(default="", metadata={"help": "An adapter to go on from."})
    lora_bias: str = field(default="none", metadata={"help": "Which biases learn too: none, all or lora_only."})
    q_lora: bool = field(
        default=False, metadata={"help": "With use_lora: the matrices that the adapter adds to are in 4 bits."}
    )


def parse(arguments: list[str] | None = None):
    """
    The four groups of arguments; names that transformers has changed since the published scripts are understood.
    Problem for arguments that are unknown, or that transformers refuses.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = {one.name for one in fields(TrainingArguments)}
    renamed = [("evaluation_strategy", "eval_strategy"), ("warmup_ratio", "warmup_steps")]
    renamed = [names for names in renamed if names[0] not in known]  # warmup_steps below 1 are a ratio then
    if "activation_checkpointing" in known:  # the old names still work there, with a warning
        kinds = "checkpointing", "checkpointing_kwargs"
        renamed += [(f"gradient_{kind}", f"activation_{kind}") for kind in kinds]
    for old, new in renamed:
        arguments = [f"--{new}{a[len(old) + 2 :]}" if a.split("=")[0] == f"--{old}" else a for a in arguments]
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, LoraArguments))
    if any(argument.split("=")[0] == "--deepspeed" for argument in arguments):
        if importlib.util.find_spec("deepspeed") is None:
            raise Problem("--deepspeed: DeepSpeed is not installed. pip install -r requirements-finetune-all.txt")
        # DeepSpeed looks for the other processes when the arguments are made; a script started alone has none.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        if "WORLD_SIZE" not in os.environ:
            os.environ.update(alone)
    try:
        return parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:  # an argument that nobody knows, or one that transformers refuses here
        no_gpu = not torch.cuda.is_available() and "gpu" in str(error)
        hint = " No GPU was found; to train on a CPU pass --use_cpu True --bf16 False." if no_gpu else ""
        raise Problem(f"{error}{hint}") from error


def check(data, training, lora) -> None:
    """Problem for arguments that can't be meant together."""
    if lora.q_lora and not training.use_lora:
        raise Problem("--q_lora learns adapters over 4-bit matrices; pass --use_lora too.")
    if lora.lora_weight_path and not training.use_lora:
        raise Problem("--lora_weight_path names an adapter to go on from; pass --use_lora too.")
    if lora.lora_modules_to_save and lora.lora_weight_path:
        raise Problem(
            "--lora_modules_to_save is for a new adapter; the one at --lora_weight_path names its own modules in "
            "adapter_config.json. Leave one of the two out."
        )
    if lora.q_lora and (training.fsdp or is_zero3()):
        raise Problem("Q-LoRA needs all 4-bit matrices on each device: use ZeRO-2 or no --deepspeed, and no FSDP.")
    if training.label_smoothing_factor:
        raise Problem(
            "--label_smoothing_factor: transformers would smooth labels of a model loaded by remote code without "
            "shifting them. Leave it at 0."
        )
    for name in (*POSITIVE, *NOT_NEGATIVE, *BELOW):
        value, below = getattr(training, name, None), BELOW.get(name, math.inf)
        if value is not None and not (0 < value < below or (value == 0 and name not in POSITIVE)):
            wanted = "a positive number" if name in POSITIVE else "0 or a positive number"
            raise Problem(f"--{name} is {value}. Pass {wanted}" + (f" below {below}." if name in BELOW else "."))
    if training.max_steps == 0:  # below 0 epochs count
        raise Problem("--max_steps is 0. Pass a positive number.")
    if (training.eval_strategy != "no" or training.eval_on_start) and not data.eval_data_path:
        raise Problem("--eval_strategy and --eval_on_start need conversations to evaluate on: pass --eval_data_path.")
    if getattr(training, "group_by_length", False) or getattr(training, "train_sampling_strategy", "") in BY_LENGTH:
        raise Problem(
            "Grouping by length saves padding, of which there is next to none here: conversations share rows."
        )
    if training.save_only_model and training.resume_from_checkpoint:
        raise Problem(
            "--save_only_model leaves out the optimiser's state, without which no run goes on as it was. Leave it "
            "or --resume_from_checkpoint out."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != training.world_size:
        raise Problem(
            f"{started} processes were started, and found no GPUs: each would train alone. On CPUs pass --use_cpu True."
        )
    if training.n_gpu > 1:
        raise Problem(
            f"There are {training.n_gpu} GPUs and one process. Start one for each, torchrun --nproc_per_node "
            f"{training.n_gpu} finetune/finetune.py ..., or choose one GPU by CUDA_VISIBLE_DEVICES=0."
        )


def check_fsdp(trainer) -> None:
    """Problem if FSDP was asked for, by accelerate launch or --fsdp, and accelerate leaves it aside without a word."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # accelerate sets it for --fsdp too
    if asked and not trainer.is_fsdp_enabled:
        raise Problem(
            f"FSDP was asked for, but accelerate does not use it here (device {trainer.args.device}, processes: "
            f"{trainer.args.world_size}), so each process would hold the whole model. FSDP needs GPUs, and accelerate "
            f"launch or torchrun: see finetune/finetune_fsdp.sh. On CPUs start without it: torchrun --nproc_per_node 2 "
            f"finetune/finetune.py --use_cpu True ..."
        )


def is_zero3() -> bool:
    return transformers.integrations.is_deepspeed_zero3_enabled()


def compute_dtype(training) -> torch.dtype:
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def load_model(arguments, training, lora):
    """
    The checkpoint as it is to be tuned: what learns is in float32 (DeepSpeed keeps its own float32 copy), what
    does not is in the precision that is computed in, and for Q-LoRA the blocks' matrices are in 4 bits.
    """
    path = arguments.model_name_or_path
    common = {"cache_dir": training.cache_dir, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(path, **common)
    int8 = any(getattr(config, name, False) for name in ("int8_weights", "int8_lm_head"))
    quantised = getattr(config, "quantization_config", None) is not None or int8
    if quantised and not training.use_lora:
        raise Problem(
            f"{path} is quantised, and its matrices can't learn. Pass --use_lora to learn an adapter over them, or "
            f"name the checkpoint in full precision that it was made from."
        )
    half = compute_dtype(training)
    options = {"dtype": half if training.use_lora or training.deepspeed else torch.float32}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    elif (
        options["dtype"] != half  # else the model chooses it itself
        and torch.cuda.is_available()
        and config.use_flash_attn is not False
        and transformers.utils.is_flash_attn_2_available()
    ):
        options["attn_implementation"] = "flash_attention_2"
    if lora.q_lora:
        options["device_map"] = {"": training.device}
        if not quantised:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise Problem(
                    f"{path} is in full precision; --q_lora makes it 4-bit with bitsandbytes, which is not installed. "
                    f"pip install bitsandbytes, or name an Int4 checkpoint."
                )
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=half,
            )
    if is_zero3():  # its parameters are divided while they are made
        import deepspeed

        deepspeed.init_distributed()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **common, **options)
    except (ImportError, ValueError, RuntimeError) as error:  # an attention that is not there, weights that don't fit
        raise Problem(f"{path} can't be loaded: {error}") from error
    if lora.q_lora:
        check_quantized(model)
    return model


def check_quantized(model) -> None:
    """Problem unless every matrix of the blocks is stored in fewer bits than a floating-point number has."""
    found = [
        name.rpartition(".weight")[0]
        for name, parameter in model.transformer.h.named_parameters()
        if name.endswith(".weight") and parameter.dim() > 1 and parameter.is_floating_point()
    ]
    if found:
        raise Problem(
            f"--q_lora: {len(found)} matrices of the blocks are in full precision (h.{found[0]}, ...), so this would "
            f"be LoRA at the price of Q-LoRA. Its quantisation did not reach them: see the warnings above, or use "
            f"--use_lora alone."
        )


def modules_named(model, names: list[str], argument: str, example: str) -> dict[str, list]:
    """For each name the modules whose names end in it; Problem if there are none: peft would pass over the name."""
    found = {name: [m for key, m in model.named_modules() if f".{key}".endswith(f".{name}")] for name in names}
    for name, modules in found.items():
        if not modules:
            raise Problem(f"{argument}: the model has no module {name}. Name some, for instance {example}.")
    return found


def check_modules_to_save(model, names: list[str]) -> None:
    """Problem unless each name is of a module that can learn whole."""
    for name, found in modules_named(model, names, "--lora_modules_to_save", "wte lm_head").items():
        if not all(parameter.is_floating_point() for module in found for parameter in module.parameters()):
            raise Problem(
                f"--lora_modules_to_save: {name} is quantised here, and its codes can't learn. Leave it out, or name "
                f"the checkpoint in full precision that this one was made from."
            )


def is_chat_model(model, path: str) -> bool:
    """Whether it was tuned to ChatML: its generation configuration says so, or its name."""
    chat_format = getattr(model.generation_config, "chat_format", None)
    return chat_format == "chatml" or (chat_format is None and "chat" in Path(path).name.lower())


def add_adapter(model, arguments, training, lora):
    """The model with an adapter that learns: a new one, or the one at `lora_weight_path`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    path = arguments.model_name_or_path
    model.requires_grad_(False)
    if lora.lora_weight_path:
        try:
            model = PeftModel.from_pretrained(model, lora.lora_weight_path, is_trainable=True)
        except (ValueError, RuntimeError) as error:  # no adapter, or one of another model
            raise Problem(f"--lora_weight_path {lora.lora_weight_path}: {error}") from error
    else:
        modules_named(model, lora.lora_target_modules, "--lora_target_modules", "c_attn c_proj w1 w2")
        to_save = lora.lora_modules_to_save
        if to_save is not None:
            check_modules_to_save(model, to_save)
        elif not is_chat_model(model, path):
            if lora.q_lora:
                say(
                    f"{path} is a base model, and with Q-LoRA its embedding and head don't learn ChatML's tokens, "
                    f"unless you pass --lora_modules_to_save {' '.join(LEARNED_BY_BASE)}."
                )
            else:
                say(f"{path} is a base model: {' and '.join(LEARNED_BY_BASE)} learn ChatML's tokens, whole.")
                to_save = LEARNED_BY_BASE
        try:
            config = LoraConfig(
                r=lora.lora_r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=lora.lora_target_modules,
                bias=lora.lora_bias,
                task_type="CAUSAL_LM",
                modules_to_save=to_save,
            )
            model = get_peft_model(model, config)
        except (ValueError, NotImplementedError) as error:  # of peft, about a value of one of these
            raise Problem(f"peft can't make this adapter: {error}") from error
    if os.path.isdir(path):  # so that the adapter finds it from another folder
        model.peft_config["default"].base_model_name_or_path = str(Path(path).resolve())
    if not training.deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def make_chat(model, tokenizer) -> None:
    """The generation configuration of a model that answers in ChatML, and ends there."""
    settings = model.generation_config
    settings.chat_format = "chatml"
    settings.eos_token_id = [tokenizer.eod_id, tokenizer.im_end_id]
    settings.pad_token_id = tokenizer.eod_id
    # The Trainer would do this, and say that the tokens are new; up to 4.57 it would also name the first end twice.
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eod_id


class Tuner(Trainer):
    """transformers' Trainer; it also tells the tokens a second (padding included), the time left and the memory."""

    tokens, since = 0, None

    def training_step(self, model, inputs, *args, **kwargs):
        if self.since is None:
            self.started = self.since = time.perf_counter()
            self.first_step = self.state.global_step
        self.tokens += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            now = time.perf_counter()
            steps = self.state.global_step - self.first_step
            left = (now - self.started) / max(steps, 1) * (self.state.max_steps - self.state.global_step)
            logs["tokens_per_second"] = round(self.tokens * self.args.world_size / (now - self.since), 1)
            logs["minutes_left"] = round(left / 60, 1)
            logs["memory_gb"] = round(peak_memory() / 1e9, 2)
            self.tokens, self.since = 0, now
        super().log(logs, *args, **kwargs)


def peak_memory() -> int:
    """Bytes that this process has held at most, on its GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The folder's checkpoints, oldest first, without those that a kill has left unfinished."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        try:  # the Trainer writes this file last
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            continue
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(training) -> str | None:
    """What `--resume_from_checkpoint` means: a path, or "auto" for the last complete one of the output, if any."""
    asked, there = training.resume_from_checkpoint, complete_checkpoints(training.output_dir)
    if asked is None:
        if there:
            raise Problem(
                f"{training.output_dir} holds checkpoints of an earlier run, to {there[-1].name}. Pass "
                f"--resume_from_checkpoint auto to go on from there, or another --output_dir."
            )
        return None
    if asked in ("auto", "True", "true", True):
        return str(there[-1]) if there else None
    if not Path(asked, "trainer_state.json").exists():
        raise Problem(
            f"--resume_from_checkpoint: {asked} is no complete checkpoint. Name one, or auto for the last one."
        )
    return asked


def check_output(arguments, training, lora) -> None:
    """Problem if what will be saved would be mixed with what `output_dir` holds, or replace the model itself."""
    folder = Path(training.output_dir)
    if folder.resolve() == Path(arguments.model_name_or_path).resolve():
        raise Problem(f"--output_dir is the folder of the model, {folder}. Name another one.")
    other = CONFIG if training.use_lora else ADAPTER  # of two kinds in one folder, what is loaded is neither
    if (folder / other).exists():
        kind = "a checkpoint" if training.use_lora else "an adapter"
        raise Problem(
            f"{folder} holds {kind} already, beside which this one would not be loaded. Name another --output_dir."
        )


def what_is_learned(arguments, data, training, lora) -> dict:
    """What can't change within a run: going on, transformers would mix it with the old or pass over it, silently."""
    settings = {"model": Path(arguments.model_name_or_path).resolve().name, **vars(data), **vars(lora)}
    settings["data_path"] = hashlib.sha256(Path(data.data_path).read_bytes()).hexdigest()[:16]
    for name in ("eval_data_path", "lazy_preprocess"):
        del settings[name]
    for name in ("use_lora", "model_max_length", "learning_rate", "weight_decay", "optim", "seed"):
        settings[name] = getattr(training, name)
    return json.loads(json.dumps(settings))


def check_same_run(checkpoint: str, settings: dict) -> None:
    """Problem if the run of this checkpoint was begun with other settings."""
    noted = Path(checkpoint).parent / RUN
    if not noted.exists():  # of a run before there was this file
        return
    before = checkpoint_files.read_json(noted)
    changed = [name for name in settings if name in before and before[name] != settings[name]]
    if changed:
        what = "; ".join(f"{name} was {before[name]!r} and is {settings[name]!r}" for name in changed)
        way = "--lora_weight_path" if before.get("use_lora") else "--model_name_or_path"
        raise Problem(
            f"The run of {checkpoint} was begun otherwise: {what}. Go on as it was begun, or begin another run from "
            f"what it has learned: {way} {checkpoint} and another --output_dir."
        )


def save(trainer, tokenizer) -> None:
    """
    The model or adapter, with tokenizer, generation configuration and code, in `output_dir`. Weights that learned in
    float32 to be computed in half precision are saved in that; an adapter's own stay in float32.
    """
    folder, half = trainer.args.output_dir, compute_dtype(trainer.args)
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # by all processes together
    if not trainer.args.should_save:
        return
    weights = {
        name: weight.to(half) if weight.is_floating_point() and "lora_" not in name else weight
        for name, weight in weights.items()
    }
    # peft would save the base's embedding and head too if one of them has an adapter.
    options = {"save_embedding_layers": False} if trainer.args.use_lora else {}
    model.save_pretrained(folder, state_dict=weights, **options)
    if not trainer.args.use_lora:
        model.config.dtype = half  # save_pretrained notes the precision of the parameters
        model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw_losses(history: list[dict], path: Path) -> None:
    """A chart of the losses in the Trainer's history, of training and of evaluation, over the steps."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for key, name, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points), style, label=name, linewidth=1, markersize=3)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


@contextlib.contextmanager
def writing_to(folder: str):
    """Problem for a disk that is full in the block: Python, safetensors and torch.save name no file then."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        unnamed = getattr(error, "errno", None) in FULL and error.filename is None
        if unnamed or any(text in str(error) for text in ("I/O error", "PytorchStreamWriter", "unexpected pos")):
            raise Problem(
                f"{folder} can't be written to ({error}). Free some space; --resume_from_checkpoint auto goes on from "
                f"the last complete checkpoint."
            ) from error
        raise


def say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def load_data(path: str, tokenizer, data, training, packing: bool) -> Conversations:
    conversations = Conversations(
        path,
        tokenizer,
        training.model_max_length,
        system=data.system,
        train_on=data.train_on,
        control_tokens=data.control_tokens,
        lazy=data.lazy_preprocess,
        packing=packing,
    )
    say(f"{path}: {conversations.num_tokens} tokens in {len(conversations)} examples")
    for numbers, what in (
        (conversations.too_long, f"are longer than {training.model_max_length} tokens and were cut off"),
        (conversations.left_out, "had nothing left to learn then and were left out"),
    ):
        if numbers:
            which = ", ".join(str(number + 1) for number in numbers[:10]) + (", ..." if len(numbers) > 10 else "")
            say(f"warning: {len(numbers)} of {len(conversations.records)} conversations {what}: no. {which}")
    return conversations


def tune(arguments, data, training, lora) -> Tuner:
    """Everything but the command line; returns the trainer, whose model is tuned and saved."""
    check(data, training, lora)
    path = arguments.model_name_or_path
    checkpoint_files.check_loadable(path)
    check_output(arguments, training, lora)
    checkpoint = checkpoint_to_resume(training)
    settings = what_is_learned(arguments, data, training, lora)
    if checkpoint is not None:
        check_same_run(checkpoint, settings)
    training.gradient_checkpointing_kwargs = training.gradient_checkpointing_kwargs or {"use_reentrant": False}
    training.prediction_loss_only = True
    training.dataloader_pin_memory &= torch.cuda.is_available()
    set_seed(training.seed)  # a new adapter is random
    tokenizer = AutoTokenizer.from_pretrained(
        path, cache_dir=training.cache_dir, model_max_length=training.model_max_length, trust_remote_code=True
    )
    examples = load_data(data.data_path, tokenizer, data, training, data.packing)
    evaluation = load_data(data.eval_data_path, tokenizer, data, training, False) if data.eval_data_path else None
    for rows, batch in ((examples, training.train_batch_size), (evaluation, training.eval_batch_size)):
        if rows and training.dataloader_drop_last and len(rows) < batch * training.world_size:
            raise Problem(
                f"--dataloader_drop_last drops a batch that is not full, and {len(rows)} examples don't fill one of "
                f"{batch * training.world_size}. Leave it out, or take smaller batches."
            )
    model = load_model(arguments, training, lora)
    flat = (model.config._attn_implementation or "").startswith("flash")
    if training.use_lora:
        model = add_adapter(model, arguments, training, lora)
    make_chat(model, tokenizer)
    learned, total = (sum(size(p) for p in model.parameters() if test(p)) for test in (is_learned, lambda p: True))
    say(f"{learned:,} of {total:,} parameters learn; attention by {model.config._attn_implementation}")
    try:
        trainer = Tuner(
            model=model,
            args=training,
            train_dataset=examples,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            data_collator=PackedBatch(tokenizer.eod_id, flat),
        )
    except ValueError as error:  # arguments that transformers refuses only here
        raise Problem(str(error)) from error
    check_fsdp(trainer)
    if trainer.is_world_process_zero():
        checkpoint_files.write_file(Path(training.output_dir, RUN), (json.dumps(settings, indent=2) + "\n").encode())
    with writing_to(training.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
        save(trainer, tokenizer)
    if trainer.is_world_process_zero():
        chart = Path(training.output_dir, "loss.svg")
        if importlib.util.find_spec("matplotlib") is None:
            say(f"warning: no {chart.name}, which needs matplotlib (pip install matplotlib)")
        else:
            draw_losses(trainer.state.log_history, chart)
        say(f"Saved to {training.output_dir}")
    return trainer


def is_learned(parameter) -> bool:
    return parameter.requires_grad


def size(parameter) -> int:
    """Its number of elements, whole under ZeRO-3 too."""
    return getattr(parameter, "ds_numel", parameter.numel())


def main() -> int:
    try:
        tune(*parse())
        return 0
    except (DataError, Problem, OSError, SafetensorError) as problem:  # safetensors reports a full disk in its own way
        print(f"problem: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted: --resume_from_checkpoint auto goes on from the last complete checkpoint, if there is one")
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
