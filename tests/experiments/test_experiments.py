"""Every documented command parses, and the network of base.yaml is the one that was released."""

import functools
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_echat import cli
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig
from lightning_echat.nn.speech_adapter import SpeechAdapterConfig
from lightning_echat.nn.speech_encoder import SpeechEncoderConfig
from lightning_echat.nn.speech_language_model import LanguageModelConfig
from lightning_echat.recipes.recipe_file import load_recipe
from lightning_echat.tokens.dialogue_template import TokensConfig
from lightning_echat.tokens.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
RECIPE = Path("experiments/quickstart/recipe.yaml")
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def documented() -> dict[str, list[str]]:
    """Where it stands -> the words of every `echat fit` in the headers of experiments and in Markdown.

    Those on files that the reader writes, which stand in a shell variable, are left out.
    """
    files = [*sorted((ROOT / "experiments").rglob("*.yaml")), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {}
    for file in files:
        text = re.sub(r"\\\n#? *", "", file.read_text())
        for number, line in enumerate(re.findall(r"^(?:# )?echat (fit [^$\n]*)$", text, flags=re.MULTILINE)):
            found[f"{file.relative_to(ROOT)}:{number}"] = shlex.split(line, comments=True)
    return found


def recipe_steps(*overrides: str) -> dict[str, list[str]]:
    return {step.name: list(step.command) for step in load_recipe(ROOT / RECIPE, overrides).steps}


DOCUMENTED = documented()
STAGES = ("understanding", "generation", "empathy")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["echat"])
    # main() sets defaults for W&B; register them so that they are taken back.
    names = ("MODE", "SILENT", "ERROR_REPORTING", "DATA_DIR", "X_TRANSACTION_LOG_FLUSH_INTERVAL")
    for key in ("JSONARGPARSE_DEPRECATION_WARNINGS", *(f"WANDB_{name}" for name in names)):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


def resolved(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, Any]:
    """The configuration that a command would run with."""
    with pytest.raises(SystemExit) as leaving:
        cli.main([*words, "--print_config"])
    shown = capsys.readouterr()
    assert leaving.value.code in (0, None), shown.err
    return yaml.safe_load(shown.out)


@pytest.mark.parametrize("words", DOCUMENTED.values(), ids=DOCUMENTED.keys())
def test_a_documented_command_parses(capsys, words):
    config = resolved(capsys, words)
    assert config["model"]["class_path"].startswith("lightning_echat.stages.")
    assert config["data"]["init_args"]["train"]


