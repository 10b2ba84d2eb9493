"""What a fresh clone must not contain, and what its README promises."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_echat.cli import COMMANDS

ROOT = Path(__file__).parents[1]
# Spelled in pieces, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile("|".join(f"(?<![\\w.~/-])/{name}/" for name in ("work", "root", "home", "Users")))
INDEXES = re.compile(
    "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "npmjs" + r"\.", "index" + "-url", "find" + "-links"))
)


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked_files():
        try:
            found.append((path, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    assert len(found) > 20
    return found


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, INDEXES], ids=["machine paths", "package indexes"])
def test_nothing_names_one_machine(pattern: re.Pattern[str]) -> None:
    hits = [f"{path.relative_to(ROOT)}: {match[0]}" for path, text in texts() for match in pattern.finditer(text)]
    assert hits == []


def test_constraints_are_names_and_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert {"torch==2.11.0", "torchaudio==2.11.0"} <= set(lines)


def test_every_requirement_is_pinned() -> None:
    """An unpinned requirement would be whatever is newest on the day of a fresh clone."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[><=~! ]", name)[0].lower().replace("_", "-") for name in wanted}
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert names - pinned == set()


def test_no_pin_is_one_that_an_installed_package_refuses() -> None:
    """Such a pin cannot be installed, or only by leaving demands out."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    refused = []
    for package in distributions():
        for line in package.requires or []:
            demand = Requirement(line)
            pin = pins.get(canonicalize_name(demand.name))
            applies = demand.marker is None or demand.marker.evaluate({"extra": ""})
            if pin and applies and not demand.specifier.contains(pin, prereleases=True):
                refused.append(f"{package.name} asks for {line}")
    # Its own demands are left out by the Makefile, which says why.
    assert [line for line in refused if not line.startswith("sweeps asks for numpy")] == []


def test_every_yaml_is_yaml() -> None:
    files = [path for path in tracked_files() if path.suffix in (".yaml", ".yml")]
    assert files
    for path in files:
        yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_what_a_document_tells_to_run_and_to_read_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    code = "\n".join(_code(text))
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
        assert target in targets, f"make {target}"
    groups = "|".join(sorted({f"{name.split()[0]} " for name in COMMANDS if " " in name}))
    for words in re.findall(rf"\bechat ((?:{groups})?[a-z0-9]+(?:-[a-z0-9]+)*)\b", code):
        assert words in COMMANDS, f"echat {words}"
    for path in re.findall(r"\b((?:experiments|docs|lightning_echat|callbacks|datamodules|tests)/[\w/.-]+\.\w+)", code):
        assert (ROOT / path).exists(), path


def _code(text: str) -> list[str]:
    """Fenced blocks and inline code."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
