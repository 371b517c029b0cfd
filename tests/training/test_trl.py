"""TRL's trainers with a BADIT configuration and the regrouping callback, as a user would write it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from badit import BaditConfig, BaditError, RegroupCallback
from badit.data import answer_rows
from badit.models import resolve_model
from badit.tuner.layer import BaditLinear
from data.examples import make_tokenizer

# TRL switches gradient checkpointing on by default, under a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing.*` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

# CHATML with TRL's marks of what the assistant says.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}


def chat(i: int, turns: int = 1) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": f"Be brief, {i}."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Name city {i + turn}."})
        messages.append({"role": "assistant", "content": f"city {i} {turn}"})
    return messages


def sft_trainer(model_folder: Path, output: Path, rows: list[dict[str, Any]], **options: Any) -> SFTTrainer:
    routing = options.pop("routing", "prompt")
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        processing_class=options.pop("tokenizer", None) or AutoTokenizer.from_pretrained(model_folder),
        args=SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=4,
            learning_rate=0.01,
            **{**QUIET, "num_train_epochs": 2, **options},
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=BaditConfig(num_experts=4, r=2, task_type="CAUSAL_LM", routing=routing),
        callbacks=[RegroupCallback(every=2)],
    )


@contextmanager
def routed(model: Any) -> Iterator[list[tuple[torch.Tensor, list[list[int]]]]]:
    """Within, keeps of every forward pass its tokens and the positions of each row that the router reads."""
    seen: list[tuple[torch.Tensor, list[list[int]]]] = []
    base = model.get_base_model()

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        # Registered before badit's own hook ends the pass.
        mask_BT = base.__dict__["_badit_routing"].forward_pass().prompt_mask_BT
        seen.append((kwargs["input_ids"], [row.nonzero()[:, 0].tolist() for row in mask_BT]))

    handle = base.register_forward_hook(keep, with_kwargs=True, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


def prompts_read(trainer: Any, tokenizer: Any) -> set[str]:
    """The texts that the router reads in the first step of a training."""
    with routed(trainer.model) as seen:
        trainer.args.max_steps = 1
        trainer.train()
    return {
        tokenizer.decode([int(ids[row, position]) for position in positions])
        for ids, rows in seen
        for row, positions in enumerate(rows)
    }


def test_supervised_fine_tuning(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(16)]
    trainer = sft_trainer(model_folder, tmp_path / "out", rows)
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


def test_chats_with_a_loss_on_the_assistant_are_routed_on_the_prompt(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=MARKED)
    rows = [{"messages": chat(i)} for i in range(4)]
    trainer = sft_trainer(model_folder, tmp_path, rows, tokenizer=tokenizer, assistant_only_loss=True)
    expected = {
        tokenizer.apply_chat_template(chat(i)[:-1], tokenize=False, add_generation_prompt=True) for i in range(4)
    }
    assert prompts_read(trainer, tokenizer) == expected, "what generation would read"


def test_chats_of_several_turns_are_routed_on_the_first_with_a_warning(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=MARKED)
    rows = [{"messages": chat(i, turns=2)} for i in range(4)]
    trainer = sft_trainer(model_folder, tmp_path, rows, tokenizer=tokenizer, assistant_only_loss=True)
    with pytest.warns(UserWarning, match=r"several answers.*badit\.data\.answer_rows"):
        read = prompts_read(trainer, tokenizer)
    expected = {
        tokenizer.apply_chat_template(chat(i)[:2], tokenize=False, add_generation_prompt=True) for i in range(4)
    }
    assert read == expected


def test_a_row_an_answer_is_routed_on_the_whole_chat_before_it(tmp_path: Path) -> None:
    """With SmolLM2's own tokenizer and template, which has no marks of what the assistant says."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    rows = [row for i in range(2) for row in answer_rows(chat(i, turns=2))]
    assert len(rows) == 4
    trainer = sft_trainer(tmp_path / "model", tmp_path / "out", rows, tokenizer=tokenizer)
    expected = {
        tokenizer.apply_chat_template(chat(i, turns=2)[:end], tokenize=False, add_generation_prompt=True)
        for i in range(2)
        for end in (2, 4)
    }
    assert prompts_read(trainer, tokenizer) == expected


