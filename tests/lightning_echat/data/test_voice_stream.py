from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import DialogueSample, Turn, UserError, VoiceBatch
from lightning_echat.data.voice_stream import VoiceLoader, VoiceReadingConfig, VoiceStream
from lightning_echat.data.writers import write_shard

CODES = 20


def reply(number: int, *, codes: int = CODES, samples: int | None = None) -> DialogueSample:
    """The waveform says at every sample which code it belongs to."""
    code = torch.arange(codes)
    waveform = code.repeat_interleave(640) % 100 / 100
    waveform = waveform if samples is None else torch.zeros(samples)
    turns = [
        Turn(role="user", text="hello"),
        Turn(role="assistant", text="yes", audio=waveform, speech_codes=code + 100 * number),
    ]
    return DialogueSample(turns=turns, key=f"dialogue-{number:03d}")


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    for shard in range(3):
        dialogues = [reply(number, codes=CODES + number) for number in range(3 * shard, 3 * shard + 3)]
        write_shard(tmp_path / f"shard-{shard}.tar", dialogues)
    return [str(tmp_path / "*.tar")]


def seen(stream: VoiceStream, batches: int | None = None) -> list[list[int]]:
    """The utterances of each batch, by their number."""
    found = []
    for batch in VoiceLoader(stream, num_workers=0):
        found.append((batch.codes[:, :1] // 100).flatten().tolist())
        if len(found) == batches:
            break
    return found


def test_a_stretch_is_cut_out_of_codes_and_waveform_alike(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=16_000, rows=3, segment_codes=6, shuffle=9)
    starts = set()
    for number, batch in enumerate(VoiceStream(config, shards=shards, training=True)):
        assert batch.codes.shape == (3, 6) and batch.waveforms.shape == (3, 6 * 640)
        said = (batch.waveforms[:, ::640] * 100).round().long()
        assert torch.equal(said, batch.codes % 100)
        starts |= set((batch.codes[:, 0] % 100).tolist())
        if number == 8:
            break
    assert len(starts) > 5


def test_audio_comes_at_the_rate_asked_for(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=22_050, rows=9)
    batch = next(iter(VoiceStream(config, shards=shards, training=False)))
    assert isinstance(batch, VoiceBatch)
    assert batch.code_lengths.tolist() == [CODES + number for number in range(9)]
    assert batch.lengths.tolist() == [882 * (CODES + number) for number in range(9)]


def test_an_epoch_holds_every_utterance_once_over_all_ranks(shards: list[str]) -> None:
    epochs = []
    for rank in (0, 1):
        config = VoiceReadingConfig(sample_rate=16_000, rows=1, shuffle=1, rank=rank, world_size=2)
        epochs.append([number for row in seen(VoiceStream(config, shards=shards, training=True), 60) for number in row])
    # Three shards make an uneven deal: of 120 draws each of the nine was drawn 12 to 15 times.
    counts = torch.bincount(torch.tensor(epochs[0] + epochs[1]), minlength=9)
    assert counts.min() >= 10 and counts.max() <= 17


def test_a_validation_has_as_many_batches_on_every_rank_and_each_utterance_once(shards: list[str]) -> None:
    found = []
    for rank in (0, 1):
        config = VoiceReadingConfig(sample_rate=16_000, rows=2, rank=rank, world_size=2)
        found.append(seen(VoiceStream(config, shards=shards, training=False)))
    assert len(found[0]) == len(found[1]) == 3
    assert sorted(n for rank in found for batch in rank for n in batch) == list(range(9))
    assert found[1][-1] == []


def test_what_cannot_be_used_is_counted_by_reason(tmp_path: Path) -> None:
    without = reply(1)
    without.turns[1].speech_codes = None
    write_shard(tmp_path / "a.tar", [reply(0), without, reply(2, samples=16_000), reply(3, codes=600)])
    config = VoiceReadingConfig(sample_rate=16_000, rows=4)
    loader = VoiceLoader(VoiceStream(config, shards=[str(tmp_path)], training=False), num_workers=0)
    assert [len(batch.lengths) for batch in loader] == [1]
    assert loader.health.skipped == {
        "reply without codes": 1,
        "codes and audio differ in length": 1,
        "audio too long": 1,
    }


def test_a_code_that_the_model_does_not_know_ends_the_run_and_names_its_place(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=16_000, codebook_size=800)
    stream = VoiceStream(config, shards=shards, training=False)
    with pytest.raises(UserError, match="dialogue-008 holds speech code 827, and the model knows 800"):
        list(VoiceLoader(stream, num_workers=0))


@pytest.mark.parametrize("training", [True, False])
def test_shards_without_codes_end_in_one_line(tmp_path: Path, training: bool) -> None:
    without = reply(1)
    without.turns[1].speech_codes = None
    write_shard(tmp_path / "a.tar", [without])
    stream = VoiceStream(VoiceReadingConfig(sample_rate=16_000), shards=[str(tmp_path)], training=training)
    with pytest.raises(UserError, match="echat data tokenize"):
        next(iter(VoiceLoader(stream, num_workers=0)))
