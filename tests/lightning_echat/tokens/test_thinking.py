from itertools import product
from random import Random

import pytest

from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS
from lightning_echat.tokens.thinking import (
    ThinkingFormat,
    parse_thinking,
    wrap_thinking,
    write_label_thinking,
    write_natural_thinking,
)

CHINESE_LIKE = ThinkingFormat(
    open="<t>",
    close="</t>",
    transcript="first, I hear: ",
    fields={"gender": "gender is ", "emotion": "mood is ", "age": "age is ", "event": "sound is "},
    reply_emotion="so I answer ",
    separator="; ",
    ending=" That is all.",
)


def label_space():
    """Every combination of the four audible label sets, absent included, with styles and replies in turn."""
    names = ("age", "gender", "emotion", "event")
    for number, chosen in enumerate(product(*((None, *LABEL_SETS[name]) for name in names))):
        labels = {name: label for name, label in zip(names, chosen, strict=True) if label is not None}
        if number % 3 == 0:
            labels["style"] = LABEL_SETS["style"][number % len(LABEL_SETS["style"])]
        yield labels, REPLY_EMOTIONS[number % len(REPLY_EMOTIONS)]


WORDS = "it's late; isn't it? yes: 5 o'clock"


@pytest.mark.parametrize("fmt", [ThinkingFormat(), CHINESE_LIKE], ids=["shipped", "another"])
def test_the_label_form_is_read_back_over_the_whole_label_space(fmt):
    for labels, reply in label_space():
        written = {name: label for name, label in labels.items() if name in fmt.fields}
        parsed = parse_thinking(write_label_thinking(WORDS, labels, reply, fmt) + "the reply", fmt)
        assert parsed.labels == written
        assert parsed.reply_emotion == reply
        assert parsed.transcript == WORDS
        assert parsed.reply == "the reply"
        assert parsed.well_formed


def test_the_natural_form_is_read_back_over_the_whole_label_space():
    for labels, reply in label_space():
        text = wrap_thinking(write_natural_thinking(WORDS, labels, reply)) + "the reply"
        parsed = parse_thinking(text)
        assert (parsed.labels, parsed.reply_emotion, parsed.transcript, parsed.reply) == (
            labels,
            reply,
            WORDS,
            "the reply",
        ), text
        assert parsed.well_formed


@pytest.mark.parametrize("reply", REPLY_EMOTIONS)
def test_every_reply_emotion_is_read_back_in_both_forms(reply):
    assert parse_thinking(write_label_thinking("a", {}, reply)).reply_emotion == reply
    assert parse_thinking(wrap_thinking(write_natural_thinking("a", {}, reply))).reply_emotion == reply


def test_an_empty_transcript_is_read_back():
    assert parse_thinking(write_label_thinking("", {"age": "old"}, "calm")).transcript == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just a reply",
        "<think>words: hi ; reply: <calm>",
        "words: hi ; reply: <calm><think end>ok",
        "<think end><think>words: hi ; reply: <calm>",
        "<think><think>words: hi ; reply: <calm><think end>ok",
        "<think>words: hi ; reply: <calm><think end>ok<think end>",
        "ahem <think>words: hi ; reply: <calm><think end>ok",
        "<think>words: hi<think end>ok",
        "<think>words: hi ; age: <ancient> ; reply: <calm><think end>ok",
        "<think>words: hi ; reply: <jolly><think end>ok",
        "<think>nothing of the kind<think end>ok",
        "<think>a woman says: hi.<think end>ok",
    ],
)
def test_malformed_thinking_is_called_so(text):
    assert not parse_thinking(text).well_formed


def test_an_unknown_label_is_left_out_and_the_rest_is_read():
    parsed = parse_thinking("<think>words: hi ; age: <ancient> ; emotion: <sad> ; reply: <calm><think end>ok")
    assert parsed.labels == {"emotion": "sad"}
    assert parsed.transcript == "hi"


def test_any_text_is_read_without_an_error():
    random = Random(0)
    form = write_label_thinking("find me a cafe", {"age": "old", "emotion": "sad"}, "calm") + "ok"
    natural = wrap_thinking(write_natural_thinking("find me a cafe", {"age": "old", "event": "cough"}, "calm")) + "ok"
    pieces = ["<think>", "<think end>", " ; ", "age: ", "<", ">", "reply: ", "words: ", "says:", ".", "\n", "é", ""]
    for _ in range(3000):
        text = list(random.choice((form, natural)))
        for _ in range(random.randint(1, 6)):
            start = random.randrange(len(text) + 1)
            text[start : start + random.randint(0, 8)] = random.choice(pieces)
        parsed = parse_thinking("".join(text))
        assert all(label in LABEL_SETS[name] for name, label in parsed.labels.items())
        assert parsed.reply_emotion is None or parsed.reply_emotion in REPLY_EMOTIONS
