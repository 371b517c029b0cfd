"""One run from recipe to adapter: load, adapt, train, save. An interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from badit.data import AnswerCollator, batches_by_task, mixture
from badit.errors import BaditError
from badit.files import copy_folder, read_json, replace_folder, write_json
from badit.recipe import Recipe
from badit.runs import RunFolder, environment, is_main_process, peak_memory
from badit.training.attention import fast_on_short_sequences
from badit.training.callbacks import MetricsLog, ProgressBar, StopOnSignal
from badit.training.checkpoints import (
    SealCheckpoints,
    TrainerSums,
    last_checkpoint,
    refuse_other_engine,
    staging_folder,
    step_of,
)
from badit.training.determinism import deterministic
from badit.training.gradients import parameter_count, whole_weights
from badit.training.method import Method
from badit.training.plan import Plan, Stage, base_model, encoded, make_plan, model_dtype, pad_id
from badit.training.trackers import refuse_missing, tracker_callbacks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keeps the random numbers of a sequence's tasks apart, and those of runs whose seeds are close.
_SEEDS_PER_STAGE = 1_000


def fit(recipe: Recipe, *, progress: bool = True) -> RunFolder:
    """Trains a recipe without scoring it. A sequence of tasks is trained one after another, each kept for itself.

    Raises:
        BaditError: bad input, or an output folder that holds another recipe's run.
    """
    plan = make_plan(recipe)
    refuse_missing(recipe.training.report_to)
    # Of several processes the first alone writes; the others meet it in the first step of training.
    run = RunFolder.prepare(recipe) if is_main_process() else RunFolder(recipe.output)
    if run.adapter.is_dir() or run.scores.is_file():
        _remove_checkpoints(run)
        return run
    if is_main_process() and not run.environment.is_file():
        write_json(run.environment, {**environment(), "dtype": model_dtype(recipe)})
    plan = _in_its_first_dtype(plan, run)
    if not plan.method.trains:
        return run
    learnt: Path | None = None
    for number, stage in enumerate(plan.stages):
        if not stage.folder.adapter.is_dir():
            if is_main_process():
                stage.folder.path.mkdir(parents=True, exist_ok=True)
            _train_stage(plan, stage, number, learnt, progress)
        _remove_checkpoints(stage.folder)
        learnt = stage.folder.adapter
    if plan.sequential and is_main_process():
        summaries = [read_json(stage.folder.environment)["training"] for stage in plan.stages]
        write_json(run.environment, {**read_json(run.environment), "training": _total(summaries)})
        copy_folder(plan.stages[-1].folder.adapter, run.adapter)
    return run


def _in_its_first_dtype(plan: Plan, run: RunFolder) -> Plan:
    """The plan with the dtype that the run began in, which "fast" could settle otherwise where it is resumed."""
    began = read_json(run.environment).get("dtype") if run.environment.is_file() else None
    if plan.recipe.model.dtype != "fast" or began not in ("bfloat16", "float32"):
        return plan
    model = plan.recipe.model.model_copy(update={"dtype": began})
    return dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"model": model}))


def _train_stage(plan: Plan, stage: Stage, number: int, learnt: Path | None, progress: bool) -> None:
    """Trains on the stage's tasks, from the base model or from what the stage before left in ``learnt``."""
    recipe, method, folder = plan.recipe, plan.method, stage.folder
    seed = recipe.training.seed + _SEEDS_PER_STAGE * number
    transformers.set_seed(seed)
    base, tokenizer = base_model(recipe, dtype="float32" if method.trains_base_weights else None)
    names = [task.name for task in plan.tasks]
    model = method.apply(base, names) if learnt is None else method.proceed(base, learnt)
    if recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()
    examples = _training_set(recipe, stage, tokenizer, progress)
    collate = AnswerCollator(pad_id(tokenizer), with_tasks=True)
    batches = batches_by_task(examples, collate, recipe.training.batch_size)
    method.before_training(model, batches)
    checkpoint = last_checkpoint(folder.checkpoints)
    bar = ProgressBar()
    behind = 0 if checkpoint is None else step_of(checkpoint)
    callbacks = [
        MetricsLog(folder.metrics),
        *([bar] if progress else []),
        *method.callbacks(folder),
        *tracker_callbacks(recipe.training.report_to, folder.path, behind),
    ]
    trainer = method.trainer(
        model=model,
        args=_arguments(recipe, folder, seed, checkpoint, mixed_precision=method.trains_base_weights),
        train_dataset=examples,
        data_collator=collate,
        callbacks=callbacks,
        group_by_length=recipe.training.group_by_length,
        max_skipped_steps=recipe.training.max_skipped_steps,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # prints the log lines, which metrics.jsonl has
    engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else "neither"
    if engine != "neither":
        method.refuse_shards(model)
    if checkpoint is not None:
        refuse_other_engine(checkpoint, engine, trainer.accelerator.num_processes)
    started = time.monotonic()
    with deterministic(recipe.training.deterministic), fast_on_short_sequences(base), StopOnSignal() as stop:
        for callback in (TrainerSums(trainer), SealCheckpoints(folder.checkpoints), stop):
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except UnpicklingError:  # torch's loader has met something else than tensors and plain values
            raise BaditError(
                f"{checkpoint}: holds what no training has written there, and nothing of it has been run; "
                "remove the folder to go on from the checkpoint before it"
            ) from None
        finally:
            bar.close()
            staging_folder(folder.checkpoints)  # a checkpoint that has not come to its end takes no room
    seconds = time.monotonic() - started
    method.after_training(model, batches)
    weights = whole_weights(model)
    if trainer.is_world_process_zero():
        known = read_json(folder.environment) if folder.environment.is_file() else {}
        write_json(folder.environment, {**known, "training": _summary(method, model, trainer.state, seconds)})
        partial = folder.adapter.with_name("adapter.partial")
        shutil.rmtree(partial, ignore_errors=True)
        method.save(model, partial, recipe.model.name, weights)
        replace_folder(partial, folder.adapter)
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # else the next model to be loaded, for scoring or a stage, would be divided as well


def _remove_checkpoints(folder: RunFolder) -> None:
    """They have done their duty once the adapter is there."""
    if is_main_process():
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def _summary(method: Method, model: Any, state: Any, seconds: float) -> dict[str, Any]:
    """What a training took; of a resumed one, the seconds are those since it was taken up."""
    return {
        "trainable_parameters": method.trained_parameters(model),
        "parameters": sum(parameter_count(parameter) for parameter in model.parameters()),
        "steps": state.global_step,
        "tokens": int(state.num_input_tokens_seen),
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
    }


def _total(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over a sequence's stages; of parameters and memory, the most that there were at a time."""
    largest = {key: max(stage[key] for stage in stages) for key in ("trainable_parameters", "parameters")}
    sums = {key: sum(stage[key] for stage in stages) for key in ("steps", "tokens")}
    seconds = round(sum(stage["seconds"] for stage in stages), 1)
    return {**largest, **sums, "seconds": seconds, "peak_memory_gib": max(s["peak_memory_gib"] for s in stages)}


def _training_set(
    recipe: Recipe, stage: Stage, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> list[dict[str, Any]]:
    tasks = {task.name: task for task in stage.tasks}
    pairs = mixture(stage.tasks, recipe.data.sampling, recipe.data.seed)
    return [
        encoded(tokenizer, recipe, tasks[name], instance)
        for name, instance in tqdm(pairs, desc="Encoding", unit="example", disable=not progress, leave=False)
    ]


def _checkpointing(on: bool) -> dict[str, Any]:
    """TrainingArguments for gradient checkpointing, which transformers renamed within version 5."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}


def _arguments(
    recipe: Recipe, folder: RunFolder, seed: int, checkpoint: Path | None, *, mixed_precision: bool
) -> TrainingArguments:
    """HF's arguments. Base weights that are trained are kept in float32 and used in the recipe's dtype."""
    training = recipe.training
    bf16 = mixed_precision and model_dtype(recipe) == "bfloat16"
    return TrainingArguments(
        output_dir=str(staging_folder(folder.checkpoints)),
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint),  # read by the callbacks
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
        bf16=bf16,
        use_cpu=bf16 and not torch.accelerator.is_available(),  # else HF refuses bf16
        seed=seed,
        logging_steps=training.log_every,
        save_steps=training.save_every,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],  # the run adds its trackers, whose files belong into its own folder
        project="badit",
        run_name=folder.path.resolve().name,
    )
