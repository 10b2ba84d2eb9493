import json
from copy import deepcopy
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from lightning_echat.contracts import SampleRejected
from lightning_echat.data.decoding import decode_dialogue, decode_waveform, is_clipped, parse_dialogue
from lightning_echat.data.tar_samples import StoredSample
from tests.lightning_echat.data.data_helpers import SIDECAR, members, wav


def stored(sidecar=SIDECAR, *, key: str = "a", **kwargs) -> StoredSample:
    named = {name.removeprefix("a."): data for name, data in members("a", sidecar=sidecar, **kwargs).items()}
    return StoredSample(key=key, shard="s.tar", ordinal=0, members=named)


def reason_of(call) -> str:
    with pytest.raises(SampleRejected) as error:
        call()
    return error.value.reason


def test_samples_come_back_as_written():
    waveform = decode_waveform(wav(0.5))
    assert waveform.dtype == torch.float32
    assert waveform.shape == (8000,)
    assert float(waveform.abs().max()) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000])
def test_any_usual_rate_is_resampled_to_16_khz(rate):
    waveform = decode_waveform(wav(1.0, rate=rate))
    assert abs(len(waveform) - 16000) <= 1
    spectrum = torch.fft.rfft(waveform[:16000]).abs()
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_channels_are_averaged():
    assert torch.allclose(decode_waveform(wav(channels=2)), decode_waveform(wav()), atol=1e-4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable audio"),
        (b"RIFF????WAVEgarbage", "unreadable audio"),
        (wav(0.0), "empty audio"),
        (wav(399 / 16000), "audio too short"),
        (wav(199 / 8000, rate=8000), "audio too short"),
        (wav(3.0), "audio too long"),
        (wav(value=np.nan, subtype="FLOAT"), "audio not finite"),
        (wav(value=np.inf, subtype="FLOAT"), "audio not finite"),
        (wav(rate=16001), "odd sample rate"),
    ],
)
def test_audio_that_cannot_be_used_is_rejected_with_its_reason(data, reason):
    assert reason_of(lambda: decode_waveform(data, max_seconds=2.0)) == reason


def test_400_samples_are_enough():
    assert len(decode_waveform(wav(400 / 16000))) == 400


def test_clipping_is_noticed_but_single_peaks_are_not():
    assert is_clipped(torch.cat([torch.ones(50), torch.zeros(950)]))
    assert not is_clipped(torch.cat([torch.ones(1), torch.zeros(15999)]))
    assert not is_clipped(torch.full((1000,), 0.5))


def test_a_dialogue_comes_back_as_its_sidecar_says():
    sample = decode_dialogue(stored())
    assert (sample.key, sample.shard, sample.speaker) == ("a", "s.tar", "s1")
    user, assistant = sample.turns
    assert user.audio is not None and len(user.audio) == 8000
    assert (user.text, user.labels) == ("hi", {"emotion": "sad"})
    assert assistant.speech_codes is not None and assistant.speech_codes.tolist() == [1, 2]
    assert assistant.audio is None


def changed(change) -> dict:
    sidecar = deepcopy(SIDECAR)
    change(sidecar)
    return sidecar


@pytest.mark.parametrize(
    ("sidecar", "reason"),
    [
        (b"{", "broken JSON"),
        (b"\xff\xfe{", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b"[]", "broken sidecar"),
        ({}, "wrong schema version"),
        (changed(lambda s: s.update(schema=2)), "wrong schema version"),
        (changed(lambda s: s.update(turns=[])), "no turns"),
        (changed(lambda s: s.update(turns={})), "broken sidecar"),
        (changed(lambda s: s.update(turns=["hi"])), "broken sidecar"),
        (changed(lambda s: s.update(speaker=3)), "broken sidecar"),
        (changed(lambda s: s["turns"].reverse()), "role order"),
        (changed(lambda s: s["turns"].append({"role": "assistant"})), "role order"),
        (changed(lambda s: s["turns"][0].update(text=5)), "broken sidecar"),
        (changed(lambda s: s["turns"][0].update(seconds=True)), "broken sidecar"),
        (changed(lambda s: s["turns"][0].update(labels={"mood": "sad"})), "unknown label set"),
        (changed(lambda s: s["turns"][0].update(labels={"emotion": "comforting"})), "unknown label"),
        (changed(lambda s: s["turns"][0].update(labels={"emotion": ["sad"]})), "unknown label"),
        (changed(lambda s: s["turns"][1].update(labels={"emotion": "gloomy"})), "unknown label"),
        (changed(lambda s: s["turns"][0].update(audio="9.wav")), "missing member"),
        (changed(lambda s: s["turns"][0].update(audio="../../etc/passwd")), "missing member"),
        (changed(lambda s: s["turns"][1].update(codes=[1, 2.5])), "bad speech codes"),
        (changed(lambda s: s["turns"][1].update(codes=[True])), "bad speech codes"),
        (changed(lambda s: s["turns"][1].update(codes=[2**70])), "bad speech codes"),
        (changed(lambda s: s["turns"][1].update(codes=[-1])), "bad speech codes"),
    ],
)
def test_a_broken_sidecar_is_rejected_with_its_reason(sidecar, reason):
    assert reason_of(lambda: parse_dialogue(stored(sidecar))) == reason


def test_a_dialogue_without_sidecar_is_rejected():
    whole = stored()
    bare = replace(whole, members={name: data for name, data in whole.members.items() if name != "json"})
    assert reason_of(lambda: parse_dialogue(bare)) == "no sidecar"


@pytest.mark.parametrize("key", ["../a", "a/b", "/etc/passwd", "a\\b", "a\nb", "\x1b[2Ja"])
def test_a_key_that_is_no_plain_name_is_rejected(key):
    assert reason_of(lambda: parse_dialogue(stored(key=key))) == "bad key"


def test_a_mutated_sidecar_is_read_or_rejected_but_never_crashes():
    random = Random(0)
    good = json.dumps(SIDECAR)
    values = ["null", "-1", "1e999", '"x"', "[]", "{}", "true", "[[1]]", '{"a": null}', "NaN", ""]
    kept = rejected = 0
    for _ in range(2000):
        text = good
        for _ in range(random.randint(1, 3)):
            start = random.randrange(len(text))
            stop = text.find(random.choice(',:}]"'), start)
            text = text[:start] + random.choice(values) + text[stop if stop > 0 else start :]
        try:
            decode_dialogue(stored(text.encode()))
            kept += 1
        except SampleRejected:
            rejected += 1
    assert kept + rejected == 2000
    assert rejected > 1000


def test_mutated_audio_is_read_or_rejected_but_never_crashes():
    random = Random(0)
    good = wav(0.1)
    for _ in range(500):
        data = bytearray(good)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(60)] = random.randrange(256)
        try:
            waveform = decode_waveform(bytes(data[: random.randrange(1, len(data))]))
            assert torch.isfinite(waveform).all() and len(waveform) > 0
        except SampleRejected:
            pass


def test_prefixes_share_the_bytes():
    sidecar = changed(lambda s: s["turns"].extend(deepcopy(s["turns"])))
    parsed = parse_dialogue(stored(sidecar))
    first, second = parsed.prefixes()
    assert [len(p.sample.turns) for p in (first, second)] == [2, 4]
    assert first.audio[0] is second.audio[0]
