"""Recognisers: what hears words, or an emotion, in a waveform. Evaluation asks them, and never the model it evaluates.

A recogniser is named in one word, as command lines and YAML give it:

    pocketsphinx          an independent recogniser with its own English model, in the package of that name
    whisper-medium-dir/   a folder or hub name of a Hugging Face model for speech recognition
    stage:RUN             the project's own understanding stage, from its run folder: not independent, and marked so
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, Turn, UserError
from lightning_echat.data.batching import collate
from lightning_echat.data.log_mel import LogMel
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.metrics import parse_answer
from lightning_echat.nn.weights import load_trained
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.tasks import DialogueTask

POCKETSPHINX = "pocketsphinx"
STAGE = "stage:"
_NOISE = 1e-3
"""Added to what pocketsphinx hears: it takes exact silence for a fault. 60 dB below full scale."""
_LEAD_SECONDS = 0.2


class SpeechRecogniser(Protocol):
    """Waveforms to words.

    Attributes:
        name: As reports give it.
        independent: Whether it was made without this project's data and models.
    """

    name: str
    independent: bool

    def transcribe(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> list[str]:
        """[samples] float32 each -> what is said, in the recogniser's own spelling."""
        ...


class EmotionRecogniser(Protocol):
    """Waveforms to emotions.

    Attributes:
        name: As reports give it.
        labels: In the order of the distributions.
    """

    name: str
    labels: tuple[str, ...]

    def distributions(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> Tensor:
        """[samples] float32 each -> [waveforms, labels] float32, each row of which sums to 1."""
        ...


class PocketsphinxRecogniser:
    """CMU Sphinx with the English model of its wheel: old, quick and independent.

    A second of speech takes a tenth of a second of one core with texts, and six tenths without.

    Args:
        texts: What may be said: a trigram model of them takes the place of its model of all English, with which it
            misunderstands most of any synthetic voice. Figures with and without are not comparable.

    Attributes:
        unknown: Words of the texts that it has no pronunciation for; it never hears them.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        try:
            import pocketsphinx
            from pocketsphinx.lm import ArpaBoLM
        except ImportError as error:
            raise UserError(
                f"recogniser pocketsphinx is not installed ({error}); pip install 'lightning-echat[recogniser]'"
            ) from error
        self.name = "pocketsphinx, trigrams of the texts" if texts else "pocketsphinx"
        self.independent = True
        options: dict[str, Any] = {"samprate": SAMPLE_RATE, "logfn": os.devnull, "loglevel": "FATAL"}
        if not texts:
            self._decoder, self.unknown = pocketsphinx.Decoder(**options), []
            return
        sentences = sorted({" ".join(_words(text)) for text in texts} - {""})
        with TemporaryDirectory() as folder:
            trigrams = str(Path(folder) / "texts.arpa")
            model = ArpaBoLM(text="\n".join(sentences), add_start=True)
            model.compute()
            model.write_file(trigrams)
            self._decoder = pocketsphinx.Decoder(**options, lm=trigrams)
        words = {word for sentence in sentences for word in sentence.split()}
        self.unknown = sorted(word for word in words if self._decoder.lookup_word(word) is None)

    def transcribe(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> list[str]:
        """See `SpeechRecogniser`."""
        return [self._one(_at_rate(waveform, sample_rate)) for waveform in waveforms]

    def _one(self, waveform: Tensor) -> str:
        rng = np.random.default_rng(0)
        quiet = np.zeros(round(_LEAD_SECONDS * SAMPLE_RATE))
        samples = np.concatenate([quiet, waveform.numpy(), quiet])
        noisy = np.clip(samples + _NOISE * rng.standard_normal(len(samples)), -1, 1)
        self._decoder.start_utt()
        self._decoder.process_raw((noisy * 32767).astype(np.int16).tobytes(), False, True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else found.hypstr


class HuggingFaceRecogniser:
    """Any model that transformers' pipeline "automatic-speech-recognition" takes, from a folder or the local cache."""

    def __init__(self, name: str, *, device: str = "cpu", batch_size: int = 8) -> None:
        self.name = name
        self.independent = True
        self._pipeline = _pipeline("automatic-speech-recognition", name, device=device, batch_size=batch_size)

    def transcribe(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> list[str]:
        """See `SpeechRecogniser`."""
        return [found["text"].strip() for found in self._pipeline(_inputs(self._pipeline, waveforms, sample_rate))]


class StageRecogniser:
    """The project's own understanding stage. It has heard the corpus it is asked about, so its figures flatter.

    Args:
        run: Checkpoint, run folder or folder of `echat convert`.
    """

    def __init__(self, run: Path, *, batch_size: int = 16) -> None:
        self.trained = load_trained(run)
        self.name = f"own stage {self.trained.path.name} (not independent)"
        self.independent = False
        self._batch_size = batch_size
        self._log_mel = LogMel(mel_bins=self.trained.tokens.mel_bins)

    def transcribe(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> list[str]:
        """See `SpeechRecogniser`."""
        heard: list[str] = []
        for start in range(0, len(waveforms), self._batch_size):
            asked = [self._question(w, sample_rate) for w in waveforms[start : start + self._batch_size]]
            tokenizer = self.trained.tokenizer
            batch = collate(asked, padding=tokenizer.vocabulary.padding, mel_bins=self.trained.tokens.mel_bins)
            replies = generate(self.trained.model, batch, tokenizer, DecodingConfig(max_text_ids=128))
            heard += [parse_answer(reply, fmt=tokenizer.prompt_set.thinking).transcript or "" for reply in replies]
        return heard

    def _question(self, waveform: Tensor, sample_rate: int) -> Any:
        turn = Turn(role="user", log_mel=self._log_mel(_at_rate(waveform, sample_rate)))
        return self.trained.tokenizer.prompt(
            DialogueSample(turns=[turn], key="speech"), DialogueTask(kind="transcribe")
        )


class HuggingFaceEmotionRecogniser:
    """Any model that transformers' pipeline "audio-classification" takes.

    Args:
        name: Folder or hub name.
        labels: The model's label -> ours, `labels.json` of its folder where nothing is given; what is not named keeps
            its own name in lower case.
        device: Where it runs.
        revision: Of a model of the hub.
    """

    def __init__(
        self, name: str, *, labels: dict[str, str] | None = None, device: str = "cpu", revision: str = "main"
    ) -> None:
        self.name = name
        self._pipeline = _pipeline("audio-classification", name, device=device, batch_size=8, revision=revision)
        own = [str(self._pipeline.model.config.id2label[i]) for i in range(self._pipeline.model.config.num_labels)]
        file = Path(name) / "labels.json"
        if labels is None and file.is_file():
            labels = json.loads(file.read_text(encoding="utf-8"))
        self._ours: dict[str, str] = {label: (labels or {}).get(label, label.lower()) for label in own}
        self.labels: tuple[str, ...] = tuple(dict.fromkeys(self._ours.values()))

    def distributions(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> Tensor:
        """See `EmotionRecogniser`; labels of the model that mean one of ours are added up."""
        table = torch.zeros(len(waveforms), len(self.labels))
        answers = self._pipeline(_inputs(self._pipeline, waveforms, sample_rate), top_k=len(self._ours))
        for row, answer in enumerate(answers):
            for entry in answer:
                table[row, self.labels.index(self._ours[entry["label"]])] += entry["score"]
        return table / table.sum(dim=1, keepdim=True)


class StageEmotionRecogniser:
    """The pooled emotion head of the project's own understanding stage: trained on the voices of queries, not replies.

    Args:
        run: Checkpoint or run folder of a stage with auxiliary heads.
    """

    def __init__(self, run: Path) -> None:
        self.trained = load_trained(run)
        heads = self.trained.model.auxiliary
        if heads is None or "emotion" not in heads.labels:
            raise UserError(f"{self.trained.path} was trained without an emotion head (network.auxiliary_labels)")
        self.name = f"own stage {self.trained.path.name} (not independent)"
        self.labels = LABEL_SETS["emotion"]
        self._heads = heads
        self._log_mel = LogMel(mel_bins=self.trained.tokens.mel_bins)

    @torch.no_grad()
    def distributions(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> Tensor:
        """See `EmotionRecogniser`."""
        rows = []
        for waveform in waveforms:
            mel = self._log_mel(_at_rate(waveform, sample_rate))[None]
            frames, lengths = self.trained.model.encoder(mel, torch.tensor([mel.shape[1]]))
            rows.append(self._heads(frames, lengths)[1]["emotion"].softmax(-1)[0])
        return torch.stack(rows) if rows else torch.zeros(0, len(self.labels))


def open_recogniser(name: str, *, texts: Sequence[str] = (), device: str = "cpu") -> SpeechRecogniser:
    """The recogniser that a word names (see the top of the file).

    Args:
        name: The word.
        texts: For pocketsphinx, what may be said.
        device: For Hugging Face models.

    Raises:
        UserError: There is none, or it cannot be loaded.
    """
    if name == POCKETSPHINX:
        return PocketsphinxRecogniser(texts)
    if name.startswith(STAGE):
        return StageRecogniser(Path(name.removeprefix(STAGE)))
    return HuggingFaceRecogniser(name, device=device)


def open_emotion_recogniser(name: str, *, device: str = "cpu") -> EmotionRecogniser:
    """The same for emotions; a Hugging Face folder may hold `labels.json`, the model's label -> ours."""
    if name.startswith(STAGE):
        return StageEmotionRecogniser(Path(name.removeprefix(STAGE)))
    return HuggingFaceEmotionRecogniser(name, device=device)


def _pipeline(task: str, name: str, **options: Any) -> Any:
    """A transformers pipeline, without running code of the model's repository."""
    from transformers import pipeline

    try:
        return pipeline(task, model=name, trust_remote_code=False, **options)  # pyright: ignore[reportCallIssue,reportArgumentType]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load recogniser {name!r} for {task}: {reason}") from error


def _inputs(pipeline: Any, waveforms: Sequence[Tensor], sample_rate: int) -> list[dict[str, Any]]:
    wanted = pipeline.feature_extractor.sampling_rate
    return [{"raw": resample(w, sample_rate, wanted).numpy(), "sampling_rate": wanted} for w in waveforms]


def _at_rate(waveform: Tensor, sample_rate: int) -> Tensor:
    return waveform if sample_rate == SAMPLE_RATE else resample(waveform, sample_rate, SAMPLE_RATE)


def _words(text: str) -> list[str]:
    """In lower case, without punctuation but for apostrophes, which are part of words."""
    return re.findall(r"[\w']+", text.lower())
