"""Pages of studies, sweeps and runs show what there is, with nothing from outside, in a real browser."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lightning_echat.cli import main
from lightning_echat.contracts import UserError
from lightning_echat.studies import tables
from lightning_echat.studies.ablate import write_results
from lightning_echat.studies.page import write_page
from lightning_echat.studies.results import RunResult, StudyResults
from lightning_echat.studies.search import Trial
from lightning_echat.studies.study_file import Figure, Reference, Stage, Study, Variant
from lightning_echat.studies.sweep_file import SweepFile
from lightning_echat.studies.sweep_results import write_sweep_results
from tests.browser import assert_self_contained, look_at


def study_results(out: Path) -> StudyResults:
    variants = tuple(Variant(name=name, skipped=frozenset(), options={}) for name in ("base & more", "<b>other</b>"))
    study = Study(
        path=Path("study.yaml"),
        title="Base against other",
        out=out,
        seeds=(0, 1),
        stages=(Stage(name="fit", command=("fit",)), Stage(name="score", command=("evaluate",))),
        variants=variants,
        figures=(Figure(name="points", path="points"), Figure(name="WER", path="wer", better="lower")),
        compare_to=variants[0].name,
        reference=Reference(source="them", values={variants[0].name: {"points": 58.0}}),
        notes="A note.",
    )
    runs = [
        RunResult(
            variant=variant.name,
            seed=seed,
            steps={"fit": f"fit-{variant.name[:1]}{seed}"},
            figures={"points": 10.0 * place + seed, "WER": float("nan")},
            seconds=60.0,
            trained_steps=5,
        )
        for place, variant in enumerate(variants)
        for seed in study.seeds
    ]
    runs[-1] = RunResult(variant=variants[1].name, seed=1, steps={}, failure="fit-1 failed (exit code 1: out of luck)")
    for run in runs:
        for step in run.steps.values():
            folder = out / "stages" / step / "metrics"
            folder.mkdir(parents=True)
            (folder / "metrics.csv").write_text("step,train/loss\n1,3.0\n2,2.0\n")
    return StudyResults(study=study, runs=tuple(runs), seconds_spent=240.0)


def write_sweep(out: Path) -> None:
    content: dict[str, Any] = {
        "method": "random",
        "metric": {"name": "val/dev/loss", "goal": "minimize"},
        "parameters": {
            "model.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0},
            "x": {"values": ["a", "b"]},
        },
        "command": ["fit", "--config", "base.yaml", "--config", "${args_json_file}"],
    }
    trials = [
        Trial(
            name=f"t{i}", parameters={"model.lr": 10.0**-i, "x": x}, state="finished", best=float(i), history=[float(i)]
        )
        for i, x in enumerate("abab")
    ]
    trials += [
        Trial(name="t4", parameters={"model.lr": 0.5, "x": "a"}, state="stopped", best=9.0, history=[9.0]),
        Trial(name="t5", parameters={"model.lr": 0.2, "x": "b"}, state="failed", reason="exit code 1: out of luck"),
    ]
    out.mkdir()
    stored = {"made_by": {}, "file": "sweep.yaml", "sweep": content, "trials": [asdict(trial) for trial in trials]}
    (out / "sweep.json").write_text(json.dumps(stored))
    file = SweepFile(path=Path("sweep.yaml"), content=content, metric="val/dev/loss", goal="minimize")
    write_sweep_results(file, trials, out)


def test_a_study_s_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = tmp_path / "study"
    write_results(study_results(out), out)
    seen = look_at(out / "report.html", tmp_path)
    assert_self_contained(seen, images=2)
    for words in ("A note.", "base & more", "<b>other</b>", "Not ours", "58", "out of luck", "0.50 ± 6.35", "WER (wer"):
        assert words in seen["text"]


def test_a_sweep_s_page_in_a_browser(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    write_sweep(out)
    seen = look_at(write_page(out), tmp_path)
    assert_self_contained(seen, images=1)
    for words in (
        "random search: 6 trials, 4 finished, 1 stopped, 1 failed",
        "out of luck",
        "the best of its trials is t0",
    ):
        assert words in seen["text"]


def test_the_report_command_knows_what_a_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_sweep(tmp_path / "sweep")
    write_results(study_results(tmp_path / "study"), tmp_path / "study")
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text(json.dumps({"seconds": 3.0}))
    for folder, title in (("sweep", "Sweep sweep"), ("study", "Base against other"), ("run", "run")):
        main(["report", str(tmp_path / folder), "--out", str(tmp_path / f"{folder}.html")])
        assert f"<title>{title} · lightning-echat" in (tmp_path / f"{folder}.html").read_text()
    seen = look_at(tmp_path / "run.html", tmp_path)
    assert seen["errors"] == [] and seen["outside"] == [] and seen["loaded"] == []


def test_a_broken_results_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        write_page(tmp_path)


def test_tables_escape_what_latex_would_read(tmp_path: Path) -> None:
    assert r"base \& more &" in tables.as_latex(study_results(tmp_path))
