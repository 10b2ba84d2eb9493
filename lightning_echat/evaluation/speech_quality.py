"""What is measured of speech that was made: words, length, likeness to a reference, emotion, predicted quality.

Everything takes waveforms at one rate and gives figures by name, NaN where there is no data. Word errors are those of a
recogniser (`recognisers`), so a figure belongs with the same recogniser's figure on recorded speech beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jiwer import process_characters, process_words
from scipy.spatial.distance import cdist
from torch import Tensor
from torchaudio.functional import resample

from lightning_echat.contracts import UserError
from lightning_echat.metrics import normalize_english
from lightning_echat.nn.token2wav.mel import LogMelSpectrogram, MelConfig

_DECIBELS = 20 / math.log(10)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordErrors:
    """Errors of one utterance after `normalize_english`.

    Attributes:
        errors, words: Substituted, deleted and inserted words; words of the reference.
        character_errors, characters: The same of characters.
    """

    errors: int
    words: int
    character_errors: int
    characters: int


def word_errors(said: str, heard: str) -> WordErrors:
    """Compare what was to be said with what was heard."""
    said, heard = normalize_english(said), normalize_english(heard)
    if not said:
        return WordErrors(errors=len(heard.split()), words=0, character_errors=len(heard), characters=0)
    words, characters = process_words(said, heard), process_characters(said, heard)
    return WordErrors(
        errors=words.substitutions + words.deletions + words.insertions,
        words=words.hits + words.substitutions + words.deletions,
        character_errors=characters.substitutions + characters.deletions + characters.insertions,
        characters=characters.hits + characters.substitutions + characters.deletions,
    )


def error_rates(errors: Sequence[WordErrors]) -> dict[str, float]:
    """`wer` and `cer` over all words, and `mean_wer`, SEED-TTS's mean over utterances of each one's own rate.

    Utterances without reference words count for none of them; `utterances` says how many did.
    """
    counted = [e for e in errors if e.words]
    words, characters = sum(e.words for e in counted), sum(e.characters for e in counted)
    return {
        "wer": sum(e.errors for e in counted) / words if words else math.nan,
        "cer": sum(e.character_errors for e in counted) / characters if characters else math.nan,
        "mean_wer": _mean([e.errors / e.words for e in counted]),
        "utterances": len(counted),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SpokenReply:
    """A reply as it was spoken.

    Attributes:
        codes: [n] int64.
        words: Of its text.
        finished: False when a length limit cut it short.
    """

    codes: Tensor
    words: int
    finished: bool


def delivery(replies: Sequence[SpokenReply], *, code_rate: float = 25.0, longest_run: float = 0.6) -> dict[str, float]:
    """How replies are delivered, whatever they say.

    Args:
        replies: All replies that should have been spoken, silent ones too.
        code_rate: Codes a second.
        longest_run: Seconds of one and the same code from which on a reply is said to repeat itself.

    Returns:
        `seconds` a spoken reply on average, `seconds_per_word`, `silent_share`, `truncated_share` (of spoken ones),
        `repeated_share`: spoken replies with such a run or with a stretch of codes said three times in a row.
    """
    spoken = [reply for reply in replies if reply.codes.numel()]
    seconds = [reply.codes.numel() / code_rate for reply in spoken]
    run = max(2, round(longest_run * code_rate))
    return {
        "seconds": _mean(seconds),
        "seconds_per_word": _mean([s / r.words for s, r in zip(seconds, spoken, strict=True) if r.words]),
        "silent_share": _mean([not reply.codes.numel() for reply in replies]),
        "truncated_share": _mean([not reply.finished for reply in spoken]),
        "repeated_share": _mean([_repeats(reply.codes, run=run) for reply in spoken]),
    }


def _repeats(codes: Tensor, *, run: int, shortest: int = 5) -> bool:
    """A run of one code, or a stretch of `shortest` codes or more three times in a row. O(n²) in the codes."""
    for period in range(1, len(codes) // 3 + 1):
        same = codes[period:] == codes[:-period]
        needed = run - 1 if period == 1 else 2 * period if period >= shortest else len(codes)
        if _longest_true(same) >= needed:
            return True
    return False


def _longest_true(values: Tensor) -> int:
    """Length of the longest run of True."""
    edges = torch.nn.functional.pad(values.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return int((ends - starts).max()) if len(starts) else 0


def mel_distance(made: Tensor, reference: Tensor, *, sample_rate: int, aligned: bool = False) -> float:
    """Root mean square difference of two log-mel spectrograms in dB, a mean over frames; NaN for too short ones.

    Args:
        made: [samples] float32.
        reference: The same.
        sample_rate: Of both.
        aligned: Compare frame by frame, as of a resynthesis, up to the shorter end. Otherwise frames are first aligned
            by dynamic time warping, as two renditions of one text need; it costs frames².
    """
    config = MelConfig(sample_rate=16_000, fft=1024, window=640, hop=160, high=8000.0)
    mels = LogMelSpectrogram(config)
    shortest = min(made.numel(), reference.numel()) / sample_rate
    if shortest * config.sample_rate < config.fft:
        return math.nan
    one, other = (
        mels(resample(w.float(), sample_rate, config.sample_rate)[None])[0] * _DECIBELS for w in (made, reference)
    )
    if aligned:
        frames = min(len(one), len(other))
        return float((one[:frames] - other[:frames]).square().mean(1).sqrt().mean())
    distances = cdist(one.numpy(), other.numpy()) / math.sqrt(config.bins)
    return _warped_mean(distances)


def _warped_mean(distances: np.ndarray) -> float:
    """Mean along the cheapest monotonous path, each step weighted alike."""
    rows, columns = distances.shape
    cost = np.full((rows + 1, columns + 1), np.inf)
    steps = np.zeros((rows + 1, columns + 1))
    cost[0, 0] = 0.0
    # All cells of a diagonal at once: they depend on the two before only.
    for diagonal in range(2, rows + columns + 1):
        row = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        column = diagonal - row
        before = (row - 1, row - 1, row), (column - 1, column, column - 1)
        best = cost[before].argmin(axis=0), np.arange(len(row))
        cost[row, column] = cost[before][best] + distances[row - 1, column - 1]
        steps[row, column] = steps[before][best] + 1
    return float(cost[-1, -1] / steps[-1, -1])


def emotion_agreement(
    heard: Tensor, intended: Sequence[str], labels: Sequence[str], *, means: Mapping[str, str] | None = None
) -> dict[str, float]:
    """How far the emotion that a recogniser hears is the one that was meant, over the whole distribution.

    Args:
        heard: [n, labels] float32 distributions.
        intended: The emotion of each, in our words; replies may be "comforting", which no recogniser knows.
        labels: What the columns are.
        means: Intended emotion -> label of the recogniser, where the two differ.

    Returns:
        `probability` given to the intended one on average, `cross_entropy` in nats, `accuracy` of the top label,
        `counted` and, for utterances whose emotion the recogniser has no label for, `without_label`. `mean/<intended>/
        <label>` is the mean distribution for each intended emotion, the confusion of which `accuracy` is a summary.
    """
    targets = [(means or {}).get(name, name) for name in intended]
    known = [row for row, target in enumerate(targets) if target in labels]
    table = heard[known].double()
    wanted = torch.tensor([list(labels).index(targets[row]) for row in known], dtype=torch.long)
    given = table.gather(1, wanted[:, None])[:, 0] if known else table.new_zeros(0)
    figures = {
        "probability": _mean(given.tolist()),
        "cross_entropy": _mean((-given.clamp_min(1e-9).log()).tolist()),
        "accuracy": _mean((table.argmax(1) == wanted).tolist() if known else []),
        "counted": float(len(known)),
        "without_label": float(len(targets) - len(known)),
    }
    for name in dict.fromkeys(intended):
        rows = [row for row, other in enumerate(intended) if other == name]
        figures |= {f"mean/{name}/{label}": float(heard[rows, i].mean()) for i, label in enumerate(labels)}
    return figures


class SpeakerSimilarity:
    """Cosine of the x-vectors of two utterances, by any model of transformers' `AutoModelForAudioXVector`.

    Args:
        name: Folder or hub name, for instance of a WavLM trained for speaker verification.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        try:
            self._features = AutoFeatureExtractor.from_pretrained(name)
            self._model = AutoModelForAudioXVector.from_pretrained(name).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot load speaker model {name!r}: {reason}") from error
        self.name = name

    @torch.no_grad()
    def embed(self, waveform: Tensor, *, sample_rate: int) -> Tensor:
        """[samples] -> [size] of length 1."""
        rate = self._features.sampling_rate
        inputs = self._features(resample(waveform, sample_rate, rate).numpy(), sampling_rate=rate, return_tensors="pt")
        return torch.nn.functional.normalize(self._model(**inputs).embeddings[0], dim=0)

    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]], *, sample_rate: int) -> float:
        """Mean cosine of the pairs, NaN without any."""
        embedded = [[self.embed(w, sample_rate=sample_rate) for w in pair] for pair in pairs]
        return _mean([float(one @ other) for one, other in embedded])


def _mean(values: Sequence[float | bool]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
