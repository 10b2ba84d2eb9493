"""A step is run again exactly when something that it depends on has changed, and continues where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_echat.contracts import UserError
from lightning_echat.recipes import run_recipe as run_recipe_module
from lightning_echat.recipes import step_run
from lightning_echat.recipes.fingerprints import fingerprints
from lightning_echat.recipes.recipe_file import Recipe, Step, load_recipe
from lightning_echat.recipes.run_recipe import run_recipe
from lightning_echat.recipes.step_run import alone_in, read_state, write_state

RECIPE = {
    "vars": {"out": "run", "word": "hello", "corpus": "${vars.out}/corpus"},
    "steps": [
        {"name": "corpus", "command": ["write", "${vars.corpus}/a.txt", "${vars.word}"], "outputs": ["${vars.corpus}"]},
        {
            "name": "train",
            "command": ["copy", "--config", "train.yaml", "${vars.corpus}/a.txt", "run/train/model.txt"],
            "inputs": ["${vars.corpus}"],
            "outputs": ["run/train/model.txt"],
            "resumable_folder": "run/train",
        },
        {"name": "note", "command": ["write", "run/note.txt", "noted"], "outputs": ["run/note.txt"]},
    ],
}


def toy_command(args: list[str]) -> None:
    """What stands for `echat`; every call leaves a line in calls.txt."""
    with Path("calls.txt").open("a") as calls:
        calls.write(f"{args[0]} {args[-1]}\n")
    if args[0] == "fail":
        raise SystemExit(7)
    if args[0] == "sleep":
        time.sleep(60)
    target = Path(args[1] if args[0] == "write" else args[-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(args[2] if args[0] == "write" else Path(args[-2]).read_text())


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What these children need is imported once; a source tree that others edit must not decide what is stale.
    monkeypatch.setattr(step_run, "PRELOADED", ("lightning_echat.recipes.run_recipe",))
    monkeypatch.setattr(run_recipe_module, "code_fingerprint", lambda: "code")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    Path("train.yaml").write_text("steps: 3")


def run(*overrides: str, only: str | None = None, fresh: bool = False) -> list[str]:
    """Run the recipe; the commands that it ran."""
    Path("calls.txt").write_text("")
    run_recipe(Path("recipe.yaml"), run_command=toy_command, overrides=overrides, only=only, fresh=fresh)
    return [line.split()[0] for line in Path("calls.txt").read_text().splitlines()]


def test_variables_are_filled_in() -> None:
    recipe = load_recipe(Path("recipe.yaml"), ["word=bye"])
    assert recipe.out == Path("run")
    assert recipe.steps[0].command == ("write", "run/corpus/a.txt", "bye")
    assert recipe.steps[1].inputs == (Path("run/corpus"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["steps"][0].update(outptus=[]), "unknown key 'outptus'; did you mean 'outputs'"),
        (lambda r: r["steps"][0].update(command=["${vars.wrod}"]), "no variable 'wrod'; there are out, word, corpus"),
        (lambda r: r["steps"][1].update(name="corpus"), "two steps are called 'corpus'"),
        (lambda r: r["vars"].pop("out"), "no variable 'out'|vars.out is missing"),
        (lambda r: r.update(step=[]), "unknown key 'step'; did you mean 'steps'"),
        (lambda r: r["steps"][0].update(command="write"), "a command (a list of words)"),
    ],
)
def test_a_wrong_recipe_is_refused(change, message: str) -> None:
    content = yaml.safe_load(yaml.safe_dump(RECIPE, sort_keys=False))
    change(content)
    Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError) as error:
        load_recipe(Path("recipe.yaml"))
    assert any(part in str(error.value) for part in message.split("|"))


def test_one_variable_chooses_the_value_of_another() -> None:
    """`make quickstart BUDGET=long` is `--set budget=long`."""
    variables = {"out": "run", "budget": "short", "steps": {"by": "budget", "short": 10, "long": 90}}
    content = {"vars": variables, "steps": [{"name": "a", "command": ["x", "${vars.steps}"]}]}
    Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    path = Path("recipe.yaml")
    assert load_recipe(path).steps[0].command == ("x", "10")
    assert load_recipe(path, ["budget=long"]).steps[0].command == ("x", "90")
    assert load_recipe(path, ["steps=7"]).steps[0].command == ("x", "7")
    with pytest.raises(UserError, match=r"budget=huge: recipe.yaml: vars.steps knows short, long"):
        load_recipe(path, ["budget=huge"])


@pytest.mark.parametrize(("override", "message"), [("wodr=x", "did you mean 'word'"), ("word", "give KEY=VALUE")])
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(Path("recipe.yaml"), [override])


def test_fingerprints_follow_what_a_step_depends_on() -> None:
    """The step itself, and all that stand on it, change; those that do not, stay."""

    def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
        return {name for name in before if before[name] != after[name]}

    recipe = load_recipe(Path("recipe.yaml"))
    before = fingerprints(recipe, code="code")
    assert fingerprints(recipe, code="code") == before
    assert changed(before, fingerprints(load_recipe(Path("recipe.yaml"), ["word=bye"]), code="code")) == {
        "corpus",
        "train",
    }
    assert changed(before, fingerprints(recipe, code="other")) == {"corpus", "train", "note"}
    Path("train.yaml").write_text("steps: 4")
    assert changed(before, fingerprints(recipe, code="code")) == {"train"}


def test_what_a_run_makes_does_not_change_its_fingerprints() -> None:
    """A word that names a file in the run's folder is an output; hashing it would make every run stale."""
    recipe = load_recipe(Path("recipe.yaml"))
    before = fingerprints(recipe, code="code")
    run()
    assert fingerprints(recipe, code="code") == before


