import pytest

from lightning_echat.contracts import SampleRejected
from lightning_echat.data.reference_tags import LABEL_SPELLINGS, REPLY_EMOTION, LabelReader, read_task
from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS

LABELLED = {
    "<TRANSCRIBE> <EMOTION>": ["emotion"],
    "<TRANSCRIBE> <STYLE>": ["style"],
    "<TRANSCRIBE> <CAPTION>": ["event"],
    "<TRANSCRIBE> <GENDER>": ["gender"],
    "<TRANSCRIBE> <AGE>": ["age"],
    "<TRANSCRIBE> <AGE> <GENDER>": ["age", "gender"],
    "<TRANSCRIBE> <STYLE> <AGE> <GENDER>": ["style", "age", "gender"],
    "<TRANSCRIBE> <CAPTION> <AGE> <GENDER>": ["event", "age", "gender"],
    "<TRANSCRIBE> <EMOTION> <AGE> <GENDER>": ["emotion", "age", "gender"],
    "<TRANSCRIBE> <AGE> <GENDER> <STYLE> <EMOTION>": ["age", "gender", "style", "emotion"],
    "<TRANSCRIBE> <CAPTION> <AGE> <GENDER> <EMOTION> <STYLE>": ["event", "age", "gender", "emotion", "style"],
    "<EMOTION>": ["emotion"],
    "<STYLE>": ["style"],
    "<CAPTION>": ["event"],
    "<CAPTION> <AUDIO>": ["event"],
    "<GENDER>": ["gender"],
    "<AGE>": ["age"],
    "<AGE> <GENDER>": ["age", "gender"],
    "<STYLE> <AGE> <GENDER>": ["style", "age", "gender"],
    "<TRANSCRIBE>": [],
    "<TRANSCRIBE> <ALIGN>": [],
    "<TRANSCRIBE> <PUNCTUATION>": [],
}
CONVERSATIONS = {
    "<TRANSCRIBE> <S2TCHAT>": "speech_to_text",
    "<S2TCHAT>": "speech_to_text",
    "<S2TCHAT_FAKE>": "speech_to_text",
    "<S2TCHAT> <THINKER>": "speech_to_text",
    "<S2TCHAT> <TEXT2TOKEN>": "speech_to_speech",
    "<Speech2TEXTandTOKEN>": "speech_to_speech",
    "<S2TCHAT> <TEXT2TOKEN> <EMOTION>": "speech_to_speech",
    "<S2TCHAT> <TEXT2TOKEN> <THINK>": "speech_to_speech",
    "<S2TCHAT> <TEXT2TOKEN> <STREAMING>": "speech_to_speech",
    "<S2TCHAT> <TEXT2TOKEN> <HISTORY>": "speech_to_speech",
    "<TEXT2TOKEN>": "text_to_speech",
    "TEXT2TOKEN": "text_to_speech",
    "<TEXT2TOKEN> <STREAMING>": "text_to_speech",
    "<TEXT2TEXT>": "text_to_text",
}
SPELLED = {
    "emotion": "sad anger angry neutral happy surprise fear disgust other",
    "age": "child adult old youth middle_age middle",
    "gender": "male female",
    "event": "laugh cough cry screaming sigh throat_clearing sneeze other none null",
    "style": "新闻科普 恐怖故事 童话故事 客服 诗歌散文 有声书 日常口语 其他 朗读 科普百科 悬疑恐怖 诗歌 散文 "
    "武侠评书 小说 历史 科幻 对话 口语 幽默",
    REPLY_EMOTION: "anger fear happy surprise sad disgust confused embarrassed curious worried shy sorry neutral "
    "愉悦 抱歉 开心 愤怒 惊讶 厌恶 悲伤 害怕 哭腔 安慰鼓励 中立",
}


@pytest.mark.parametrize("tag", LABELLED)
def test_every_task_of_understanding_asks_for_its_labels_in_order(tag):
    for spelled in (tag, tag.lower(), tag.replace("> <", "><")):
        task = read_task(spelled)
        assert (task.family, list(task.labels), task.words) == ("understand", LABELLED[tag], "<TRANSCRIBE>" in tag)


@pytest.mark.parametrize("tag", CONVERSATIONS)
def test_every_conversation_serves_the_task_of_its_kind(tag):
    assert read_task(tag) == read_task(tag.lower())
    assert read_task(tag).serves.startswith(CONVERSATIONS[tag])
    assert read_task(tag).speaks == CONVERSATIONS[tag].endswith("to_speech")


@pytest.mark.parametrize("tag", ["<SING>", "<TRANSCRIBE> <SING>", "sing", "<AUDIO>", "<TRANSCRIBE> <TEXT2TOKEN>", ""])
def test_an_unknown_task_is_rejected_under_its_name(tag):
    """Taken for a transcription, as the public implementation does, it would be learned as one."""
    with pytest.raises(SampleRejected, match=f"unknown task {tag}") as error:
        read_task(tag)
    assert error.value.reason == f"unknown task {tag}"


@pytest.mark.parametrize("label_set", SPELLED)
def test_every_spelling_is_a_label_in_either_case_with_and_without_brackets(label_set):
    reader = LabelReader()
    labels = REPLY_EMOTIONS if label_set == REPLY_EMOTION else LABEL_SETS[label_set]
    for spelling in SPELLED[label_set].split():
        read = {
            reader.read(label_set, form) for form in (spelling, spelling.upper(), f"<{spelling}>", f" < {spelling} >")
        }
        assert len(read) == 1
        assert read <= set(labels)
    assert reader.take_unknown() == []


def test_the_table_only_names_labels_that_exist():
    for label_set, labels in LABEL_SPELLINGS.items():
        assert set(labels) <= set(REPLY_EMOTIONS if label_set == REPLY_EMOTION else LABEL_SETS[label_set])


def test_labels_mean_what_they_say():
    reader = LabelReader()
    assert reader.read("emotion", "<ANGER>") == "angry"
    assert reader.read("age", "<YOUTH>") == "adult"
    assert reader.read("event", "throat clearing") == "throat_clearing"
    assert reader.read("event", "<NONE>") == "none"
    assert reader.read("style", "<武侠评书>") == "audiobook"
    assert reader.read(REPLY_EMOTION, "<安慰鼓励>") == "comforting"


def test_unknown_labels_are_named_and_absent_ones_are_not():
    reader = LabelReader()
    assert [reader.read("emotion", spelled) for spelled in (None, "", "<NONE>", "<&&>", "<null>")] == [None] * 5
    assert reader.take_unknown() == []
    assert reader.read("emotion", "<Bored>") is None
    assert reader.take_unknown() == ["emotion <bored>"]
    assert reader.take_unknown() == []


def test_a_users_own_spelling_is_read_like_the_known_ones():
    assert LabelReader(extra={"event": {"Church Bells": "other"}}).read("event", "<church_bells>") == "other"


def test_tags_are_told_apart_by_place_and_then_by_meaning():
    reader = LabelReader()
    assert reader.read_tags(["other", "other"], ["emotion", "event"]) == {"emotion": "other", "event": "other"}
    assert reader.read_tags(["MALE", "OLD"], ["age", "gender"]) == {"age": "old", "gender": "male"}
    assert reader.read_tags(["OLD", "odd"], ["age", "gender"]) == {"age": "old"}
    assert reader.take_unknown() == ["gender <odd>"]
