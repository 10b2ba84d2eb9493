import pytest

from lightning_echat.contracts import SampleRejected
from lightning_echat.data.reference_rows import ReferenceFields, RowConverter, read_extra
from lightning_echat.data.reference_tags import LabelReader, read_task


def convert(tag, values, extra=None, *, audio=("wav",), **options):
    fields = ReferenceFields(
        values=values, extra=extra or {}, audio={name: lambda name=name: name.encode() for name in audio}
    )
    return RowConverter(labels=LabelReader(), **options).convert(fields, read_task(tag))


def turns(*args, **kwargs):
    return convert(*args, **kwargs)[0]["turns"]


def test_a_transcript_with_tags_is_words_and_labels():
    (turn,) = turns("<TRANSCRIBE> <AGE> <GENDER>", {"txt": "你好 < Old ><MALE>\n"})
    assert turn == {"role": "user", "text": "你好", "labels": {"age": "old", "gender": "male"}, "audio": "0.audio"}


def test_a_leading_tag_of_a_label_task_is_the_label_not_an_empty_text():
    """The public implementation strips it, and trains such rows on nothing."""
    (turn,) = turns("<EMOTION>", {"txt": "<HAPPY>"})
    assert turn["labels"] == {"emotion": "happy"}
    assert turns("<EMOTION>", {"txt": "happy"})[0]["labels"] == {"emotion": "happy"}


def test_times_of_an_alignment_are_left_out_and_its_words_kept():
    (turn,) = turns("<TRANSCRIBE> <ALIGN>", {"txt": "你<0.1, 0.3>好<0.3, 0.5>hello<0.5, 0.9>world<1.0, 1.2>"})
    assert turn["text"] == "你好hello world"


def test_a_spoken_reply_has_words_heard_labels_thinking_and_codes():
    extra = {
        "question": "where",
        "age": "<CHILD>",
        "gender": "female",
        "caption": "<COUGH>",
        "q_emotion": "SAD",
        "think_str": "a girl\nasks",
        "speech_token": [3, 4095],
    }
    user, reply = turns("<S2TCHAT> <TEXT2TOKEN> <THINK>", {"txt": "<安慰鼓励>here"}, extra)
    assert user["text"] == "where"
    assert user["labels"] == {"age": "child", "gender": "female", "event": "cough", "emotion": "sad"}
    assert reply == {
        "role": "assistant",
        "text": "here",
        "labels": {"emotion": "comforting"},
        "thinking": "a girl asks",
        "codes": [3, 4095],
    }
    assert turns("<S2TCHAT>", {"txt": "a"}, {"q_txt": "heard", "question": "asked"})[0]["text"] == "heard"


def test_thinking_that_stands_in_the_text_is_taken_out_of_it():
    reply = turns("<S2TCHAT> <THINKER>", {"txt": "<think>a man asks<think end><开心>yes"})[1]
    assert (reply["text"], reply["thinking"], reply["labels"]) == ("yes", "a man asks", {"emotion": "happy"})


def test_replies_without_a_tag_get_an_emotion_only_when_one_is_asked_for():
    assert "labels" not in turns("<S2TCHAT>", {"txt": "yes"})[1]
    assert turns("<S2TCHAT>", {"txt": "yes"}, reply_emotion="neutral")[1]["labels"] == {"emotion": "neutral"}


def test_a_transcript_and_a_reply_in_one_text_are_two_turns():
    user, reply = turns("<TRANSCRIBE> <S2TCHAT>", {"txt": "where<开始回答>here"})
    assert (user["text"], reply["text"]) == ("where", "here")


