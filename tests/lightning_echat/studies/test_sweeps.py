"""A W&B sweep file runs with no account, survives what stops it, and its mistakes are found before the first trial."""

from __future__ import annotations

import json
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
from lightning_echat.studies import sweep as sweep_module
from lightning_echat.studies.importance import importance
from lightning_echat.studies.search import Search, Trial
from lightning_echat.studies.sweep import sweep
from lightning_echat.studies.sweep_file import check_with_parser, load_sweep
from lightning_echat.studies.sweep_results import nested
from tests.lightning_echat.studies.toy_trials import resolve, toy_command

pytest.importorskip("sklearn", reason="the extra [sweep] is not installed")

ROOT = Path(__file__).parents[3]
SWEEP: dict[str, Any] = {
    "program": "echat",
    "command": ["${env}", "${program}", "fit", "--config", "base.yaml", "--config", "${args_json_file}"],
    "method": "random",
    "metric": {"name": "val/dev/loss", "goal": "minimize"},
    "parameters": {
        "model.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0},
        "model.layers": {"values": [1, 2]},
    },
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A step of these tests takes no time; forked from here, its process takes none either.
    monkeypatch.setattr(step_run, "START_METHOD", "fork")
    monkeypatch.setattr(sweep_module, "code_fingerprint", lambda: "code")
    monkeypatch.setattr(sweep_module, "_LOOKING_SECONDS", 0.1)
    Path("base.yaml").write_text("{}")


def write_sweep(**changes: Any) -> Path:
    path = Path("sweep.yaml")
    content = {key: value for key, value in {**SWEEP, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(**options: Any) -> list[dict[str, Any]]:
    sweep(Path("sweep.yaml"), run_command=toy_command, resolve=resolve, out=Path("out"), **{"parallel": 3, **options})
    return json.loads(Path("out/sweep.json").read_text())["trials"]


def test_a_sweep_ends_with_its_best_trial_as_yaml() -> None:
    write_sweep()
    trials = run(trials=9)
    assert [trial["state"] for trial in trials] == ["finished"] * 9
    for trial in trials:
        lr, layers = trial["parameters"]["model.lr"], trial["parameters"]["model.layers"]
        assert trial["best"] == pytest.approx(abs(math.log10(lr) + 2) + layers + 1 / 9)
    best = min(trials, key=lambda trial: trial["best"])
    text = Path("out/best.yaml").read_text()
    assert yaml.safe_load(text) == nested(best["parameters"]) and best["name"] in text
    assert "echat fit --config base.yaml --config best.yaml" in text
    assert f"Best: {best['name']}" in Path("out/results.md").read_text()
    assert len(Path("out/results.csv").read_text().splitlines()) == 10
    for name in ("parallel_coordinates", "importance"):
        assert Path(f"out/{name}.png").stat().st_size > 1000 and "<svg" in Path(f"out/{name}.svg").read_text()


def test_the_same_seed_tries_the_same_and_more_trials_continue() -> None:
    write_sweep(method="bayes")
    first = [trial["parameters"] for trial in run(trials=3, parallel=1)]
    assert [trial["parameters"] for trial in run(trials=5, parallel=1)][:3] == first
    Path("out").rename("before")
    assert [trial["parameters"] for trial in run(trials=3, parallel=1)] == first
    with pytest.raises(UserError, match="out holds the trials of another sweep file or seed"):
        run(trials=3, seed=1)


def test_a_grid_ends_by_itself() -> None:
    write_sweep(method="grid", metric=None, parameters={"model.layers": {"values": [1, 2]}, "model.lr": {"value": 0.1}})
    assert sorted(trial["parameters"]["model.layers"] for trial in run()) == [1, 2]
    assert not Path("out/best.yaml").exists()


def test_hyperband_stops_and_the_trial_reads_stopped() -> None:
    """A stopped trial may well exit with 0; its state is what was decided about it."""
    parameters = {**SWEEP["parameters"], "pause": {"value": 0.3}}
    write_sweep(method="random", parameters=parameters, early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2})
    trials = run(trials=6, parallel=3)
    states = {trial["state"] for trial in trials}
    assert states == {"finished", "stopped"}
    stopped = [trial for trial in trials if trial["state"] == "stopped"]
    # One that was given up at its very end has logged all nine.
    assert any(len(trial["history"]) < 9 for trial in stopped)
    assert f"{len(stopped)} stopped" in Path("out/results.md").read_text()


def test_failed_trials_are_named_and_no_result_is_made_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep()
    Path("fail.txt").write_text("")
    with pytest.raises(SystemExit) as leaving:
        run(trials=2)
    assert leaving.value.code == 1
    said = capsys.readouterr()
    assert "t0001 failed: exit code 1: echat: error: out of luck" in said.err and "2 failed" in said.out
    assert not Path("out/best.yaml").exists()


def test_a_killed_sweep_continues_its_trials() -> None:
    write_sweep(parameters={**SWEEP["parameters"], "pause": {"value": 0.5}})
    code = (
        "from pathlib import Path; from lightning_echat.recipes import step_run\n"
        "from lightning_echat.studies import sweep as s\n"
        "from tests.lightning_echat.studies import toy_trials as t\n"
        "step_run.START_METHOD = 'fork'; s.code_fingerprint = lambda: 'code'; s._LOOKING_SECONDS = 0.1\n"
        "s.sweep(Path('sweep.yaml'), run_command=t.toy_command, resolve=t.resolve, trials=3, parallel=2,"
        " out=Path('out'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    waited_until = time.monotonic() + 120
    while not list(Path("out").glob("trials/*/metrics.csv")) and time.monotonic() < waited_until:
        time.sleep(0.1)
    children = step_run.psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = step_run.psutil.wait_procs(children, timeout=60)
    assert not alive
    left = json.loads(Path("out/sweep.json").read_text())["trials"]
    assert left and left[0]["state"] == "running"
    trials = run(trials=3)
    assert [trial["state"] for trial in trials] == ["finished"] * 3
    assert [trial["parameters"] for trial in trials][: len(left)] == [trial["parameters"] for trial in left]
    # What the first attempt had logged and the second logged again counts once.
    assert len(trials[0]["history"]) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"model.rl": {"values": [1.0]}}}, "unknown key 'model.rl'"),
        ({"parameters": {"model.layers": {"values": [1, 2.5]}}}, "model.layers: expected int, got 2.5"),
        ({"parameters": {"model.layers": {"min": 1.0, "max": 2.0}}}, "model.layers: expected int"),
        ({"parameters": {"model.lr": {"min": 0.0, "max": 1}}}, "min 0.0 and max 1, one whole and one not: ambiguous"),
        ({"parameters": {"model.lr": {"min": 0, "max": 1}}}, "may be any number: ambiguous; write 0.0 and 1.0"),
        ({"parameters": {"model.lr": {"min": 1.0, "max": 0.1}}}, "min 1.0 is not below max 0.1"),
        ({"parameters": {"model.lr": {"min": "1e-5", "max": 1.0}}}, "write it with a point, as in 1.0e-5"),
        (
            {"parameters": {"model.lr": {"distribution": "log_uniform", "min": 1e-5, "max": 1e-2}}},
            "this means 1 to 1.01; for values from 1e-05 to 0.01 write log_uniform_values",
        ),
        ({"parameters": {"model.lr": {"distribution": "lognormal"}}}, "sweep.yaml: "),
        ({"parameters": {"model": {"parameters": {"lr": {"values": [1]}}}}}, "give flat names with dots"),
        ({"parameters": {"model.lr": 3}}, "give values: […]"),
        ({"method": "bayes", "metric": None}, "metric is missing"),
        ({"metric": {"name": "val/dev/loss"}}, "goal is minimize or maximize, not None"),
        ({"metric": {"name": "val/dve/loss", "goal": "minimize"}}, "no validation set 'dve'; did you mean 'dev'?"),
        ({"metric": {"name": "loss", "goal": "minimize"}}, "keys read split/what"),
        ({"metric": {"name": "val/dev/wer", "goal": "maximize"}}, "lower is better, but goal is maximize"),
        ({"method": "guess"}, "sweep.yaml: "),
        ({"program": "train.py"}, "give program: echat"),
        ({"command": ["${env}", "${program}", "fit"]}, "no trial would get its parameters"),
        ({"command": ["${program}", "validate", "${args}"]}, "the command of echat is fit"),
        ({"parameters": None}, "parameters is missing"),
    ],
)
def test_a_mistake_is_found_before_the_first_trial(change: dict[str, Any], message: str) -> None:
    write_sweep(**change)
    with pytest.raises(UserError) as error:
        run(trials=2)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("out/sweep.json").exists()


