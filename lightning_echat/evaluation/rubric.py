"""The rubric judge: scores a reply by its wording alone, without a model, the same on every machine.

A rubric (a YAML file) lists claims: wording that tells what the writer of the reply believes to have heard. "sir"
claims an adult man, "bless you" a sneeze. A cue of the query that some claim takes up is honoured, a cue that a claim
takes for another is contradicted, and every other cue is missed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.command_errors import nearest
from lightning_echat.contracts import UserError
from lightning_echat.evaluation.items import CUES, NO_CUE, categories_of, present_cues
from lightning_echat.evaluation.judging import JudgedReply, JudgeScore
from lightning_echat.metrics import normalize_english
from lightning_echat.tokens.paralinguistics import LABEL_SETS, check_label

RUBRICS = Path(__file__).parent / "rubrics"
"""Where the rubrics that come with the package stand."""

DEFAULT_RUBRIC = "echat_en_v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Wording and what it claims to have heard.

    Attributes:
        name: What the wording does, for people.
        phrases: The wording, in words as `normalize_english` writes them.
        says: Cue -> labels that the wording takes up.
        fits: Cue -> labels that the wording suits without taking them up.
    """

    name: str
    phrases: tuple[str, ...]
    says: Mapping[str, tuple[str, ...]]
    fits: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """A rubric as its file holds it; see `rubrics/echat_en_v1.yaml` for the meaning of each part."""

    name: str
    version: int
    honoured: float
    missed: float
    contradicted: float
    contradiction_factor: float
    contractions: dict[str, str]
    claims: tuple[Claim, ...]
    function_words: frozenset[str]
    sha256: str

    @property
    def identifier(self) -> str:
        """Name and version, as it stands beside every score."""
        return f"{self.name}_v{self.version}"


def load_rubric(rubric: str | Path = DEFAULT_RUBRIC) -> Rubric:
    """Read a rubric: the name of one that comes with the package, or the path of a YAML file.

    Raises:
        UserError: The rubric is not there, is malformed, or leaves a label without any wording that honours it.
    """
    shipped = {path.stem: path for path in RUBRICS.glob("*.yaml")}
    path = shipped.get(str(rubric), Path(rubric))
    if not path.is_file():
        raise UserError(
            f"no rubric {str(rubric)!r}; give a YAML file or one of: {', '.join(sorted(shipped))}"
            f"{nearest(str(rubric), shipped)}"
        )
    raw = path.read_bytes()
    try:
        loaded = _rubric_from(yaml.safe_load(raw), sha256=hashlib.sha256(raw).hexdigest())
    except KeyError as error:
        raise UserError(f"rubric {path}: {error} is missing") from error
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"rubric {path}: {' '.join(str(error).split())}") from error
    unheard = [f"{cue} {label}" for cue, label in _cues_to_honour() if not _is_honourable(loaded, cue, label)]
    if unheard:
        raise UserError(f"rubric {path}: no claim says {', '.join(unheard)}, so no reply could honour it")
    return loaded


