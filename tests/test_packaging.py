"""The wheel holds the three packages, all of each, and nothing else."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_echat", "datamodules", "callbacks")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy: a build in the tree would leave build/ and find what older ones left."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests", "experiments"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "wheel", "."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (source / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_top_level_names_are_exactly_ours(wheel_names: set[str]) -> None:
    """A bare package search would ship `tests` and `experiments` under these generic names."""
    tops = {name.partition("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_every_source_and_data_file_is_inside(wheel_names: set[str]) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".json")
    }
    assert "lightning_echat/tokens/prompt_sets/english.yaml" in expected
    assert expected - wheel_names == set()


def test_the_generic_names_belong_to_this_project_alone() -> None:
    """A package of the same name would win over ours and break every experiment that names a class in it."""
    owners = importlib.metadata.packages_distributions()
    for name in ("datamodules", "callbacks"):
        assert set(owners.get(name, ["lightning-echat"])) == {"lightning-echat"}
