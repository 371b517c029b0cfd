"""TRL's trainers with a BADIT configuration and the regrouping callback, as a user would write it."""

import math
from contextlib import nullcontext
from itertools import chain

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from badit import BaditConfig, BaditError, RegroupCallback
from badit.data import answer_rows
from badit.files import read_jsonl
from badit.tuner.layer import BaditLinear
from data.examples import make_tokenizer
from training.trainers import QUIET

# CHATML with TRL's marks of what the assistant says.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARGUMENTS = {**QUIET, "bf16": False, "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 0.01}
ROWS = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(64)]


def chat(i, turns=1):
    messages = [{"role": "system", "content": f"Be brief, {i}."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Name city {i + turn}."})
        messages.append({"role": "assistant", "content": f"city {i} {turn}"})
    return messages


def config(**options):
    return BaditConfig(num_experts=4, r=2, task_type="CAUSAL_LM", **options)


def sft_trainer(model_folder, output, rows, tokenizer=None, routing="prompt", dropout=0.05, **options):
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        processing_class=tokenizer or AutoTokenizer.from_pretrained(model_folder),
        args=SFTConfig(output_dir=str(output), **{**ARGUMENTS, "num_train_epochs": 2, **options}),
        train_dataset=Dataset.from_list(rows),
        peft_config=config(routing=routing, lora_dropout=dropout),
        callbacks=[RegroupCallback(every=2)],
    )


def routed_on(trainer, tokenizer):
    """Trains, and returns of every forward pass the number of rows and the texts that the router reads."""
    passes = []
    base = trainer.model.get_base_model()

    def keep(module, args, kwargs, output):
        # Registered before badit's own hook ends the pass.
        mask_BT = base.__dict__["_badit_routing"].forward_pass().prompt_mask_BT
        if mask_BT is not None:  # a decoding step has the gates of its prompt
            passes.append([tokenizer.decode(ids[mask]) for ids, mask in zip(kwargs["input_ids"], mask_BT, strict=True)])

    handle = base.register_forward_hook(keep, with_kwargs=True, prepend=True)
    trainer.train()
    handle.remove()
    return passes


def prompts_of(tokenizer, chats):
    """What generation would read."""
    return {tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats}


@pytest.mark.parametrize("rows", ["one turn", "two turns", "one row per answer"])
def test_chats_with_a_loss_on_the_assistant_are_routed_on_the_prompt(model_folder, tmp_path, rows):
    tokenizer, chats, options = make_tokenizer(chat_template=MARKED), [chat(i, turns=2) for i in range(2)], {}
    prompts = [messages[:end] for messages in chats for end in (2, 4)]
    if rows == "one row per answer":
        data = [row for messages in chats for row in answer_rows(messages)]
    else:
        chats = [chat(i, turns=2 if rows == "two turns" else 1) for i in range(4)]
        prompts = [messages[:2] for messages in chats]
        data, options = [{"messages": messages} for messages in chats], {"assistant_only_loss": True}
    trainer = sft_trainer(model_folder, tmp_path, data, tokenizer, max_steps=1, **options)
    several = pytest.warns(UserWarning, match=r"several answers.*badit\.data\.answer_rows")
    with several if rows == "two turns" else nullcontext():
        read = routed_on(trainer, tokenizer)
    assert set(chain(*read)) == prompts_of(tokenizer, prompts)


PADDING_FREE = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 64}, PADDING_FREE])
@pytest.mark.parametrize("routing", ["prompt", "token"])
def test_packed_rows_are_trained_and_regrouped(model_folder, tmp_path, options, routing):
    trainer = sft_trainer(model_folder, tmp_path, ROWS, routing=routing, **options)
    trainer.train()
    assert trainer.state.global_step < (2 * 64 / 4 if options["max_length"] else 2 * 64 / 4 + 1)
    assert (tmp_path / "regroupings.jsonl").read_text()


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_padding_free_training_equals_padded_training(model_folder, tmp_path):
    trainers = []
    for options in ({"max_length": None}, PADDING_FREE):
        trainers.append(sft_trainer(model_folder, tmp_path, ROWS[:16], logging_steps=1, dropout=0.0, **options))
        trainers[-1].train()
    assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), rel=1e-4)


def test_rows_that_are_cut_anywhere_are_refused(model_folder, tmp_path):
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 64}
    with pytest.raises(BaditError, match="wrapped rows are cut anywhere"):
        sft_trainer(model_folder, tmp_path, ROWS[:16], **options).train()


