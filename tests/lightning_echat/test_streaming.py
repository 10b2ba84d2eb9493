"""Events of an answer: the order they come in, that they add up to the answer, and the times told."""

import pytest
import torch

from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.nn.token2wav.chunks import ChunkConfig
from lightning_echat.nn.token2wav.kmeans import fit_kmeans, log_mel_blocks
from lightning_echat.reply_writer import ReplyWriter
from lightning_echat.streaming import StreamEvent, _Spelling, playback_waits, stream_answer
from lightning_echat.testing import CODEBOOK_SIZE, dummy_audio, dummy_batch, tiny_model
from lightning_echat.tokens.tasks import task_from_name

CHUNKS = ChunkConfig(first=4, codes=8, context=4, look_ahead=2)


@pytest.fixture(scope="module")
def voice():
    blocks = torch.cat([log_mel_blocks(dummy_audio(3.0, seed=seed)) for seed in range(2)])
    return fit_kmeans(blocks, codebook_size=CODEBOOK_SIZE)


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """Every answer reads `text`, and has 30 codes where it speaks, whatever the heads want."""

    def script(text: str) -> None:
        ids = [*tokenizer.encode(text), tokenizer.vocabulary.end_of_text]
        write = ReplyWriter.write

        def scripted_write(writer: ReplyWriter, id: int) -> None:
            counts = writer._counts
            if writer.phase != "speech":
                id = ids[counts["thinking"] + counts["text"]]
            elif counts["speech"] > 30:
                id = tokenizer.vocabulary.speech_boundary
            elif id == tokenizer.vocabulary.speech_boundary and counts["speech"]:
                id = tokenizer.vocabulary.first_code
            write(writer, id)

        monkeypatch.setattr(ReplyWriter, "write", scripted_write)

    return script


def events_of(tokens, tokenizer, task: str, voice=None) -> list[StreamEvent]:
    batch = dummy_batch(tokenizer, [task_from_name(task)])
    return list(stream_answer(tiny_model(tokens), batch, tokenizer, DecodingConfig(), token2wav=voice, chunks=CHUNKS))


def order(events: list[StreamEvent]) -> list[str]:
    """Kinds, runs of one kind once."""
    kinds = [event.kind for event in events]
    return [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]


THOUGHT = "<think>hm<think end>"


def test_a_sequential_answer_comes_in_order_and_adds_up(tokens, tokenizer, voice, scripted):
    scripted(THOUGHT + "yes")
    events = events_of(tokens, tokenizer, "speech_to_speech.label_thinking", voice)
    assert order(events) == ["thinking", "text", *["codes", "audio"] * 4, "done"]
    assert "".join(e.text for e in events if e.kind == "thinking") == THOUGHT
    assert "".join(e.text for e in events if e.kind == "text") == "yes"
    reply, timing = events[-1].reply, events[-1].timing
    assert reply is not None and timing is not None
    assert [code for e in events for code in e.codes] == reply.speech_codes.tolist()
    sound = torch.cat([e.waveform for e in events if e.waveform is not None])
    assert len(sound) == 30 * 640
    assert timing.thinking_ids == len(THOUGHT) and timing.codes == 30 and timing.audio == pytest.approx(1.2)
    assert [event.at for event in events] == sorted(event.at for event in events)


def test_interleaved_sound_begins_before_the_words_are_over(tokens, tokenizer, voice, scripted):
    scripted("x" * 10)
    events = events_of(tokens, tokenizer, "speech_to_speech.interleaved", voice)
    kinds = order(events)
    assert kinds[:3] == ["text", "codes", "audio"] and "text" in kinds[3:]
    assert "thinking" not in kinds


def test_the_answer_is_the_one_that_is_generated_at_once(tokens, tokenizer):
    model, config = tiny_model(tokens, seed=3), DecodingConfig(max_text_ids=15, max_speech_ids=25)
    for task in ("speech_to_speech.interleaved", "text_to_speech", "speech_to_text.label_thinking"):
        batch = dummy_batch(tokenizer, [task_from_name(task)])
        reply = list(stream_answer(model, batch, tokenizer, config))[-1].reply
        (whole,) = generate(model, batch, tokenizer, config)
        assert reply is not None
        assert reply.text == whole.text and torch.equal(reply.speech_codes, whole.speech_codes)


def test_times_are_in_the_order_of_what_they_time(tokens, tokenizer, voice, scripted):
    scripted(THOUGHT + "yes")
    timing = events_of(tokens, tokenizer, "speech_to_speech.label_thinking", voice)[-1].timing
    assert timing is not None and timing.first_text and timing.first_code and timing.first_audio
    assert 0 < timing.prefill < timing.first_text < timing.first_code < timing.first_audio < timing.total
    after = timing.first_audio - timing.prefill - timing.thinking
    assert timing.first_audio_after_thinking == pytest.approx(after, abs=1e-3)
    assert timing.codes_rtf and timing.token2wav_rtf and timing.codes_rtf * timing.audio < timing.total


def test_what_an_answer_lacks_has_no_time(tokens, tokenizer, voice, scripted):
    scripted("yes")
    timing = events_of(tokens, tokenizer, "text_to_text", voice)[-1].timing
    assert timing is not None
    assert timing.first_code is timing.first_audio is timing.token2wav_rtf is None
    assert timing.first_text is not None and timing.thinking_ids == 0
    timing = events_of(tokens, tokenizer, "text_to_speech", None)[-1].timing
    assert timing is not None and timing.first_text is None and timing.first_audio is None and timing.first_code


def test_codes_come_in_chunks_where_nobody_makes_sound_of_them(tokens, tokenizer, scripted):
    scripted("")
    events = events_of(tokens, tokenizer, "text_to_speech")
    assert [len(event.codes) for event in events] == [18, 12, 0]


def test_one_dialogue_is_streamed_at_a_time(tokens, tokenizer):
    batch = dummy_batch(tokenizer, [task_from_name("text_to_text")] * 2)
    with pytest.raises(ValueError, match="not 2"):
        next(stream_answer(tiny_model(tokens), batch, tokenizer, DecodingConfig()))


def test_a_character_of_several_ids_is_told_when_it_is_whole(tokenizer):
    spelling, text = _Spelling(tokenizer), "a € sign, ünd 漢字 and so on, for longer than what is kept"
    pieces = [spelling.add(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text and spelling.rest() == ""
    assert "€" in pieces and pieces.count("") > 5
    assert spelling.add(tokenizer.encode("€")[0]) == "" and spelling.rest() == "\ufffd"


@pytest.mark.parametrize(
    ("pieces", "waits"),
    [
        ([], []),
        ([(1.0, 0.5)], []),
        ([(1.0, 0.5), (1.4, 1.0)], [0.0]),
        # The second comes 0.2 s late; what follows is then heard later, and the third is in time again.
        ([(1.0, 0.5), (1.7, 1.0), (2.6, 1.0)], [0.2, 0.0]),
        ([(0.0, 1.0), (0.5, 1.0), (2.5, 1.0)], [0.0, 0.5]),
    ],
)
def test_a_listener_waits_for_what_comes_late(pieces, waits):
    assert playback_waits(pieces) == pytest.approx(waits)
