"""Every stage in a real Trainer, on real shards, with the real data module; the model is tiny."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.spoken_dialogue import SpokenDialogueDataModule
from lightning_echat.contracts import IGNORE_INDEX, UserError
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.writers import ShardWriter
from lightning_echat.decoding import DecodingConfig
from lightning_echat.nn.weights import load_trained
from lightning_echat.stages import base
from lightning_echat.stages.base import AuxiliaryWeights, EChatStage
from lightning_echat.stages.empathy import EmpathyStage
from lightning_echat.stages.generation import GenerationStage
from lightning_echat.stages.schedule import WarmupCosine
from lightning_echat.stages.understanding import UnderstandingStage
from lightning_echat.testing import dummy_batch, dummy_dialogue, tiny_network_config, write_dummy_shards
from lightning_echat.tokens.tasks import DialogueTask

ADAM = partial(torch.optim.AdamW, lr=1e-2)
TASKS: dict[type[EChatStage], list[TaskConfig]] = {
    UnderstandingStage: [
        TaskConfig(kind="transcribe_and_label", labels=("age", "emotion")),
        TaskConfig(kind="label", labels=("age",)),
    ],
    GenerationStage: [TaskConfig(kind="text_to_speech"), TaskConfig(kind="speech_to_speech", layout="interleaved")],
    EmpathyStage: [TaskConfig(kind="speech_to_speech", thinking="label"), TaskConfig(kind="text_to_text")],
}
STAGES = list(TASKS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return str(write_dummy_shards(Path(tmp_path_factory.mktemp("shards")), shards=1, samples_per_shard=4))


class Watcher(Callback):
    """Notes what each step logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if "train/loss" in trainer.logged_metrics:
            self.losses.append(float(trainer.logged_metrics["train/loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def data(tokens, shards: str, tasks: list[TaskConfig], **options) -> SpokenDialogueDataModule:
    validation = {f"set {place}": SourceConfig(shards=[shards], tasks=[task]) for place, task in enumerate(tasks)}
    return SpokenDialogueDataModule(
        tokens=tokens,
        train=[SourceConfig(shards=[shards], tasks=tasks)],
        validation=validation,
        batching=BatchingConfig(tokens_per_batch=2400, max_ids=600, pool=8, shuffle=1, validation_rows=4),
        num_workers=0,
        **options,
    )


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
    }
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{**settings, **options})


def snapshot(stage: EChatStage) -> dict[str, torch.Tensor]:
    assert stage.model is not None
    return {name: parameter.detach().clone() for name, parameter in stage.model.named_parameters()}


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_learns_a_few_dialogues_by_heart(tmp_path, tokens, shards, kind):
    torch.manual_seed(0)
    stage, watcher = kind(tokens=tokens, network=tiny_network_config(), optimizer=ADAM, trainable=["*"]), Watcher()
    trainer(tmp_path, watcher, max_steps=12).fit(stage, data(tokens, shards, TASKS[kind]))
    assert len(watcher.losses) == 12
    # Untrained: about the logarithm of the vocabulary, 260 text ids and 65 of speech.
    assert 5 < watcher.losses[0] < 6.5
    assert sum(watcher.losses[-3:]) / 3 < watcher.losses[0] - 1


@pytest.mark.parametrize(
    ("kind", "moving"),
    [
        (UnderstandingStage, {"encoder", "adapter", "auxiliary"}),
        (GenerationStage, {"encoder", "adapter", "lm", "auxiliary"}),
    ],
)
def test_a_stage_trains_its_own_parts_and_no_other(tmp_path, tokens, shards, kind, moving):
    stage = kind(tokens=tokens, network=tiny_network_config(auxiliary_labels=("age",)), optimizer=ADAM)
    stage.configure_model()
    before = snapshot(stage)
    trainer(tmp_path, max_steps=2).fit(stage, data(tokens, shards, TASKS[kind]))
    moved = {name for name, tensor in snapshot(stage).items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in moved} == moving
    # Weight decay would move them too: what is frozen must not reach the optimizer.
    assert all(name in moved for name in before if name.startswith("encoder.") and name.endswith("weight"))


def test_empathy_trains_everything(tokens):
    stage = EmpathyStage(tokens=tokens, network=tiny_network_config(auxiliary_labels=("age",)))
    stage.configure_model()
    assert stage.model is not None and all(parameter.requires_grad for parameter in stage.model.parameters())


def test_validation_gives_the_mean_loss_of_each_set_and_kind_of_target(tmp_path, tokens, shards):
    stage = EmpathyStage(tokens=tokens, network=tiny_network_config(), optimizer=ADAM)
    module = data(tokens, shards, TASKS[EmpathyStage])
    running = trainer(tmp_path, limit_val_batches=1.0)
    running.validate(stage, module, verbose=False)
    found = {name: float(value) for name, value in running.callback_metrics.items()}
    # text_to_text has no speech to be scored.
    assert set(found) == {"val/set 0/loss/text", "val/set 0/loss/speech", "val/set 1/loss/text"}
    assert stage.model is not None
    for place, loader in enumerate(module.val_dataloader()):
        sums: dict[str, list[float]] = {"text": [0, 0], "speech": [0, 0]}
        for batch in loader:
            with torch.no_grad():
                hidden = stage.model(batch).hidden_states
            for row, column in (batch.labels != IGNORE_INDEX).nonzero().tolist():
                target = int(batch.labels[row, column])
                logits = stage.model.lm.text_head(hidden[row, column])
                if batch.speech_scored[row, column]:
                    logits = torch.cat([logits, stage.model.lm.speech_head(hidden[row, column])])
                kind = "text" if target < 260 else "speech"
                sums[kind][0] -= float(logits.detach().log_softmax(0)[target])
                sums[kind][1] += 1
        for kind, (total, count) in sums.items():
            if count:
                assert found[f"val/set {place}/loss/{kind}"] == pytest.approx(total / count, rel=1e-4)


def test_auxiliary_losses_teach_the_encoder(tmp_path, tokens, shards):
    network = tiny_network_config(auxiliary_labels=("age", "gender"))
    stage = UnderstandingStage(
        tokens=tokens,
        network=network,
        optimizer=ADAM,
        trainable=["*"],
        auxiliary=AuxiliaryWeights(ctc=0.5, labels=1.0),
    )
    running = trainer(tmp_path, max_steps=2)
    running.fit(stage, data(tokens, shards, TASKS[UnderstandingStage]))
    logged = {name: float(value) for name, value in running.logged_metrics.items()}
    # About log 3 and log 2 for the labels, and log 29 at most for a character in a few frames each.
    assert 0.4 < logged["train/loss/labels"] < 2 and logged["train/loss/ctc"] > 1
    with pytest.raises(UserError, match="auxiliary_labels"):
        UnderstandingStage(tokens=tokens, network=tiny_network_config(), auxiliary=AuxiliaryWeights(ctc=0.5))


def test_text_ctc_brings_what_the_adapter_puts_out_near_the_embeddings_of_the_words(tmp_path, tokens):
    """Read with the text head, the outputs must spell the transcript after a while: the loss falls below guessing."""
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(4):
            # Eight seconds of frames for a text of bytes: dummy speech is shorter than its spelling otherwise.
            writer.write(dummy_dialogue(number, seconds=8.0))
    losses = []
    for steps in (1, 40):
        stage = UnderstandingStage(
            tokens=tokens,
            network=tiny_network_config(auxiliary_labels=("age",)),
            optimizer=ADAM,
            trainable=["*"],
            auxiliary=AuxiliaryWeights(text_ctc=1.0),
        )
        running = trainer(tmp_path / str(steps), max_steps=steps)
        running.fit(stage, data(tokens, str(tmp_path / "shards"), TASKS[UnderstandingStage]))
        losses.append(float(running.logged_metrics["train/loss/text_ctc"]))
        assert running.logged_metrics["train/text_ctc_share"] == 1
    assert losses[1] < 0.6 * losses[0]


def test_a_batch_without_audio_trains_beside_auxiliary_losses(tmp_path, tokens, shards):
    stage = EmpathyStage(
        tokens=tokens,
        network=tiny_network_config(auxiliary_labels=("age",)),
        optimizer=ADAM,
        auxiliary=AuxiliaryWeights(ctc=0.5, text_ctc=0.5, labels=1.0),
    )
    trainer(tmp_path, max_steps=1).fit(stage, data(tokens, shards, [TaskConfig(kind="text_to_text")]))
    assert stage.model is not None
    assert all(parameter.isfinite().all() for parameter in stage.model.parameters())


def test_the_schedule_moves_at_every_optimizer_step(tmp_path, tokens, shards):
    schedule = partial(WarmupCosine, warmup_steps=4, total_steps=8)
    stage, watcher = (
        EmpathyStage(tokens=tokens, network=tiny_network_config(), optimizer=ADAM, scheduler=schedule),
        Watcher(),
    )
    options = {"max_steps": 3, "accumulate_grad_batches": 2}
    trainer(tmp_path, watcher, **options).fit(stage, data(tokens, shards, TASKS[EmpathyStage]))
    assert watcher.rates == pytest.approx([0.0025, 0.005, 0.005, 0.0075, 0.0075, 0.01])


def test_what_is_frozen_stays_in_eval_mode_while_the_rest_trains(tmp_path, tokens, shards):
    modes: dict[str, bool] = {}

    class Modes(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
            modes.update({name: module.training for name, module in pl_module.get_submodule("model").named_modules()})

    stage = UnderstandingStage(tokens=tokens, network=tiny_network_config(), optimizer=ADAM)
    trainer(tmp_path, Modes(), max_steps=1).fit(stage, data(tokens, shards, TASKS[UnderstandingStage]))
    assert modes["encoder.layers.0"] and modes["adapter"]
    assert not any(training for name, training in modes.items() if name.startswith("lm"))


def test_a_checkpoint_of_a_run_answers_like_the_model_that_was_trained(tmp_path, tokens, shards, tokenizer):
    stage = EmpathyStage(tokens=tokens, network=tiny_network_config(), optimizer=ADAM)
    saving = ModelCheckpoint(dirpath=tmp_path / "run" / "checkpoints", save_last=True, every_n_train_steps=2)
    schedule = partial(WarmupCosine, warmup_steps=4, total_steps=8)
    stage.scheduler_callable = schedule
    trainer(tmp_path, saving, max_steps=2, enable_checkpointing=True).fit(
        stage, data(tokens, shards, TASKS[EmpathyStage])
    )
    trained = load_trained(tmp_path / "run")
    assert trained.step == 2 and trained.path.name == "last.ckpt"
    batch = dummy_batch(tokenizer, [DialogueTask(kind="speech_to_speech"), DialogueTask(kind="text_to_text")])
    assert stage.model is not None
    with torch.no_grad():
        expected = stage.model.eval()(batch)
        found = trained.model(batch)
    assert torch.equal(found.hidden_states, expected.hidden_states)

    # The next stage takes it over, and the same stage goes on from it.
    following = GenerationStage(tokens=tokens, network=tiny_network_config(), init_from=str(tmp_path / "run"))
    following.configure_model()
    assert all(torch.equal(tensor, snapshot(stage)[name]) for name, tensor in snapshot(following).items())
    again = EmpathyStage(tokens=tokens, network=tiny_network_config(), optimizer=ADAM, scheduler=schedule)
    running = trainer(tmp_path, max_steps=3)
    running.fit(again, data(tokens, shards, TASKS[EmpathyStage]), ckpt_path=str(trained.path), weights_only=True)
    assert running.global_step == 3
    assert not torch.equal(snapshot(again)["encoder.conv1.weight"], snapshot(stage)["encoder.conv1.weight"])


def test_a_hand_over_that_does_not_fit_stops_before_training(tmp_path, tokens, shards):
    grown = tiny_network_config(auxiliary_labels=("age",))
    stage = EmpathyStage(tokens=tokens, network=tiny_network_config())
    stage.configure_model()
    running = trainer(tmp_path)
    running.strategy.connect(stage)
    stage.trainer = running
    running.save_checkpoint(tmp_path / "a.ckpt")
    refused = EmpathyStage(tokens=tokens, network=grown, init_from=str(tmp_path / "a.ckpt"))
    with pytest.raises(UserError, match="init_new_parts"):
        trainer(tmp_path, max_steps=1).fit(refused, data(tokens, shards, TASKS[EmpathyStage]))
    announced = EmpathyStage(
        tokens=tokens, network=grown, init_from=str(tmp_path / "a.ckpt"), init_new_parts=["auxiliary.*"]
    )
    announced.configure_model()
    assert torch.equal(snapshot(announced)["encoder.conv1.weight"], snapshot(stage)["encoder.conv1.weight"])


def test_a_wrong_pattern_stops_before_training(tmp_path, tokens, shards):
    stage = UnderstandingStage(tokens=tokens, network=tiny_network_config(), trainable=["encodre.*"])
    with pytest.raises(UserError, match=r"'encodre\.\*' matches no parameter"):
        trainer(tmp_path, max_steps=1).fit(stage, data(tokens, shards, TASKS[UnderstandingStage]))


def test_answers_to_a_batch_are_generated_once_and_training_goes_on(monkeypatch, tokens, tokenizer):
    stage = EmpathyStage(
        tokens=tokens, network=tiny_network_config(), decoding=DecodingConfig(max_text_ids=3, max_speech_ids=4)
    )
    stage.configure_model()
    assert stage.model is not None
    stage.model.train()
    asked: list[bool] = []

    def counted(model, *args):
        asked.append(model.training)
        return generate(model, *args)

    generate = base.generate
    monkeypatch.setattr(base, "generate", counted)
    batch = dummy_batch(tokenizer, [DialogueTask(kind="text_to_text")] * 2)
    replies = stage.answers(batch)
    assert stage.answers(batch) is replies and len(replies) == 2
    assert asked == [False] and stage.model.training
    assert stage.answers(replace(batch)) is not replies
