from random import Random

import pytest
import torch

from lightning_echat.contracts import IGNORE_INDEX, AudioClip, DialogueReference, TokenizedDialogue, UserError
from lightning_echat.data.batching import (
    BatchingConfig,
    batch_rows,
    collate,
    frame_padding_share,
    pack_rows,
    padding_share,
)

PADDING = 9


def dialogue(number: int, *, length: int = 10, frames: int | None = 16, supervised: int = 3) -> TokenizedDialogue:
    """Ids count up from 1000 × number, the last `supervised` positions have targets."""
    ids = torch.arange(length) + 1000 * number
    labels = torch.full((length,), IGNORE_INDEX)
    labels[length - supervised :] = ids[length - supervised :] + 1
    clips = []
    if frames is not None:
        clips = [
            AudioClip(
                log_mel=torch.full((frames, 80), float(number)),
                start=2,
                length=-(-frames // 8),
                labels=torch.tensor([number % 2, 0, 1, IGNORE_INDEX, 0]),
                characters=torch.arange(number % 4) + 1,
                transcript_ids=torch.arange(number % 3) + 1,
            )
        ]
    reference = DialogueReference(key=str(number), task="transcribe", prompt_length=4)
    return TokenizedDialogue(
        input_ids=ids, labels=labels, speech_scored=number % 2 == 0, clips=clips, reference=reference
    )


def many(count: int, *, seed: int = 0) -> list[TokenizedDialogue]:
    random = Random(seed)
    return [dialogue(i + 1, length=random.randint(8, 90), frames=random.randint(40, 900)) for i in range(count)]


def test_a_dialogue_a_row_is_padded_at_its_end_only():
    batch = collate([dialogue(1, length=6), dialogue(2, length=9)], padding=PADDING)
    assert batch.input_ids.tolist() == [[*range(1000, 1006), *[PADDING] * 3], list(range(2000, 2009))]
    assert batch.document_ids.tolist() == [[1] * 6 + [0] * 3, [1] * 9]
    assert batch.position_ids.tolist() == [[*range(6), 0, 0, 0], list(range(9))]
    assert batch.labels[0, 6:].eq(IGNORE_INDEX).all()
    assert batch.speech_scored[0].logical_not().all() and batch.speech_scored[1].all()
    assert padding_share(batch) == pytest.approx(3 / 18)


def test_packed_dialogues_stand_one_after_the_other():
    rows = [[dialogue(1, length=6), dialogue(2, length=5)], [dialogue(3, length=8)]]
    batch = pack_rows(rows, padding=PADDING)
    assert batch.input_ids[0].tolist() == [*range(1000, 1006), *range(2000, 2005)]
    assert batch.position_ids[0].tolist() == [*range(6), *range(5)]
    assert batch.document_ids[0].tolist() == [1] * 6 + [2] * 5
    assert batch.speech_scored[0].tolist() == [False] * 6 + [True] * 5
    assert batch.document_ids[1].tolist() == [1] * 8 + [0] * 3
    assert [(r.key, r.row, r.start, r.length) for r in batch.references] == [
        ("1", 0, 0, 6),
        ("2", 0, 6, 5),
        ("3", 1, 0, 8),
    ]


def test_no_target_belongs_to_another_dialogue():
    rows = [[d for d in many(6)], [d for d in many(5, seed=1)]]
    batch = pack_rows(rows, padding=PADDING)
    counted = batch.labels != IGNORE_INDEX
    assert torch.equal(batch.labels[counted] // 1000, batch.input_ids[counted] // 1000)
    assert int(counted.sum()) == batch.num_supervised == sum(d.num_supervised for row in rows for d in row)


def test_clips_keep_their_place_their_frames_and_their_labels():
    rows = [[dialogue(1, frames=16), dialogue(2, frames=40)], [dialogue(3, frames=None), dialogue(4, frames=8)]]
    batch = pack_rows(rows, padding=PADDING)
    assert batch.clip_rows.tolist() == [0, 0, 1]
    assert batch.clip_starts.tolist() == [2, 12, 12]
    assert batch.clip_lengths.tolist() == [2, 5, 1]
    assert batch.log_mel_lengths.tolist() == [16, 40, 8]
    # 40 frames, rounded up so that few shapes occur.
    assert batch.log_mels.shape == (3, 64, 80)
    assert batch.log_mels[0, :16].eq(1).all() and batch.log_mels[0, 16:].eq(0).all()
    assert batch.clip_labels[:, 0].tolist() == [1, 0, 0]
    assert batch.clip_character_lengths.tolist() == [1, 2, 0]
    assert batch.clip_characters.tolist() == [[1, 0], [1, 2], [0, 0]]
    # arange(number % 3) + 1 of dialogues 1, 2 and 4.
    assert batch.clip_transcript_ids.tolist() == [[1, 0], [1, 2], [1, 0]]
    assert batch.clip_transcript_lengths.tolist() == [1, 2, 1]
    assert batch.audio_seconds == pytest.approx(0.64)
    assert frame_padding_share(batch) == pytest.approx(1 - 64 / 192)


def test_a_batch_without_audio_has_no_clip():
    batch = collate([dialogue(1, frames=None)], padding=PADDING)
    assert batch.log_mels.shape == (0, 0, 80)
    assert batch.clip_labels.shape == (0, 5)
    assert frame_padding_share(batch) == 0.0


def test_a_batch_without_dialogues_is_one_position_of_padding():
    batch = collate([], padding=PADDING)
    assert batch.input_ids.tolist() == [[PADDING]]
    assert (batch.num_tokens, batch.num_supervised, batch.references) == (0, 0, [])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 3, 64, 500])
