"""Who hears the emotion of a spoken reply: a plug-in, for judges that are told about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.progress import track

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, Turn, UserError
from lightning_echat.data.batching import collate
from lightning_echat.data.files import write_json
from lightning_echat.data.log_mel import LogMel
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.evaluation.chat import read_waveform
from lightning_echat.evaluation.judging import construct
from lightning_echat.evaluation.recognisers import HuggingFaceEmotionRecogniser
from lightning_echat.evaluation.scores import file_name
from lightning_echat.metrics import parse_answer
from lightning_echat.nn.weights import checkpoint_hash, load_trained
from lightning_echat.tokens.tasks import DialogueTask

RECOGNISERS: dict[str, str] = {
    "understanding": "lightning_echat.evaluation.reply_emotion.UnderstandingRecogniser",
    "hf": "lightning_echat.evaluation.reply_emotion.AudioClassifier",
}
"""Short name -> class path. `none` hears nothing."""


class EmotionRecogniser(Protocol):
    """Names the emotion of a wav file."""

    @property
    def name(self) -> str:
        """Stands in the name of a judge; changes whenever the same file may be heard differently."""
        ...

    def hear(self, path: Path) -> str | None:
        """The emotion in a wav file, None where none could be named."""
        ...


def make_recogniser(name: str, arguments: Mapping[str, Any] | None = None) -> EmotionRecogniser | None:
    """The recogniser of a name of `RECOGNISERS` or of a class path; None for `none`.

    Raises:
        UserError: There is no such recogniser, or its arguments do not fit.
    """
    if name == "none":
        if arguments:
            raise UserError("reply_emotion_args are given but reply_emotion is none; name a recogniser")
        return None
    return construct(name, arguments, known=RECOGNISERS, what="reply emotion recogniser", members=("name", "hear"))


def hear_replies(audio: Sequence[Path | None], recogniser: EmotionRecogniser, *, folder: Path) -> list[str | None]:
    """The emotion of each reply, None where there is no audio or nothing could be named.

    What was heard is kept in `folder`, by the content of the file, so that scoring again listens to nothing again.
    """
    cache = folder / "reply_emotions" / f"{file_name(recogniser.name)}.json"
    known: dict[str, str | None] = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None for path in audio]
    new = {digest: path for digest, path in zip(digests, audio, strict=True) if digest and digest not in known}
    try:
        for digest, path in track(new.items(), description=recogniser.name, transient=True):
            if path is not None:
                known[digest] = recogniser.hear(path)
    finally:
        # Also after Ctrl-C: an hour of listening is not done again.
        if new:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, content=known)
    return [known[digest] if digest else None for digest in digests]


class UnderstandingRecogniser:
    """A checkpoint of this project, asked as in understanding.

    It was trained on queries: how well it hears replies is not known unless it is measured on such audio.

    Args:
        checkpoint: A .ckpt file, the folder of a run, or one of echat convert.
        labels: Label sets that it is asked for, `emotion` among them; those that it was trained to name.
        max_text_ids: After which its answer is cut.
    """

    def __init__(
        self,
        checkpoint: Path,
        labels: tuple[str, ...] = ("age", "gender", "emotion", "event"),
        max_text_ids: int = 128,
    ) -> None:
        if "emotion" not in labels:
            raise UserError(f"labels {', '.join(labels)} hold no emotion, which is what is to be heard")
        self._trained = load_trained(checkpoint)
        self._task = DialogueTask(kind="transcribe_and_label", labels=labels)
        self._decoding = DecodingConfig(max_text_ids=max_text_ids)
        self._log_mel = LogMel(mel_bins=self._trained.tokens.mel_bins)
        self.name = f"understanding-{checkpoint_hash(self._trained.path)[:8]}-step{self._trained.step}"

    def hear(self, path: Path) -> str | None:
        """The emotion that the checkpoint names."""
        trained = self._trained
        sample = DialogueSample(turns=[Turn(role="user", log_mel=self._log_mel(read_waveform(path)))], key=path.name)
        prompt = trained.tokenizer.prompt(sample, self._task)
        batch = collate([prompt], padding=trained.tokenizer.vocabulary.padding, mel_bins=trained.tokens.mel_bins)
        (reply,) = generate(trained.model, batch, trained.tokenizer, self._decoding)
        return parse_answer(reply).labels.get("emotion")


class AudioClassifier:
    """Any audio-classification model of the Hugging Face hub or of a folder, by transformers; no remote code runs.

    Args:
        model: Its name or folder; `labels.json` in a folder maps its labels to ours.
        revision: Of the hub.
    """

    def __init__(self, model: str, revision: str = "main") -> None:
        self._recogniser = HuggingFaceEmotionRecogniser(model, revision=revision)
        folder = Path(model)
        # A folder by its content: it may be moved, and another model may take its place.
        which = (folder.name, checkpoint_hash(folder)[:8]) if folder.is_dir() else (model, revision)
        self.name = "-".join(["hf", *which])

    def hear(self, path: Path) -> str | None:
        """The likeliest label."""
        shares = self._recogniser.distributions([read_waveform(path)], sample_rate=SAMPLE_RATE)[0]
        return self._recogniser.labels[int(shares.argmax())]