class RubricJudge:
    """Scores replies by a rubric. A reply is never read by a model, so that a score can be checked by hand.

    Each cue of the query is worth the rubric's `honoured`, `missed` or `contradicted` points; a missed cue earns its
    points only where the reply takes up a content word of the query. The score of a category is the mean over its cues
    (its own one, or all for `multi` and for the total), times `contradiction_factor` for each cue, of this category or
    any other, that the reply contradicts. To claim an emotion or a sound event where there is none is a contradiction.
    """

    def __init__(self, rubric: str | Path = DEFAULT_RUBRIC) -> None:
        self.rubric = load_rubric(rubric)
        self._claim_of = {phrase: claim for claim in self.rubric.claims for phrase in claim.phrases}
        # Longest first: an alternation takes its first match, and its words are then used up.
        phrases = sorted(self._claim_of, key=len, reverse=True)
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b")

    @property
    def name(self) -> str:
        """How scores name this judge: rubric/echat_en_v1."""
        return f"rubric/{self.rubric.identifier}"

    def score_all(self, replies: Sequence[JudgedReply], *, folder: Path) -> list[JudgeScore | None]:
        """Score every reply; nothing is kept in `folder`, as scoring again gives the same and costs nothing."""
        return [
            self.score(said.transcript, labels=said.labels, reply=said.reply, categories=said.categories)
            for said in replies
        ]

    def score(
        self, transcript: str, *, labels: Mapping[str, str], reply: str, categories: Sequence[str] | None = None
    ) -> JudgeScore:
        """Score `reply` to a query with these words, spoken by a voice with these labels.

        `categories` are those of the item; without them it counts in each whose cue it carries.
        """
        phrases = self._pattern.findall(self._words(reply))
        verdicts = {cue: self._verdict(cue, labels[cue], phrases) for cue in CUES if cue in labels}
        on_topic = self._is_on_topic(transcript, reply)
        cues = present_cues(labels)
        points = {
            "honoured": self.rubric.honoured,
            "missed": self.rubric.missed if on_topic else 0.0,
            "contradicted": self.rubric.contradicted,
        }
        per_dimension = {
            cue: points[verdict] for cue, verdict in verdicts.items() if cue in cues or verdict == "contradicted"
        }
        factor = self.rubric.contradiction_factor ** sum(verdict == "contradicted" for verdict in verdicts.values())

        def of(judged: Iterable[str]) -> float:
            values = [per_dimension[cue] for cue in judged]
            return factor * sum(values) / len(values) if values else math.nan

        judged = categories_of(labels) if categories is None else categories
        return JudgeScore(
            total=of(cues),
            by_category={name: of(cues if name == "multi" else [name]) for name in judged},
            per_dimension=per_dimension,
            verdicts=verdicts,
            phrases=phrases,
            on_topic=on_topic,
        )

    def _verdict(self, cue: str, label: str, phrases: list[str]) -> str:
        """honoured, contradicted or missed; `silent` where there is nothing to honour and nothing was claimed."""
        if label == "other":
            return "silent"  # Something was heard that no claim can name: it can neither be met nor missed.
        claims = [self._claim_of[phrase] for phrase in phrases]
        about = [claim for claim in claims if cue in claim.says]
        if any(label not in (*claim.says[cue], *claim.fits.get(cue, ())) for claim in about):
            return "contradicted"
        if any(label in claim.says[cue] for claim in about):
            return "honoured"
        return "silent" if label in NO_CUE.get(cue, frozenset()) else "missed"

    def _is_on_topic(self, transcript: str, reply: str) -> bool:
        """Whether the reply takes up a content word of the query. Crude: it needs the same word."""
        asked = set(self._words(transcript).split()) - self.rubric.function_words
        answered = set(self._words(reply).split())
        return bool(asked & answered) if asked else bool(answered)

    def _words(self, text: str) -> str:
        return _words(text, self.rubric.contractions)


def _words(text: str, contractions: dict[str, str]) -> str:
    """Normalised words with contractions written out (I'm -> i am), so that a phrase is listed once."""
    text = text.lower().replace("’", "'")
    return normalize_english(re.sub(r"[a-z]+(?:'[a-z]+)+", lambda match: contractions.get(match[0], match[0]), text))


def _rubric_from(content: Any, *, sha256: str) -> Rubric:
    """The rubric that the content of a file describes. Raises KeyError, TypeError or ValueError where it does not."""
    contractions = {str(short): str(long) for short, long in content["contractions"].items()}
    claims = tuple(_claim_from(claim, contractions) for claim in content["claims"])
    seen: dict[str, str] = {}
    for claim in claims:
        for phrase in claim.phrases:
            if phrase in seen:
                raise ValueError(f"{phrase!r} stands twice, under {seen[phrase]!r} and {claim.name!r}")
            seen[phrase] = claim.name
    scores = content["scores"]
    return Rubric(
        name=str(content["name"]),
        version=int(content["version"]),
        honoured=float(scores["honoured"]),
        missed=float(scores["missed"]),
        contradicted=float(scores["contradicted"]),
        contradiction_factor=float(content["contradiction_factor"]),
        contractions=contractions,
        claims=claims,
        function_words=frozenset(_word(word) for word in content["function_words"]),
        sha256=sha256,
    )


def _claim_from(content: Mapping[str, Any], contractions: dict[str, str]) -> Claim:
    says, fits = (
        {str(cue): tuple(_word(label) for label in labels) for cue, labels in content.get(key, {}).items()}
        for key in ("says", "fits")
    )
    for cue, labels in (*says.items(), *fits.items()):
        for label in labels:
            check_label(cue, label)
    phrases = tuple(_words(str(phrase), contractions) for phrase in content["phrases"])
    if not all(phrases):
        raise ValueError(f"claim {content['name']!r} has an empty phrase")
    return Claim(name=str(content["name"]), phrases=phrases, says=says, fits=fits)


def _word(value: Any) -> str:
    """`value` itself. YAML reads a bare yes, no or on as a truth value; who means the word quotes it."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a word; quote it")
    return value


def _cues_to_honour() -> list[tuple[str, str]]:
    """Every label that a reply can be held to."""
    return [(cue, label) for cue in CUES for label in LABEL_SETS[cue] if present_cues({cue: label})]


def _is_honourable(rubric: Rubric, cue: str, label: str) -> bool:
    return any(label in claim.says.get(cue, ()) for claim in rubric.claims)
