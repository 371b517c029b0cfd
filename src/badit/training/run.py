"""One run from recipe to scores: load, adapt, train, save, evaluate. An interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import TrainingArguments

from badit.data import (
    AnswerCollator,
    Instance,
    Task,
    encode_example,
    encode_prompt,
    hold_out,
    limit,
    load_tasks,
    mixture,
)
from badit.errors import BaditError
from badit.evaluation.evaluate import evaluate_tasks, write_predictions
from badit.evaluation.generation import generate_answers
from badit.models import load_base_model
from badit.recipe import Recipe, expand_source
from badit.runs import RunFolder, environment, read_json, replace_folder, write_json
from badit.training.callbacks import MetricsLog, ProgressBar, StopOnSignal
from badit.training.methods import Method, build_method
from badit.training.trainer import AnswerTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass
class Plan:
    """What a recipe comes to before any model is loaded."""

    recipe: Recipe
    tasks: list[Task]
    method: Method

    @property
    def training_instances(self) -> int:
        return len(mixture(self.tasks, self.recipe.data.sampling, self.recipe.data.seed))

    @property
    def test_instances(self) -> int:
        return sum(len(getattr(task, self.recipe.evaluation.split)) for task in self.tasks)


def make_plan(recipe: Recipe) -> Plan:
    """Validates the method and reads the tasks.

    Raises:
        BaditError: a bad option, or bad data.
    """
    data = recipe.data
    method = build_method(recipe.method)
    tasks = load_tasks(expand_source(data.source), tasks=data.tasks, format=data.format)
    tasks = hold_out(tasks, data.validation_per_task, data.seed)
    tasks = limit(tasks, data.train_per_task, data.test_per_task, data.seed)
    for task in tasks:
        if not getattr(task, recipe.evaluation.split):
            raise BaditError(
                f"data: task {task.name} has no {recipe.evaluation.split} instances; "
                "leave it out with data.tasks, or set data.validation_per_task and evaluation.split"
            )
    if not any(task.train for task in tasks):
        raise BaditError("data: no task has training instances")
    return Plan(recipe, tasks, method)


def train(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Runs a recipe to its end, or to its end from where it stopped, and returns its scores.

    Raises:
        BaditError: bad input, or an output folder that holds another recipe's run.
    """
    plan = make_plan(recipe)
    run = RunFolder.prepare(recipe)
    if run.scores.is_file():
        return read_json(run.scores)
    write_json(run.environment, environment())
    if plan.method.trains and not run.adapter.is_dir():
        _train_adapter(plan, run, progress)
    return evaluate(run.path, progress=progress)


def evaluate(path: str | Path, *, split: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Scores a run's adapter on its tasks; writes ``scores.json`` and ``predictions/`` (for the recipe's own split)."""
    run = RunFolder.existing(path)
    recipe = run.recipe()
    plan = make_plan(recipe)
    model, tokenizer = load_run(run)
    return score(model, tokenizer, plan, split=split, run=run, progress=progress)


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    run: RunFolder,
    split: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores any model on a plan's tasks and keeps scores and predictions in the run's folder."""
    own_split = plan.recipe.evaluation.split
    split = split or own_split
    suffix = "" if split == own_split else f"-{split}"
    scores, predictions = evaluate_tasks(
        model,
        tokenizer,
        plan.tasks,
        encode_prompt=lambda task, instance: encoded(tokenizer, plan.recipe, task, instance, answer=False)["input_ids"],
        split=split,  # pyright: ignore[reportArgumentType]
        max_new_tokens=plan.recipe.evaluation.max_new_tokens,
        batch_size=plan.recipe.evaluation.batch_size,
        progress=progress,
    )
    write_predictions(run.path / f"predictions{suffix}", predictions)
    write_json(run.path / f"scores{suffix}.json", scores)
    return scores


