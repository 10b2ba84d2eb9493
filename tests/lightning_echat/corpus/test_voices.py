import importlib

import numpy as np
import pytest

from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.corpus.acoustics import (
    PEAK,
    SILENCE,
    coloured_noise,
    draw_room,
    limit_peak,
    record,
    rms_db,
    shelf,
    to_sample_rate,
    trim_silence,
)
from lightning_echat.corpus.dialogues import EVENTS, Split, speaker_of, voice_query, voice_reply, write_script
from lightning_echat.corpus.replies import choose_reply_emotion, write_reply
from lightning_echat.corpus.sound_events import make_event
from lightning_echat.corpus.voices import draw_speaker, express, user_prosody

TEXT = "could you find the quiet cafe"


def median_f0(samples: np.ndarray) -> float:
    """Hz, by autocorrelation of the voiced 40 ms frames."""
    found = []
    for start in range(0, samples.size - 640, 320):
        frame = samples[start : start + 640] - samples[start : start + 640].mean()
        correlation = np.correlate(frame, frame, "full")[639:] / (640 - np.arange(640))
        lag = 33 + int(np.argmax(correlation[33:228]))
        if frame @ frame > 640 * 1e-5 and correlation[lag] > 0.6 * correlation[0]:
            found.append(SAMPLE_RATE / lag)
    return float(np.median(found))


def say(espeak, speaker, emotion="neutral", **labels):
    rng = np.random.default_rng(3)
    cues = {"age": speaker.age, "gender": speaker.gender, "emotion": emotion, "event": "none", **labels}
    split = Split(name="train", number=0, dialogues=1, speakers=1)
    exchange = write_script(split, index=0, seed=0).exchanges[0]
    emotion = choose_reply_emotion(cues)
    exchange = type(exchange)(
        query=TEXT, labels=cues, reply=write_reply("let us go", labels=cues), reply_emotion=emotion, thinking=None
    )
    return voice_query(exchange, speaker=speaker, rng=rng, espeak=espeak), exchange


def speaker(age, gender, number=0, klatt=False):
    return draw_speaker(np.random.default_rng(number), name="x", age=age, gender=gender, klatt=klatt)


def test_an_utterance_does_not_depend_on_what_was_said_before(espeak):
    lines = express(speaker("old", "female"), prosody=user_prosody("sad", intensity=1.2)).lines
    first = espeak.speak(TEXT, voice_lines=lines, rate=150, noise_seed=5)
    espeak.speak("something else", voice_lines=["language en-gb", "klatt 2", "flutter 9"], rate=200, noise_seed=1)
    assert np.array_equal(first, espeak.speak(TEXT, voice_lines=lines, rate=150, noise_seed=5))


def test_a_missing_synthesizer_is_one_line_that_says_what_to_install(monkeypatch):
    from lightning_echat.corpus.espeak import Espeak

    def refuse(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UserError, match=r"pip install 'lightning-echat\[synthesis\]'"):
        Espeak()


def test_pitch_orders_men_women_and_children(espeak):
    man, woman, girl = (
        np.median([median_f0(say(espeak, speaker(age, gender, number))[0]) for number in range(4)])
        for age, gender in (("adult", "male"), ("adult", "female"), ("child", "female"))
    )
    assert man < 145 < woman < 250 < girl


def test_old_speakers_are_slower_and_sadness_slows_lowers_and_quiets(espeak):
    adult, old = (np.mean([say(espeak, speaker(age, "male", n))[0].size for n in range(4)]) for age in ("adult", "old"))
    assert old > 1.2 * adult
    voices = [speaker("adult", "female", number) for number in range(4)]
    neutral, sad = ([say(espeak, voice, emotion)[0] for voice in voices] for emotion in ("neutral", "sad"))
    assert all(s.size > 1.2 * n.size and rms_db(s) < rms_db(n) - 2 for n, s in zip(neutral, sad, strict=True))
    assert np.median([median_f0(s) for s in sad]) < np.median([median_f0(n) for n in neutral])


