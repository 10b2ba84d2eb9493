"""`echat evaluate speech`: wav files against the texts they should say, as SEED-TTS evaluates.

Its WER is a mean over utterances of each one's own rate; the corpus's WER stands beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from lightning_echat.contracts import SAMPLE_RATE, SampleRejected, UserError
from lightning_echat.data.decoding import decode_waveform
from lightning_echat.data.files import write_json
from lightning_echat.evaluation.opinion_scores import DNSMOS, NISQA, ScriptedPredictor
from lightning_echat.evaluation.recognisers import POCKETSPHINX, open_emotion_recogniser, open_recogniser
from lightning_echat.evaluation.records import nan_as_none
from lightning_echat.evaluation.speech_quality import (
    SpeakerSimilarity,
    emotion_agreement,
    error_rates,
    mel_distance,
    word_errors,
)

_FIELDS = ("wav", "text", "reference", "emotion")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedUtterance:
    """A line of the list.

    Attributes:
        wav: What is evaluated.
        text: What it should say.
        reference: A recording of the voice it should have, or of the same text; None where there is none.
        emotion: That it should have; empty where nobody said.
    """

    wav: Path
    text: str
    reference: Path | None = None
    emotion: str = ""


def evaluate_speech(
    listed: Path,
    *,
    recogniser: str = POCKETSPHINX,
    out: Path | None = None,
    known_texts: bool = False,
    emotion_recogniser: str | None = None,
    speaker_model: str | None = None,
    dnsmos: Path | None = None,
    nisqa: Path | None = None,
    mos_model: Path | None = None,
    device: str = "cpu",
) -> None:
    """Score wav files and print one line a figure.

    Args:
        listed: A .jsonl file of {"wav", "text", and where known "reference", "emotion"}, or a file of
            wav|text lines. Paths are relative to it.
        recogniser: pocketsphinx, the name or folder of a Hugging Face model, or stage:RUN.
        out: JSON file for all figures and for every utterance.
        known_texts: Let pocketsphinx know which words and trigrams the texts hold.
        emotion_recogniser: Name or folder of a Hugging Face audio classifier, or stage:RUN.
        speaker_model: Name or folder of a Hugging Face x-vector model, to compare with the references.
        dnsmos: Folder of the DNSMOS models.
        nisqa: Folder of NISQA's weights.
        mos_model: TorchScript of another predictor of opinion scores, UTMOS for instance (docs/token2wav.md).
        device: For Hugging Face models.
    """
    utterances = read_list(listed)
    waveforms = [_read(utterance.wav) for utterance in utterances]
    listener = open_recogniser(
        recogniser, texts=[utterance.text for utterance in utterances] if known_texts else (), device=device
    )
    heard = listener.transcribe(waveforms, sample_rate=SAMPLE_RATE)
    errors = [word_errors(utterance.text, words) for utterance, words in zip(utterances, heard, strict=True)]
    figures: dict[str, Any] = {"recogniser": listener.name, "independent": listener.independent, **error_rates(errors)}
    pairs = [(w, _read(u.reference)) for w, u in zip(waveforms, utterances, strict=True) if u.reference]
    if pairs:
        distances = [mel_distance(*pair, sample_rate=SAMPLE_RATE) for pair in pairs]
        figures["mel_distance_db"] = sum(distances) / len(distances)
    if speaker_model:
        if not pairs:
            raise UserError(f"{listed} names no reference to compare voices with; leave --speaker_model out")
        figures["speaker_similarity"] = SpeakerSimilarity(speaker_model)(pairs, sample_rate=SAMPLE_RATE)
    if emotion_recogniser:
        figures["emotion"] = _emotions(emotion_recogniser, utterances, waveforms, device=device)
    if mos_model:
        figures["mos"] = ScriptedPredictor(mos_model)(waveforms, sample_rate=SAMPLE_RATE)
    if nisqa:
        figures["nisqa"] = NISQA(nisqa)(waveforms, sample_rate=SAMPLE_RATE)
    if dnsmos:
        figures["dnsmos"] = DNSMOS(dnsmos)(waveforms, sample_rate=SAMPLE_RATE)
    _tell(figures)
    if out is not None:
        each = [
            {"wav": str(u.wav), "text": u.text, "heard": words, "errors": e.errors, "words": e.words}
            for u, words, e in zip(utterances, heard, errors, strict=True)
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, content=nan_as_none({**figures, "each": each}))


def read_list(path: Path) -> list[ListedUtterance]:
    """The utterances of a list file.

    Raises:
        UserError: It is missing, empty, or a line is wrong.
    """
    if not path.is_file():
        raise UserError(f"no list {str(path)!r}; give a .jsonl file, or one of wav|text lines")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = _row(line, where=f"{path} line {number}", as_json=path.suffix == ".jsonl")
            reference = path.parent / row["reference"] if row.get("reference") else None
            found.append(
                ListedUtterance(
                    wav=path.parent / row["wav"], text=row["text"], reference=reference, emotion=row.get("emotion", "")
                )
            )
    if not found:
        raise UserError(f"{path} lists nothing")
    return found


def _row(line: str, *, where: str, as_json: bool) -> dict[str, str]:
    if not as_json:
        wav, bar, text = line.partition("|")
        if not bar:
            raise UserError(f"{where}: write wav|text")
        return {"wav": wav.strip(), "text": text.strip()}
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error})") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(name, ""), str) for name in _FIELDS):
        raise UserError(f"{where}: write an object of texts, {', '.join(_FIELDS)}")
    if missing := [name for name in ("wav", "text") if not row.get(name)]:
        raise UserError(f"{where}: {missing[0]} is missing")
    return row


def _read(path: Path) -> Tensor:
    try:
        return decode_waveform(path.read_bytes())
    except SampleRejected as error:
        raise UserError(f"{path}: {error}") from error


def _emotions(name: str, utterances: list[ListedUtterance], waveforms: list[Tensor], *, device: str) -> dict[str, Any]:
    listener = open_emotion_recogniser(name, device=device)
    asked = [(w, u.emotion) for w, u in zip(waveforms, utterances, strict=True) if u.emotion]
    heard = listener.distributions([w for w, _ in asked], sample_rate=SAMPLE_RATE)
    agreement = emotion_agreement(heard, [emotion for _, emotion in asked], listener.labels)
    return {"recogniser": listener.name, **agreement}


def _tell(figures: dict[str, Any], prefix: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            _tell(value, f"{prefix}{name}/")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            Console().print(f"{prefix}{name}: {shown}", highlight=False, markup=False, soft_wrap=True)
