"""How replies sound while the model trains: words heard in them, delivery, the emotion heard, and audio."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import wandb
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks.answering import AnsweringStage, AnswerMetrics, log_validation, named_sets
from lightning_echat.collectives import gathered
from lightning_echat.contracts import GeneratedReply, UserError
from lightning_echat.evaluation.recognisers import (
    EmotionRecogniser,
    SpeechRecogniser,
    open_emotion_recogniser,
    open_recogniser,
)
from lightning_echat.evaluation.speech_quality import (
    SpokenReply,
    WordErrors,
    delivery,
    emotion_agreement,
    error_rates,
    word_errors,
)
from lightning_echat.metrics import normalize_english, parse_answer
from lightning_echat.nn.token2wav.interface import Token2Wav, load_token2wav
from lightning_echat.tokens.tasks import traits_of

_COLUMNS = ["key", "reply", "heard", "intended emotion", "audio"]


@dataclass(slots=True, kw_only=True)
class _Heard:
    """A reply, what it should say and what was heard in it; `waveform` stays on its rank."""

    key: str
    words: str
    spoken: SpokenReply
    emotion: str
    heard: str = ""
    errors: WordErrors | None = None
    emotions: list[float] | None = None
    waveform: Tensor | None = None

    def row(self, rate: int) -> list[Any]:
        """Of the table."""
        assert self.waveform is not None
        # Audio without a caption cannot be read back from a table (wandb 0.31).
        audio = wandb.Audio(self.waveform.numpy(), sample_rate=rate, caption=self.words or self.key)
        return [self.key, self.words, self.heard, self.emotion, audio]


class SpeechQuality(AnswerMetrics):
    """Speaks the replies to the first batches of every validation set whose task speaks, and has them heard.

    Keys, all under `val/<set>/speech/`: `wer`, `cer`, `mean_wer` of what a recogniser hears against the text that the
    model wrote; `seconds`, `seconds_per_word`, `silent_share`, `truncated_share`, `repeated_share`;
    `emotion/probability`, `emotion/cross_entropy`, `emotion/accuracy` of the emotion that the model meant; and a W&B
    table `val/<set>/spoken` with audio. What has no data has no key.

    Every rank speaks and hears its own replies; what they add up is gathered, so figures are over all of them.

    Args:
        max_batches: Batches of each set, on each rank, that are answered.
        replies: Spoken and heard of each set, on each rank; recognising takes longer than speaking.
        every_n_validations: Once in so many validations, beginning with the first.
        token2wav: Folder of what speaks, where it is not `tokens.speech_tokenizer` of the stage.
        recogniser: As for `echat evaluate speech`; null leaves words out.
        emotion_recogniser: The same for the emotion; null leaves it out.
        audio: Replies of each set in the table, from rank 0.
    """

    def __init__(
        self,
        *,
        max_batches: int = 1,
        replies: int = 16,
        every_n_validations: int = 1,
        token2wav: str | None = None,
        recogniser: str | None = None,
        emotion_recogniser: str | None = None,
        audio: int = 4,
    ) -> None:
        super().__init__(max_batches=max_batches)
        if replies < 1 or every_n_validations < 1 or audio < 0:
            raise UserError("SpeechQuality: replies and every_n_validations must be at least 1, audio at least 0")
        self.replies, self.every_n_validations, self.audio = replies, every_n_validations, audio
        self.token2wav = token2wav
        self.recogniser, self.emotion_recogniser = recogniser, emotion_recogniser
        self._voice: Token2Wav | None = None
        self._listener: SpeechRecogniser | None = None
        self._emotions: EmotionRecogniser | None = None
        self._validations = 0
        self._heard: dict[str, list[_Heard]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open voice and recognisers, on every rank; what is missing ends the run before it begins."""
        super().setup(trainer, pl_module, stage)
        folder = self.token2wav or getattr(getattr(pl_module, "tokens", None), "speech_tokenizer", None)
        if not folder:
            raise UserError("SpeechQuality needs token2wav, or model.init_args.tokens.speech_tokenizer")
        self._voice = load_token2wav(Path(folder))
        self._listener = open_recogniser(self.recogniser) if self.recogniser else None
        self._emotions = open_emotion_recogniser(self.emotion_recogniser) if self.emotion_recogniser else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start empty. Every rank has every set, whatever it will see of it."""
        self._heard = {key: [] for key in named_sets(trainer)}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures over all ranks, and this rank's audio where it is the first."""
        if trainer.sanity_checking:
            return
        due = self._due()
        self._validations += 1
        if not due:
            return
        for key, own in self._heard.items():
            values = _figures(_everyones(own), self._emotions)
            log_validation(pl_module, {f"{key}/speech/{what}": value for what, value in values.items()})
            if trainer.is_global_zero:
                self._log_audio(trainer, key, own)
        self._heard = {}

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, so that a resumed run keeps the rhythm."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def _due(self) -> bool:
        return self._validations % self.every_n_validations == 0

    def _add(self, stage: AnsweringStage, replies: list[GeneratedReply], *, key: str) -> None:
        spoken = [reply for reply in replies if traits_of(reply.reference.task).speaks]
        heard = self._heard[key]
        for reply in spoken[: self.replies - len(heard)]:
            heard.append(self._hear(reply, stage))

    def _hear(self, reply: GeneratedReply, stage: AnsweringStage) -> _Heard:
        assert self._voice is not None
        answer = parse_answer(reply, fmt=stage.dialogue_tokenizer.prompt_set.thinking)
        # A task without a conversation reads out what it was given.
        words = answer.reply if traits_of(reply.reference.task).converses else reply.reference.reply
        codes, rate = reply.speech_codes.cpu(), self._voice.sample_rate
        spoken = SpokenReply(codes=codes, words=len(normalize_english(words).split()), finished=reply.finished)
        entry = _Heard(key=reply.reference.key, words=words, spoken=spoken, emotion=answer.reply_emotion or "")
        if not codes.numel():
            return entry
        entry.waveform = self._voice.decode(codes).cpu()
        if self._listener is not None:
            entry.heard = self._listener.transcribe([entry.waveform], sample_rate=rate)[0]
            entry.errors = word_errors(words, entry.heard)
        if self._emotions is not None:
            entry.emotions = self._emotions.distributions([entry.waveform], sample_rate=rate)[0].tolist()
        return entry

    def _log_audio(self, trainer: Trainer, key: str, heard: list[_Heard]) -> None:
        assert self._voice is not None
        rate = self._voice.sample_rate
        rows = [entry.row(rate) for entry in heard if entry.waveform is not None][: self.audio]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and rows:
                logger.log_table(f"{key}/spoken", columns=_COLUMNS, data=rows, step=trainer.global_step)


def _everyones(own: list[_Heard]) -> list[_Heard]:
    """The replies of all ranks, without their sound: a collective call."""
    light = [replace(entry, waveform=None) for entry in own]
    return [entry for rank in gathered({"heard": light}) for entry in rank["heard"]]


def _figures(heard: list[_Heard], emotions: EmotionRecogniser | None) -> dict[str, float]:
    """Name -> value, NaN without data."""
    values = delivery([entry.spoken for entry in heard])
    if errors := [entry.errors for entry in heard if entry.errors is not None]:
        rates = error_rates(errors)
        values |= {name: rates[name] for name in ("wer", "cer", "mean_wer")}
    meant = [(entry.emotions, entry.emotion) for entry in heard if entry.emotions and entry.emotion]
    if emotions is not None and meant:
        table = torch.tensor([distribution for distribution, _ in meant])
        agreement = emotion_agreement(table, [emotion for _, emotion in meant], emotions.labels)
        values |= {f"emotion/{name}": agreement[name] for name in ("probability", "cross_entropy", "accuracy")}
    return values
