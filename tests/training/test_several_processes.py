"""Training in several processes (DDP, FSDP2) matches one; only the first writes and prints."""

import shutil
import socket

import pytest
import torch

from data.examples import write_pairs
from training.launches import Launches, assert_same_run, assert_stops_and_resumes, losses
from training.ranks import clustered, codes_of
from training.trainers import assert_same, learned

pytestmark = pytest.mark.slow
CHANGE = {
    "init_weights": "bad",
    "gated": "change",
    "gates": "clusters",
    "router_input": "standardised",
    "key": "embedding",
}


def test_two_processes_match_one_process_and_resume_in_one_or_three(
    recipe_values, tmp_path, processes, capsys
):
    # Codes from gradients agree to 1e-3 only, so the adapters would differ.
    recipe_values["method"] |= {"codes": "random", "init_weights": "lora"}
    launches = Launches(recipe_values, tmp_path, processes)
    launches.train_alone("one", batch=4)
    assert any("badit_centroids" in name for name in learned(launches.run("one")))
    for engine in ("ddp", "fsdp2"):
        printed = launches.train(engine, 2, engine, launcher=True)
        assert printed.count("mean over tasks") == 1
        assert printed.count("0/12 [00:00<?") == 1, "one progress bar"
        assert_same_run(launches.run(engine), launches.run("one"))
        assert_stops_and_resumes(launches, engine)
    assert "fsdp_cpu_ram_efficient_loading: false" in launches.train(
        "refused", 2, "fsdp2, one reader", code=2
    )
    # Stopped runs resume in one process (DDP only), with half as many instances per step, and in
    # three.
    shutil.copytree(launches.run("ddp-copied").path, launches.folder / "alone")
    assert launches.train_alone("alone") == 0
    capsys.readouterr()
    assert launches.train_alone("fsdp2-copied") == 2
    assert "was written with FSDP" in capsys.readouterr().err
    for engine in ("ddp", "fsdp2"):
        launches.train(f"{engine}-copied", 3, engine)
    for name in ("alone", "ddp-copied", "fsdp2-copied"):
        run = launches.run(name)
        assert run.metrics.dropna(subset="loss")["step"].tolist() == list(range(1, 13))
        assert all(tensor.isfinite().all() for tensor in learned(run).values())
    assert losses(launches.run("fsdp2-copied")) == pytest.approx(
        losses(launches.run("ddp-copied")), abs=1e-5
    )


@pytest.mark.parametrize("gates", ["mean_one", "clusters"])
def test_sequence_in_two_processes_writes_one_complete_run(
    recipe_values, tmp_path, processes, gates
):
    values = {**recipe_values, "data": {**recipe_values["data"], "order": "seeded-0"}}
    values["method"] |= {"gates": gates, "router_input": "standardised"}
    launches = Launches(values, tmp_path, processes)
    launches.train("sequence", 2, "ddp")
    run = launches.run("sequence")
    assert set(run.scores["task"]) == {"cities", "rivers"}
    assert learned(run)
    assert not list(run.path.rglob("*.partial"))
    assert run.environment["training"]["steps"] == 2 * 12


def test_orthogonal_in_two_processes_matches_one_process_and_resumes(
    recipe_values, tmp_path, processes
):
    recipe_values["method"] |= {
        "gates": "mean_one",
        "num_experts": 3,
        "r": 3,
    }  # nine rows of A on two ranks
    recipe_values["training"] |= {"optimizer": "orthogonal"}
    launches = Launches(recipe_values, tmp_path, processes)
    assert launches.train_alone("alone", batch=4) == 0
    for engine in ("ddp", "fsdp2"):
        launches.train(engine, 2, engine)
        assert_same_run(launches.run(engine), launches.run("alone"))
    for engine in ("ddp", "fsdp2", "fsdp2, sharded state"):
        assert_stops_and_resumes(launches, engine, whole=engine.split(",")[0])
    for engine in ("fsdp2", "fsdp2, sharded state"):
        checkpoint = tmp_path / f"{engine}-copied" / "checkpoints" / "checkpoint-7"
        assert (checkpoint / "optimizer.bin").is_file()
        assert not [*checkpoint.rglob("*.metadata")], (
            "torch would read it with an unrestricted unpickler"
        )