@pytest.mark.parametrize("options", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_packed_batches_are_refused_with_the_way_out(
    model_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    rows = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(16)]
    trainer = sft_trainer(model_folder, tmp_path / "out", rows, **options)
    with pytest.raises(BaditError, match="packing=False and padding_free=False"):
        trainer.train()


def test_packed_batches_go_with_routing_by_token(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(64)]
    trainer = sft_trainer(
        model_folder, tmp_path, rows, packing=True, max_length=64, routing="token", num_train_epochs=1
    )
    trainer.train()
    assert trainer.state.global_step < 64 / 4, "several rows in one"
    assert (tmp_path / "regroupings.jsonl").read_text()


# --- preferences ------------------------------------------------------------------------------------------------------


def dpo_trainer(model: Any, tokenizer: Any, output: Path, peft_config: Any, **options: Any) -> DPOTrainer:
    rows = [
        {
            "prompt": chat(i)[:-1],
            "chosen": chat(i)[-1:],
            "rejected": [{"role": "assistant", "content": "I could not say"}],
        }
        for i in range(16)
    ]
    return DPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=DPOConfig(
            output_dir=str(output),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=0.01,
            logging_steps=1,
            **{**QUIET, **options},
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
        callbacks=[RegroupCallback(every=2)],
    )


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_takes_the_base_model_as_its_reference(model_folder: Path, tmp_path: Path, precomputed: bool) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = BaditConfig(num_experts=4, r=2, task_type="CAUSAL_LM")
    trainer = dpo_trainer(base, tokenizer, tmp_path, config, precompute_ref_log_probs=precomputed)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "BADIT starts from exactly the base model"
    assert losses[-1] < losses[0]
    lines = [json.loads(line) for line in (tmp_path / "regroupings.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2}
    assert any(line["components_moved"] for line in lines)
    assert all(line["output_change"] is not None for line in lines)
    unloaded = dict(trainer.model.unload().named_parameters())
    assert all(torch.equal(unloaded[name], weights[name]) for name in weights)


def test_dpo_routes_both_answers_on_the_prompt(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = BaditConfig(num_experts=4, r=2, task_type="CAUSAL_LM")
    trainer = dpo_trainer(AutoModelForCausalLM.from_pretrained(model_folder), tokenizer, tmp_path, config)
    expected = {
        tokenizer.apply_chat_template(chat(i)[:-1], tokenize=False, add_generation_prompt=True) for i in range(16)
    }
    with routed(trainer.model) as seen:
        trainer.train()
    chosen_and_rejected, _ = next((ids, rows) for ids, rows in seen)
    assert len(chosen_and_rejected) == 8
    read = [
        tokenizer.decode([int(ids[row, position]) for position in positions])
        for ids, rows in seen
        for row, positions in enumerate(rows)
    ]
    assert {text.removeprefix("<s>") for text in read} <= expected | {""}
    assert len(set(read)) == 16


def test_dpo_after_fine_tuning_takes_the_tuned_adapter_as_its_reference(
    tiny_model: Callable[..., Any], model_folder: Path, tmp_path: Path
) -> None:
    """TRL adds a copy named ref; after a regrouping no two of its tensors are what a new adapter starts with."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = BaditConfig(num_experts=4, r=2, task_type="CAUSAL_LM", router_input="standardised")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    for layer in model.modules():
        if isinstance(layer, BaditLinear):
            layer.expert_of("default").copy_(layer.expert_of("default").flip(0))
            torch.nn.init.normal_(layer.badit_router["default"])
            torch.nn.init.normal_(layer.badit_B["default"])
            layer.badit_moments["default"].fill_(0.3)
    trainer = dpo_trainer(model, tokenizer, tmp_path, None)
    for layer in trainer.model.modules():
        if isinstance(layer, BaditLinear):
            for tensors in (layer.badit_A, layer.badit_B, layer.badit_router, layer.badit_A0, layer.badit_B0):
                assert torch.equal(tensors["default"], tensors["ref"])
                assert tensors["default"].data_ptr() != tensors["ref"].data_ptr()
            assert torch.equal(layer.expert_of("default"), layer.expert_of("ref"))
            assert torch.equal(layer.badit_moments["default"], layer.badit_moments["ref"])
    trainer.train()
    first = next(line for line in trainer.state.log_history if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
