"""One run from recipe to scores: load, adapt, train, save, score. An interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import shutil
import time
from typing import TYPE_CHECKING, Any

import transformers
from tqdm import tqdm
from transformers import TrainingArguments

from badit.data import AnswerCollator, mixture
from badit.recipe import Recipe
from badit.runs import RunFolder, environment, peak_memory, read_json, replace_folder, write_json
from badit.training.callbacks import MetricsLog, ProgressBar, StopOnSignal
from badit.training.plan import Plan, base_model, encoded, make_plan
from badit.training.scoring import evaluate
from badit.training.trainer import AnswerTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Runs a recipe to its end, or to its end from where it stopped, and returns its scores.

    Raises:
        BaditError: bad input, or an output folder that holds another recipe's run.
    """
    plan = make_plan(recipe)
    run = RunFolder.prepare(recipe)
    if run.scores.is_file():
        return read_json(run.scores)
    if not run.adapter.is_dir():
        write_json(run.environment, environment())
        if plan.method.trains:
            _train_adapter(plan, run, progress)
    return evaluate(run.path, progress=progress)


def _train_adapter(plan: Plan, run: RunFolder, progress: bool) -> None:
    recipe = plan.recipe
    transformers.set_seed(recipe.training.seed)
    base, tokenizer = base_model(recipe)
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
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
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