def dpo_trainer(model_folder, output, model=None, **options):
    rejected = [{"role": "assistant", "content": "I could not say"}]
    rows = [{"prompt": chat(i)[:-1], "chosen": chat(i)[-1:], "rejected": rejected} for i in range(16)]
    return DPOTrainer(
        model=model or AutoModelForCausalLM.from_pretrained(model_folder),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        args=DPOConfig(output_dir=str(output), num_train_epochs=1, logging_steps=1, **{**ARGUMENTS, **options}),
        train_dataset=Dataset.from_list(rows),
        peft_config=None if model else config(),
        callbacks=[RegroupCallback(every=2)],
    )


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_uses_the_base_model_as_its_reference(model_folder, tmp_path, precomputed):
    weights = dict(AutoModelForCausalLM.from_pretrained(model_folder).named_parameters())
    trainer = dpo_trainer(model_folder, tmp_path, precompute_ref_log_probs=precomputed)
    passes, tokenizer = routed_on(trainer, trainer.processing_class), trainer.processing_class
    assert 8 in map(len, passes), "both answers are routed on the prompt"
    read = {text.removeprefix("<s>") for text in chain(*passes)}
    assert read - {""} == prompts_of(tokenizer, [chat(i)[:-1] for i in range(16)])
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5), "BADIT starts from exactly the base model"
    assert losses(trainer)[-1] < losses(trainer)[0]
    lines = list(read_jsonl(tmp_path / "regroupings.jsonl"))
    assert {line["step"] for line in lines} == {2}
    assert any(line["components_moved"] for line in lines)
    unloaded = dict(trainer.model.unload().named_parameters())
    assert all(torch.equal(unloaded[name], weights[name]) for name in weights)


def test_dpo_after_fine_tuning_uses_the_tuned_adapter_as_its_reference(model_folder, tmp_path):
    """TRL adds a copy named ref; after a regrouping no two of its tensors are what a new adapter starts with."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(base, config(router_input="standardised"))
    layers = [layer for layer in model.modules() if isinstance(layer, BaditLinear)]
    for layer in layers:
        layer.expert_of("default").copy_(layer.expert_of("default").flip(0))
        torch.nn.init.normal_(layer.badit_router["default"], std=0.02)
        torch.nn.init.normal_(layer.badit_B["default"])
        layer.badit_moments["default"].fill_(0.3)
        layer.badit_batches["default"].fill_(1000)  # a batch then changes the moments by a fiftieth
    trainer = dpo_trainer(model_folder, tmp_path, model)
    for layer in layers:
        for tensors in (layer.badit_A, layer.badit_B, layer.badit_router, layer.badit_A0, layer.badit_B0):
            assert torch.equal(tensors["default"], tensors["ref"])
            assert tensors["default"].data_ptr() != tensors["ref"].data_ptr()
        assert torch.equal(layer.expert_of("default"), layer.expert_of("ref"))
        assert torch.equal(layer.badit_moments["default"], layer.badit_moments["ref"])
    trainer.train()
    # The reference's moments stay, the trained adapter's follow its first batch.
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=0.02)
    assert all((layer.badit_moments["ref"] == 0.3).all() for layer in layers)
    assert not any((layer.badit_moments["default"] == 0.3).all() for layer in layers)


def answered_trainer(kind, model_folder, output, routing):
    """KTO on answers that are called good or bad; GRPO with the number of an answer's vowels and digits as reward."""
    rows = [{"prompt": chat(i)[:-1], "completion": chat(i)[-1:], "label": i % 2 == 0} for i in range(4)]
    arguments, options = {"output_dir": str(output), "max_steps": 4, **ARGUMENTS}, {}
    if kind is GRPOTrainer:
        rows = [{"prompt": row["prompt"]} for row in rows]
        options["reward_funcs"] = lambda completions, **columns: [
            float(sum(letter in "aeiou0123456789" for letter in message["content"])) for (message,) in completions
        ]
        args = GRPOConfig(**arguments, num_generations=4, max_completion_length=6, beta=0.1)
    else:
        args = KTOConfig(**arguments)
    return kind(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=config(routing=routing),
        callbacks=[RegroupCallback(every=2)],
        **options,
    )


@pytest.mark.parametrize("kind", [KTOTrainer, GRPOTrainer])
@pytest.mark.parametrize("routing", ["prompt", "token"])
def test_kto_and_grpo_train_the_router_on_the_prompt_and_regroup(model_folder, tmp_path, kind, routing):
    """GRPO's passes include those in which it generates: both read the same prompts."""
    trainer = answered_trainer(kind, model_folder, tmp_path, routing)
    routers = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "router" in name}
    passes, tokenizer = routed_on(trainer, trainer.processing_class), trainer.processing_class
    read = {text.removeprefix("<s>") for text in chain(*passes)}
    assert read - {""} == prompts_of(tokenizer, [chat(i)[:-1] for i in range(4)])
    trained = dict(trainer.model.named_parameters())
    assert routers
    assert not any(torch.equal(trained[name], router) for name, router in routers.items())
    lines = list(read_jsonl(tmp_path / "regroupings.jsonl"))
    assert {line["step"] for line in lines} == {2}
