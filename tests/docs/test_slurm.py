"""The Slurm scripts in the documentation, with stand-ins for Slurm's commands."""

import os
import re
import shutil
import subprocess

from torch.distributed.run import get_args_parser

from docs.pages import ROOT

# A command that writes its name and arguments, one per line, to a file of its own: bash prints line
# by line, and several calls run at the same time.
ECHO = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" > "$(mktemp "$CALLS/XXXXXX")"\n'


def run_script(script, folder):
    """Runs a script, and returns the arguments of each stand-in that it calls."""
    for name, text in (
        ("srun", ECHO),
        ("badit", ECHO),
        ("sleep", "#!/bin/bash\n"),
        ("scontrol", "#!/bin/bash\nprintf 'first\\nsecond\\n'\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"NNODES": "2", "GPUS_ON_NODE": "8", "JOB_ID": "7", "JOB_NODELIST": "node[1-2]"}
    called = folder / "calls"
    shutil.rmtree(called, ignore_errors=True)
    called.mkdir()
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(called)}
    environment |= {f"SLURM_{name}": value for name, value in slurm.items()}
    # The end of the output is that of the calls in the background too.
    subprocess.run(["bash", "-eu", "-c", script], env=environment, capture_output=True, check=True)
    return sorted(call.read_text().splitlines() for call in called.iterdir())


def test_slurm_scripts_start_the_documented_commands(tmp_path):
    page = (ROOT / "docs/several-gpus.md").read_text("utf-8")
    train, compare = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", page, re.S)
    ((_, launcher, *arguments),) = run_script(train, tmp_path)
    assert launcher == "torchrun"
    parsed = get_args_parser().parse_args(arguments)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "first:29500")
    assert (parsed.module, parsed.training_script) == (True, "badit")
    assert parsed.training_script_args == ["train", "recipe.yaml", "output=/shared/runs/mine"]
    badit, *ray = run_script(compare, tmp_path)
    assert badit[:5] == ["badit", "compare", "recipe.yaml", "--ray", "first:6379"]
    assert {word for call in ray for word in call} >= {
        "--head",
        "--address=first:6379",
        "--nodes=1",
    }
