"""Every mistake a user can make ends in one line and exit code 2; what is right reaches the function or the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_echat import cli
from tests import toy_stage

BASE = {
    "trainer": {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    | {"enable_progress_bar": False, "enable_model_summary": False},
    "model": {"class_path": "tests.toy_stage.ToyStage", "init_args": {"tokens": {"tokenizer": "abc"}}},
    "data": {"class_path": "tests.toy_stage.ToyData", "init_args": {"shards": ["a.tar"]}},
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["echat"])
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "ECHAT_DEBUG"):
        monkeypatch.delenv(key, raising=False)
    # main() sets defaults for W&B; register them so that they are taken back.
    names = ("MODE", "ERROR_REPORTING", "DATA_DIR", "X_TRANSACTION_LOG_FLUSH_INTERVAL")
    for key in ("JSONARGPARSE_DEPRECATION_WARNINGS", *(f"WANDB_{name}" for name in names)):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    before = signal.getsignal(signal.SIGINT)
    yield
    # Lightning ignores Ctrl-C from the first one on.
    signal.signal(signal.SIGINT, before)


def line_of(capsys: pytest.CaptureFixture[str], args: list[str], code: int = 2) -> str:
    """Run a command that fails; its only `echat:` line."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(args)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("echat:")]
    assert leaving.value.code == code, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"]):
        cli.main(args)
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and command.summary in shown for name, command in cli.COMMANDS.items())
        assert all(len(line) < 120 for line in shown.splitlines())


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from lightning_echat.cli import main; main(['--help']); print({'torch'} & set(sys.modules))"
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("set()\n")
    assert time.monotonic() - began < 5, "0.3 s on an idle machine"


