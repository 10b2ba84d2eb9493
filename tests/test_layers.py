"""Imports only go down, and importing does nothing."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_echat", "datamodules", "callbacks")

_IMPORT_EACH = """
import importlib, json, logging, os, random, sys
import torch

def state():
    return {
        "files": sorted(os.listdir(".")), "environment": dict(os.environ), "cuda": torch.cuda.is_initialized(),
        "log handlers": len(logging.getLogger().handlers), "seed": torch.initial_seed(),
        "random": hash(random.getstate()), "default type": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
    }

wrong = []
# What the libraries do at their first import is theirs; see it once, before looking.
import lightning.pytorch, transformers, torchaudio, wandb, peft, torchmetrics, webdataset, matplotlib, scipy.signal
for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    wrong += [f"importing {name} changes {key}" for key in before if before[key] != after[key]]
print(json.dumps(wrong))
"""


def modules() -> list[str]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]


def test_imports_only_go_down() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_no_module_imports_itself_by_way_of_others() -> None:
    """So each can be imported first."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert set(modules()) <= set(imports)
    TopologicalSorter(imports).prepare()


def test_importing_does_nothing(tmp_path: Path) -> None:
    """A module that sets a seed, an environment variable or a log handler changes runs that merely import it."""
    names = modules()
    assert len(names) > 20
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_EACH, *names], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]", result.stdout


def test_package_files_hold_no_code() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            lines = [
                line for line in path.read_text().splitlines() if line and not line.startswith(('"""', "__version__"))
            ]
            assert lines == [], path
