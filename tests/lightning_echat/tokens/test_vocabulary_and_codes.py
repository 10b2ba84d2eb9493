import pytest
import torch

from lightning_echat.contracts import SampleRejected, UserError
from lightning_echat.tokens.speech_codes import codes_to_ids, ids_to_codes, interleave, repetition_rate
from lightning_echat.tokens.speech_timing import num_embeddings
from lightning_echat.tokens.vocabulary import Vocabulary

REFERENCE = Vocabulary(text_size=151936, codebook_size=4096, end_of_text=151645)


def test_the_ids_of_the_reference_follow_its_text_ids():
    assert REFERENCE.speech_boundary - REFERENCE.first_code == 4096
    assert REFERENCE.input_speech_begin - REFERENCE.first_code == 4097
    assert REFERENCE.input_speech_end - REFERENCE.first_code == 4098
    assert (REFERENCE.speech_size, REFERENCE.speech_rows) == (4097, 4099)


def test_no_two_owners_share_an_id():
    vocabulary = Vocabulary(text_size=10, codebook_size=4, end_of_text=3)
    special = [
        vocabulary.speech_boundary,
        vocabulary.input_speech_begin,
        vocabulary.input_speech_end,
        vocabulary.audio_placeholder,
    ]
    assert [*range(10), *range(10, 14), *special] == list(range(vocabulary.size))


def test_a_tokenizer_larger_than_the_embedding_is_refused(compact):
    with pytest.raises(UserError, match="text_vocabulary_size"):
        Vocabulary.of(compact.tokenizer, text_size=100, codebook_size=4)


def test_codes_stand_between_boundaries_and_come_back():
    codes = torch.tensor([0, 4095, 7])
    ids = codes_to_ids(codes, REFERENCE)
    assert ids == [156032, 151936, 156031, 151943, 156032]
    assert torch.equal(ids_to_codes([5, *ids, 9], REFERENCE), codes)


@pytest.mark.parametrize("code", [-1, 4096])
def test_a_code_outside_the_codebook_is_rejected(code):
    with pytest.raises(SampleRejected, match="out of range"):
        codes_to_ids(torch.tensor([1, code]), REFERENCE)


def runs(mixed: list[int]) -> list[tuple[str, int]]:
    """Text ids are negative here."""
    found: list[tuple[str, int]] = []
    for value in mixed:
        kind = "text" if value < 0 else "speech"
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + 1)
        else:
            found.append((kind, 1))
    return found


@pytest.mark.parametrize(
    ("text", "speech", "expected"),
    [
        (12, 36, [("text", 6), ("speech", 18), ("text", 6), ("speech", 18)]),
        (14, 100, [("text", 6), ("speech", 18), ("text", 6), ("speech", 18), ("text", 2), ("speech", 64)]),
        (20, 20, [("text", 6), ("speech", 18), ("text", 6), ("speech", 2), ("text", 8)]),
        (6, 5, [("text", 6), ("speech", 5)]),
        (7, 18, [("text", 6), ("speech", 18), ("text", 1)]),
        (0, 30, [("speech", 30)]),
        (3, 0, [("text", 3)]),
    ],
)
def test_six_text_ids_alternate_with_eighteen_speech_ids(text, speech, expected):
    assert runs(interleave([-i - 1 for i in range(text)], list(range(speech)))) == expected


@pytest.mark.parametrize("text", range(0, 26, 5))
@pytest.mark.parametrize("speech", range(0, 80, 9))
def test_interleaving_keeps_every_id_in_its_order(text, speech):
    text_ids, speech_ids = [-i - 1 for i in range(text)], list(range(speech))
    mixed = interleave(text_ids, speech_ids)
    assert [i for i in mixed if i < 0] == text_ids
    assert [i for i in mixed if i >= 0] == speech_ids


def test_embeddings_of_an_utterance_round_up_at_every_stride():
    assert [num_embeddings(frames, (2, 2, 2)) for frames in (0, 1, 8, 9, 300)] == [0, 1, 1, 2, 38]
    lengths = torch.tensor([0, 1, 8, 9, 300])
    assert num_embeddings(lengths, (2, 2, 2)).tolist() == [0, 1, 1, 2, 38]


def test_repetition_is_the_share_of_runs_that_came_before():
    assert repetition_rate(torch.arange(20)) == 0.0
    assert repetition_rate(torch.zeros(20, dtype=torch.long)) == pytest.approx(16 / 17)
    # 1 2 3 4 stands twice among seven runs.
    assert repetition_rate(torch.tensor([1, 2, 3, 4, 0, 1, 2, 3, 4, 5])) == pytest.approx(1 / 7)
    assert repetition_rate(torch.tensor([1, 1, 1])) == 0.0
