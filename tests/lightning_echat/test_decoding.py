"""One decoder for all tasks: what it may write, and that batches, packing and the cache change nothing."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_echat.contracts import IGNORE_INDEX, GeneratedReply, PackedBatch
from lightning_echat.data.batching import collate
from lightning_echat.decoding import DecodingConfig, _Writers, extract_prompts, generate
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.testing import dummy_batch, tiny_model
from lightning_echat.tokens.speech_codes import SPEECH_CHUNK, TEXT_CHUNK, interleave
from lightning_echat.tokens.tasks import ALL_TASK_NAMES, task_from_name

TASKS = [task_from_name(name, labels=("age", "emotion")) for name in ALL_TASK_NAMES]
SHORT = DecodingConfig(max_text_ids=20, max_speech_ids=30)


def said(replies: list[GeneratedReply]) -> list[tuple]:
    return [(r.reference.key, r.text_ids, r.speech_codes.tolist(), r.finished) for r in replies]


def lively(tokens, seed: int = 0) -> EChatModel:
    """A model whose ids vary, which untrained ones this small do not, in float64, so that nearly equal ids are few."""
    model = tiny_model(tokens, seed=seed).double()
    with torch.no_grad():
        for parameter in model.lm.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_of_all_tasks_is_answered_as_each_alone(tokens, tokenizer, seed):
    model = lively(tokens, seed)
    together = said(generate(model, dummy_batch(tokenizer, TASKS, exchanges=2), tokenizer, SHORT))
    alone = [
        said(generate(model, dummy_batch(tokenizer, [task], first=number, exchanges=2), tokenizer, SHORT))[0]
        for number, task in enumerate(TASKS)
    ]
    assert together == alone
    # The answers differ from one another, else this would show nothing.
    assert len({tuple(text) for _, text, _, _ in together}) > len(TASKS) // 2
    assert len({tuple(codes) for _, _, codes, _ in together if codes}) > 2


def test_packed_and_padded_batches_hold_the_same_prompts(tokenizer):
    padded = extract_prompts(dummy_batch(tokenizer, TASKS, exchanges=2), padding=tokenizer.vocabulary.padding)
    packed = extract_prompts(
        dummy_batch(tokenizer, TASKS, exchanges=2, per_row=4), padding=tokenizer.vocabulary.padding
    )
    for name in PackedBatch.__slots__:
        ours, theirs = getattr(packed, name), getattr(padded, name)
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs), name
    strip = [replace(reference, row=0, start=0, length=0) for reference in packed.references]
    assert strip == [replace(reference, row=0, start=0, length=0) for reference in padded.references]


def test_targets_are_not_looked_at(tokens, tokenizer):
    model, batch = lively(tokens), dummy_batch(tokenizer, TASKS)
    blind = replace(batch, input_ids=batch.input_ids.clone(), labels=torch.full_like(batch.labels, IGNORE_INDEX))
    for reference in batch.references:
        blind.input_ids[reference.row, reference.prompt_length :] = 7
    assert said(generate(model, batch, tokenizer, SHORT)) == said(generate(model, blind, tokenizer, SHORT))


def test_each_prompt_is_that_of_a_dialogue_without_target(tokenizer):
    """What a metric asks while training is what a chat asks."""
    batch = dummy_batch(tokenizer, TASKS, per_row=5)
    prompts = extract_prompts(batch, padding=tokenizer.vocabulary.padding)
    for row, reference in enumerate(prompts.references):
        ids = prompts.input_ids[row, : reference.prompt_length]
        assert tokenizer.decode(ids[-1:].tolist()) == "<|im_end|>"
        assert int((prompts.document_ids[row] > 0).sum()) == reference.prompt_length
    placeholders = (prompts.input_ids == tokenizer.vocabulary.audio_placeholder).nonzero().tolist()
    spans = zip(prompts.clip_rows.tolist(), prompts.clip_starts.tolist(), prompts.clip_lengths.tolist(), strict=True)
    assert [[row, place] for row, start, length in spans for place in range(start, start + length)] == placeholders


class Scripted:
    """Stands for the heads: wants at every step an id of its own choosing, which the layout may refuse."""

    def __init__(self, tokenizer, *, text: str | None = None, seed: int = 0, boundary_after: int = 40) -> None:
        self.vocabulary = tokenizer.vocabulary
        self.script = [*tokenizer.encode(text), self.vocabulary.end_of_text] if text is not None else None
        self.random = random.Random(seed)
        self.boundary_after = boundary_after
        self.written_text = 0
        self.written_speech = 0

    def logits(self) -> tuple[Tensor, Tensor]:
        text = torch.zeros(1, self.vocabulary.text_size)
        speech = torch.zeros(1, self.vocabulary.speech_size)
        if self.script is None:
            wanted = self.random.choice([self.vocabulary.end_of_text, *range(40, 80)])
        else:
            wanted = self.script[min(self.written_text, len(self.script) - 1)]
        text[0, wanted] = 1
        over = self.written_speech > self.boundary_after
        speech[0, self.vocabulary.speech_size - 1 if over else self.random.randrange(64)] = 1
        return text, speech


def write(tokenizer, task_name: str, script: Scripted, config: DecodingConfig) -> tuple[list[int], GeneratedReply]:
    """Let a script answer a task; the ids written and the reply made of them."""
    batch = dummy_batch(tokenizer, [task_from_name(task_name, labels=("age",))])
    writers = _Writers(extract_prompts(batch, padding=0), tokenizer, config)
    ids: list[int] = []
    while not bool(writers.done.all()):
        ids.append(int(writers.next_ids(*script.logits())))
        is_text = ids[-1] < tokenizer.vocabulary.text_size
        script.written_text += is_text
        script.written_speech += not is_text
    return ids, writers.replies({})[0]


def kinds(ids: list[int], tokenizer) -> str:
    """t text, e end of text, c code, b boundary."""
    vocabulary = tokenizer.vocabulary
    named = {vocabulary.end_of_text: "e", vocabulary.speech_boundary: "b"}
    return "".join(named.get(i, "t" if i < vocabulary.text_size else "c") for i in ids)


@pytest.mark.parametrize("task", ["transcribe", "label", "text_to_text", "speech_to_text.natural_thinking"])
def test_written_answers_end_with_the_end_of_text(tokenizer, task):
    ids, reply = write(tokenizer, task, Scripted(tokenizer, text="hello"), DecodingConfig())
    assert kinds(ids, tokenizer) == "ttttte"
    assert reply.text == "hello" and reply.finished and reply.speech_codes.numel() == 0


@pytest.mark.parametrize("task", ["speech_to_speech", "speech_to_speech.label_thinking"])
def test_spoken_answers_are_text_then_codes_between_boundaries(tokenizer, task):
    text = "<think>words<think end>yes"
    ids, reply = write(tokenizer, task, Scripted(tokenizer, text=text, boundary_after=30), DecodingConfig())
    assert kinds(ids, tokenizer) == "t" * len(text) + "e" + "b" + "c" * 30 + "b"
    assert reply.text == text and reply.finished
    first = tokenizer.vocabulary.first_code
    assert reply.speech_codes.tolist() == [i - first for i in ids[len(text) + 2 : -1]]


def test_reading_aloud_writes_codes_alone(tokenizer):
    ids, reply = write(tokenizer, "text_to_speech", Scripted(tokenizer, boundary_after=4), DecodingConfig())
    assert kinds(ids, tokenizer) == "bccccb"
    assert reply.text == "" and len(reply.speech_codes) == 4 and reply.finished


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
    ids, _ = write(tokenizer, task, script, DecodingConfig())
    assert kinds(ids, tokenizer) == expected


@pytest.mark.parametrize("form", ["label", "natural"])
def test_interleaving_starts_behind_the_thinking(tokenizer, form):
    thinking = "<think>a <woman> says: hi; i think<think end>"
    script = Scripted(tokenizer, text=thinking + "x" * 8, boundary_after=20)
    ids, reply = write(tokenizer, f"speech_to_speech.{form}_thinking.interleaved", script, DecodingConfig())
    spoken = "tttttt" + "b" + 17 * "c" + "tte" + 3 * "c" + "b"
    assert kinds(ids, tokenizer) == "t" * len(thinking) + spoken
    assert reply.text == thinking + "x" * 8


def test_thinking_that_is_never_closed_is_followed_by_speech(tokenizer):
    script = Scripted(tokenizer, text="<think>for ever and ever", boundary_after=2)
    ids, reply = write(tokenizer, "speech_to_speech.label_thinking.interleaved", script, DecodingConfig())
    assert kinds(ids, tokenizer) == "t" * 24 + "e" + "bccb"
    assert reply.finished


@pytest.mark.parametrize("name", ALL_TASK_NAMES)
@pytest.mark.parametrize("seed", range(6))
def test_answers_keep_their_layout_whatever_the_heads_want(tokenizer, name, seed):
    script = Scripted(tokenizer, seed=seed, boundary_after=5 * seed)
    ids, reply = write(tokenizer, name, script, DecodingConfig(max_text_ids=30, max_speech_ids=50))
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
        ("text_to_text", {"max_text_ids": 4}, "tttt"),
        ("speech_to_speech", {"max_text_ids": 4}, "tttt"),
        ("speech_to_speech", {"max_speech_ids": 6}, "tttttebccccc"),
        ("text_to_speech", {"max_speech_ids": 6}, "bccccc"),
        ("speech_to_speech.interleaved", {"max_speech_ids": 3}, "tttttebcc"),
    ],
)
def test_a_length_limit_cuts_the_answer_and_says_so(tokenizer, task, limits, expected):
    ids, reply = write(tokenizer, task, Scripted(tokenizer, text="hello"), DecodingConfig(**limits))
    assert kinds(ids, tokenizer) == expected
    assert not reply.finished


def test_an_answer_that_just_fits_is_finished(tokenizer):
    script = Scripted(tokenizer, text="hello", boundary_after=4)
    _, reply = write(tokenizer, "speech_to_speech", script, DecodingConfig(max_text_ids=6, max_speech_ids=6))
    assert reply.finished and len(reply.speech_codes) == 4


@pytest.mark.parametrize("name", ["speech_to_text.label_thinking", "speech_to_speech.interleaved", "text_to_speech"])
@torch.no_grad()
def test_every_step_of_the_cache_is_a_full_pass(tokens, tokenizer, name):
    """The answer is read again as one row without a cache; each id must be the best one there."""
    model = lively(tokens, seed=2)
    longest = dummy_batch(tokenizer, [task_from_name(name), task_from_name("text_to_text")], exchanges=3)
    reply = generate(model, longest, tokenizer, SHORT)[0]
    prompts = extract_prompts(longest, padding=0)
    length = prompts.references[0].prompt_length
    embeddings, _ = model.hear(prompts, model.lm.embed(prompts.input_ids))
    vocabulary = tokenizer.vocabulary
    codes = (reply.speech_codes + vocabulary.first_code).tolist()
    text = [*reply.text_ids, vocabulary.end_of_text]
    spoken = [vocabulary.speech_boundary, *codes, vocabulary.speech_boundary]
    row = embeddings[:1, :length]
    checked = {"text": 0, "speech": 0}
    kind = "speech" if name == "text_to_speech" else "text"
    wanted = len(reply.text_ids) + len(codes)
    while wanted > 0:
        hidden = model.lm(row, position_ids=None, attention_mask=None)[0, -1]
        stream, head, base = (
            (text, model.lm.text_head, 0) if kind == "text" else (spoken, model.lm.speech_head, vocabulary.first_code)
        )
        expected = stream[checked[kind]]
        if expected not in (vocabulary.speech_boundary, vocabulary.end_of_text):
            assert int(head(hidden).argmax()) + base == expected
            wanted -= 1
        row = torch.cat([row, model.lm.embed(torch.tensor([[expected]]))], dim=1)
        checked[kind] += 1
        if name.endswith("interleaved"):
            chunk, other = (TEXT_CHUNK, "speech") if kind == "text" else (SPEECH_CHUNK, "text")
            text_over = checked["text"] == len(text)
            kind = other if checked[kind] % chunk == 0 and not (kind == "speech" and text_over) else kind
        elif kind == "text" and checked["text"] == len(text):
            kind = "speech"
    assert sum(checked.values()) >= 15


def test_an_empty_batch_has_no_answers(model, tokenizer):
    assert generate(model, collate([], padding=0), tokenizer, SHORT) == []


def test_sampling_follows_from_its_seed(tokens, tokenizer):
    model, batch = lively(tokens), dummy_batch(tokenizer, TASKS[:4])
    warm = replace(SHORT, temperature=1.5, seed=3)
    first = said(generate(model, batch, tokenizer, warm))
    torch.manual_seed(99)
    assert said(generate(model, batch, tokenizer, warm)) == first
    assert said(generate(model, batch, tokenizer, replace(warm, seed=4))) != first
    assert said(generate(model, batch, tokenizer, replace(warm, top_k=1))) == said(
        generate(model, batch, tokenizer, SHORT)
    )


def test_sampling_keeps_to_the_best_k(tokenizer):
    prompts = extract_prompts(dummy_batch(tokenizer, TASKS[:1]), padding=0)
    writers = _Writers(prompts, tokenizer, DecodingConfig(temperature=5.0, top_k=3))
    drawn = {int(writers._choose(torch.arange(10.0)[None])) for _ in range(200)}
    assert drawn == {7, 8, 9}


def test_timings_are_told(model, tokenizer):
    reply = generate(model, dummy_batch(tokenizer, TASKS[:1]), tokenizer, replace(SHORT, max_text_ids=2))[0]
    assert set(reply.timings) == {"prefill", "total"}
    assert 0 < reply.timings["prefill"] <= reply.timings["total"]
