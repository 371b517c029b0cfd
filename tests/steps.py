"""The steps of a run, from recipes and folders."""

from badit.api import Run
from badit.evaluation import losses, scoring
from badit.export import exporting
from badit.export import scoring as export_scoring
from badit.recipe.method import resolve_method
from badit.runs.resolved import open_run, resolve
from badit.training import fit as training
from badit.training import loading
from badit.training.methods import training_method


def fit(recipe, **options):
    """Trains a recipe without scoring it; returns the run."""
    run = resolve(recipe)
    training.fit(run, **options)
    trusts_code = recipe.model.trust_remote_code
    return Run(run.folder.path, check=False, trust_remote_code=trusts_code)


def evaluate(folder, **options):
    return scoring.evaluate(open_run(folder), **options)


def validation_loss(folder):
    losses.validation_loss(open_run(folder))


def load_run(folder, recipe=None):
    """Loads a run or, with the run's recipe, a stage of it."""
    if recipe is None:
        return loading.load_run(open_run(folder))
    return loading.load_run(resolve(recipe), folder)


def method_of(section):
    """Returns the method of a ``method`` section, which applies it to a model."""
    return training_method(resolve_method(section))


def export(folder, output, *, progress=False, **options):
    chosen = exporting.ExportOptions(**options)
    return exporting.export(open_run(folder), output, chosen, progress=progress)


def score_export(folder, exported, **options):
    return export_scoring.score_export(open_run(folder), exported, **options)