def test_a_metric_of_no_table_is_doubted_and_yet_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """A callback of one's own may log it."""
    write_sweep(metric={"name": "val/dev/loss/texts", "goal": "minimize"})
    with pytest.raises(SystemExit):
        run(trials=1)
    doubt = "metric 'val/dev/loss/texts' is none of docs/metrics.md, did you mean 'val/dev/loss/text'?"
    assert doubt in capsys.readouterr().out


def test_whole_ranges_that_are_meant_are_taken() -> None:
    for distribution in ({"min": 1, "max": 4}, {"distribution": "int_uniform", "min": 1, "max": 4}):
        file = load_sweep(write_sweep(parameters={"model.layers": distribution}))
        assert check_with_parser(file, resolve=resolve, scratch=Path("out"))["model.layers"] == 1


@pytest.mark.parametrize("macro", ["${args}", "${args_no_equals}", "${args_json_file}"])
def test_commands_are_worded_as_the_agent_words_them(macro: str) -> None:
    """Compared with what W&B's own agent makes of the same file."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    os.environ["TOY_FOLDER"] = "there"
    file = load_sweep(
        write_sweep(command=["${env}", "${program}", "fit", "--x", "${envvar:TOY_FOLDER}/x", "--config", macro])
    )
    values = {"a.b": True, "c": [1, 2], "d": 1e-05, "e": "word"}
    theirs = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    theirs |= {"env": ["/usr/bin/env"], "program": ["echat"], "args_json_file": ["values.json"]}
    words: list[str] = []
    for word in map(str, create_sweep_command(list(file.content["command"]))):
        words += theirs[word[2:-1]] if word.startswith("${") else [word]
    assert file.words(values, Path("values.json")) == words[2:]


def test_a_search_is_exhausted_and_does_not_disturb_the_random_state() -> None:
    import numpy as np

    search = Search({"method": "grid", "parameters": {"a": {"values": [1]}}}, seed=0)
    np.random.seed(5)
    undisturbed = np.random.random()
    np.random.seed(5)
    assert search.suggest([]) == {"a": 1}
    assert search.suggest([Trial(name="t", parameters={"a": 1}, state="finished")]) is None
    assert np.random.random() == undisturbed


def test_importance_finds_what_mattered_and_admits_when_nothing_did() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    draws = [{"a": float(random.uniform()), "b": float(random.uniform()), "c": 1} for _ in range(40)]

    def trials(score: Any) -> list[Trial]:
        return [Trial(name=str(i), parameters=p, state="finished", best=score(p)) for i, p in enumerate(draws)]

    found = importance(trials(lambda p: 5 * p["a"]), ["a", "b", "c"])
    assert found is not None and found.explained > 0.8
    assert found.shares["a"] > 0.9 and "c" not in found.shares and found.correlation["a"] > 0.95
    noise = importance(trials(lambda p: float(random.normal())), ["a", "b", "c"])
    assert noise is not None and noise.explained < 0.2
    assert importance(trials(lambda p: p["a"])[:5], ["a", "b"]) is None
