import io
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import DialogueSample, Turn, UserError, VoiceBatch
from lightning_echat.data.loader import TrainingLoader
from lightning_echat.data.mixture import SourceConfig
from lightning_echat.data.stream_state import Position, from_checkpoint, redistribute, to_checkpoint
from lightning_echat.data.voice_stream import VoiceLoader, VoiceReadingConfig, VoiceStream
from lightning_echat.data.voice_training import VoiceTrainingStream
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


def training(config: VoiceReadingConfig, shards: list[str], *, workers: int = 0, position: Position | None = None):
    stream = VoiceTrainingStream(config, source=SourceConfig(name="voice", shards=shards, tasks=[]))
    return TrainingLoader(stream, num_workers=workers, position=position)


def numbers(batch: VoiceBatch) -> list[int]:
    """The utterances of a batch, by their number."""
    return (batch.codes[:, :1] // 100).flatten().tolist()


def test_a_stretch_is_cut_out_of_codes_and_waveform_alike(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=16_000, rows=3, segment_codes=6, shuffle=9)
    starts = set()
    for batch in islice(training(config, shards), 9):
        assert batch.codes.shape == (3, 6) and batch.waveforms.shape == (3, 6 * 640)
        said = (batch.waveforms[:, ::640] * 100).round().long()
        assert torch.equal(said, batch.codes % 100)
        starts |= set((batch.codes[:, 0] % 100).tolist())
    assert len(starts) > 5


def test_audio_comes_at_the_rate_asked_for(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=22_050, rows=9)
    batch = next(iter(VoiceStream(config, shards=shards)))
    assert isinstance(batch, VoiceBatch)
    assert batch.code_lengths.tolist() == [CODES + number for number in range(9)]
    assert batch.lengths.tolist() == [882 * (CODES + number) for number in range(9)]


def test_an_epoch_holds_every_utterance_once_over_all_ranks(shards: list[str]) -> None:
    epochs = []
    for rank in (0, 1):
        config = VoiceReadingConfig(sample_rate=16_000, rows=1, shuffle=1, rank=rank, world_size=2)
        epochs.append([number for batch in islice(training(config, shards), 60) for number in numbers(batch)])
    # Three shards make an uneven deal: of 120 draws each of the nine was drawn 12 to 15 times.
    counts = torch.bincount(torch.tensor(epochs[0] + epochs[1]), minlength=9)
    assert counts.min() >= 10 and counts.max() <= 17


def test_a_validation_has_as_many_batches_on_every_rank_and_each_utterance_once(shards: list[str]) -> None:
    found = []
    for rank in (0, 1):
        config = VoiceReadingConfig(sample_rate=16_000, rows=2, rank=rank, world_size=2)
        found.append([numbers(batch) for batch in VoiceLoader(VoiceStream(config, shards=shards), num_workers=0)])
    assert len(found[0]) == len(found[1]) == 3
    assert sorted(n for rank in found for batch in rank for n in batch) == list(range(9))
    assert found[1][-1] == []


def test_what_cannot_be_used_is_counted_by_reason(tmp_path: Path) -> None:
    without = reply(1)
    without.turns[1].speech_codes = None
    write_shard(tmp_path / "a.tar", [reply(0), without, reply(2, samples=16_000), reply(3, codes=600)])
    config = VoiceReadingConfig(sample_rate=16_000, rows=4)
    loader = VoiceLoader(VoiceStream(config, shards=[str(tmp_path)]), num_workers=0)
    assert [len(batch.lengths) for batch in loader] == [1]
    assert loader.health.skipped == {
        "reply without codes": 1,
        "codes and audio differ in length": 1,
        "audio too long": 1,
    }


def test_a_code_that_the_model_does_not_know_ends_the_run_and_names_its_place(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=16_000, codebook_size=800)
    stream = VoiceStream(config, shards=shards)
    with pytest.raises(UserError, match="dialogue-008 holds speech code 827, and the model knows 800"):
        list(VoiceLoader(stream, num_workers=0))


@pytest.mark.parametrize("trains", [True, False])
def test_shards_without_codes_end_in_one_line(tmp_path: Path, trains: bool) -> None:
    without = reply(1)
    without.turns[1].speech_codes = None
    write_shard(tmp_path / "a.tar", [without])
    config, shards = VoiceReadingConfig(sample_rate=16_000), [str(tmp_path)]
    loader = training(config, shards) if trains else VoiceLoader(VoiceStream(config, shards=shards), num_workers=0)
    with pytest.raises(UserError, match=r"\d reply without codes.*echat data tokenize"):
        next(iter(loader))


def contents(batches: list[VoiceBatch]) -> list[tuple]:
    """All that is learned from, to the bit."""
    return [(b.codes.tolist(), b.lengths.tolist(), b.waveforms.numpy().tobytes()) for b in batches]


def stored(positions: list[Position], made_by: dict[str, str]) -> list[Position]:
    """Through the file that a checkpoint is."""
    file = io.BytesIO()
    torch.save(to_checkpoint(positions, made_by), file)
    file.seek(0)
    return from_checkpoint(torch.load(file, weights_only=True), made_by)


@pytest.mark.parametrize("segment_codes", [None, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_k_batches_and_the_rest_are_all_for_every_k(shards: list[str], segment_codes, workers: int) -> None:
    config = VoiceReadingConfig(
        sample_rate=16_000, rows=2, shuffle=5, segment_codes=segment_codes, world_size=2, rank=1
    )
    loader = training(config, shards, workers=workers)
    batches = list(islice(loader, 21))
    made_by = loader.stream.made_by(workers=max(workers, 1))
    whole, positions = contents(batches), [batch.position for batch in batches]
    # Sixteen batches are drawn at once, so these stand before, within and after such a draw.
    for k in (1, 15, 16, 17, 19) if workers else range(1, 21):
        (position,) = stored([positions[k - 1]], made_by)
        rest = training(config, shards, workers=workers, position=position)
        assert contents(list(islice(rest, 21 - k))) == whole[k:], k


def test_another_number_of_ranks_goes_on_with_what_has_not_been_given_out(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=16_000, rows=1, shuffle=4, world_size=2)
    loaders = [training(replace(config, rank=rank), shards) for rank in (0, 1)]
    given = [list(islice(loader, 4)) for loader in loaders]
    (alone,) = redistribute(
        [batches[-1].position for batches in given],
        loaders[0].stream.orders(given[0][-1].position.deals, consumers=2),
        world_size=1,
    )
    rest = training(replace(config, world_size=1), shards, position=alone)
    # What was drawn ahead and what waits in the buffers comes first: whole epochs, then the next one.
    everything = [n for batches in given for batch in batches for n in numbers(batch)]
    everything += [n for batch in islice(rest, 46) for n in numbers(batch)]
    counts = torch.bincount(torch.tensor(everything), minlength=9)
    assert len(everything) == 54 and counts.min() >= 4 and counts.max() <= 8


def test_a_changed_setting_is_named(shards: list[str]) -> None:
    config = VoiceReadingConfig(sample_rate=16_000, rows=2, shuffle=5)
    loader = training(config, shards)
    next(iter(loader))
    state = to_checkpoint([loader.position], loader.stream.made_by(workers=1))
    changed = training(replace(config, rows=3), shards).stream.made_by(workers=1)
    with pytest.raises(UserError, match=r"data\.rows was 2 and is now 3"):
        from_checkpoint(state, changed)


def test_speaker_embeddings_reach_the_batch_and_what_has_none_is_counted(tmp_path: Path) -> None:
    dialogues = [reply(0), reply(1), reply(2)]
    dialogues[0].turns[1].speaker_embedding = torch.tensor([0.25, -1.5])
    dialogues[2].turns[1].speaker_embedding = torch.tensor([3.0, 1e-3])
    write_shard(tmp_path / "a.tar", dialogues)
    config = VoiceReadingConfig(sample_rate=16_000, rows=3, speaker_size=2)
    loader = VoiceLoader(VoiceStream(config, shards=[str(tmp_path)]), num_workers=0)
    (batch,) = loader
    voices = torch.tensor([[0.25, -1.5], [0.0, 0.0], [3.0, 1e-3]])
    torch.testing.assert_close(batch.speakers, voices)
    assert loader.health.noticed == {"reply without speaker embedding": 1}
    (cut,) = islice(training(replace(config, segment_codes=5), [str(tmp_path)]), 1)
    torch.testing.assert_close(cut.speakers, voices[numbers(cut)])
    (unasked,) = VoiceLoader(VoiceStream(replace(config, speaker_size=0), shards=[str(tmp_path)]), num_workers=0)
    assert unasked.speakers is None
    wrong = VoiceStream(replace(config, speaker_size=192), shards=[str(tmp_path)])
    with pytest.raises(UserError, match="dialogue-000 holds a speaker embedding of 2 values, and the flow takes 192"):
        list(VoiceLoader(wrong, num_workers=0))
