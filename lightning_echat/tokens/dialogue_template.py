"""Dialogue + task -> ids, loss mask and shifted labels. Decided here and nowhere else.

A row of one dialogue reads, with * where the loss counts (the target of a position is the id after it):

    system | [user query · assistant reply end]… | user [instruction] query · assistant target*

A spoken query is `input_speech_begin`, one placeholder per adapter output, `input_speech_end`. The target is the
answer's text and its end of text, then for spoken targets the speech ids between boundaries, or both interleaved.
Earlier turns hold the reply's text, and its speech where the prompt set's `history` asks for it: what the model thought
is not carried along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lightning_echat.contracts import (
    IGNORE_INDEX,
    MODEL_TYPE,
    AudioClip,
    DialogueReference,
    DialogueSample,
    SampleRejected,
    TokenizedDialogue,
    Turn,
    UserError,
)
from lightning_echat.tokens.characters import spell
from lightning_echat.tokens.id_tensors import id_tensor
from lightning_echat.tokens.paralinguistics import class_indices, write_label_tags
from lightning_echat.tokens.prompts import PromptSet, load_prompt_set
from lightning_echat.tokens.speech_codes import codes_to_ids, interleave
from lightning_echat.tokens.speech_timing import num_embeddings
from lightning_echat.tokens.tasks import DialogueTask
from lightning_echat.tokens.thinking import wrap_thinking, write_label_thinking, write_natural_thinking
from lightning_echat.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensConfig:
    """What data and model must agree on. Given once, under the model, and linked to the data.

    Attributes:
        tokenizer: Folder or hub name of a Hugging Face tokenizer.
        text_vocabulary_size: Rows of the language model's text embedding.
        codebook_size: Number of speech codes.
        prompt_set: Name of a shipped prompt set, or the path of a YAML file.
        audio_strides: Strides of the convolutions from mel frames to adapter outputs, in order. (2, 2, 2) is
            Whisper's 2 and an adapter of 4: 12.5 outputs a second.
        mel_bins: Mel bins of the speech encoder's input.
        speech_tokenizer: Folder of the speech tokenizer that the codes come from; only what turns codes into sound
            reads it.
    """

    tokenizer: str
    text_vocabulary_size: int
    codebook_size: int = 4096
    prompt_set: str = "english"
    audio_strides: tuple[int, ...] = (2, 2, 2)
    mel_bins: int = 80
    speech_tokenizer: str | None = None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; `UserError` when it cannot be loaded."""
    try:
        config = Path(name) / "config.json"
        # In a converted folder transformers would look at config.json, which is ours, and warn that it is.
        ours = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
        return AutoTokenizer.from_pretrained(name, **({"config": PreTrainedConfig()} if ours else {}))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        # A name on the hub has one slash at most; of a path transformers would say that it is no such name.
        if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
            reason = "there is no such folder"
        raise UserError(f"cannot load tokenizer {name!r}: {reason}") from error


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A row under construction: ids, and the clips met so far."""

    ids: list[int]
    clips: list[AudioClip]

    def add(self, ids: Sequence[int]) -> None:
        self.ids += ids


class DialogueTokenizer:
    """Turns dialogues into ids by the templates of `tokens.tasks` and the wording of a prompt set."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: Vocabulary,
        prompt_set: PromptSet,
        audio_strides: Sequence[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.prompt_set = prompt_set
        self.audio_strides = tuple(audio_strides)
        # Its threads would cost more than they do for single texts, and readers are processes already.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # A fast tokenizer is asked directly: what transformers wraps around it costs more than the work.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        # Headers and instructions recur in every sample; replies do not and are encoded directly.
        self._encode_fixed = lru_cache(maxsize=4096)(self.encode)
        self.spell_id = lru_cache(maxsize=65_536)(self._spell_id)

    @classmethod
    def from_config(cls, config: TokensConfig) -> DialogueTokenizer:
        """Load tokenizer and prompt set; `UserError` when the tokenizer cannot be loaded."""
        tokenizer = load_tokenizer(config.tokenizer)
        vocabulary = Vocabulary.of(tokenizer, text_size=config.text_vocabulary_size, codebook_size=config.codebook_size)
        return cls(
            tokenizer,
            vocabulary=vocabulary,
            prompt_set=load_prompt_set(config.prompt_set),
            audio_strides=config.audio_strides,
        )

    def encode(self, text: str) -> list[int]:
        """Text -> ids without any special token added."""
        if not text:
            return []
        if self._backend is not None:
            # The one call that does not also work out where in the text each id stands: half the time of `encode`.
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text ids -> text, added tokens kept."""
        size = len(self.tokenizer)
        known = [i for i in ids if i < size]
        # A list of ids gives a string; the list that the annotation also allows belongs to batches.
        return str(self.tokenizer.decode(known, skip_special_tokens=False))

    def _spell_id(self, id: int) -> str:
        """The text of one id, U+FFFD where it is a part of a character. Called as `spell_id`, which remembers."""
        return self.decode([id])

    def tokenize(self, sample: DialogueSample, task: DialogueTask, *, choice: int = 0) -> TokenizedDialogue:
        """The dialogue with its target: the last turn's, of the role that the task is about.

        Args:
            sample: Clips must carry `log_mel` where the task listens.
            task: Which template.
            choice: Selects one of the prompt set's instructions.

        Raises:
            SampleRejected: The sample lacks what the task needs.
        """
        draft, target_turn, query_turn = self._prompt(sample, task, choice)
        prompt_length = len(draft.ids)
        draft.add(self._target(target_turn, query_turn, task))
        return self._finish(draft, sample, task, prompt_length, query_turn, target_turn)

    def prompt(self, sample: DialogueSample, task: DialogueTask, *, choice: int = 0) -> TokenizedDialogue:
        """The dialogue up to the point where the model answers; nothing is supervised.

        The sample may end in a user turn, as it does in a live chat.
        """
        draft, target_turn, query_turn = self._prompt(sample, task, choice)
        return self._finish(draft, sample, task, len(draft.ids), query_turn, target_turn)

    def _prompt(
        self, sample: DialogueSample, task: DialogueTask, choice: int
    ) -> tuple[_Draft, Turn | None, Turn | None]:
        """Everything before the target, the turn that holds the target's text, and the query."""
        turns = sample.turns
        if not turns:
            raise SampleRejected("no turns")
        reply = turns[-1] if turns[-1].role == "assistant" else None
        draft = _Draft(ids=[], clips=[])
        draft.add(self._encode_fixed(self.prompt_set.system[task.name]))
        if task.kind == "text_to_speech":
            # The text is spoken by the assistant's own voice, so it is the assistant's turn that is read.
            if reply is None or not reply.text:
                raise SampleRejected("no text to speak")
            draft.add(self._encode_fixed(self.prompt_set.user))
            draft.add(self.encode(reply.text))
            draft.add(self._encode_fixed(self.prompt_set.assistant))
            return draft, reply, None
        until_query = turns[:-1] if reply is not None else turns
        if not until_query or until_query[-1].role != "user":
            raise SampleRejected("no user turn")
        query = until_query[-1]
        if task.traits.converses:
            self._add_history(draft, until_query[:-1], task)
        draft.add(self._encode_fixed(self.prompt_set.user))
        draft.add(self._encode_fixed(self.prompt_set.instruction(task, choice)))
        self._add_query(draft, query, listens=task.traits.listens)
        draft.add(self._encode_fixed(self.prompt_set.assistant))
        return draft, reply if task.traits.converses else query, query

    def _add_history(self, draft: _Draft, turns: Sequence[Turn], task: DialogueTask) -> None:
        form = self.prompt_set.history
        for turn in turns:
            if turn.role == "user":
                draft.add(self._encode_fixed(self.prompt_set.user))
                self._add_query(draft, turn, listens=task.traits.listens, marked=form.speech_marks)
                draft.add(self._encode_fixed(form.assistant))
                continue
            draft.add(self.encode(turn.text))
            if form.end_of_text:
                draft.add([self.vocabulary.end_of_text])
            if form.speech_codes and task.traits.speaks and turn.speech_codes is not None:
                draft.add(codes_to_ids(turn.speech_codes, self.vocabulary))
            draft.add(self._encode_fixed(form.turn_end))

    def _add_query(self, draft: _Draft, turn: Turn, *, listens: bool, marked: bool = True) -> None:
        if not listens:
            if not turn.text:
                raise SampleRejected("no query text")
            draft.add(self.encode(turn.text))
            return
        if turn.log_mel is None:
            raise SampleRejected("no query audio")
        length = num_embeddings(turn.log_mel.shape[0], self.audio_strides)
        if length == 0:
            raise SampleRejected("empty query audio")
        if marked:
            draft.add([self.vocabulary.input_speech_begin])
        clip = AudioClip(
            log_mel=turn.log_mel,
            start=len(draft.ids),
            length=length,
            labels=class_indices(turn.labels),
            characters=spell(turn.text),
            transcript_ids=id_tensor(self.encode(turn.text)),
        )
        draft.clips.append(clip)
        draft.add([self.vocabulary.audio_placeholder] * length)
        if marked:
            draft.add([self.vocabulary.input_speech_end])

    def _target(self, turn: Turn | None, query: Turn | None, task: DialogueTask) -> list[int]:
        """The supervised ids, ends included."""
        if turn is None:
            raise SampleRejected("no reply")
        if task.kind == "text_to_speech":
            text_ids = [*self.encode(turn.text), self.vocabulary.end_of_text] if task.layout == "interleaved" else []
            return self._with_speech([], text_ids, turn, task)
        if not task.traits.converses:
            return [*self.encode(_understanding_target(turn, task)), self.vocabulary.end_of_text]
        assert query is not None
        if not turn.text:
            raise SampleRejected("no reply text")
        thinking_ids = self.encode(self._thinking(query, turn, task))
        reply_ids = [*self.encode(turn.text), self.vocabulary.end_of_text]
        if not task.traits.speaks:
            return thinking_ids + reply_ids
        return self._with_speech(thinking_ids, reply_ids, turn, task)

    def _with_speech(self, thinking_ids: list[int], text_ids: list[int], turn: Turn, task: DialogueTask) -> list[int]:
        if turn.speech_codes is None:
            raise SampleRejected("no speech codes", "run echat data tokenize")
        speech_ids = codes_to_ids(turn.speech_codes, self.vocabulary)
        if task.layout == "interleaved":
            return thinking_ids + interleave(text_ids, speech_ids)
        return thinking_ids + text_ids + speech_ids

    def _thinking(self, query: Turn, reply: Turn, task: DialogueTask) -> str:
        if task.thinking == "none":
            return ""
        fmt = self.prompt_set.thinking
        emotion = reply.labels.get("emotion", "")
        if task.thinking == "natural" and reply.thinking:
            return wrap_thinking(reply.thinking, fmt)
        if not emotion:
            raise SampleRejected("no reply emotion to think of")
        if task.thinking == "label":
            return write_label_thinking(query.text, query.labels, emotion, fmt)
        return wrap_thinking(write_natural_thinking(query.text, query.labels, emotion), fmt)

    def _finish(
        self,
        draft: _Draft,
        sample: DialogueSample,
        task: DialogueTask,
        prompt_length: int,
        query: Turn | None,
        target: Turn | None,
    ) -> TokenizedDialogue:
        input_ids, labels = _shift(draft.ids, prompt_length)
        reply = target if target is not None and target.role == "assistant" else None
        reference = DialogueReference(
            key=sample.key,
            task=task.name,
            shard=sample.shard,
            source=sample.source,
            speaker=sample.speaker,
            voice_type=sample.voice_type,
            transcript=query.text if query else "",
            labels=dict(query.labels) if query else {},
            asked_labels=task.labels,
            reply=reply.text if reply else "",
            reply_emotion=reply.labels.get("emotion", "") if reply else "",
            prompt_length=prompt_length,
            length=len(input_ids),
        )
        return TokenizedDialogue(
            input_ids=input_ids,
            labels=labels,
            speech_scored=task.traits.speaks,
            clips=draft.clips,
            reference=reference,
        )


def _shift(row: list[int], prompt_length: int) -> tuple[Tensor, Tensor]:
    """Inputs and the id to predict after each. The last id is never read, only predicted, so it is no input.

    A prompt, which supervises nothing, keeps all its ids.
    """
    ids = id_tensor(row)
    if prompt_length == len(row):
        return ids, torch.full_like(ids, IGNORE_INDEX)
    labels = ids.numpy().copy()  # a slice of it is set in a tenth of the time that torch takes
    labels[:prompt_length] = IGNORE_INDEX
    return ids[:-1], torch.from_numpy(labels[1:])


def _understanding_target(query: Turn, task: DialogueTask) -> str:
    """The words, the label tags, or both, as the task asks."""
    if task.traits.transcribes and not query.text:
        raise SampleRejected("no transcript")
    for name in task.labels:
        if name not in query.labels:
            raise SampleRejected(f"no {name} label")
    tags = write_label_tags([query.labels[name] for name in task.labels])
    return (query.text if task.traits.transcribes else "") + tags


def expand_history(sample: DialogueSample) -> Iterator[DialogueSample]:
    """Every prefix of a dialogue that ends in an assistant turn, shortest first, keyed by its turn: each is a sample.

    A dialogue of one exchange, or without a reply, is yielded as it is.
    """
    ends = [i + 1 for i, turn in enumerate(sample.turns) if turn.role == "assistant"]
    if len(ends) <= 1:
        yield sample
        return
    for end in ends:
        yield replace(sample, turns=sample.turns[:end], key=f"{sample.key}#{end // 2}")