def test_nothing_is_lost_and_no_budget_is_broken(packed, count):
    config = BatchingConfig(tokens_per_batch=400, max_rows=12, max_ids=100, pool=64, packed=packed)
    dialogues = many(count)
    keys = []
    for rows in batch_rows(dialogues, config=config, random=Random(0)):
        batch = pack_rows(rows, padding=PADDING)
        assert batch.input_ids.numel() <= 400
        assert len(rows) <= 12
        keys += [reference.key for reference in batch.references]
    assert sorted(keys, key=int) == [d.reference.key for d in dialogues]


def shares(dialogues, **options) -> tuple[float, float]:
    config = BatchingConfig(**{"tokens_per_batch": 1000, "max_ids": 200, "pool": 512, **options})
    padding = ids = frames = filled = 0
    for rows in batch_rows(dialogues, config=config, random=Random(0)):
        batch = pack_rows(rows, padding=PADDING)
        ids += batch.document_ids.numel()
        padding += batch.document_ids.numel() - batch.num_tokens
        frames += batch.log_mels.shape[0] * batch.log_mels.shape[1]
        filled += int(batch.log_mel_lengths.sum())
    return padding / ids, 1 - filled / frames


def test_buckets_keep_both_paddings_low():
    # 2048 dialogues whose two lengths have nothing to do with each other: unsorted, half of each would be padding.
    ids, frames = shares(many(2048))
    assert ids < 0.16
    assert frames < 0.20


def test_packing_leaves_next_to_no_padding():
    ids, _ = shares(many(2048), packed=True)
    assert ids < 0.03


def test_batches_do_not_come_in_the_order_of_their_length():
    config = BatchingConfig(tokens_per_batch=1000, max_ids=200, pool=512)
    lengths = [len(rows[0][0].input_ids) for rows in batch_rows(many(512), config=config, random=Random(0))]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_no_dialogue_is_held_back_for_ever():
    config = BatchingConfig(tokens_per_batch=1000, max_ids=500, pool=32)
    dialogues = many(2000)
    dialogues[0] = dialogue(1, length=400, frames=3000)
    dialogues[1] = dialogue(2, length=8, frames=10)
    seen = {}
    for number, rows in enumerate(batch_rows(iter(dialogues), config=config, random=Random(0))):
        for row in rows:
            seen[row[0].reference.key] = number
    assert seen["1"] < 40 and seen["2"] < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows is 0"),
        ({"tokens_per_batch": 100, "max_ids": 200}, "max_ids 200 exceeds tokens_per_batch 100"),
    ],
)
def test_sizes_that_no_batch_can_have_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BatchingConfig(**options)