def load_run(run: RunFolder) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A run's base model with its trained adapter (if its method trains one), for inference.

    Raises:
        BaditError: the run has no adapter yet, or it is damaged.
    """
    recipe = run.recipe()
    if not build_method(recipe.method).trains:
        return _base_model(recipe)
    if not run.adapter.is_dir():
        raise BaditError(f"{run.path}: has no adapter yet; finish its training with: badit train {run.config}")
    if not (run.adapter / SAFETENSORS_WEIGHTS_NAME).is_file():  # PEFT would go on to look for a pickled file
        raise BaditError(f"{run.adapter}: has no {SAFETENSORS_WEIGHTS_NAME}; remove the folder to train it anew")
    model, tokenizer = _base_model(recipe)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, str(run.adapter))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BaditError(f"{run.adapter}: cannot be loaded ({first_line:.200})") from None
    return model.eval(), tokenizer


def answer(run: RunFolder, prompt: str, *, max_new_tokens: int = 50) -> str:
    """A run's answer to one prompt's text, in the prompt format of its recipe."""
    if not prompt.strip():
        raise BaditError("the prompt is empty")
    section = run.recipe().prompt
    model, tokenizer = load_run(run)
    ids = encode_prompt(
        tokenizer, prompt, max_source_tokens=section.max_source_tokens, chat_template=section.chat_template
    )
    return generate_answers(model, tokenizer, [ids], max_new_tokens=max_new_tokens, progress=False)[0]


def encoded(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, task: Task, instance: Instance, *, answer: bool = True
) -> dict[str, Any]:
    """One instance in the recipe's prompt format, as token ids and labels."""
    prompt = recipe.prompt
    return encode_example(
        tokenizer,
        task,
        instance,
        encoding=prompt.encoding,
        max_source_tokens=prompt.max_source_tokens,
        max_answer_tokens=prompt.max_answer_tokens,
        chat_template=prompt.chat_template,
        with_answer=answer,
    )


def _base_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    section = recipe.model
    return load_base_model(
        section.name,
        dtype=section.dtype,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )


def _train_adapter(plan: Plan, run: RunFolder, progress: bool) -> None:
    import transformers

    recipe = plan.recipe
    transformers.set_seed(recipe.training.seed)
    base, tokenizer = _base_model(recipe)
    model = plan.method.apply(base)
    if recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = AnswerTrainer(
        model=model,
        args=_arguments(recipe, run),
        train_dataset=_training_set(plan, tokenizer, progress),  # pyright: ignore[reportArgumentType] (a list will do)
        data_collator=AnswerCollator(_pad_id(tokenizer)),
        callbacks=[MetricsLog(run.metrics), *([ProgressBar()] if progress else []), *plan.method.callbacks(run)],
        group_by_length=recipe.training.group_by_length,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # prints the log lines, which metrics.jsonl has
    checkpoint = run.last_checkpoint(plan.method.checkpoint_files)
    started = time.monotonic()
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainable, total = model.get_nb_trainable_parameters()
    tokens = trainer.state.num_input_tokens_seen
    summary = {
        "trainable_parameters": trainable,
        "parameters": total,
        "steps": trainer.state.global_step,
        "tokens": int(tokens),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(run.environment, {**read_json(run.environment), "training": summary})
    partial = run.adapter.with_name("adapter.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # The name that the recipe gives; a built-in model's own would be a folder of this machine's cache. From a name PEFT
    # would look the embeddings up on a hub, to see whether to save them too: they are frozen.
    model.peft_config["default"].base_model_name_or_path = recipe.model.name
    model.save_pretrained(str(partial), save_embedding_layers=False)
    replace_folder(partial, run.adapter)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding is masked everywhere, so a tokenizer without a padding token gets any id, and is left as it is."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def _training_set(plan: Plan, tokenizer: PreTrainedTokenizerBase, progress: bool) -> list[dict[str, Any]]:
    tasks = {task.name: task for task in plan.tasks}
    pairs = mixture(plan.tasks, plan.recipe.data.sampling, plan.recipe.data.seed)
    return [
        encoded(tokenizer, plan.recipe, tasks[name], instance)
        for name, instance in tqdm(pairs, desc="Encoding", unit="example", disable=not progress, leave=False)
    ]


def _checkpointing(on: bool) -> dict[str, Any]:
    """TrainingArguments for gradient checkpointing, which transformers renamed within version 5."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}


def _arguments(recipe: Recipe, run: RunFolder) -> TrainingArguments:
    training = recipe.training
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup,  # below 1 it is a fraction of the run
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        **_checkpointing(training.gradient_checkpointing),
        seed=training.seed,
        logging_steps=training.log_every,
        save_steps=training.save_every,
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        logging_nan_inf_filter=False,
    )
