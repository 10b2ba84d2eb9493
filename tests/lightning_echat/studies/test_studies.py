"""A study trains what its variants share once, survives what stops it, and its table loses no run."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_echat.contracts import UserError
from lightning_echat.recipes import step_run
from lightning_echat.studies import ablate as ablate_module
from lightning_echat.studies.ablate import ablate
from lightning_echat.studies.plan import plan_study
from lightning_echat.studies.results import estimate
from lightning_echat.studies.study_file import load_study
from tests.lightning_echat.studies.toy_stages import resolve, toy_command
from tests.wandb_log import read_run

ROOT = Path(__file__).parents[3]
STUDY: dict[str, Any] = {
    "vars": {"out": "out", "steps": 3},
    "seeds": [0, 1],
    "stages": [
        {"name": "first", "command": ["fit", "--steps", "${vars.steps}"]},
        {"name": "second", "command": ["fit", "--steps", "2"]},
        {"name": "score", "command": ["evaluate"]},
    ],
    "variants": {
        "base": {},
        "large": {"second": {"size": 10}},
        "same as base": {"second": {"size": 1}},
        "short": {"first": "skip"},
    },
    "figures": {"points": {"path": "score.points.0"}, "gap": {"path": "score.gap", "better": "lower"}},
    "reference": {"source": "them", "values": {"base": {"points": 58.0}}},
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A step of these tests takes no time; forked from here, its process takes none either.
    monkeypatch.setattr(step_run, "START_METHOD", "fork")
    monkeypatch.setattr(ablate_module, "code_fingerprint", lambda: "code")
    write_study()


def write_study(**changes: Any) -> Path:
    path = Path("study.yaml")
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def run(**options: Any) -> list[str]:
    """Run the study; the steps that it ran."""
    Path("calls.txt").write_text("")
    ablate(Path("study.yaml"), run_command=toy_command, resolve=resolve, **{"parallel": 3, **options})
    return [line.rpartition("-")[0] for line in Path("calls.txt").read_text().splitlines()]


def figures() -> dict[tuple[str, int], str]:
    with Path("out/results.csv").open(newline="") as stream:
        return {(r["variant"], int(r["seed"])): r["value"] for r in csv.DictReader(stream) if r["figure"] == "points"}


def test_stages_that_variants_agree_on_are_trained_once() -> None:
    """ "same as base" gives the default in words of its own: what counts is what the words come to."""
    plan = plan_study(load_study(Path("study.yaml")), resolve=resolve)
    names = [step.name.rpartition("-")[0] for step in plan.recipe.steps]
    assert len(plan.runs) == 8
    # Each of two seeds: one first; base, large and short differ in the second and so in the score.
    assert {name: names.count(name) for name in names} == {"first": 2, "second": 6, "score": 6}
    of = {(run.variant, run.seed): run.steps for run in plan.runs}
    assert of["base", 0] == of["same as base", 0]
    assert of["base", 0]["first"] == of["large", 0]["first"] != of["base", 1]["first"]
    assert "first" not in of["short", 0]


def test_a_study_runs_and_its_table_holds_every_run() -> None:
    ran = run()
    assert sorted(ran) == ["first"] * 2 + ["score"] * 6 + ["second"] * 6
    # 3 steps and 2 steps of the given size, and the seed for each stage.
    assert figures() == {
        ("base", 0): "5.0", ("base", 1): "7.0",
        ("large", 0): "23.0", ("large", 1): "25.0",
        ("same as base", 0): "5.0", ("same as base", 1): "7.0",
        ("short", 0): "2.0", ("short", 1): "3.0",
    }  # fmt: skip
    table = Path("out/results.md").read_text()
    # Differences are paired: large is 18 more with either seed, with no spread at all.
    assert "| large | +18.00 ± 0.00 |" in table
    assert "| base | 6.00 ± 12.71 | – | 2/2 |" in table and "| short | -3.50 ± 6.35 |" in table
    assert "Not ours: them" in table and "| base | 58 | – |" in table
    assert "No run has 'gap' (`score.gap` in report.json)." in table
    assert r"base & 6.00 $\pm$ 12.71 & --" in Path("out/results.tex").read_text()
    assert Path("out/results.png").stat().st_size > 1000 and "<svg" in Path("out/results.svg").read_text()
    assert run() == []


def test_what_changed_is_trained_again_and_nothing_else() -> None:
    run()
    assert sorted(run(overrides=["steps=4"])) == ["first"] * 2 + ["score"] * 4 + ["second"] * 4
    assert sorted(run(overrides=["steps=4"], seeds=[0, 1, 2])) == ["first"] + ["score"] * 3 + ["second"] * 3
    write_study(variants={**STUDY["variants"], "huge": {"second": {"size": 100}}})
    assert sorted(run()) == ["score"] * 2 + ["second"] * 2


def test_a_failed_run_is_named_and_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_study(load_study(Path("study.yaml")), resolve=resolve)
    doomed = next(run for run in plan.runs if run.variant == "large" and run.seed == 1).steps["second"]
    Path("fail.txt").write_text(doomed)
    with pytest.raises(SystemExit) as leaving:
        run()
    assert leaving.value.code == 1
    assert f"{doomed}: exit code 2: echat: error: out of luck" in capsys.readouterr().err
    table = Path("out/results.md").read_text()
    assert "- large, seed 1: " + doomed + " failed (exit code 2: echat: error: out of luck)" in table
    assert "| large | 23.00 ± ? | – | 1/2 |" in table and "| base | 6.00 ± 12.71 | – | 2/2 |" in table
    assert figures()["large", 1] == ""
    Path("fail.txt").unlink()
    assert sorted(run()) == ["score", "second"]
    assert figures()["large", 1] == "25.0"


def test_a_killed_study_leaves_nobody_behind_and_continues() -> None:
    """The child of a killed study would go on writing into the folder that the next one works in."""
    write_study(variants={"base": {}, "slow": {"second": {"size": "sleep"}}}, seeds=[0])
    code = (
        "from pathlib import Path; from lightning_echat.recipes import step_run\n"
        "from lightning_echat.studies import ablate as a\n"
        "from tests.lightning_echat.studies import toy_stages as t\n"
        "step_run.START_METHOD = 'fork'; a.code_fingerprint = lambda: 'code'\n"
        "a.ablate(Path('study.yaml'), run_command=t.toy_command, resolve=t.resolve, parallel=2)"
    )
    Path("calls.txt").write_text("")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    states = Path("out/.recipe")
    waited_until = time.monotonic() + 120
    while Path("calls.txt").read_text().count("second") < 2 and time.monotonic() < waited_until:
        time.sleep(0.1)
    children = step_run.psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = step_run.psutil.wait_procs(children, timeout=20)
    assert children and not alive
    unfinished = [file.stem for file in states.glob("second-*.json") if '"unfinished"' in file.read_text()]
    assert unfinished
    write_study(variants={"base": {}}, seeds=[0])
    assert set(run()) <= {"second", "score"}


def test_one_step_and_the_table_by_themselves() -> None:
    """What the jobs of a cluster do."""
    plan = plan_study(load_study(Path("study.yaml")), resolve=resolve)
    steps = plan.runs[0].steps
    with pytest.raises(UserError, match=f"what it reads is not made yet; run {steps['first']} first"):
        run(only=steps["second"])
    for stage in ("first", "second", "score"):
        assert run(only=steps[stage]) == [stage]
    assert not Path("out/results.md").exists()
    run(only="table")
    table = Path("out/results.md").read_text()
    assert (
        "| base | 5.00 ± ? | – | 1/2 |" in table and f"- base, seed 1: {plan.runs[4].steps['first']} waiting" in table
    )
    with pytest.raises(UserError, match="--only nothing: no such step"):
        run(only="nothing")


def test_slurm_jobs_wait_for_what_they_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """submit.sh is run for real with an sbatch that only takes down what it is asked."""
    write_study(variants={"base": {}}, seeds=[0])
    assert run(slurm=Path("jobs")) == []
    assert "submit.sh" in capsys.readouterr().out
    sbatch = Path("bin/sbatch")
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/bash\necho "$@" >> sbatch.txt\necho $(wc -l < sbatch.txt)\n')
    sbatch.chmod(0o755)
    path = f"{sbatch.parent.absolute()}:{os.environ['PATH']}"
    subprocess.run(["bash", "jobs/submit.sh"], check=True, env={**os.environ, "PATH": path, "SBATCH_OPTIONS": "-p x"})
    asked = [line.split() for line in Path("sbatch.txt").read_text().splitlines()]
    jobs = [Path(words[-1]).name.rpartition("-")[0] or Path(words[-1]).stem for words in asked]
    assert jobs == ["first", "second", "score", "table"]
    after = [[word for word in words if word.startswith("--dependency")] for words in asked]
    assert after == [[], ["--dependency=afterok:1"], ["--dependency=afterok:2"], ["--dependency=afterany:1:2:3"]]
    assert all("-p" in words for words in asked)
    job = Path(asked[0][-1]).read_text()
    assert "ablate study.yaml" in job and job.rstrip().endswith(Path(asked[0][-1]).stem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {"base": {"frist": {}}}}, "variant 'base': unknown key 'frist'; did you mean 'first'"),
        ({"variants": {"base": {"score": "skip"}}}, "the last stage, 'score', makes the figures"),
        ({"variants": {"base": {"first": "skip", "second": "skip"}}}, "nothing was trained before it"),
        ({"variants": {"base": {"first": {"wrong": 1}}}}, "variant 'base', stage 'first': unknown key 'wrong'"),
        ({"seeds": [0, 0]}, "repeat one"),
        ({"seeds": ["a"]}, "seeds are whole numbers"),
        ({"figures": {"a": {"path": "b", "better": "up"}}}, "better is higher or lower, not 'up'"),
        ({"figures": {}}, "figures is missing"),
        ({"compare_to": "nobody"}, "compare_to 'nobody' is no variant"),
        ({"reference": {"source": "x", "values": {"bse": {}}}}, "unknown key 'bse'; did you mean 'base'"),
        ({"stages": [{"name": "a", "command": ["chat"]}, {"name": "b", "command": ["evaluate"]}]}, "fit or evaluate"),
        ({"base": "nowhere.yaml"}, "base 'nowhere.yaml' is no file"),
        ({"varaints": {}}, "unknown key 'varaints'; did you mean 'variants'"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(change: dict[str, Any], message: str) -> None:
    content = {**STUDY, **change}
    if "stages" in change:
        content["variants"] = {"base": {}}
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError) as error:
        plan_study(load_study(Path("study.yaml")), resolve=resolve)
    assert message in str(error.value)


def test_a_study_overlays_its_base() -> None:
    Path("below").mkdir()
    Path("below/base.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    small = {"base": "base.yaml", "vars": {"steps": 9}, "variants": {"only": {}}, "reference": None}
    Path("below/small.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    study = load_study(Path("below/small.yaml"))
    assert study.stages[0].command[-1] == "9" and study.out == Path("out")
    assert [variant.name for variant in study.variants] == ["only"]


def test_an_interval_is_student_s() -> None:
    found = estimate([1.0, 2.0, 3.0, math.nan])
    assert found.n == 3 and found.mean == 2.0
    # t(0.975, 2) = 4.3027 times 1 / sqrt(3)
    assert found.half_width == pytest.approx(2.4841, abs=1e-4)
    assert estimate([5.0]).n == 1 and math.isnan(estimate([5.0]).half_width)
    assert estimate([math.nan]).n == 0


def test_the_table_goes_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(seeds=[0])
    logged = read_run(Path("out"))
    assert logged.history[-1]["points/large"] == 23.0
    table, _ = logged.table("runs")
    assert len(table["data"]) == 4 and table["columns"][:3] == ["variant", "seed", "points"]
