"""The reader: shards -> stored dialogues -> mels -> ids. Streams of batches are built on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from lightning_echat.contracts import DialogueSample, SampleRejected, TokenizedDialogue, Utterance
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.clip_features import ClipFeatures
from lightning_echat.data.decoding import ParsedDialogue, parse_dialogue, with_audio
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import LOCAL, ShardAccess
from lightning_echat.data.shard_reader import PlacedDialogue, ShardReader
from lightning_echat.data.tar_samples import StoredSample
from lightning_echat.data.utterances import UtteranceConfig, read_utterance
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import DialogueTask


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingConfig:
    """What every stream of a run shares.

    Attributes:
        tokens: What data and model agree on.
        batching: See there.
        seed: Decides every draw.
        rank, world_size: Which of how many processes reads.
        expand_history: Each exchange of a longer dialogue is a sample of its own, with what precedes as history.
        max_skip_share: Share of skipped samples past which a run stops.
        max_seconds: Longest clip; longer ones are skipped and counted.
        mels_on_device: Batches carry waveforms, to be made mels by `clip_features.make_log_mels`.
        access: How shards behind a URL are reached.
        utterances: How replies are read as they sound, for a stage that learns from them; None for not at all.
    """

    tokens: TokensConfig
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    expand_history: bool = True
    max_skip_share: float = 0.05
    max_seconds: float = 30.0
    mels_on_device: bool = False
    access: ShardAccess = LOCAL
    utterances: UtteranceConfig | None = None


class DialogueReader(ShardReader):
    """Stored dialogues to tokenized ones. Holds what is built once: tokenizer, filter bank, counters."""

    def __init__(self, config: ReadingConfig, *, augmentation: AugmentationConfig | None = None) -> None:
        super().__init__(access=config.access, max_skip_share=config.max_skip_share)
        self.config = config
        self.tokenizer = DialogueTokenizer.from_config(config.tokens)
        self.padding = self.tokenizer.vocabulary.padding
        self._features = ClipFeatures(
            mel_bins=config.tokens.mel_bins, on_device=config.mels_on_device, augmentation=augmentation
        )

    def _exchanges(self, stored: StoredSample, source: str, counter: SkipCounter) -> Iterator[PlacedDialogue]:
        try:
            parsed = parse_dialogue(stored, source=source)
        except SampleRejected as error:
            self._skip(error, counter, shard=stored.shard, key=stored.key)
            return
        for exchange, prefix in enumerate(parsed.prefixes() if self.config.expand_history else [parsed]):
            yield PlacedDialogue(stored.ordinal, exchange, prefix)

    def tokenize(
        self, parsed: ParsedDialogue, task: DialogueTask, *, random: Random | None = None
    ) -> TokenizedDialogue | None:
        """The dialogue as the model sees it, or None, and counted, where it cannot be used.

        Args:
            parsed: What `parse` yields.
            task: Which template.
            random: Draws augmentation and wording; without it nothing is altered and the first wording is used.
        """
        try:
            sample = self.with_mels(parsed, task, random=random)
            choice = random.randrange(2**16) if random else 0
            dialogue = self.tokenizer.tokenize(sample, task, choice=choice)
            self._features.complete(dialogue, sample, heard_turns(sample, task), random=random)
            if len(dialogue.input_ids) > self.config.batching.max_ids:
                raise SampleRejected("longer than max_ids", f"{len(dialogue.input_ids)} ids")
        except SampleRejected as error:
            self._skip(error, self.counter, shard=parsed.sample.shard, key=parsed.sample.key)
            return None
        if self.config.utterances is not None and task.traits.speaks:
            dialogue.utterance = self._utterance(parsed, self.config.utterances)
        self.counter.keep()
        return dialogue

    def _utterance(self, parsed: ParsedDialogue, config: UtteranceConfig) -> Utterance | None:
        """The last reply; a dialogue whose reply cannot be used is used without, and counted."""
        replies = [place for place, turn in enumerate(parsed.sample.turns) if turn.role == "assistant"]
        try:
            return read_utterance(parsed, replies[-1], config) if replies else None
        except SampleRejected as error:
            counter, sample = self.counter, parsed.sample
            counter.notice(f"no sound to learn from: {error.reason}", shard=sample.shard, key=sample.key)
            return None

    def with_mels(self, parsed: ParsedDialogue, task: DialogueTask, *, random: Random | None = None) -> DialogueSample:
        """The dialogue with audio and mel of the turns that the task hears, altered where `random` is given.

        Raises:
            SampleRejected: Audio is unusable.
        """
        heard = heard_turns(parsed.sample, task)
        sample = with_audio(
            parsed,
            turns=heard,
            max_seconds=self.config.max_seconds,
            counter=self.counter,
            as_stored=self.config.mels_on_device,
        )
        return self._features.with_mels(sample, heard, random=random)


def heard_turns(sample: DialogueSample, task: DialogueTask) -> list[int]:
    """Places of the turns that the task listens to: all the user's in a conversation, else the last one."""
    if not task.traits.listens:
        return []
    places = [place for place, turn in enumerate(sample.turns) if turn.role == "user"]
    return places if task.traits.converses else places[-1:]