def test_earlier_turns_come_first_with_their_own_audio_text_and_codes():
    values = {"txt": "third", "txt_1": "<抱歉>first", "txt_2": "second"}
    extra = {"age": "OLD", "q_emotion": "SAD", "speech_token": [3], "speech_token_1": [1], "question": "q"}
    sidecar, members = convert("<S2TCHAT> <TEXT2TOKEN>", values, extra, audio=("wav_2", "wav", "wav_1"))
    replies = sidecar["turns"][1::2]
    assert [turn["text"] for turn in replies] == ["first", "second", "third"]
    assert [turn.get("codes") for turn in replies] == [[1], None, [3]]
    assert replies[0]["labels"] == {"emotion": "sorry"}
    assert members == {"0.audio": b"wav_1", "2.audio": b"wav_2", "4.audio": b"wav"}
    # Whose voice it is holds throughout, what it sounded like only for the last query.
    assert [turn["labels"] for turn in sidecar["turns"][::2]] == [{"age": "old"}] * 2 + [
        {"age": "old", "emotion": "sad"}
    ]


def test_written_tasks_look_at_no_audio():
    asked, spoken = turns("<TEXT2TOKEN>", {"txt": "say this"}, {"speech_token": [1]}, audio=())
    assert asked == {"role": "user", "text": "say this"}
    assert (spoken["text"], spoken["codes"]) == ("say this", [1])
    asked, written = turns("<TEXT2TEXT>", {"txt": "b"}, {"question": "a"}, audio=())
    assert (asked["text"], written["text"]) == ("a", "b")


def test_speakers_are_kept_where_they_have_a_name():
    assert convert("<TRANSCRIBE>", {"txt": "a", "speaker": "anna"})[0]["speaker"] == "anna"
    assert "speaker" not in convert("<TRANSCRIBE>", {"txt": "a", "speaker": "none"})[0]


SPEAK = "<S2TCHAT> <TEXT2TOKEN>"


@pytest.mark.parametrize(
    ("reason", "tag", "values", "extra", "audio"),
    [
        ("missing audio", "<TRANSCRIBE>", {"txt": "a"}, {}, []),
        ("missing audio", SPEAK, {"txt": "a", "txt_1": "b"}, {"speech_token": [1]}, ["wav"]),
        ("gap in history", SPEAK, {"txt": "a", "txt_2": "b"}, {"speech_token": [1]}, ["wav", "wav_2"]),
        ("mismatched speech codes", SPEAK, {"txt": "a"}, {"speech_token": [1], "speech_token_1": [1]}, ["wav"]),
        ("no speech codes", SPEAK, {"txt": "a"}, {"speech_token": []}, ["wav"]),
        ("no speech codes", "<TEXT2TOKEN>", {"txt": "a"}, {}, []),
        ("bad speech codes", SPEAK, {"txt": "a"}, {"speech_token": [1, 4096]}, ["wav"]),
        ("bad speech codes", SPEAK, {"txt": "a"}, {"speech_token": [True]}, ["wav"]),
        ("bad speech codes", SPEAK, {"txt": "a"}, {"speech_token": "1 2"}, ["wav"]),
        ("bad speech codes", SPEAK, {"txt": "a"}, {"speech_token": [64], "speech_token_num": 65}, ["wav"]),
        ("no transcript", "<TRANSCRIBE> <EMOTION>", {"txt": "<HAPPY>"}, {}, ["wav"]),
        ("no known label", "<EMOTION>", {"txt": "<BORED>"}, {}, ["wav"]),
        ("no reply text", "<S2TCHAT>", {"txt": "<HAPPY>"}, {}, ["wav"]),
        ("no answer mark", "<TRANSCRIBE> <S2TCHAT>", {"txt": "a"}, {}, ["wav"]),
        ("no query text", "<TEXT2TEXT>", {"txt": "a"}, {}, []),
        ("broken row", "<S2TCHAT>", {"txt": 7}, {}, ["wav"]),
    ],
)
def test_rows_that_lack_what_their_task_needs_are_rejected(reason, tag, values, extra, audio):
    with pytest.raises(SampleRejected) as error:
        convert(tag, values, extra, audio=audio)
    assert error.value.reason == reason


def test_extra_is_an_object_or_the_text_of_one():
    assert read_extra(b'{"age": "OLD"}') == read_extra({"age": "OLD"}) == {"age": "OLD"}
    assert read_extra(None) == read_extra("") == {}
    for broken, reason in (("{", "broken JSON"), ("[1]", "broken row"), (3, "broken row")):
        with pytest.raises(SampleRejected) as error:
            read_extra(broken)
        assert error.value.reason == reason
