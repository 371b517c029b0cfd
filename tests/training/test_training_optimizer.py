"""A recipe's ``training.optimizer``: the optimizer used, and training in several processes."""

import torch

from badit.optimizer import OrthogonalUpdates
from badit.recipe import build_recipe
from badit.train import fit
from training.launches import Launches, assert_same_run, assert_stops_and_resumes
from training.trainers import learned, on, with_callbacks


def test_run_uses_the_optimizer_of_its_recipe(recipe_values, tmp_path):
    used, adapters = [], []
    recipe_values["method"] |= {"gates": "mean_one"}
    recipe_values["training"] |= {"lora_plus_ratio": 4.0, "router_lr_ratio": 0.5, "max_steps": 3}
    for name in ("adamw", "lora+", "orthogonal"):
        recipe = build_recipe(recipe_values, [f"training.optimizer={name}", f"output={tmp_path / name}"])
        with with_callbacks(on("on_train_begin", lambda state, keywords: used.append(keywords["optimizer"].optimizer))):
            adapters.append(learned(fit(recipe, progress=False)))
    assert [group["initial_lr"] for group in used[1].param_groups[:2]] == [1e-2, 4e-2]
    assert [optimizer.param_groups[-1]["initial_lr"] for optimizer in used] == [5e-3] * 3, "the routers' learning rate"
    assert isinstance(used[2], OrthogonalUpdates)
    changed = next(key for key in adapters[0] if key.endswith("badit_B"))
    assert not any(torch.equal(adapters[0][changed], other[changed]) for other in adapters[1:])


def test_orthogonal_in_two_processes_matches_one_process_and_resumes(recipe_values, tmp_path, processes):
    recipe_values["method"] |= {"gates": "mean_one", "num_experts": 3, "r": 3}  # nine rows of A on two ranks
    recipe_values["training"] |= {"optimizer": "orthogonal"}
    launches = Launches(recipe_values, tmp_path, processes)
    assert launches.train_alone("alone", batch=4) == 0
    for engine in ("ddp", "fsdp2"):
        launches.train(engine, 2, engine)
        assert_same_run(launches.run(engine), launches.run("alone"))
    for engine in ("fsdp2", "fsdp2, sharded state"):
        assert_stops_and_resumes(launches, engine, whole="fsdp2")
        checkpoint = tmp_path / f"{engine}-copied" / "checkpoints" / "checkpoint-7"
        assert (checkpoint / "optimizer.bin").is_file()
        assert not [*checkpoint.rglob("*.metadata")], "torch would read it with an unrestricted unpickler"
