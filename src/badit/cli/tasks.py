"""``badit tasks``."""

from pathlib import Path

from cyclopts.types import NonNegativeInt

from badit.cli.app import app, load


@app.command
def tasks(source: str, /, *overrides: str, show: NonNegativeInt = 0) -> str:
    """List and validate task data, and print prompts in the model's input format.

    Args:
        source: a recipe, or a value of its data.source: a file, a folder, a dataset on the hub or
            'builtin'.
        overrides: key=value, such as data.columns.input=text or data.format=superni.
        show: number of training prompts per task to print in the model's input format, with token
            statistics.
    """
    loading = load("badit.recipe.loading")
    # Data in the current directory may have the name of a recipe.
    is_shipped = source in loading.shipped_recipes() and not Path(source).exists()
    if is_shipped or Path(source).suffix in (".yaml", ".yml"):
        recipe = loading.load_recipe(source, overrides)
    else:
        source = load("badit.recipe.schema").source_of(source)
        recipe = loading.build_recipe({"data": {"source": source}}, overrides)
    return load("badit.authoring.preview").preview(recipe, show)
