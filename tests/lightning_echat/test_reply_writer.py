"""The order in which a row may write text and speech, whatever the heads want."""

import random
from copy import copy
from dataclasses import dataclass, replace

import pytest

from lightning_echat.reply_writer import ReplyLimits, ReplyWriter
from lightning_echat.tokens.speech_codes import ids_to_codes, interleave
from lightning_echat.tokens.tasks import ALL_TASK_NAMES

LIMITS = ReplyLimits(text=128, thinking=0, speech=375)


@dataclass
class Answer:
    text: str
    codes: list[int]
    finished: bool


class Scripted:
    """Stands for the heads: wants at every step an id of its own choosing, which the layout may refuse."""

    def __init__(self, tokenizer, *, text: str | None = None, seed: int = 0, boundary_after: int = 40) -> None:
        self.vocabulary = tokenizer.vocabulary
        self.script = [*tokenizer.encode(text), self.vocabulary.end_of_text] if text is not None else None
        self.random = random.Random(seed)
        self.boundary_after = boundary_after
        self.written_text = 0
        self.written_speech = 0

    def choose(self, phase: str) -> int:
        vocabulary = self.vocabulary
        if phase == "speech":
            over = self.written_speech > self.boundary_after
            return vocabulary.speech_boundary if over else vocabulary.first_code + self.random.randrange(64)
        if self.script is None:
            return self.random.choice([vocabulary.end_of_text, *range(40, 80)])
        return self.script[min(self.written_text, len(self.script) - 1)]


def write(tokenizer, task_name: str, script: Scripted, limits: ReplyLimits = LIMITS) -> tuple[list[int], Answer]:
    """Let a script answer a task; the ids written, and what they say."""
    writer = ReplyWriter(task_name, tokenizer, limits)
    while not writer.done:
        forced = writer.forced_id
        id = script.choose(writer.phase) if forced is None else forced
        writer.write(id)
        script.written_text += id < tokenizer.vocabulary.text_size
        script.written_speech += id >= tokenizer.vocabulary.text_size
    ids, vocabulary = writer.written.ids, tokenizer.vocabulary
    text = [i for i in ids if i < vocabulary.text_size and i != vocabulary.end_of_text]
    return ids, Answer(tokenizer.decode(text), ids_to_codes(ids, vocabulary).tolist(), not writer.cut)


def kinds(ids: list[int], tokenizer) -> str:
    """t text, e end of text, c code, b boundary."""
    vocabulary = tokenizer.vocabulary
    named = {vocabulary.end_of_text: "e", vocabulary.speech_boundary: "b"}
    return "".join(named.get(i, "t" if i < vocabulary.text_size else "c") for i in ids)


@pytest.mark.parametrize("task", ["transcribe", "label", "text_to_text", "speech_to_text.natural_thinking"])
def test_written_answers_end_with_the_end_of_text(tokenizer, task):
    ids, reply = write(tokenizer, task, Scripted(tokenizer, text="hello"))
    assert kinds(ids, tokenizer) == "ttttte"
    assert reply.text == "hello" and reply.finished and reply.codes == []


@pytest.mark.parametrize("task", ["speech_to_speech", "speech_to_speech.label_thinking"])
def test_spoken_answers_are_text_then_codes_between_boundaries(tokenizer, task):
    text = "<think>words<think end>yes"
    ids, reply = write(tokenizer, task, Scripted(tokenizer, text=text, boundary_after=30))
    assert kinds(ids, tokenizer) == "t" * len(text) + "e" + "b" + "c" * 30 + "b"
    assert reply.text == text and reply.finished
    first = tokenizer.vocabulary.first_code
    assert reply.codes == [i - first for i in ids[len(text) + 2 : -1]]


def test_reading_aloud_writes_codes_alone(tokenizer):
    ids, reply = write(tokenizer, "text_to_speech", Scripted(tokenizer, boundary_after=4))
    assert kinds(ids, tokenizer) == "bccccb"
    assert reply.text == "" and len(reply.codes) == 4 and reply.finished


@pytest.mark.parametrize(
    ("letters", "codes", "expected"),
    [
        # 8 letters and the end: 6 + 3. Once the text is over nothing interrupts the codes.
        (8, 40, "tttttt" + "b" + 17 * "c" + "tte" + 23 * "c" + "b"),
        # 5 letters and the end fill one chunk.
        (5, 40, "ttttte" + "b" + 40 * "c" + "b"),
        # The codes end inside their first chunk; the text goes on alone.
        (14, 3, "tttttt" + "bcccb" + 8 * "t" + "e"),
    ],
)
@pytest.mark.parametrize("task", ["speech_to_speech.interleaved", "text_to_speech.interleaved"])
def test_interleaved_answers_take_six_and_eighteen_in_turn(tokenizer, task, letters, codes, expected):
    script = Scripted(tokenizer, text="x" * letters, boundary_after=codes)
    ids, _ = write(tokenizer, task, script)
    assert kinds(ids, tokenizer) == expected


