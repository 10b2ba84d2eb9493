"""EchoMind: its scripts as an item set with a neutral voice, and its metrics.

`script_info_synthesis.json` and `script_info_human.json` hold one object a script: `case_id`, `spoken_info` (what the
voice carries), `topic`, the words, and for each of target, neutral and alternative `{type}_audio_info` with
`{type}_input_audio_file` below `audio/`. The target voice becomes the query, the neutral one the control's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_echat.contracts import SampleRejected
from lightning_echat.evaluation.text_units import count_errors, words_of

NAME = "echomind"

LABELS: dict[str, dict[str, str]] = {
    "male": {"gender": "male"},
    "female": {"gender": "female"},
    "child": {"age": "child"},
    "adult": {"age": "adult"},
    "elderly": {"age": "old"},
    "happy-toned expressive voice": {"emotion": "happy"},
    "sad-toned expressive voice": {"emotion": "sad"},
    "surprise-toned expressive voice": {"emotion": "surprise"},
    "angry-toned expressive voice": {"emotion": "angry"},
    "fear-toned expressive voice": {"emotion": "fear"},
    "disgust-toned expressive voice": {"emotion": "disgust"},
    "cough voice": {"event": "cough"},
    "sigh sound": {"event": "sigh"},
    "laughter sound": {"event": "laugh"},
    "sobbing sound": {"event": "cry"},
    "shout": {"event": "scream"},
}
"""`spoken_info` -> labels. What has no label here (whisper, pace, sounds of the surroundings) is only kept as text."""

_WORDS_FIELDS = ("speak_a", "speaker_a", "script", "text")
_NO_NEUTRAL = frozenset({"male", "female", "child", "adult", "elderly"})
CRITERIA = ("context_fit", "naturalness", "colloquialism", "speech_information_relevance")
"""C1 to C4 of its judge, 1 to 5 each."""


def item_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A script as a line of an item set. Audio paths are those below the folder of the file."""
    try:
        spoken, key = str(row["spoken_info"]), str(row["case_id"])
        audio = f"audio/{row['target_audio_info']['target_input_audio_file']}"
    except (KeyError, TypeError) as error:
        raise SampleRejected("not EchoMind", f"a script needs {error}") from error
    words = next((row[name] for name in _WORDS_FIELDS if isinstance(row.get(name), str)), "")
    found = {
        "key": re.sub(r"[./\\]", "-", f"{NAME}-{key}"),
        "audio": audio,
        "transcript": words,
        "labels": LABELS.get(spoken, {}),
        "language": "en",
        "extra": {"benchmark": NAME, "spoken_info": spoken, "topic": str(row.get("topic", ""))},
    }
    neutral = row.get("neutral_audio_info")
    if spoken not in _NO_NEUTRAL and isinstance(neutral, Mapping) and neutral.get("neutral_input_audio_file"):
        found["neutral_audio"] = f"audio/{neutral['neutral_input_audio_file']}"
    return found


def choice_accuracy(replies: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy of its multiple-choice questions, asked for as "The answer is: [A/B/C/D]"; unparsed ones are wrong."""
    chosen = [re.search(r"answer is:?\s*[\[(\"'*]*([A-D])\b", reply, flags=re.IGNORECASE) for reply in replies]
    named = [found[1].upper() if found else None for found in chosen]
    right = [option == answer.strip().upper()[:1] for option, answer in zip(named, answers, strict=True)]
    return {"items": len(named), "accuracy": _mean(right), "unparsed": _mean([option is None for option in named])}


def mean_wer(heard: Sequence[str], said: Sequence[str]) -> float:
    """Mean of the word error rates of the utterances, as EchoMind averages; NaN without any."""
    rates = [count_errors([words_of(left)], [words_of(right)]).rate for left, right in zip(heard, said, strict=True)]
    return _mean(rates)


def mean_criteria(ratings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each criterion over the replies that it was given for."""
    return {name: _mean([rating[name] for rating in ratings if name in rating]) for name in CRITERIA}


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values) if values else float("nan")
