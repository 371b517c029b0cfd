"""Runs that train base weights, use gradient surgery, or adapt fused experts."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from badit import Run
from badit.baselines.neurons import neuron_scores, top_neurons
from badit.data import AnswerCollator
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.support.files import read_json, write_json
from badit.training.encoding import encoded
from badit.training.loading import load_base
from badit.training.methods import WEIGHTS, AdapterMethod, Method, WeightsMethod
from baselines.naive import logits
from refusals import refuses
from steps import fit, load_run, method_of
from training.trainers import change_tensors, fit_until, learned, on, with_callbacks

SHARE = 0.2
FULL = {"name": "full"}
NEURONS = {"name": "task-neurons", "share": SHARE, "score_batches": 1}


def recipe_with(values, method, *overrides):
    settings = ["training.num_train_epochs=1", "training.learning_rate=1e-3", *overrides]
    return build_recipe({**values, "method": method}, settings)


@pytest.fixture
def trained(monkeypatch):
    """The models of the runs at the end of training."""
    models, save = [], WeightsMethod.save
    monkeypatch.setattr(
        WeightsMethod, "save", lambda *given: models.append(given[1]) or save(*given)
    )
    return models


def test_full_fine_tuning_changes_every_weight_and_round_trips(recipe_values, trained):
    recipe = recipe_with(recipe_values, FULL)
    run = fit(recipe, progress=False)
    base, weights = dict(load_base(recipe, dtype="float32")[0].named_parameters()), learned(run)
    assert weights.keys() == base.keys()
    assert not any(torch.equal(weights[name], base[name]) for name in base)
    assert run.environment["training"]["trainable_parameters"] == sum(
        tensor.numel() for tensor in base.values()
    )
    assert [file.name for file in run.adapter_path.iterdir()] == [WEIGHTS]
    assert not run.checkpoints_path.exists()
    with safe_open(run.adapter_path / WEIGHTS, framework="pt") as file:
        assert json.loads(file.metadata()["badit"]) == {
            "base_model": recipe.model.name,
            "method": "full",
        }
    assert torch.equal(logits(load_run(run)[0]), logits(trained[0].eval()))


def test_bfloat16_recipe_saves_float32_and_loads_bfloat16(recipe_values):
    run = fit(recipe_with(recipe_values, FULL, "model.dtype=bfloat16"), progress=False)
    weights = learned(run)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    for name, parameter in load_run(run)[0].named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, weights[name].bfloat16())


def test_task_neurons_changes_only_the_top_neurons_of_each_task(
    recipe_values, trained, monkeypatch
):
    monkeypatch.setattr(
        "badit.training.methods.rank_and_size", lambda: (0, 2)
    )  # neurons are scored on the batches of both
    recipe = recipe_with(recipe_values, NEURONS, "training.per_device_train_batch_size=6")
    count, per_neuron = 2 * 48, 3 * 32
    method = method_of(recipe.method)
    assert method.trained_parameters(load_base(recipe)[0]) == round(SHARE * count * per_neuron), (
        "for one task"
    )
    run = fit(recipe, progress=False)
    (model, tokenizer), weights, of_tasks = load_base(recipe), learned(run), []
    base = dict(model.named_parameters())
    for task in resolve(recipe).tasks:  # a score is a sum over instances
        batch = encoded(tokenizer, recipe, [(task, instance) for instance in task.train], None)
        of_tasks.append(
            top_neurons(
                neuron_scores(model, [AnswerCollator(tokenizer.pad_token_id)(batch)]), SHARE
            )
        )
    masks = {name: sum(mask[name] for mask in of_tasks).bool() for name in of_tasks[0]}
    assert {name.split(".")[-2] for name in weights} == {"gate_proj", "up_proj", "down_proj"}
    for name, tensor in weights.items():
        mlp, _, projection = name.removesuffix(".weight").rpartition(".")
        assert torch.equal(
            (tensor != base[name]).any(dim=0 if projection == "down_proj" else 1), masks[mlp]
        ), name
    neurons = sum(int(mask_F.sum()) for mask_F in masks.values())
    assert SHARE * count <= neurons < count
    assert run.environment["training"]["trainable_parameters"] == neurons * per_neuron
    assert torch.equal(logits(load_run(run)[0]), logits(trained[0].eval()))


@pytest.mark.parametrize(
    "method", [FULL, NEURONS, {"name": "pcgrad", "r": 4}, {"name": "pissa", "r": 4}], ids=str
)
def test_resumed_run_saves_bit_identical_weights(recipe_values, tmp_path, method):
    whole = fit(recipe_with(recipe_values, method, f"output={tmp_path / 'whole'}"), progress=False)
    recipe = recipe_with(recipe_values, method)
    kind = Method if method in (FULL, NEURONS) else AdapterMethod
    run = fit_until(6, recipe, kind=kind)
    begun = []
    with with_callbacks(
        on("on_step_begin", lambda state, _: begun.append(state.global_step)), kind=kind
    ):
        fit(recipe, progress=False)
    assert begun == [5], "only the sixth step is repeated"
    counts = [each.environment["training"]["trainable_parameters"] for each in (whole, run)]
    assert counts[0] == counts[1]
    files = [next(each.adapter_path.glob("*.safetensors")).read_bytes() for each in (whole, run)]
    assert files[0] == files[1], "including the metadata"


def test_damaged_weights_give_a_one_line_error(recipe_values):
    recipe = recipe_with(recipe_values, FULL)
    resolve(recipe).prepare_folder()
    run = Run.at(recipe.output)
    for damage, message in (
        (
            lambda path: path.unlink(),
            r"adapter: has no weights\.safetensors; pickled weights are not read",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1000]),
            r"weights\.safetensors: cannot be loaded",
        ),
        (
            change_tensors(lambda t: {**t, "lm_head.weight": torch.zeros(3)}),
            "belongs to another base model",
        ),
        (
            change_tensors(lambda t: dict(list(t.items())[1:])),
            r"weights\.safetensors: has no weight ",
        ),
        (
            change_tensors(lambda t: {"lm_head.bias": torch.zeros(3)}),
            r"the one with the weight 'lm_head\.bias'",
        ),
    ):
        method_of({"name": "full"}).save(load_base(recipe)[0], run.adapter_path, recipe.model.name)
        load_run(run)
        damage(run.adapter_path / WEIGHTS)
        refuses(message, load_run, run)


def test_lora_pcgrad_and_cagrad_train_different_adapters(recipe_values, tmp_path):
    adapters = []
    for name in ("lora", "pcgrad", "cagrad"):
        recipe = recipe_with(recipe_values, {"name": name, "r": 4}, f"output={tmp_path / name}")
        adapters.append(
            torch.cat(
                [tensor.flatten() for tensor in learned(fit(recipe, progress=False)).values()]
            )
        )
    assert len({tuple(adapter.tolist()) for adapter in adapters}) == 3


@pytest.mark.skipif(peft.__version__ < "0.20", reason="PEFT 0.19 cannot load such a LoRA")
# A warning of PEFT about its own patterns.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [
        ["method.target_modules=[q_proj]", "data.order=[rivers,cities]"],
        ["method.target_modules=[gate_proj,up_proj,down_proj]"],
        ["method.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"],
        ["method.target_parameters=[mlp.experts.down_proj,mlp.experts.gate_up_proj]"],
    ],
)
def test_lora_on_a_mixture_of_experts_model_is_loaded_again(
    recipe_values, tiny_model, tmp_path, options
):
    tokenizer = AutoTokenizer.from_pretrained(recipe_values["model"]["name"])
    for part in (tiny_model("qwen3_moe", vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "moe")
    recipe_values["method"] = {"name": "lora", "r": 2}
    recipe = build_recipe(
        recipe_values, [f"model.name={tmp_path / 'moe'}", "training.max_steps=1", *options]
    )
    run = Run(fit(recipe, progress=False))
    assert run.load()
    settings = run.adapter_path / "adapter_config.json"
    write_json(settings, read_json(settings) | {"target_parameters": 5})
    refuses("target_parameters: is 5, but the run's recipe says", run.load)