def test_the_words_of_a_command_do_not_run_together() -> None:
    one, other = (Step(name="a", command=command) for command in (("ab", "c"), ("a", "bc")))
    prints = [fingerprints(Recipe(out=Path("run"), steps=(step,)), code="x")["a"] for step in (one, other)]
    assert prints[0] != prints[1]


def test_a_value_given_with_an_equals_sign_is_a_dependency() -> None:
    """`--model.init_args.init_from=run/train` without an entry under inputs must not reuse a stale step."""
    recipe = load_recipe(Path("recipe.yaml"))
    last = Step(name="next", command=("fit", "--model.init_args.init_from=run/train"))
    recipe = replace(recipe, steps=(*recipe.steps, last))
    before = fingerprints(recipe, code="code")["next"]
    Path("train.yaml").write_text("steps: 4")
    assert fingerprints(recipe, code="code")["next"] != before


def test_an_input_that_nobody_makes_is_refused() -> None:
    recipe = Recipe(out=Path("run"), steps=(Step(name="a", command=("x",), inputs=(Path("nowhere"),)),))
    with pytest.raises(UserError, match="step 'a' reads nowhere, which neither exists nor is made"):
        fingerprints(recipe, code="")


def test_a_second_run_reuses_what_is_unchanged(capfd: pytest.CaptureFixture[str]) -> None:
    assert run() == ["write", "copy", "write"]
    assert Path("run/train/model.txt").read_text() == "hello"
    state = read_state(Path("run"), "train")
    assert state is not None and state.status == "done" and state.exit_code == 0
    assert state.seconds > 0 and state.peak_memory_bytes > 1e6
    assert run() == []
    assert "reused" in capfd.readouterr().out
    Path("train.yaml").write_text("steps: 4")
    assert run() == ["copy"]
    Path("run/note.txt").unlink()
    assert run() == ["write"]
    assert run("word=bye") == ["write", "copy"]
    assert run(only="note") == []
    assert run("word=bye", only="note", fresh=True) == ["write"]
    with pytest.raises(UserError, match="no such step; there are corpus, train, note"):
        run(only="nothing")


def test_a_stale_folder_is_moved_aside_and_an_unfinished_one_is_kept() -> None:
    run()
    Path("train.yaml").write_text("steps: 4")
    run()
    assert Path("run/train.stale/model.txt").exists()
    # The same settings, stopped halfway: nothing is moved and the seconds add up.
    state = read_state(Path("run"), "train")
    assert state is not None
    write_state(Path("run"), "train", replace(state, status="unfinished", seconds=100.0))
    Path("run/train/halfway.ckpt").write_text("")
    assert run() == ["copy"]
    assert Path("run/train/halfway.ckpt").exists()
    state = read_state(Path("run"), "train")
    assert state is not None and state.seconds > 100


def test_a_failing_step_stops_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    content = {**RECIPE, "steps": [{"name": "bad", "command": ["fail"]}, *RECIPE["steps"]]}
    Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SystemExit) as leaving:
        run()
    assert leaving.value.code == 7
    assert Path("calls.txt").read_text() == "fail fail\n"
    assert "step 'bad' ended with exit code 7" in capsys.readouterr().err
    state = read_state(Path("run"), "bad")
    assert state is not None and state.status == "unfinished" and state.exit_code == 7


def test_an_output_that_was_not_made_is_an_error() -> None:
    content = {"vars": {"out": "run"}, "steps": [{"name": "a", "command": ["write", "x", "y"], "outputs": ["z"]}]}
    Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="'a' succeeded but did not make z"):
        run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_child_and_leaves_the_state_right(number: int, tmp_path: Path) -> None:
    """Without this the child of a killed recipe goes on training beside the next one."""
    content = {"vars": {"out": "run"}, "steps": [{"name": "long", "command": ["sleep"]}]}
    Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    code = (
        "from pathlib import Path; from lightning_echat.recipes import run_recipe, step_run\n"
        "from tests.lightning_echat.recipes import test_recipes as t\n"
        "step_run.PRELOADED = ()\n"
        "run_recipe.run_recipe(Path('recipe.yaml'), run_command=t.toy_command)"
    )
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE, text=True
    )
    waited_until = time.monotonic() + 60
    while not Path("calls.txt").exists() and time.monotonic() < waited_until:
        time.sleep(0.1)
    assert Path("calls.txt").exists()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert number != signal.SIGINT or "the same command continues it" in error
    state = json.loads(Path("run/.recipe/long.json").read_text())
    assert state["status"] == "unfinished" and state["seconds"] > 0


def test_two_runs_in_one_folder_are_refused() -> None:
    with alone_in(Path("run")), pytest.raises(UserError, match="another echat run works in run"):
        run()


def test_an_unreadable_state_costs_a_run_and_no_more() -> None:
    run()
    Path("run/.recipe/note.json").write_text("{")
    assert run() == ["write"]
