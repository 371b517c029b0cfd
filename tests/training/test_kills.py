"""Runs that are killed, interrupted or out of disk space resume to bit-identical files.

``make stress`` kills a run at 20 random steps, its first 20 file operations and 20 random ones,
``make test-slow`` at two.
"""

import random
import signal

import pytest
import yaml

from badit.support.files import read_json
from data.examples import write_pairs
from fuzz.command import STRESS
from materials import make_recipe
from training import killed
from training.trainers import contents

pytestmark = pytest.mark.slow
KILLS = 20 if STRESS > 1 else 2
# Twelve steps; checkpoints, log lines and regroupings have different periods.
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 5,
    "save_steps": 3,
}
LORAMOE = "method={name: loramoe, num_experts: 3, r: 2, lora_dropout: 0.1}"
CHANGE = "init_weights: bad, gated: change, router_input: standardised"
ROUTER = f"{{{CHANGE}, gates: mean_one}}"
CODES = f"{{{CHANGE}, gates: clusters, key: embedding, codes: grouped}}"
KINDS = {
    "mixed": ["method.regroup.every=4"],
    "sequence": [
        "method.regroup.every=2",
        "method.router_input=standardised",
        "data.order=[rivers,cities]",
    ],
    "gated-change": [f"method={ROUTER}", "method.regroup={every: 3, reset_smallest: 0.2}"],
    "codes": [f"method={CODES}", "method.regroup.every=4"],
    "preferences": ["training.objective=dpo", "method.regroup.every=4"],
    "without-regrouping": [
        LORAMOE,
        "training.lr_scheduler_type=linear",
        "training.optimizer=orthogonal",
    ],
}


@pytest.fixture(scope="module", params=KINDS)
def train(request, processes, material, tmp_path_factory):
    """Trains one kind of run, whole or until an injected failure; "whole" is already finished."""
    folder = tmp_path_factory.mktemp(request.param)
    values = make_recipe(material / "model", material / "tasks.jsonl", folder)
    values["training"] |= TRAINING
    if request.param == "preferences":
        values["data"] = {"source": str(write_pairs(folder / "pairs.jsonl"))}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))

    def run(name, *when):
        command = [
            "train",
            str(folder / "recipe.yaml"),
            f"output={folder / name}",
            "data.test_per_task=1",
        ]
        return killed.end(
            killed.start(processes, [*command, *KINDS[request.param]], folder / name, *when)
        )

    run.folder = folder
    assert run("whole")[0] == 0
    return run


def assert_ends_as_whole(train, name):
    assert train(name)[0] == 0
    whole, resumed = contents(train.folder / "whole"), contents(train.folder / name)
    assert whole.keys() == resumed.keys(), name
    assert [key for key in whole if whole[key] != resumed[key]] == [], name


def test_killed_runs_resume_bit_identically(train):
    counts = read_json(train.folder / "whole.json")
    rng = random.Random(0)
    strikes = [
        (rng.choice(killed.STEP_EVENTS), rng.randint(1, counts["on_step_end"]))
        for _ in range(KILLS)
    ]
    strikes += [("file", number) for number in range(1, KILLS + 1)]  # the first ones
    strikes += [("file", rng.randint(1, counts["file"])) for _ in range(KILLS)]
    strikes += [("on_train_end", 1)]  # after the last checkpoint
    for i, (event, number) in enumerate(strikes):
        status, said = train(f"killed-{i}", event, number, signal.SIGKILL)
        assert status == -signal.SIGKILL, (event, number, said)
        assert_ends_as_whole(train, f"killed-{i}")


def test_run_stopped_five_times_resumes_bit_identically(train):
    for event, number, sent, status in [
        ("on_save", 1, signal.SIGKILL, -signal.SIGKILL),
        ("on_step_begin", 2, signal.SIGTERM, 130),
        ("on_optimizer_step", 2, 0, 2),
        ("on_pre_optimizer_step", 1, signal.SIGINT, 130),
        ("on_log", 1, signal.SIGKILL, -signal.SIGKILL),
    ]:
        code, said = train("stopped", event, number, sent)
        assert code == status, (event, said)
        assert "Traceback" not in said
        if status == 2:
            assert said.splitlines()[-1].startswith(
                f"badit: {train.folder / 'stopped'}: cannot be written"
            )
            assert not list((train.folder / "stopped").rglob("checkpoints/partial"))
    assert_ends_as_whole(train, "stopped")
