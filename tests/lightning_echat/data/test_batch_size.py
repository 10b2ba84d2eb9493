"""The search for the largest batch: what it answers, and what it makes of trials that fail."""

import pytest
import yaml
from rich.console import Console

from lightning_echat.contracts import UserError
from lightning_echat.data import batch_size as module
from lightning_echat.data.batch_size import batch_size, search

QUIET = Console(quiet=True)


@pytest.mark.parametrize("true_limit", [2048, 2500, 5000, 100_000])
def test_the_answer_trains_and_is_within_a_sixteenth_of_the_largest_that_does(true_limit):
    tried = []

    def trains(budget):
        tried.append(budget)
        return budget <= true_limit

    found, too_large = search(trains, smallest=2048, largest=2**20, console=QUIET)
    assert found in tried and found <= true_limit
    assert too_large is not None and too_large in tried and true_limit < too_large
    assert too_large - found <= max(64, found / 16)
    assert len(tried) == len(set(tried)), "no trial twice: each is a whole fit"


def test_a_limit_that_was_never_met_is_told():
    assert search(lambda budget: True, smallest=2048, largest=5000, console=QUIET) == (5000, None)


def test_a_machine_too_small_for_anything_is_one_line():
    with pytest.raises(UserError, match="2048 ids do not fit"):
        search(lambda budget: False, smallest=2048, largest=2**20, console=QUIET)


def fake_fit(monkeypatch, code):
    monkeypatch.setattr(module, "_FIT", ("-c", code))


@pytest.mark.parametrize(
    "code",
    [
        "raise MemoryError('DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes')",
        "import os; os.kill(os.getpid(), 9)",
        "x = bytearray(2 * 10**9)  # beyond the limit of the trial\nraise SystemExit(0)",
    ],
)
def test_trials_that_die_of_their_memory_are_too_large(monkeypatch, code):
    fake_fit(
        monkeypatch,
        f"try:\n {code.replace(chr(10), chr(10) + ' ')}\nexcept MemoryError as e:\n raise SystemExit('out of memory')",
    )
    with pytest.raises(UserError, match="do not fit"):
        batch_size([], memory_gigabytes=1.0)


def test_another_failure_is_passed_on_and_not_taken_for_memory(monkeypatch):
    fake_fit(monkeypatch, "raise SystemExit('echat: error: no train sources given')")
    with pytest.raises(UserError, match="2048 ids failed: no train sources given"):
        batch_size([])


def test_a_launcher_around_the_command_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        batch_size([])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_real_configuration_is_tried_by_training_it(tmp_path, capsys, devices):
    from dataclasses import asdict

    from lightning_echat.testing import tiny_network_config, tiny_tokens_config, write_dummy_shards

    shards = write_dummy_shards(tmp_path / "shards")
    plain = lambda config: yaml.safe_load(yaml.safe_dump(_plain(asdict(config))))  # noqa: E731
    content = {
        "trainer": {"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto"},
        "model": {
            "class_path": "lightning_echat.stages.understanding.UnderstandingStage",
            "init_args": {"tokens": plain(tiny_tokens_config(tmp_path / "t")), "network": plain(tiny_network_config())},
        },
        "data": {
            "class_path": "datamodules.spoken_dialogue.SpokenDialogueDataModule",
            "init_args": {
                "num_workers": 0,
                "train": [{"name": "a", "shards": [str(shards)], "tasks": [{"kind": "transcribe"}]}],
            },
        },
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(content))
    batch_size([config], largest=4096)
    assert "tokens_per_batch 4096" in capsys.readouterr().out


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