@pytest.mark.parametrize("read", ["alike", "sharded"])
@pytest.mark.parametrize("codes", ["random", "matched", "grouped"])
def test_two_processes_find_the_clusters_and_codes_of_one(tmp_path, processes, codes, read):
    """Also if every rank reads other batches, as from a sharded data loader."""
    options = {**CHANGE, "num_clusters": 4, "codes": codes}
    batches = _batches_of_two_tasks()
    first, second = _found_by_ranks(processes, options, batches, tmp_path / read)
    expected = codes_of(options, batches)
    assert_same(first, second)
    for name, tensor in first.items():
        if any(part in name for part in ("key", "expert_of")) or codes == "random":
            assert torch.equal(tensor, expected[name]), name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    labels = torch.stack([tensor for name, tensor in first.items() if "expert_of" in name])
    assert (labels != labels[0].sort().values).any() == (codes != "random")


@pytest.mark.parametrize("read", ["alike", "sharded"])
def test_two_processes_find_the_codes_of_each_layers_clusters(tmp_path, processes, read):
    """With the same batches they are those of one process; each rank has half of the gradients."""
    options = {**CHANGE, "key": "layer", "num_clusters": 4, "codes": "grouped"}
    batches = _batches_of_two_tasks()
    first, second = _found_by_ranks(processes, options, batches, tmp_path / read)
    assert_same(first, second)
    expected = codes_of(options, batches)
    labels = torch.stack([tensor for name, tensor in first.items() if "expert_of" in name])
    assert (labels != labels[0].sort().values).any(), "grouped"
    if read == "sharded":  # the clusters are those of the first rank's prompts
        return
    for name, tensor in first.items():
        if "expert_of" in name:
            assert torch.equal(tensor, expected[name]), name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def _batches_of_two_tasks():
    batches = []
    generator = torch.Generator().manual_seed(0)
    for first in (4, 50) * 10:
        ids = torch.randint(first, first + 8, (4, 9), generator=generator)
        ids[:, 5:] = first
        labels = ids.where(torch.arange(9) > 4, -100)
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def _found_by_ranks(processes, options, batches, path):
    """Returns the adapters of two ranks with their clusters and codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        processes.Process(
            target=clustered, args=(options, batches, {**group, "RANK": str(rank)}, str(path))
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [torch.load(f"{path}-{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    "codes", [{"key": "embedding", "codes": "matched"}, {"key": "layer", "codes": "grouped-random"}]
)
def test_gated_change_with_codes_and_resets_in_two_processes_matches_one(
    recipe_values, tmp_path, processes, codes
):
    recipe_values["method"] |= {**CHANGE, "num_clusters": 4, **codes}
    recipe_values["method"]["regroup"] = {"every": 3, "reset_smallest": 1.0}
    launches = Launches(recipe_values, tmp_path, processes)
    assert launches.train_alone("alone", batch=4) == 0
    for engine in ("ddp", "fsdp2"):
        launches.train(engine, 2, engine)
        assert_same_run(launches.run(engine), launches.run("alone"))
        assert_stops_and_resumes(launches, engine)


def test_preferences_in_two_processes_match_one_process_and_resume(
    recipe_values, tmp_path, processes
):
    recipe_values["data"] = {"source": str(write_pairs(tmp_path / "pairs.jsonl"))}
    recipe_values["method"] |= {"codes": "random", "init_weights": "lora"}
    recipe_values["training"] |= {"objective": "dpo"}
    launches = Launches(recipe_values, tmp_path, processes)
    assert launches.train_alone("one", batch=4) == 0
    launches.train("ddp", 2, "ddp")
    assert_same_run(launches.run("ddp"), launches.run("one"))
    assert_stops_and_resumes(launches, "ddp")
    assert "launch it with DDP" in launches.train("fsdp2", 2, "fsdp2", code=2)
