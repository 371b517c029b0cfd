"""Writes a copy of a run without an added task."""

from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Recipe
from badit.runs.folder import AnyPath, RunFolder
from badit.runs.resolved import ResolvedRun
from badit.support.errors import BaditError, explained
from badit.support.files import exclusive, read_json, remove, replace_folder, write_json, write_text
from badit.training.saved_adapters import saved_config, tensor_shapes
from badit.tuner.removal import without_task


def remove_task(run: ResolvedRun, task: str, output: AnyPath) -> Path:
    """Writes a copy of a run without an added task; BaditError as of :meth:`Run.remove_task`."""
    output = Path(output)
    if output.exists():
        raise BaditError(f"{output}: exists; choose another output=FOLDER")
    if not run.method.adds_tasks or not run.folder.adapter_path.is_dir():
        raise BaditError(f"{run.folder.path}: has no adapter with added tasks")
    source = run.folder.adapter_path
    weights = source / SAFETENSORS_WEIGHTS_NAME
    config = saved_config(source / CONFIG_NAME, run.method.options, tensor_shapes(weights))
    with explained(weights, action="loaded", any_error=True):
        tensors = load_file(weights)
    config, remaining = without_task(config, tensors, task)

    copied = RunFolder.at(output.with_name(f"{output.name}.partial"))
    with exclusive(output):
        remove(copied.path)
        copied.adapter_path.mkdir(parents=True)
        save_file(remaining, copied.adapter_path / weights.name, metadata={"format": "pt"})
        saved = read_json(source / CONFIG_NAME)
        saved["extensions"] = config.to_dict()["extensions"]
        write_json(copied.adapter_path / CONFIG_NAME, saved)
        recipe, environment = _without(run, task)
        recipe = recipe.model_copy(update={"output": str(output)})
        write_text(copied.config_path, dump_recipe(recipe))
        write_json(copied.environment_path, environment)
        replace_folder(copied.path, output)
    return output


def _without(run: ResolvedRun, task: str) -> tuple[Recipe, dict[str, Any]]:
    """Returns the recipe and the record of a run without a task."""
    recipe = run.recipe
    environment = run.folder.known_environment
    mixture = environment.get("mixture", {})
    remaining = [name for name in mixture if name != task]
    # The copy has no stages.
    data: dict[str, Any] = {"order": None}
    if task in mixture:
        # Without tasks of its own, the copy has no data, like an adapter adopted without data.
        data |= {"tasks": remaining} if remaining else {"tasks": None, "source": None}
        inputs = environment.get("inputs", {})
        kept = {name: value for name, value in inputs.items() if name != f"task {task}"}
        environment = {
            **environment,
            "mixture": {name: mixture[name] for name in remaining},
            "inputs": kept,
        }
    data_section = recipe.data.model_copy(update=data)
    return recipe.model_copy(update={"data": data_section}), environment
