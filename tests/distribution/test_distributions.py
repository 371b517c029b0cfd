"""What the wheel and the source distribution hold, and what they say of themselves."""

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import badit

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "src" / "badit"
INFO = f"badit-{badit.__version__}.dist-info"


def test_the_wheel_is_the_package_and_no_more(tmp_path):
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    wheel = zipfile.ZipFile(path)
    names = {name for name in wheel.namelist() if not name.startswith(f"{INFO}/")}
    files = [
        file for file in PACKAGE.glob("**/*") if file.is_file() and "__pycache__" not in file.parts
    ]
    recipes = {f"badit/{file.relative_to(ROOT)}" for file in (ROOT / "recipes").glob("**/*.*")}
    assert names == {str(file.relative_to(PACKAGE.parent)) for file in files} | recipes
    assert {
        "badit/py.typed",
        "badit/report/templates/page.html.j2",
        "badit/report/templates/page.js",
    } <= names
    assert f"{INFO}/licenses/LICENSE" in wheel.namelist()
    assert (
        wheel.read(f"{INFO}/entry_points.txt").decode()
        == "[console_scripts]\nbadit = badit.cli:main\n"
    )


def test_every_requirement_has_a_floor_and_a_ceiling():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        if requirement.name == "badit":  # an extra that takes in another
            assert requirement.extras <= extras.keys()
        else:
            assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}, text


def test_the_source_distribution_can_be_tested_and_documented(tmp_path):
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        sizes = {
            name.partition("/")[2]: archive.getmember(name).size for name in archive.getnames()
        }
    wanted = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "Makefile",
    }
    wanted |= {
        "pyproject.toml",
        "mkdocs.yml",
        "docs/fsdp2.yaml",
        "docs/_site/hooks.py",
        "src/badit/py.typed",
    }
    for folder, pattern in (("recipes", "*.yaml"), ("tests", "*.py"), ("benchmarks", "*.json")):
        wanted |= {str(file.relative_to(ROOT)) for file in (ROOT / folder).glob(f"**/{pattern}")}
    assert wanted - sizes.keys() == set()
    made = re.compile(r"^(runs|site|dist|\.venv)/|(^|/)__pycache__/")
    assert [name for name in sizes if made.search(name)] == []
    assert max(sizes.values()) < 10_000_000, "the raw scores of a comparison are the largest"
    assert Path(path).stat().st_size < 6_000_000