def test_a_group_of_commands_lists_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["data"])
    shown = capsys.readouterr().out
    assert "data pack" in shown and "evaluate" not in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("echat 0.")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fitt"], "unknown command 'fitt'; did you mean 'fit'?"),
        (["data", "pak"], "unknown command 'data pak'; did you mean 'data pack'?"),
        (["run", "nope.yaml"], "no recipe 'nope.yaml'"),
        (["fit", "-c", "nope.yaml"], "no config file 'nope.yaml'"),
        (["fit", "-c", "."], "no config file '.'"),
        (["fit"], "missing: data, model"),
    ],
)
def test_a_wrong_command_or_file(capsys: pytest.CaptureFixture[str], args: list[str], expected: str) -> None:
    assert expected in line_of(capsys, args)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trainer.max_stepz=3"], "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
        (["--trainer.max_steps=many"], "trainer.max_steps: expected int, got 'many'"),
        (["--model.init_args.widht=3"], "unknown key 'widht' of tests.toy_stage.ToyStage; did you mean 'width'?"),
        (["--model.init_args.encoder.layerz=3"], "unknown key 'encoder.layerz' of tests.toy_stage.ToyStage"),
        (["--model.init_args.encoder.layers=2.5"], "model.init_args.encoder.layers: expected int, got '2.5'"),
        (["--model.class_path=tests.toy_stage.ToyStag"], "no 'ToyStag' in tests.toy_stage; did you mean 'ToyStage'?"),
        (["--model.class_path=nowhere.ToyStage"], "model: no module 'nowhere'"),
        (["--model=tests.toy_stage.ToyData"], "tests.toy_stage.ToyData is no LightningModule"),
        (["--model.init_args.optimizer.class_path=torch.optim.Adm"], "no 'Adm' in torch.optim; did you mean 'Adam'?"),
        (["--model.init_args.options.tpo=2"], "unknown key 'tpo' of tests.toy_stage.ToyStage; did you mean 'top'?"),
        (["--model.init_args.mode=fats"], "model.init_args.mode: 'fats' is none of fast, slow; did you mean 'fast'?"),
        (["--trainer.precision=17"], "trainer.precision: 17 is none of"),
        (["--trainer.accelerator=gpux"], "invalid accelerator name"),
        (["--trainer.devices=0"], "Trainer(devices='0')"),
        (["--trainer.strategy=fsdpp"], "invalid strategy name"),
        (["--model.init_args.refuse=true"], "error: cannot build the configuration: width 3 does not suit"),
        (["--data.init_args.tokens.size=9"], "tokens are given once, as model.init_args.tokens"),
        (["--ckpt_path=nope.ckpt"], "nope.ckpt"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_value(toy: None, capsys: pytest.CaptureFixture[str], args: list[str], expected: str) -> None:
    assert expected in line_of(capsys, ["fit", "-c", "base.yaml", *args])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer:\n  max_stepz: 2\n", "'trainer.max_stepz' (extra.yaml line 2); did you mean 'trainer.max_steps'?"),
        ("modl:\n  init_args:\n    width: 2\n", "'modl.init_args.width' (extra.yaml line 3); did you mean 'model'?"),
        (
            "model: {init_args: {encoder: {layerz: 2}}}\n",
            "'encoder.layerz' of tests.toy_stage.ToyStage (extra.yaml line 1)",
        ),
        ("data: {init_args: {shards: 3}}\n", "data.init_args.shards: expected a list, got '3'"),
        ("data: {init_args: {tokens: {size: 9}}}\n", "extra.yaml: tokens are given once"),
        ("trainer: {callbacks: [{class_path: callbacks.Nope}]}\n", "trainer.callbacks: no 'Nope' in callbacks"),
        (
            "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
            "    init_args: {monitr: x}\n",
            "unknown key 'monitr' of lightning.pytorch.callbacks.ModelCheckpoint (extra.yaml line 4);"
            " did you mean 'monitor'?",
        ),
        ("trainer: [cpu\nmodel: x\n", "extra.yaml: line 2, column"),
        ("- a\n- b\n", "extra.yaml: must hold keys and values, found a list"),
    ],
)
def test_a_wrong_file(toy: None, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    assert expected in line_of(capsys, ["fit", "-c", "base.yaml", "-c", write("extra.yaml", text)])


def test_gpus_that_are_not_there(
    toy: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = line_of(capsys, ["fit", "-c", "base.yaml", "--trainer.accelerator=gpu", "--trainer.devices=4"])
    assert "cannot build the configuration" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_inside_a_loader_worker_is_one_line(
    toy: None, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    args = ["fit", "-c", "base.yaml", "--data.init_args.broken=true", f"--data.init_args.workers={workers}"]
    assert line_of(capsys, args) == "echat: error: shard a.tar is no tar file; make it again with echat data pack"


def test_an_interrupted_fit_leaves_with_130(toy: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(capsys, ["fit", "-c", "base.yaml", "--model.init_args.interrupt=true"], 130) == "echat: interrupted"


def test_a_fit_leaves_the_resolved_config_in_its_folder(toy: None) -> None:
    cli.main(["fit", "-c", "base.yaml", "--trainer.default_root_dir=run", "--model.init_args.width=5"])
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["model"]["init_args"]["width"] == 5 and saved["seed_everything"] == 0
    assert os.environ["WANDB_MODE"] == "offline"
    assert Path(os.environ["WANDB_DATA_DIR"]) == Path("run/.wandb-data").absolute()
    # What was saved runs again, in the same folder.
    cli.main(["fit", "-c", "run/config.yaml"])
    assert yaml.safe_load(Path("run/config.yaml").read_text()) == saved


def test_a_choice_of_the_environment_stays(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    cli.main(["fit", "-c", "base.yaml"])
    assert os.environ["WANDB_MODE"] == "online"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli.COMMANDS["chat"]
    monkeypatch.setitem(cli.COMMANDS, "chat", replace(command, function="tests.toy_stage:toy_command"))
    monkeypatch.setitem(cli.COMMANDS, "evaluate", replace(command, function="tests.toy_stage:failing_command"))
    toy_stage.CALLS.clear()


@pytest.mark.parametrize(
    ("args", "audio", "json", "top"),
    [
        (["--audio", "a.wav", "--audio=b.wav", "--json"], ["a.wav", "b.wav"], True, 3),
        (["--json", "false", "--audio", "a.wav", "--options.top=5"], ["a.wav"], False, 5),
        (["--audio", "[a.wav, b.wav]"], ["a.wav", "b.wav"], False, 3),
        (["--config", "options.yaml"], ["c.wav"], True, 7),
    ],
)
def test_arguments_of_a_plain_command(plain: None, args: list[str], audio: list[str], json: bool, top: int) -> None:
    write("options.yaml", "audio: [c.wav]\njson: true\noptions: {top: 7}\n")
    cli.main(["chat", "--checkpoint", "run", *args])
    (call,) = toy_stage.CALLS
    assert call == ("run", audio, json, toy_stage.ToyOptions(top=top))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--checkpont", "x", "--audio=a"], "unknown key 'checkpont'; did you mean 'checkpoint'?"),
        (["--checkpoint", "x"], "missing: audio"),
        (["--checkpoint", "x", "--audio=a", "--json=5"], "json: expected true or false, got '5'"),
        (["--checkpoint", "x", "--audio=a", "--options.topp=5"], "'options.topp'; did you mean 'options.top'?"),
    ],
)
def test_wrong_arguments_of_a_plain_command(
    plain: None, capsys: pytest.CaptureFixture[str], args: list[str], expected: str
) -> None:
    assert expected in line_of(capsys, ["chat", *args])


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("user", 2, "echat: error: source 'b' is empty: no shard in runs/b"),
        ("file", 2, "echat: error: No such file or directory: missing.wav"),
        ("folder", 2, "echat: error: Is a directory: /"),
        ("wrapped", 2, "echat: error: no audio in a.tar/d-3"),
        ("interrupt", 130, "echat: interrupted"),
    ],
)
def test_a_failure_while_running_is_one_line(
    plain: None, capsys: pytest.CaptureFixture[str], kind: str, code: int, expected: str
) -> None:
    assert line_of(capsys, ["evaluate", "--kind", kind], code) == expected


def test_a_bug_of_ours_keeps_its_traceback(plain: None) -> None:
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["evaluate", "--kind", "bug"])


def test_debug_shows_where(plain: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHAT_DEBUG", "1")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--kind", "user"])
    assert "Traceback" in capsys.readouterr().err


def test_only_rank_0_tells_what_every_rank_finds(
    plain: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        cli.main(["chat", "--checkpont", "x"])
    assert capsys.readouterr().err == ""
    # What goes wrong while running may be wrong on this rank alone.
    assert line_of(capsys, ["evaluate", "--kind", "user"]).startswith("echat: rank 3: error: source")


def test_the_console_script_ends_in_one_line() -> None:
    script = Path(sys.executable).with_name("echat")
    result = subprocess.run([script, "data", "pak"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "echat: error: unknown command 'data pak'; did you mean 'data pack'? (echat --help)\n"
