"""badit.prepare and start_task with the batches of real trainers of transformers and TRL."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

from badit import BaditConfig, hooks_of, prepare
from badit.baselines import BASELINES
from badit.data import AnswerCollator, answer_rows
from badit.tuner import BaditLinear
from data.examples import make_tokenizer
from refusals import refuses
from training.test_trl import ARGUMENTS, CONFIGS, MARKED, ROWS, chat, reward
from training.trainers import QUIET, adapter_state, assert_same, examples

CLUSTERS = {"num_experts": 4, "r": 2, "num_clusters": 4, "task_type": "CAUSAL_LM"}
TEXTS = [{"text": f"{row['prompt']}{row['completion']}"} for row in ROWS]
CHATS = [{"messages": chat(i)} for i in range(16)]
PAIRS = [
    {
        "prompt": chat(i)[:-1],
        "chosen": chat(i)[-1:],
        "rejected": [{"role": "assistant", "content": "I could not say"}],
    }
    for i in range(16)
]
LABELLED = [
    {"prompt": chat(i)[:-1], "completion": chat(i)[-1:], "label": i % 2 == 0} for i in range(16)
]
QUESTIONS = [{"prompt": chat(i)[:-1]} for i in range(16)]


def trl_trainer(kind, model_folder, output, rows, *, tokenizer=None, config=None, **options):
    given = {"reward_funcs": reward} if kind is GRPOTrainer else {}
    if kind is GRPOTrainer:
        options = {"num_generations": 4, "max_completion_length": 4, **options}
    return kind(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=CONFIGS[kind](output_dir=str(output), **{**ARGUMENTS, "max_steps": 2, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer or AutoTokenizer.from_pretrained(model_folder),
        peft_config=config or BaditConfig(**CLUSTERS),
        **given,
    )


def hf_trainer(model, output, **arguments):
    arguments = {"max_steps": 2, "remove_unused_columns": False, **QUIET, **arguments}
    return Trainer(
        model,
        TrainingArguments(output_dir=str(output), save_strategy="no", **arguments),
        train_dataset=examples(),
        data_collator=AnswerCollator(0),
    )


def badit_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, BaditLinear)]


def clusters_found(trainer):
    """The largest number of different centroids that a layer has."""
    layers = badit_layers(trainer.model)
    return max(len(layer.badit_centroids["default"].unique(dim=0)) for layer in layers)


@pytest.mark.filterwarnings("ignore:labels begin at the first token")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", ["text", "messages"])
def test_rows_whose_labels_begin_at_the_first_token_are_refused(
    model_folder, tmp_path, rows, packed
):
    """Each prompt would be the first token, so every prompt would have the same gates."""
    rows = TEXTS if rows == "text" else CHATS
    trainer = trl_trainer(
        SFTTrainer, model_folder, tmp_path, rows, padding_free=packed, max_length=None
    )
    fixes = r"answer_rows\(messages\).*assistant_only_loss=True.*routing='token'"
    for _ in range(2):
        refuses(f"labels begin at the first token of every row.*{fixes}", prepare, trainer)
    refuses("the prompts have no clusters yet", trainer.train)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", ["prompt and completion", "answer_rows", "assistant_only_loss"])
def test_rows_with_a_prompt_are_clustered(model_folder, tmp_path, rows, packed):
    options = {"padding_free": packed, "max_length": None}
    if rows == "prompt and completion":
        data = ROWS
    elif rows == "answer_rows":
        data = [row for messages in CHATS for row in answer_rows(messages["messages"])]
    else:
        data = CHATS
        options["assistant_only_loss"] = True
    tokenizer = make_tokenizer(chat_template=MARKED)
    trainer = trl_trainer(SFTTrainer, model_folder, tmp_path, data, tokenizer=tokenizer, **options)
    prepare(trainer)
    assert clusters_found(trainer) == 4
    trainer.train()


@pytest.mark.filterwarnings("ignore:labels begin at the first token")
def test_one_row_with_a_prompt_is_enough(model_folder, tmp_path, tiny_model):
    rows = [
        {"input_ids": torch.arange(3, 9)[None] + i, "labels": torch.arange(3, 9)[None] + i}
        for i in range(8)
    ]
    model = get_peft_model(tiny_model("llama"), BaditConfig(**CLUSTERS))
    refuses("labels begin at the first token", hooks_of(model).start_task, {"all": rows})
    rows[7]["labels"] = rows[7]["labels"].index_fill(1, torch.arange(3), -100)
    hooks_of(model).start_task({"all": rows})


@pytest.mark.filterwarnings("ignore:labels begin at the first token")
def test_prompts_of_one_token_are_prompts(tiny_model):
    """Here no label is on the first token."""
    ids = torch.arange(3, 51).view(8, 6)
    labels = ids.index_fill(1, torch.tensor(0), -100)
    model = get_peft_model(tiny_model("llama"), BaditConfig(**CLUSTERS))
    hooks_of(model).start_task({"all": [{"input_ids": ids, "labels": labels}]})
    assert all(
        len(layer.badit_centroids["default"].unique(dim=0)) == 4 for layer in badit_layers(model)
    )


@pytest.mark.filterwarnings("ignore:labels begin at the first token")
def test_a_single_cluster_or_equal_prompts_need_no_different_gates(tiny_model):
    ids = torch.arange(3, 51).view(8, 6)
    single = get_peft_model(tiny_model("llama"), BaditConfig(**{**CLUSTERS, "num_clusters": 1}))
    hooks_of(single).start_task({"all": [{"input_ids": ids, "labels": ids}]})
    equal = get_peft_model(tiny_model("llama"), BaditConfig(**CLUSTERS))
    labels = ids.index_fill(1, torch.arange(3), -100)
    hooks_of(equal).start_task({"all": [{"input_ids": ids[[1] * 8], "labels": labels[[1] * 8]}]})


def test_prompts_that_no_layer_tells_apart_are_refused(tiny_model):
    """A model whose hidden states are not finite, so that all centroids are zero."""
    base = tiny_model("llama")
    torch.nn.init.constant_(base.model.embed_tokens.weight, torch.nan)
    model = get_peft_model(base, BaditConfig(**CLUSTERS))
    ids = torch.arange(3, 51).view(8, 6)
    batch = {"input_ids": ids, "labels": ids.index_fill(1, torch.arange(3), -100)}
    for _ in range(2):
        refuses(
            "8 different prompts are the same in every layer",
            hooks_of(model).start_task,
            {"all": [batch]},
        )
    refuses("the prompts have no clusters yet", model.train(), **batch)


@pytest.mark.parametrize(
    ("kind", "rows"), [(DPOTrainer, PAIRS), (KTOTrainer, LABELLED), (GRPOTrainer, QUESTIONS)]
)
def test_preferences_and_generated_answers_are_prepared(model_folder, tmp_path, kind, rows):
    trainer = trl_trainer(kind, model_folder, tmp_path, rows)
    prepare(trainer)
    assert clusters_found(trainer) == 4
    before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.train()
    after = dict(trainer.model.named_buffers())
    assert_same({name: after[name] for name in before}, before)


def test_prompts_of_generated_answers_are_those_of_generation(model_folder, tmp_path, monkeypatch):
    """Each is read once, although the batches repeat it, also texts without a chat template."""
    read = []
    monkeypatch.setattr(
        "badit.tuner.model.BaditModel.start_task",
        lambda model, batches: read.extend(
            trainer.processing_class.decode(ids[mask.bool()])
            for batch in batches["all"]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ),
    )
    trainer = trl_trainer(GRPOTrainer, model_folder, tmp_path, QUESTIONS)
    prepare(trainer)
    prompts = [
        trainer.processing_class.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        for row in QUESTIONS
    ]
    assert sorted(text.removeprefix("<s>") for text in read) == sorted(prompts)
    read.clear()
    texts = [{"prompt": f"Name city {i}."} for i in range(8)]
    trainer = trl_trainer(GRPOTrainer, model_folder, tmp_path, texts)
    prepare(trainer)
    assert sorted(read) == sorted(f"<s>{row['prompt']}" for row in texts)


def test_prepare_equals_start_task_and_a_second_call_changes_nothing(tiny_model, tmp_path):
    states = []
    for call in ("prepare", "start_task"):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), BaditConfig(**CLUSTERS))
        trainer = hf_trainer(model, tmp_path)
        if call == "prepare":
            prepare(trainer)
        else:
            hooks_of(model).start_task({"all": trainer.get_train_dataloader()})
        states.append(adapter_state(model))
    assert_same(*states)
    prepare(trainer)
    assert_same(adapter_state(model), states[1])
    trainer.train()
    trained = adapter_state(model)
    prepare(trainer)
    assert_same(adapter_state(model), trained)


def test_models_without_hooks_need_no_preparation(tiny_model, tmp_path):
    for model in (tiny_model("llama"), get_peft_model(tiny_model("llama"), LoraConfig())):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer = hf_trainer(model, tmp_path)
        prepare(trainer)
        assert_same(model.state_dict(), before)
        trainer.train()


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("gainlora", "before_update, after_update, end_task"),
        ("goat", "extra_loss"),
        ("loramoe", "extra_loss"),
        ("mtl-lora", "rows_of"),
    ],
)
def test_methods_that_need_more_than_a_preparation_are_refused(tiny_model, tmp_path, method, calls):
    options = {"tasks": ["one"]} if method == "mtl-lora" else {}
    config = BASELINES[method].config_cls(r=8, **options)
    trainer = hf_trainer(get_peft_model(tiny_model("llama"), config), tmp_path)
    refuses(
        f"needs calls of .*{calls}.* during the training.*Trainer does not make; use badit train",
        prepare,
        trainer,
    )


def test_anything_but_a_trainer_is_refused(tiny_model):
    model = get_peft_model(tiny_model("llama"), BaditConfig(**CLUSTERS))
    refuses(r"prepare: needs a trainer.*not PeftModel.*start_task", prepare, model)
