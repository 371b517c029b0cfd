"""Commands on a full or read-only disk: one line of error, and whole files when repeated."""

# The disk is a small tmpfs. Where tmpfs cannot be mounted, a limit on file sizes simulates a full
# disk.

import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager, suppress

import pytest
import yaml

from badit.cli import main
from fuzz.command import STRESS
from materials import make_recipe
from training import killed
from training.trainers import contents

pytestmark = pytest.mark.slow
FULL = "cannot be written, the disk (or a quota) is full; "
FULL += "free some space and run the same command again"
READ_ONLY = "cannot be written, the file system is read-only; choose a folder that can be written"
# The free space in kB to test each command with; None is a read-only disk. `make stress` tests more
# values.
CASES = {
    "train": [None, 0, 24, 100],
    "train a sequence": [150],
    "evaluate": [None, 0, 4],
    "analyze": [None, 0, 16],
}
CASES |= {
    "export --task=rivers": [None, 0, 8],
    "export --task=rivers --merged": [40],
    "report": [None, 0],
}
# Files that depend on the time or the folder.
ASIDE = (
    "environment.json",
    "config.yaml",
    "gates.json",
    "export.json",
    "analysis.json",
    ".html",
    "README.md",
)
if STRESS > 1:
    CASES = {command: [None, *range(0, 240, 8)] for command in CASES}


@pytest.fixture
def disk(tmp_path):
    """A folder on its own disk, and a context manager that limits its free space (see CASES)."""
    folder, mounted = tmp_path / "disk", False
    folder.mkdir()
    with suppress(FileNotFoundError):
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0

    @contextmanager
    def with_room(kilobytes):
        """Yields the error message that a command must print."""
        if not mounted:
            former = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (min(kilobytes or 0, 1) * 1024, former[1]))
            yield FULL
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        elif kilobytes is None:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            yield READ_ONLY
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        else:
            (folder / "fill").write_bytes(bytes(shutil.disk_usage(folder).free - 1024 * kilobytes))
            yield FULL
            (folder / "fill").unlink()

    yield folder, with_room
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """The output folder of each command on a disk with enough space, by command."""
    folder = tmp_path_factory.mktemp("whole")
    values = make_recipe(material / "model", material / "tasks.jsonl", folder / "train")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for command in CASES:
        assert main(command_line(command, folder / "train", folder / command)) == 0
    return {command: folder / command for command in CASES}


def command_line(command, run, output):
    verb, *more = command.split()
    if verb == "train":
        order = ["data.order=[rivers,cities]"] if more else []
        return ["train", str(run.with_name("recipe.yaml")), f"output={output}", *order]
    if verb in ("report", "export"):
        return [
            verb,
            str(run),
            f"--output={output / 'page.html' if verb == 'report' else output}",
            *more,
        ]
    if not output.exists():
        shutil.copytree(run, output)
    return [verb, str(output), *(["--instances=2"] if verb == "analyze" else [])]


@pytest.mark.parametrize(
    ("command", "room"), [(command, room) for command, rooms in CASES.items() for room in rooms]
)
def test_full_or_read_only_disk_is_one_error_and_repeating_gives_same_files(
    command, room, whole, disk, capsys
):
    folder, with_room = disk
    place = folder / "out"
    arguments = command_line(command, whole["train"], place)
    with with_room(room) as problem:
        code = main(arguments)
    said = capsys.readouterr().err.splitlines()
    assert not list(folder.rglob("*.partial"))
    if code != 0 or room is None or STRESS == 1:  # otherwise the space was sufficient
        assert code == 2, said
        assert said[-1].startswith(f"badit: {folder}")
        assert said[-1].endswith(problem)
        assert sum(line.endswith(problem) for line in said) == 1
    assert main(arguments) == 0
    assert contents(place, *ASIDE) == contents(whole[command], *ASIDE)
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("command", [command for command in CASES if "train" not in command])
def test_command_killed_in_a_file_operation_gives_same_files_when_repeated(
    command, whole, processes, tmp_path
):
    for number in range(1, 10 * STRESS + 1) if STRESS > 1 else [1, 3]:
        place = tmp_path / str(number)
        arguments = command_line(command, whole["train"], place)
        code, said = killed.end(
            killed.start(processes, arguments, place, "file", number, signal.SIGKILL)
        )
        if code == 0:
            assert number > 1, "the command has no file operation"
            return
        assert code == -signal.SIGKILL, said
        assert main(arguments) == 0
        assert contents(place, *ASIDE) == contents(whole[command], *ASIDE)
        assert not list(place.rglob("*.partial"))
