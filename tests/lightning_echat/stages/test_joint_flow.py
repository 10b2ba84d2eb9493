"""A flow that trains beside the language model, in the empathy stage."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules.spoken_dialogue import SpokenDialogueDataModule
from lightning_echat.checkpoints.token2wav import token2wav
from lightning_echat.contracts import PackedBatch, UserError, Utterance, VoiceBatch
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.utterances import collate_utterances
from lightning_echat.data.writers import write_shard
from lightning_echat.nn.token2wav.code_encoder import CodeEncoderConfig
from lightning_echat.nn.token2wav.estimator import EstimatorConfig
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching
from lightning_echat.nn.token2wav.interface import load_token2wav
from lightning_echat.nn.token2wav.mel import LogMelSpectrogram, MelConfig
from lightning_echat.nn.token2wav.synthesizer import FlowToken2Wav
from lightning_echat.stages import empathy
from lightning_echat.stages.empathy import EmpathyStage, JointFlowConfig
from lightning_echat.testing import dummy_audio, dummy_dialogue, tiny_network_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from tests.ranks import run_on_ranks
from tests.tiny_training import batches_of, make_stage, make_trainer, recorded, train

NETWORK = FlowConfig(
    codebook_size=64,
    mel=MelConfig(sample_rate=16_000, fft=512, window=512, hop=160, bins=16, high=7000.0),
    mel_mean=-5.0,
    mel_scale=2.0,
    speaker_size=0,
    encoder=CodeEncoderConfig(width=16, layers=1, heads=2, feedforward=32, stretched_layers=1, dropout=0.0),
    estimator=EstimatorConfig(channels=(16,), blocks=1, middle=1, heads=2, head_size=8),
)
SPOKEN = [[0], [], [1, 2], [], [], [], [3], []]
"""Utterances of each of `batches_of`'s micro-batches; a rank's share may be none at all."""


def utterance(number: int) -> Utterance:
    """All of one length: the group norms of a flow see padding, so how a batch is padded makes a small difference."""
    codes = torch.randint(64, (10,), generator=torch.Generator().manual_seed(number))
    return Utterance(codes, dummy_audio(0.04 * len(codes), seed=number))


def spoken_batches(tokens: TokensConfig) -> tuple[list[PackedBatch], list[PackedBatch]]:
    """The micro-batches, and the same as one batch a step, some with the sound of replies."""
    micro, whole = batches_of(DialogueTokenizer.from_config(tokens))
    for batch, numbers in zip(micro, SPOKEN, strict=True):
        batch.replies = collate_utterances([utterance(n) for n in numbers]) if numbers else None
    for batch, steps in zip(whole, (SPOKEN[:4], SPOKEN[4:]), strict=True):
        batch.replies = collate_utterances([utterance(n) for numbers in steps for n in numbers])
    return micro, whole


def loss_without_chance(
    flow: FlowMatching, mel: LogMelSpectrogram, batch: VoiceBatch, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """As if the noise were always the same, so that two ways of spreading a batch can be compared."""
    mels, lengths = mel(batch.waveforms), batch.lengths // mel.config.hop
    valid = torch.arange(mels.shape[1]) < lengths[:, None]
    encoded = flow.encoder(batch.codes, batch.code_lengths, lengths, frames=mels.shape[1])
    unused = 0.0 * sum(parameter.sum() for parameter in flow.parameters())
    return ((encoded - mels).square() * valid[..., None]).sum() + unused, valid.sum() * mels.shape[-1]


def train_on_a_rank(tokens: TokensConfig, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(empathy, "flow_loss_sum", loss_without_chance)
        stage = make_stage(tokens, flow=JointFlowConfig(network=NETWORK))
        train(stage, spoken_batches(tokens)[0], folder, strategy="ddp", devices=2, accumulate_grad_batches=2)


def test_two_ranks_that_accumulate_train_the_flow_as_one_big_batch(tmp_path, tokens, monkeypatch):
    run_on_ranks(train_on_a_rank, tokens, tmp_path / "two")
    monkeypatch.setattr(empathy, "flow_loss_sum", loss_without_chance)
    stage = make_stage(tokens, flow=JointFlowConfig(network=NETWORK))
    stage.configure_model()
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    train(stage, spoken_batches(tokens)[1], tmp_path / "one")
    _, one = recorded(tmp_path / "one")
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt")["weights"] for rank in (0, 1))
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), f"the ranks differ in {name}"
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    moved = [(one[name] - before[name]).abs().max() for name in before if name.startswith("flow.")]
    assert max(moved) > 1e-3


def test_a_code_weighs_as_much_as_an_id_and_the_language_model_feels_nothing(tmp_path, tokens, monkeypatch):
    """With errors of 1 everywhere, the flow adds one a code."""
    monkeypatch.setattr(empathy, "flow_loss_sum", _errors_of_one)
    (batch, *_), _ = spoken_batches(tokens)
    ends = {}
    for name, flow in {"none": None, "one": _joint(1.0), "three": _joint(3.0)}.items():
        train(make_stage(tokens, flow=flow), [batch], tmp_path / name)
        ends[name] = torch.load(tmp_path / name / "rank0.pt")
    loss = {name: end["losses"][0][0] for name, end in ends.items()}
    codes = len(utterance(0).codes)
    assert loss["one"] - loss["none"] == pytest.approx(codes, rel=1e-4)
    assert loss["three"] - loss["none"] == pytest.approx(3 * codes, rel=1e-4)
    for key, value in ends["none"]["weights"].items():
        assert torch.equal(value, ends["three"]["weights"][key]), key


def _joint(weight: float) -> JointFlowConfig:
    return JointFlowConfig(network=NETWORK, weight=weight)


def _errors_of_one(
    flow: FlowMatching, mel: LogMelSpectrogram, batch: VoiceBatch, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    number = (batch.lengths // mel.config.hop).sum() * mel.config.bins
    return number + 0.0 * sum(parameter.sum() for parameter in flow.parameters()), number


def spoken_data(folder: Path, tokens: TokensConfig) -> SpokenDialogueDataModule:
    """Four dialogues whose replies have audio, one of them of another length than its codes."""
    dialogues = []
    for number in range(4):
        dialogue = dummy_dialogue(number, seconds=0.5)
        reply = dialogue.turns[-1]
        assert reply.speech_codes is not None
        seconds = 0.04 * len(reply.speech_codes) + (0.5 if number == 2 else 0.0)
        dialogue.turns[-1] = replace(reply, audio=dummy_audio(seconds, seed=number))
        dialogues.append(dialogue)
    shard = str(folder / "shard-000000.tar")
    write_shard(Path(shard), dialogues)
    task = TaskConfig(kind="speech_to_speech", thinking="label")
    return SpokenDialogueDataModule(
        tokens=tokens,
        train=[SourceConfig(shards=[shard], tasks=[task])],
        validation={"dialogue": SourceConfig(shards=[shard], tasks=[task])},
        batching=BatchingConfig(tokens_per_batch=2400, max_ids=600, pool=4, shuffle=1, validation_rows=4),
        num_workers=0,
    )


def test_the_data_brings_replies_and_the_run_becomes_a_voice(tmp_path, tokens):
    torch.manual_seed(0)
    stage = EmpathyStage(
        tokens=tokens,
        network=tiny_network_config(),
        optimizer=partial(torch.optim.AdamW, lr=1e-4),
        flow=JointFlowConfig(network=NETWORK, learning_rate=5e-3),
    )
    data = spoken_data(tmp_path, tokens)
    trainer = make_trainer(tmp_path, max_epochs=None, max_steps=20, val_check_interval=1, log_every_n_steps=1)
    losses = []
    stage.on_validation_end = lambda: losses.append(float(trainer.callback_metrics["val/dialogue/loss/flow"]))
    trainer.fit(stage, datamodule=data)
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.optimizers[0].param_groups[1]["lr"] == 5e-3
    assert data.train_loader is not None
    assert set(data.train_loader.health.noticed) == {"no sound to learn from: codes and audio differ in length"}
    trainer.save_checkpoint(tmp_path / "run" / "last.ckpt")
    token2wav(tmp_path / "run", tmp_path / "voice")
    assert stage.flow is not None
    voice = load_token2wav(tmp_path / "voice")
    assert isinstance(voice, FlowToken2Wav)
    assert torch.equal(voice.flow.encoder.embedding.weight, stage.flow.encoder.embedding.weight)


def test_batches_carry_no_sound_that_nobody_asked_for(tmp_path, tokens):
    data = spoken_data(tmp_path, tokens)
    assert next(iter(data.val_dataloader()[0])).replies is None
    data.utterances = empathy.UtteranceConfig(sample_rate=8_000)
    replies = next(iter(data.val_dataloader()[0])).replies
    # One of four has another length than its codes.
    assert replies is not None
    assert len(replies.lengths) == 3
    assert torch.equal(replies.lengths, 320 * replies.code_lengths)


def test_what_the_flow_cannot_train_under_is_refused(tmp_path, tokens):
    stage = make_stage(tokens, flow=JointFlowConfig(network=NETWORK))
    with pytest.raises(UserError, match="run of its own"):
        train(stage, spoken_batches(tokens)[1], tmp_path, precision="bf16-true")
    with pytest.raises(UserError, match="must be positive"):
        JointFlowConfig(network=NETWORK, weight=0.0)
