"""The label sets: what can be heard in a voice, under which names. The one place that lists them.

A label set is ordered; a label's place is its class index in every metric, confusion matrix and auxiliary head, so new
labels go at the end. In text a label is written as a lower-case tag, `<happy>`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_echat.contracts import IGNORE_INDEX
from lightning_echat.tokens.id_tensors import id_tensor

LABEL_SETS: dict[str, tuple[str, ...]] = {
    "age": ("child", "adult", "old"),
    "gender": ("female", "male"),
    "emotion": ("neutral", "happy", "sad", "angry", "surprise", "fear", "disgust", "other"),
    "event": ("none", "cough", "laugh", "sneeze", "sigh", "cry", "scream", "throat_clearing", "other"),
    "style": ("daily", "news", "story", "horror", "service", "poetry", "audiobook", "other"),
}

REPLY_EMOTIONS: tuple[str, ...] = (
    "neutral",
    "happy",
    "sad",
    "sorry",
    "comforting",
    "calm",
    "surprise",
    "curious",
    "worried",
    "angry",
    "fear",
    "disgust",
    "confused",
    "shy",
)
"""Emotions that a reply may be spoken in."""


def check_label(label_set: str, label: str) -> None:
    """Raise ValueError, naming the nearest valid choice, unless `label` belongs to `label_set`."""
    if label_set not in LABEL_SETS:
        raise ValueError(f"unknown label set {label_set!r}; known: {', '.join(LABEL_SETS)}")
    known = LABEL_SETS[label_set]
    if label not in known:
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"unknown {label_set} {label!r}; {hint}")


def write_label(label: str) -> str:
    """The tag of a label as it stands in text: happy -> <happy>."""
    return f"<{label}>"


def write_label_tags(labels: Sequence[str]) -> str:
    """Labels one after the other as an understanding task writes them: happy, old -> <happy><old>."""
    return "".join(write_label(label) for label in labels)


def parse_label_tags(text: str, asked_labels: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Answer of an understanding task -> the words before the tags, and the labels among the tags.

    Tags are read in the order in which they were asked for, as two sets may share a label. A tag that is no label of
    its set is left out, which every metric counts as wrong.
    """
    words, *_ = re.split(r"<[a-z_]+>", text, maxsplit=1)
    tags = re.findall(r"<([a-z_]+)>", text)
    labels = {name: tag for name, tag in zip(asked_labels, tags, strict=False) if tag in LABEL_SETS[name]}
    return words.strip(), labels


def class_indices(labels: Mapping[str, str]) -> Tensor:
    """Labels -> [L] int64 class index per label set in the order of `LABEL_SETS`, IGNORE_INDEX where absent."""
    return id_tensor(
        [known.index(labels[name]) if name in labels else IGNORE_INDEX for name, known in LABEL_SETS.items()]
    )
