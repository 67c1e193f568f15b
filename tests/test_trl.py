"""trl's SFTTrainer learns what assistants say, and nothing else, with the default chat template."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except (ImportError, RuntimeError) as error:  # with an older transformers
    pytest.skip(f"needs trl ({error})", allow_module_level=True)

DEMO = str(ROOT / "demo")


def test_the_loss_is_that_of_the_assistant_only(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(DEMO, trust_remote_code=True, fp32=True)
    chat = [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "\nOne <|im_end|> 龘"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Two."},
    ]
    settings = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, max_steps=1, report_to=[], use_cpu=True, bf16=False, seed=0
    )
    rows = Dataset.from_list([{"messages": chat}])
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = [index for index, label in zip(batch["input_ids"][0], batch["labels"][0]) if label != -100]
    assert tokenizer.decode(torch.stack(learned)) == "\nOne <|im_end|> 龘<|im_end|>Two.<|im_end|>"
    assert batch["input_ids"][0].tolist() == tokenizer.apply_chat_template(chat, return_dict=False)
    assert trainer.train().training_loss > 0
