"""The studies and sweeps that are shipped name options that exist, with values that they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_echat.cli import resolve
from lightning_echat.studies.plan import plan_study
from lightning_echat.studies.study_file import load_study
from lightning_echat.studies.sweep_file import check_with_parser, load_sweep
from lightning_echat.tracking.metric_table import metric_of

ROOT = Path(__file__).parents[3]
STUDIES = sorted(path for path in (ROOT / "experiments/ablations").glob("*.yaml") if "variants:" in path.read_text())
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_paper_s_two_by_two_shares_what_its_variants_agree_on() -> None:
    plan = plan_study(load_study(ROOT / "experiments/ablations/two_by_two.yaml"), resolve=resolve)
    stages = [step.name.rpartition("-")[0] for step in plan.recipe.steps]
    counts = {stage: stages.count(stage) for stage in stages}
    assert counts == {"understanding": 3, "generation": 6, "empathy": 12, "evaluation": 12}


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_planned(path: Path) -> None:
    study = load_study(path, seeds=[0])
    plan = plan_study(study, resolve=resolve)
    assert len({run.steps["evaluation"] for run in plan.runs}) == len(study.variants)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_optimizes_a_documented_metric_in_its_direction_on_a_set_of_its_experiment(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    name, goal = sweep["metric"]["name"], sweep["metric"]["goal"]
    documented = metric_of(name)
    assert documented is not None and goal == {"lower": "minimize", "higher": "maximize"}[documented.better]
    files = [Path(word) for word in sweep["command"] if str(word).startswith("experiments/")]
    experiments = [yaml.safe_load(file.read_text()) for file in files]
    sets = [content.get("data", {}).get("init_args", {}).get("validation", {}) for content in experiments]
    assert name.split("/")[1] in {key for found in sets for key in found}
    assert f"echat sweep sweeps/{path.name}" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_can_be_run(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra [sweep] is not installed")
    check_with_parser(load_sweep(path), resolve=resolve, scratch=tmp_path)