def test_the_same_voice_type_is_never_in_training_and_in_the_held_out_types():
    train = Split(name="train", number=0, dialogues=10, speakers=60)
    held_out = Split(name="held_out_types", number=3, dialogues=10, speakers=60, klatt=True)
    types = [{speaker_of(split, index=i, seed=0).voice_type for i in range(60)} for split in (train, held_out)]
    assert len(types[0]) == len(types[1]) == 6
    assert not types[0] & types[1]


def test_speech_begins_and_ends_without_silence_and_never_clips(espeak):
    for index in range(12):
        split = Split(name="train", number=0, dialogues=12, speakers=12)
        exchange = write_script(split, index=index, seed=1).exchanges[0]
        rng = np.random.default_rng(index)
        asked = voice_query(exchange, speaker=speaker_of(split, index=index, seed=1), rng=rng, espeak=espeak)
        answered = voice_reply(exchange, rng=rng, espeak=espeak)
        for audio in (asked, answered):
            assert audio.dtype == np.float32
            assert np.abs(audio).max() <= PEAK + 1e-6
            loudness = np.abs(audio)
            assert loudness[:1600].max() > 2 * SILENCE
            assert loudness[-1600:].max() > SILENCE
        assert 0.5 < asked.size / SAMPLE_RATE < 7
        assert 1 < answered.size / SAMPLE_RATE < 6


@pytest.mark.parametrize("event", EVENTS)
def test_a_sound_event_makes_the_query_longer_and_is_heard(espeak, event):
    voice = speaker("adult", "female")
    plain, with_event = say(espeak, voice)[0], say(espeak, voice, event=event)[0]
    assert with_event.size > plain.size + 0.2 * SAMPLE_RATE


@pytest.mark.parametrize("event", EVENTS)
def test_sound_events_are_deterministic_finite_and_do_not_clip(event):
    for number in range(5):
        makes = [make_event(event, f0=200.0, formant_scale=1.1, rng=np.random.default_rng(number)) for _ in range(2)]
        assert np.array_equal(makes[0], makes[1])
        assert np.isfinite(makes[0]).all()
        assert np.abs(makes[0]).max() == pytest.approx(1.0)
        assert 0.2 <= makes[0].size / SAMPLE_RATE <= 2.5
        assert not (np.abs(makes[0]) > 0.999).sum() > 4


def test_trimming_keeps_everything_above_the_threshold():
    samples = np.concatenate([np.zeros(500), [0.5, -0.001, 0.3], np.full(300, 1e-3)]).astype(np.float32)
    assert trim_silence(samples).tolist() == pytest.approx([0.5, -0.001, 0.3])
    assert trim_silence(np.zeros(10, np.float32)).size == 0


def test_resampling_keeps_a_tone_at_its_pitch_and_level():
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(22_050) / 22_050).astype(np.float32)
    resampled = to_sample_rate(tone)
    assert resampled.size == SAMPLE_RATE
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert np.abs(resampled - expected)[200:-200].max() < 0.01


@pytest.mark.parametrize(("high", "inside", "outside"), [(True, 6000, 60), (False, 40, 6000)])
def test_a_shelf_changes_its_side_only(high, inside, outside):
    for frequency, expected in ((inside, 6.0), (outside, 0.0)):
        tone = np.sin(2 * np.pi * frequency * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
        shaped = shelf(tone, corner_hz=600.0, gain_db=6.0, high=high)
        assert rms_db(shaped) - rms_db(tone) == pytest.approx(expected, abs=1.2)


def test_a_room_keeps_the_level_and_adds_the_noise_asked_for():
    rng = np.random.default_rng(0)
    tone = 0.1 * np.sin(2 * np.pi * 500 * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
    heard = record(tone, room=draw_room(rng, shelf_db=(5.0, -5.0)), rng=rng)
    assert rms_db(heard) == pytest.approx(rms_db(tone), abs=0.5)
    assert np.sqrt(np.square(coloured_noise(4001, colour=1.0, rng=rng)).mean()) == pytest.approx(1.0, rel=1e-3)
    assert limit_peak(np.array([2.0, -1.0], np.float32)).tolist() == pytest.approx([PEAK, -PEAK / 2])
