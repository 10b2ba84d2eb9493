import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.inspection import find_dialogue, inspect
from lightning_echat.data.shards import expand_shards
from lightning_echat.testing import dummy_dialogue, write_dummy_shards


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def test_a_sample_is_shown_as_the_model_will_see_it(tokens, shards, capsys):
    inspect([str(shards)], tokens=tokens, task="speech_to_speech.label_thinking", index=9)
    printed = capsys.readouterr().out
    sample = dummy_dialogue(9)
    assert "dialogue-000009 · task speech_to_speech.label_thinking · scored over text and speech codes" in printed
    assert sample.turns[0].text in printed
    assert "[input speech begin]" in printed and "mel frames ->" in printed
    assert f"* <think>words: {sample.turns[0].text}" in printed
    assert "[speech boundary] [codes" in printed or "* [codes" in printed
    assert "thinking (well formed)" in printed
    codes = sample.turns[1].speech_codes
    assert codes is not None and f"{len(codes)} speech codes ({len(codes) / 25:.2f} s at 25 Hz)" in printed


def test_totals_are_those_of_the_ids(tokens, shards, capsys):
    inspect([str(shards)], tokens=tokens, task="transcribe", index=0)
    words = dummy_dialogue(0).turns[0].text
    printed = capsys.readouterr().out
    assert f"{len(words) + 1} supervised" in printed
    assert f"answer: {words}" in printed


def test_a_sample_is_found_by_place_key_and_exchange(tokens, tmp_path, capsys):
    folder = write_dummy_shards(tmp_path, shards=2, samples_per_shard=2, exchanges=2)
    paths = expand_shards([str(folder)])
    assert find_dialogue(paths, index=3)[0].key == "dialogue-000003"
    assert find_dialogue(paths, index="dialogue-000002")[0].shard == paths[1]
    for index, clips in (("1#1", 1), ("1#2", 2), ("1", 2)):
        inspect([str(folder)], tokens=tokens, task="speech_to_text", index=index)
        assert f"of {clips} clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": 24}, "no sample 24 in 3 shards; they hold 24"),
        ({"index": "nobody"}, "no sample nobody"),
        ({"index": "0#2"}, "has 1 exchanges, not 2"),
        ({"index": "0#x"}, "number of an exchange"),
        ({"task": "speech_to_spech"}, "did you mean 'speech_to_speech'"),
        ({"max_seconds": 0.1}, "would be skipped for task .*audio too long"),
    ],
)
def test_what_cannot_be_shown_is_the_users_to_mend(tokens, shards, options, message):
    with pytest.raises(UserError, match=message):
        inspect([str(shards)], tokens=tokens, **options)
