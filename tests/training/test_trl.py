"""TRL's SFTTrainer with a BADIT configuration and the regrouping callback, as a user would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from badit import BaditConfig, BaditError, RegroupCallback

# TRL switches gradient checkpointing on by default, under a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def sft_trainer(model_folder: Path, output: Path, **options: Any) -> SFTTrainer:
    rows = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(16)]
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        args=SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=4,
            num_train_epochs=2,
            learning_rate=0.01,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=BaditConfig(num_experts=4, r=2, task_type="CAUSAL_LM"),
        callbacks=[RegroupCallback(every=2)],
    )


def test_supervised_fine_tuning(model_folder: Path, tmp_path: Path) -> None:
    trainer = sft_trainer(model_folder, tmp_path / "out")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[n])}
    assert {name.split(".")[-2] for name in changed} == {"badit_A", "badit_B", "badit_router"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "regroupings.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2, 4, 6}

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_packed_batches_are_refused_with_the_way_out(model_folder: Path, tmp_path: Path) -> None:
    trainer = sft_trainer(model_folder, tmp_path / "out", padding_free=True, max_length=None)
    with pytest.raises(BaditError, match="packing=False and padding_free=False"):
        trainer.train()
