from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from lightning_echat.contracts import IGNORE_INDEX, AudioClip, DialogueReference, TokenizedDialogue, UserError
from lightning_echat.data.batching import (
    FRAME_MULTIPLE,
    BatchingConfig,
    Window,
    choose_packed,
    choose_padded,
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
    assert batch.log_mels.shape == (3, 48, 80)
    assert batch.log_mels[0, :16].eq(1).all() and batch.log_mels[0, 16:].eq(0).all()
    assert batch.clip_labels[:, 0].tolist() == [1, 0, 0]
    assert batch.clip_character_lengths.tolist() == [1, 2, 0]
    assert batch.clip_characters.tolist() == [[1, 0], [1, 2], [0, 0]]
    # arange(number % 3) + 1 of dialogues 1, 2 and 4.
    assert batch.clip_transcript_ids.tolist() == [[1, 0], [1, 2], [1, 0]]
    assert batch.clip_transcript_lengths.tolist() == [1, 2, 1]
    assert batch.audio_seconds == pytest.approx(0.64)
    assert frame_padding_share(batch) == pytest.approx(1 - 64 / 144)


def test_a_batch_without_audio_has_no_clip():
    batch = collate([dialogue(1, frames=None)], padding=PADDING)
    assert batch.log_mels.shape == (0, 0, 80)
    assert batch.clip_labels.shape == (0, 5)
    assert frame_padding_share(batch) == 0.0


def test_a_batch_without_dialogues_is_one_position_of_padding():
    batch = collate([], padding=PADDING)
    assert batch.input_ids.tolist() == [[PADDING]]
    assert (batch.num_tokens, batch.num_supervised, batch.references) == (0, 0, [])


def batches(dialogues, config: BatchingConfig):
    """Rows of one batch after the other, the window topped up between them."""
    window: Window[None] = Window(config)
    stream = iter(dialogues)
    while True:
        while not window.full and (following := next(stream, None)) is not None:
            window.add(following, None)
        if not (rows := window.take()):
            return
        yield rows


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 3, 64, 500])
def test_nothing_is_lost_and_no_budget_is_broken(packed, count):
    config = BatchingConfig(tokens_per_batch=400, max_rows=12, max_ids=100, pool=64, packed=packed)
    dialogues = many(count)
    keys = []
    for rows in batches(dialogues, config):
        batch = pack_rows(rows, padding=PADDING)
        assert batch.input_ids.numel() <= 400
        assert len(rows) <= 12
        keys += [reference.key for reference in batch.references]
    assert sorted(keys, key=int) == [d.reference.key for d in dialogues]


def long_tailed(count: int, *, text_share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Ids and frames of queries and replies of log-normal length, half of them only transcribed, some without audio."""
    random = np.random.default_rng(0)
    query, reply = (np.clip(random.lognormal(np.log(mean), 0.6, count), 0.5, 30) for mean in (4, 5))
    spoken = random.random(count) < 0.5
    ids = np.minimum(20 + 15.5 * query + spoken * 28 * reply, 2000).astype(int)
    return ids, np.where(random.random(count) < text_share, 0, (100 * query).astype(int))


def shares(ids: np.ndarray, frames: np.ndarray, config: BatchingConfig) -> tuple[float, float]:
    """Shares of padding among ids and among frames while the stream lasts: its end is not typical."""
    sums = np.zeros(4)
    waiting, following = np.arange(config.pool), config.pool
    while following < len(ids):
        lengths, clips = ids[waiting], frames[waiting]
        if config.packed:
            rows = choose_packed(lengths, clips, config)
        else:
            rows = [[place] for place in choose_padded(lengths, clips, config)]
        row_lengths = [int(lengths[row].sum()) for row in rows]
        chosen = [place for row in rows for place in row]
        heard = clips[chosen][clips[chosen] > 0]
        frames_each = -(-max(heard, default=0) // FRAME_MULTIPLE) * FRAME_MULTIPLE
        sums += (sum(row_lengths), max(row_lengths) * len(rows), heard.sum(), frames_each * len(heard))
        waiting = np.append(np.delete(waiting, chosen), np.arange(following, following + len(chosen)))
        following += len(chosen)
        waiting = waiting[waiting < len(ids)]
    return 1 - sums[0] / sums[1], 1 - sums[2] / sums[3]


def test_a_long_tailed_corpus_pads_less_than_a_tenth_of_its_rows_and_of_its_frames():
    padding, frames = shares(*long_tailed(5000), BatchingConfig())
    assert padding < 0.08
    assert frames < 0.08


def test_packing_leaves_next_to_no_padding_even_of_frames():
    padding, frames = shares(*long_tailed(5000), BatchingConfig(packed=True))
    assert padding < 0.02
    assert frames < 0.035


def test_a_batch_begins_with_the_oldest_and_takes_its_like():
    config = BatchingConfig(tokens_per_batch=50, max_ids=50, pool=8)
    ids, frames = np.array([20, 50, 21, 19, 8]), np.array([100, 100, 2000, 110, 100])
    assert choose_padded(ids, frames, config) == [0, 3]
    # Rows a little longer than the first are taken where they are padded less together.
    assert choose_padded(
        np.array([20, 15, 24, 24]), np.array([100, 70, 112, 112]), replace(config, tokens_per_batch=75)
    ) == [0, 2, 3]
    # A frame that is padded counts as much as it is told to.
    weighing = np.array([20, 20, 16]), np.array([112, 80, 112])
    assert choose_padded(*weighing, replace(config, frames_weight=0.1)) == [0, 1]
    assert choose_padded(*weighing, replace(config, frames_weight=2.0)) == [0, 2]
    # Without a clip the length of ids decides alone.
    assert choose_padded(ids, np.array([0, 0, 0, 0, 0]), config) == [0, 2]


def test_rows_are_packed_first_fit_with_clips_of_like_length():
    config = BatchingConfig(tokens_per_batch=100, max_ids=50, pool=8, packed=True)
    ids, frames = np.array([30, 30, 20, 20, 10]), np.array([100, 900, 101, 0, 99])
    assert choose_packed(ids, frames, config) == [[0, 3], [2, 4]]


def test_no_dialogue_is_held_back_for_ever():
    config = BatchingConfig(tokens_per_batch=1000, max_ids=500, pool=32)
    dialogues = many(2000)
    dialogues[0] = dialogue(1, length=400, frames=3000)
    dialogues[1] = dialogue(2, length=8, frames=10)
    seen = {}
    for number, rows in enumerate(batches(dialogues, config)):
        for row in rows:
            seen[row[0].reference.key] = number
    assert seen["1"] == 0 and seen["2"] < 32


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
