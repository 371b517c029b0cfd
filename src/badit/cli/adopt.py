"""``badit adopt``."""

from pathlib import Path

from badit.cli.app import Output, app, load, refuse_missing_data
from badit.runs.folder import refuse_no_adapter


@app.command
def adopt(
    adapter: str,
    /,
    *overrides: str,
    data: str | None = None,
    output: Output = "runs/adopted",
    any_prompts: bool = False,
) -> str:
    """Make a run of an adapter that a script trained (TRL, transformers' Trainer, Axolotl).

    generate, evaluate, export, analyze, push and studio then accept it. Nothing is trained. The
    base model is loaded once with the adapter, to check that they fit. With --data, the prompts get
    the form (chat template, separator) of the script's training, as far as the adapter shows it,
    and one prompt of each task is printed.

    Args:
        adapter: the folder with adapter_config.json and adapter_model.safetensors, such as a
            checkpoint of a trainer.
        overrides: key=value of the sections model, data, prompt and evaluation, such as
            model.name=org/name, prompt.chat_template=never or data.columns.input=text.
        data: tasks to score and to analyze: a file, a folder, a dataset on the hub or 'builtin'
            (default: none).
        output: the folder of the run, which must be new or empty.
        any_prompts: adopt even if the prompts are unlike those of the training, as for other tasks.
    """
    refuse_no_adapter(adapter)
    if data is not None:
        refuse_missing_data(data)
    adoption = load("badit.authoring.adoption")
    run, prompts = adoption.adopt(
        Path(adapter), output, data, {}, overrides, any_prompts=any_prompts
    )
    lines = [f"Run: {run.folder.path} ({run.method.name} on {run.recipe.model.name})", ""]
    if data is None:
        lines.append("It has no tasks, which evaluate, analyze and most exports need: see --data.")
    else:
        lines += prompts
    return "\n".join([*lines, "", *adoption.next_commands(run)])