def test_every_stage_and_every_trainer_is_documented():
    words = {word for command in DOCUMENTED.values() for word in command}
    stages = {f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.yaml")}
    assert stages <= words


@pytest.mark.parametrize("overlay", sorted((ROOT / "experiments/trainer").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_trainer_overlays_a_stage(capsys, overlay):
    config = resolved(capsys, _fit("experiments/base.yaml", "experiments/empathy.yaml", str(overlay)))
    for key, value in yaml.safe_load(overlay.read_text())["trainer"].items():
        assert str(config["trainer"][key]) == str(value) or isinstance(value, dict)


@pytest.mark.parametrize("budget", ["short", "long"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_the_quickstart_parses(capsys, stage, budget):
    config = resolved(capsys, recipe_steps(f"budget={budget}")[stage])
    schedule = config["model"]["init_args"]["scheduler"]["init_args"]
    assert schedule["total_steps"] == config["trainer"]["max_steps"] > schedule["warmup_steps"]
    assert config["trainer"]["val_check_interval"] <= config["trainer"]["max_steps"]
    tokens = config["model"]["init_args"]["tokens"]
    assert (
        tokens["text_vocabulary_size"] == config["model"]["init_args"]["network"]["llm"]["architecture"]["vocab_size"]
    )


def test_every_other_step_of_the_quickstart_parses(monkeypatch):
    called: dict[str, dict[str, Any]] = {}

    def stand_in(name: str, function):
        @functools.wraps(function)
        def remember(**arguments: Any) -> None:
            called[name] = arguments

        return remember

    for name, command in cli.COMMANDS.items():
        if command.function:
            module, _, attribute = command.function.partition(":")
            function = getattr(importlib.import_module(module), attribute)
            monkeypatch.setattr(f"{module}.{attribute}", stand_in(name, function))
    for words in recipe_steps("out=elsewhere").values():
        if words[0] != "fit":
            cli.main(words)
    assert set(called) == {"data synthesize", "data tokenize", "evaluate", "evaluate resynthesis", "report"}
    asked = called["evaluate"]
    assert [(entry.name, entry.shards) for entry in asked["sets"]] == [
        ("held-out voices", ["elsewhere/corpus/held_out_voices"]),
        ("held-out voice types", ["elsewhere/corpus/held_out_types"]),
    ]
    assert asked["questions"].labels == ("age", "gender", "emotion", "event")


def test_a_wrong_key_in_an_experiment_is_refused(capsys, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {init_args: {network: {encoder: {widht: 3}}}}")
    with pytest.raises(SystemExit) as leaving:
        cli.main([*_fit("experiments/base.yaml", "experiments/understanding.yaml", str(wrong)), "--print_config"])
    assert leaving.value.code == 2
    assert "widht" in capsys.readouterr().err


SIZES = (
    r"ckpt_path",
    r"trainer\.(max_steps|accumulate_grad_batches|devices|strategy\b.*|val_check_interval|default_root_dir|log_every_n_steps|callbacks\b.*)",
    r"model\.init_args\.(tokens|network|optimizer|scheduler|auxiliary|trainable|init_from)\b.*",
    r"data\.init_args\..*",
)
"""Keys in which the quickstart may differ from the real experiment: sizes, data, devices, and how it is optimized."""


@pytest.mark.parametrize(
    ("stage", "real"),
    [("understanding", "understanding"), ("generation", "generation_s2s"), ("empathy", "empathy")],
)
def test_the_quickstart_is_the_real_experiment_with_other_sizes(capsys, stage, real):
    small = resolved(capsys, recipe_steps()[stage])
    words = _fit("experiments/base.yaml", f"experiments/{real}.yaml", "experiments/trainer/cpu.yaml")
    large = resolved(capsys, words)
    assert small["model"]["class_path"] == large["model"]["class_path"]
    assert small["data"]["class_path"] == large["data"]["class_path"]
    callbacks = [[callback["class_path"] for callback in config["trainer"]["callbacks"]] for config in (small, large)]
    assert callbacks[0][: len(callbacks[1])] == callbacks[1]
    ours, theirs = _flat(small), _flat(large)
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert {key for key in differing if not any(re.fullmatch(pattern, key) for pattern in SIZES)} == set()
    # The sizes do differ.
    assert "model.init_args.network.encoder.width" in differing


def test_the_network_of_base_yaml_has_the_parameters_of_the_released_one():
    arguments = yaml.safe_load((ROOT / "experiments/base.yaml").read_text())["model"]["init_args"]
    given = arguments["network"]
    given["encoder"]["strides"] = tuple(given["encoder"]["strides"])
    network = NetworkConfig(
        encoder=SpeechEncoderConfig(**{**given["encoder"], "pretrained": False}),
        adapter=SpeechAdapterConfig(**given["adapter"]),
        llm=LanguageModelConfig(**{**given["llm"], "pretrained": False, "architecture": QWEN}),
    )
    tokens = TokensConfig(**arguments["tokens"])
    vocabulary = Vocabulary(
        text_size=tokens.text_vocabulary_size, codebook_size=tokens.codebook_size, end_of_text=151645
    )
    with torch.device("meta"):
        model = EChatModel(network, tokens=tokens, vocabulary=vocabulary)
    adapter = model.adapter
    assert {
        "encoder": _count(model.encoder),
        "convolutions": _count(adapter.convolutions),
        "adapter transformer": _count(adapter) - _count(adapter.convolutions) - _count(adapter.projection),
        "projection": _count(adapter.projection),
        "language model": _count(model.lm.llm),
        "speech embedding": _count(model.lm.speech_embedding),
        "speech head": _count(model.lm.speech_head),
    } == {
        "encoder": 305_680_384,
        "convolutions": 9_440_256,
        "adapter transformer": 38_849_536,
        "projection": 2_099_200,
        "language model": 3_085_938_688,
        "speech embedding": 8_394_752,
        "speech head": 8_394_753,
    }


def _fit(*files: str) -> list[str]:
    return ["fit", *(word for file in files for word in ("--config", file))]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: leaf for k, v in value.items() for name, leaf in _flat(v, f"{key}.{k}" if key else str(k)).items()}
