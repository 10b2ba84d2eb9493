"""What the assistant answers: tables of wording keyed to the cues of the query, and nothing else.

A reply is: opener per emotion, address per age and gender, phrase per sound event, the sentence that answers the
question, pace phrase per age. A cue that is absent (neutral emotion, no event) adds nothing. The pace phrase tells
the age and the address the gender, so that a judge can check each cue by itself. Nothing here knows about audio.
"""

from __future__ import annotations

from collections.abc import Mapping

OPENERS: dict[str, str] = {
    "neutral": "",
    "happy": "how lovely",
    "sad": "i am sorry",
    "angry": "i understand",
    "surprise": "what a surprise",
}
"""User emotion -> how the reply begins."""

ADDRESSES: dict[tuple[str, str], str] = {
    ("child", "female"): "little miss",
    ("child", "male"): "little mister",
    ("adult", "female"): "madam",
    ("adult", "male"): "sir",
    ("old", "female"): "dear grandma",
    ("old", "male"): "dear grandpa",
}
"""(age, gender) -> how the speaker is addressed. The last word alone tells the gender."""

EVENT_PHRASES: dict[str, str] = {
    "none": "",
    "cough": "drink warm water",
    "laugh": "i like your laugh",
    "sneeze": "bless you",
    "sigh": "take a breath",
    "cry": "do not cry",
}
"""Sound event -> the sentence that takes it up."""

PACE_PHRASES: dict[str, str] = {"child": "easy peasy", "adult": "", "old": "take your time"}
"""Age -> how the reply ends."""

_REPLY_EMOTION_OF_EMOTION = {"happy": "happy", "sad": "comforting", "angry": "calm", "surprise": "curious"}
_REPLY_EMOTION_OF_EVENT = {"cough": "worried", "sneeze": "worried", "laugh": "happy", "sigh": "comforting"}


def choose_reply_emotion(labels: Mapping[str, str]) -> str:
    """The emotion to answer in. Tears outrank the voice's emotion; other events only count in a neutral voice."""
    if labels["event"] == "cry":
        return "comforting"
    if labels["emotion"] != "neutral":
        return _REPLY_EMOTION_OF_EMOTION[labels["emotion"]]
    return _REPLY_EMOTION_OF_EVENT.get(labels["event"], "neutral")


def write_reply(topic: str, *, labels: Mapping[str, str]) -> str:
    """The reply of somebody who heard words and voice.

    Args:
        topic: The sentence that answers the question, without a full stop.
        labels: age, gender, emotion and event of the query.
    """
    address = ADDRESSES[labels["age"], labels["gender"]]
    cues = [phrase for phrase in (OPENERS[labels["emotion"]], EVENT_PHRASES[labels["event"]]) if phrase]
    sentences = [f"{cues[0]}, {address}", *cues[1:], topic] if cues else [f"{address}, {topic}"]
    pace = PACE_PHRASES[labels["age"]]
    return " ".join(f"{sentence}." for sentence in [*sentences, *([pace] if pace else [])])


def neutral_reply(topic: str) -> str:
    """The reply of somebody who read the words only."""
    return f"{topic}."
