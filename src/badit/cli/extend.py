"""``badit extend``."""

import os

from badit.cli.app import RunPath, Trust, app, load
from badit.cli.train import show_trained
from badit.support.errors import BaditError


@app.command
def extend(
    run: RunPath,
    data: str | None = None,
    /,
    *overrides: str,
    remove: str | None = None,
    trust_remote_code: Trust = False,
) -> str | None:
    """Add tasks to a finished run, without the data of its tasks and without changing them.

    A new task gets an expert and clusters of prompts of its own, and may use earlier experts. The
    result is a run in another folder, RUN-extended by default. Before the training, the command
    says which tasks cannot be told apart. The same command resumes an interrupted run.

    Args:
        data: the new tasks: a file, a folder or a dataset, as data.source of a recipe.
        overrides: key=value, such as output=runs/more, extend.rank=16, data.order=seeded-0 to add
            the tasks one after another, or merge=true to train the clusters that already cover the
            tasks.
        remove: remove this added task instead; the other tasks stay as they are.
    """
    # Without DATA, the first override is in its place.
    if data is not None and "=" in data and not os.path.exists(data):
        overrides = (data, *overrides)
        data = None
    if (data is None) == (remove is None):
        raise BaditError("extend: give either DATA with new tasks, or --remove TASK")
    api = load("badit.api")
    opened = api.Run(run, trust_remote_code=trust_remote_code)
    if remove is not None:
        return f"Run: {opened.remove_task(remove, overrides=overrides).path}"
    return show_trained(opened.extend(data, overrides=overrides))
