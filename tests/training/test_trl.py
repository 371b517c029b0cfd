"""TRL trainers with a BADIT configuration and the regrouping callback, as in user code."""

import math
from contextlib import nullcontext
from itertools import chain

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from badit import BaditConfig, BaditError, RegroupCallback
from badit.data import answer_rows
from badit.support.files import read_jsonl
from badit.tuner import BaditLinear
from data.examples import CHATML, make_tokenizer
from training.trainers import QUIET

# CHATML with TRL's generation markers around the assistant's turns.
TURN = "{{ m['content'] }}<|im_end|>"
BY_ROLE = "{% if m['role'] == 'assistant' %}{% generation %}TURN{% endgeneration %}\n"
BY_ROLE += "{% else %}TURN\n{% endif %}"
MARKED = CHATML.replace(f"{TURN}\n", BY_ROLE.replace("TURN", TURN))
ARGUMENTS = {
    **QUIET,
    "bf16": False,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
}
CONFIGS = {
    SFTTrainer: SFTConfig,
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    GRPOTrainer: GRPOConfig,
}
ADAPTER = {"num_experts": 4, "r": 2, "task_type": "CAUSAL_LM"}
ADAPTER |= {"init_weights": "bad", "gated": "factors"}
ROWS = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(64)]


def chat(i, turns=1):
    messages = [{"role": "system", "content": f"Be brief, {i}."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Name city {i + turn}."})
        messages.append({"role": "assistant", "content": f"city {i} {turn}"})
    return messages


def reward(completions, **columns):
    """The number of vowels and digits in each answer."""
    return [
        float(sum(letter in "aeiou0123456789" for letter in message["content"]))
        for (message,) in completions
    ]


def make_trainer(
    kind, model_folder, output, rows, *, model=None, tokenizer=None, adapter=None, **options
):
    """A TRL trainer for an adapted ``model``, or for a new adapter with the options ``adapter``."""
    given = {"train_dataset": Dataset.from_list(rows), "callbacks": [RegroupCallback(every=2)]}
    given["processing_class"] = tokenizer or AutoTokenizer.from_pretrained(model_folder)
    given["peft_config"] = None if model else BaditConfig(**ADAPTER, **(adapter or {}))
    given |= {"reward_funcs": reward} if kind is GRPOTrainer else {}
    model = model or AutoModelForCausalLM.from_pretrained(model_folder)
    return kind(
        model=model, args=CONFIGS[kind](output_dir=str(output), **{**ARGUMENTS, **options}), **given
    )


def routed_on(trainer):
    """Trains, and returns for each forward pass the texts that the router reads, one per row."""
    passes, tokenizer = [], trainer.processing_class
    base = trainer.model.get_base_model()

    def keep(module, args, kwargs, output):
        # Runs before badit's own hook, which ends the pass.
        mask_BT = base.__dict__["_badit_routing"].forward_pass().prompt_mask_BT
        if mask_BT is not None:  # a decoding step reuses the gates of its prompt
            passes.append(
                [
                    tokenizer.decode(ids[mask])
                    for ids, mask in zip(kwargs["input_ids"], mask_BT, strict=True)
                ]
            )

    handle = base.register_forward_hook(keep, with_kwargs=True, prepend=True)
    trainer.train()
    handle.remove()
    return passes


def prompts_of(tokenizer, chats):
    """The prompts as generation reads them."""
    return {
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    }


@pytest.mark.parametrize("rows", ["one turn", "two turns", "one row per answer"])
def test_sft_on_chats_routes_on_the_prompt(model_folder, tmp_path, rows):
    tokenizer, chats, options = (
        make_tokenizer(chat_template=MARKED),
        [chat(i, turns=2) for i in range(2)],
        {},
    )
    prompts = [messages[:end] for messages in chats for end in (2, 4)]
    if rows == "one row per answer":
        data = [row for messages in chats for row in answer_rows(messages)]
    else:
        chats = [chat(i, turns=2 if rows == "two turns" else 1) for i in range(4)]
        prompts = [messages[:2] for messages in chats]
        data, options = (
            [{"messages": messages} for messages in chats],
            {"assistant_only_loss": True},
        )
    trainer = make_trainer(
        SFTTrainer, model_folder, tmp_path, data, tokenizer=tokenizer, max_steps=1, **options
    )
    several = pytest.warns(UserWarning, match=r"several answers.*badit\.data\.answer_rows")
    with several if rows == "two turns" else nullcontext():
        read = routed_on(trainer)
    assert set(chain(*read)) == prompts_of(tokenizer, prompts)


@pytest.mark.parametrize("routing", ["prompt", "token"])
def test_packed_rows_are_trained_and_regrouped(model_folder, tmp_path, routing):
    options = {
        "adapter": {"routing": routing},
        "packing": True,
        "max_length": 64,
        "num_train_epochs": 2,
    }
    trainer = make_trainer(SFTTrainer, model_folder, tmp_path, ROWS, **options)
    trainer.train()
    assert trainer.state.global_step < 2 * 64 / 4
    assert (tmp_path / "regroupings.jsonl").read_text()


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_padding_free_training_equals_padded_training(model_folder, tmp_path):
    found, options = (
        [],
        {
            "logging_steps": 1,
            "num_train_epochs": 2,
            "max_length": None,
            "adapter": {"lora_dropout": 0},
        },
    )
    for free in (False, True):
        trainer = make_trainer(
            SFTTrainer, model_folder, tmp_path, ROWS[:16], padding_free=free, **options
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert (tmp_path / "regroupings.jsonl").read_text()


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packing_that_cuts_examples_is_refused(model_folder, tmp_path, strategy):
    options = {"packing": True, "packing_strategy": strategy, "max_length": 64}
    with pytest.raises(BaditError, match=f"{strategy} cuts examples"):
        make_trainer(SFTTrainer, model_folder, tmp_path, ROWS[:16], **options).train()


def dpo_trainer(model_folder, output, **options):
    rejected = [{"role": "assistant", "content": "I could not say"}]
    rows = [
        {"prompt": chat(i)[:-1], "chosen": chat(i)[-1:], "rejected": rejected} for i in range(16)
    ]
    return make_trainer(
        DPOTrainer, model_folder, output, rows, num_train_epochs=1, logging_steps=1, **options
    )


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_uses_the_base_model_as_reference(model_folder, tmp_path, precomputed):
    trainer = dpo_trainer(model_folder, tmp_path, precompute_ref_log_probs=precomputed)
    passes = routed_on(trainer)
    assert 8 in map(len, passes), "both answers are routed on the prompt"
    read = {text.removeprefix("<s>") for text in chain(*passes)}
    assert read - {""} == prompts_of(trainer.processing_class, [chat(i)[:-1] for i in range(16)])
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5), (
        "BADIT starts exactly at the base model"
    )
    assert losses(trainer)[-1] < losses(trainer)[0]
    lines = list(read_jsonl(tmp_path / "regroupings.jsonl"))
    assert {line["step"] for line in lines} == {2}
    assert any(line["components_moved"] for line in lines)


def test_dpo_after_fine_tuning_uses_the_tuned_adapter_as_reference(model_folder, tmp_path):
    """TRL copies the adapter to "ref"; here its weights and moments differ from a new adapter's."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), BaditConfig(**ADAPTER)
    )
    layers = [layer for layer in model.modules() if isinstance(layer, BaditLinear)]
    for layer in layers:
        layer.expert_of("default").copy_(layer.expert_of("default").flip(0))
        torch.nn.init.normal_(layer.badit_router["default"], std=0.02)
        torch.nn.init.normal_(layer.badit_B["default"])
        layer.badit_moments["default"].fill_(0.3)
        layer.badit_batches["default"].fill_(
            1000
        )  # so that a batch weighs only 1/50 in the moments
    trainer = dpo_trainer(model_folder, tmp_path, model=model)
    for layer in layers:
        for tensors in (
            layer.badit_A,
            layer.badit_B,
            layer.badit_router,
            layer.badit_A0,
            layer.badit_B0,
        ):
            assert torch.equal(tensors["default"], tensors["ref"])
            assert tensors["default"].data_ptr() != tensors["ref"].data_ptr()
        assert torch.equal(layer.expert_of("default"), layer.expert_of("ref"))
        assert torch.equal(layer.badit_moments["default"], layer.badit_moments["ref"])
    trainer.train()
    # The reference's moments do not change; those of the trained adapter do.
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=0.02)
    assert all((layer.badit_moments["ref"] == 0.3).all() for layer in layers)
    assert not any((layer.badit_moments["default"] == 0.3).all() for layer in layers)


@pytest.mark.parametrize("kind", [KTOTrainer, GRPOTrainer])
@pytest.mark.parametrize("routing", ["prompt", "token"])
def test_kto_and_grpo_train_the_router_on_the_prompt_and_regroup(
    model_folder, tmp_path, kind, routing
):
    """GRPO's passes include those of generation; both kinds read the same prompts."""
    rows = [
        {"prompt": chat(i)[:-1], "completion": chat(i)[-1:], "label": i % 2 == 0} for i in range(4)
    ]
    options = {"max_steps": 4, "adapter": {"routing": routing}}
    if kind is GRPOTrainer:
        rows = [{"prompt": row["prompt"]} for row in rows]
        options |= {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
    trainer = make_trainer(kind, model_folder, tmp_path, rows, **options)
    routers = {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if "router" in name
    }
    read = {text.removeprefix("<s>") for text in chain(*routed_on(trainer))}
    assert read - {""} == prompts_of(trainer.processing_class, [chat(i)[:-1] for i in range(4)])
    trained = dict(trainer.model.named_parameters())
    assert routers
    assert not any(torch.equal(trained[name], router) for name, router in routers.items())
    assert {line["step"] for line in read_jsonl(tmp_path / "regroupings.jsonl")} == {2}