@pytest.mark.parametrize("form", ["label", "natural"])
def test_interleaving_starts_behind_the_thinking(tokenizer, form):
    thinking = "<think>a <woman> says: hi; i think<think end>"
    script = Scripted(tokenizer, text=thinking + "x" * 8, boundary_after=20)
    ids, reply = write(tokenizer, f"speech_to_speech.{form}_thinking.interleaved", script)
    spoken = "tttttt" + "b" + 17 * "c" + "tte" + 3 * "c" + "b"
    assert kinds(ids, tokenizer) == "t" * len(thinking) + spoken
    assert reply.text == thinking + "x" * 8


def test_the_mark_that_closes_thinking_may_end_in_a_character_of_several_ids(tokenizer):
    other, prompts = copy(tokenizer), tokenizer.prompt_set
    other.prompt_set = replace(prompts, thinking=replace(prompts.thinking, close="[完]完"))
    ids = tokenizer.encode("well [完]完")
    writer = ReplyWriter("speech_to_text.natural_thinking", other, LIMITS)
    phases = []
    for id in ids:
        writer.write(id)
        phases.append(writer.phase)
    assert phases == ["thinking"] * (len(ids) - 1) + ["text"]


def test_thinking_that_is_never_closed_is_followed_by_speech(tokenizer):
    script = Scripted(tokenizer, text="<think>for ever and ever", boundary_after=2)
    ids, reply = write(tokenizer, "speech_to_speech.label_thinking.interleaved", script)
    assert kinds(ids, tokenizer) == "t" * 24 + "e" + "bccb"
    assert reply.finished


@pytest.mark.parametrize("name", ALL_TASK_NAMES)
@pytest.mark.parametrize("seed", range(6))
def test_answers_keep_their_layout_whatever_the_heads_want(tokenizer, name, seed):
    script = Scripted(tokenizer, seed=seed, boundary_after=5 * seed)
    ids, reply = write(tokenizer, name, script, replace(LIMITS, text=30, speech=50))
    written = kinds(ids, tokenizer)
    text, speech = [k for k in written if k in "te"], [k for k in written if k in "cb"]
    assert "e" not in text[:-1] and len(text) <= 30 and len(speech) <= 50
    assert [k == "b" for k in speech] == [place in (0, len(speech) - 1) for place in range(len(speech))] or (
        not reply.finished and "b" not in speech[1:]
    )
    if reply.finished:
        assert (text[-1:] == ["e"]) is (name != "text_to_speech")
        assert bool(speech) is ("to_speech" in name)
    if "interleaved" in name and "thinking" not in name:
        # The very order that is trained on.
        is_text = [i < tokenizer.vocabulary.text_size for i in ids]
        in_order = interleave(
            [i for i, of_text in zip(ids, is_text, strict=True) if of_text],
            [i for i, of_text in zip(ids, is_text, strict=True) if not of_text],
        )
        assert not reply.finished or ids == in_order
    else:
        assert written == "".join([*text, *speech])


@pytest.mark.parametrize(
    ("task", "limits", "expected"),
    [
        ("text_to_text", {"text": 4}, "tttt"),
        ("speech_to_speech", {"text": 4}, "tttt"),
        ("speech_to_speech", {"speech": 6}, "tttttebccccc"),
        ("text_to_speech", {"speech": 6}, "bccccc"),
        ("speech_to_speech.interleaved", {"speech": 3}, "tttttebcc"),
    ],
)
def test_a_length_limit_cuts_the_answer_and_says_so(tokenizer, task, limits, expected):
    ids, reply = write(tokenizer, task, Scripted(tokenizer, text="hello"), replace(LIMITS, **limits))
    assert kinds(ids, tokenizer) == expected
    assert not reply.finished


def test_an_answer_that_just_fits_is_finished(tokenizer):
    script = Scripted(tokenizer, text="hello", boundary_after=4)
    _, reply = write(tokenizer, "speech_to_speech", script, replace(LIMITS, text=6, speech=6))
    assert reply.finished and len(reply.codes) == 4


def test_the_phases_are_told_apart(tokenizer):
    thinking = "<think>sad<think end>"
    writer = ReplyWriter("speech_to_speech.label_thinking", tokenizer, LIMITS)
    for id in [*tokenizer.encode(thinking + "yes"), tokenizer.vocabulary.end_of_text]:
        writer.write(id)
    assert writer.phase == "speech" and writer.forced_id == tokenizer.vocabulary.speech_boundary
    assert writer.written.phases == ["thinking"] * len(thinking) + ["text"] * 4


def test_thinking_has_a_limit_of_its_own(tokenizer):
    script = Scripted(tokenizer, text="<think>for ever and ever")
    ids, reply = write(tokenizer, "speech_to_text.label_thinking", script, replace(LIMITS, thinking=10))
    assert len(ids) == 10 and not reply.finished
    script = Scripted(tokenizer, text="<think>x<think end>" + "y" * 20)
    ids, reply = write(tokenizer, "speech_to_text.label_thinking", script, replace(LIMITS, thinking=20))
    assert len(ids) == 40 and reply.finished


def test_other_chunks_make_another_order(tokenizer):
    script = Scripted(tokenizer, text="x" * 5, boundary_after=6)
    ids, _ = write(tokenizer, "text_to_speech.interleaved", script, replace(LIMITS, text_chunk=2, speech_chunk=3))
    assert kinds(ids, tokenizer) == "tt" + "bcc" + "tt" + "ccc" + "te" + "cb"
