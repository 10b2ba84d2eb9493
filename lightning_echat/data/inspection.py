"""`echat data inspect`: one sample exactly as the model will see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_echat.contracts import (
    IGNORE_INDEX,
    SAMPLE_RATE,
    DialogueSample,
    SampleRejected,
    TokenizedDialogue,
    UserError,
)
from lightning_echat.data.decoding import ParsedDialogue, parse_dialogue
from lightning_echat.data.dialogue_stream import DialogueReader, ReadingConfig
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.tar_samples import StoredSample
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import task_from_name
from lightning_echat.tokens.thinking import parse_thinking
from lightning_echat.tokens.vocabulary import Vocabulary

_SHOWN_CODES = 8
"""Speech codes written out of a span before it is cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring positions of one sort.

    Attributes:
        start: First position.
        sort: "text", "code", "speech boundary", "input speech begin", "input speech end" or "audio".
        ids: What stands there.
        targets: What these positions are to predict, one each, or nothing where no loss counts.
    """

    start: int
    sort: str
    ids: tuple[int, ...]
    targets: tuple[int, ...]


def inspect(
    shards: list[str],
    *,
    tokens: TokensConfig,
    task: str = "speech_to_speech.label_thinking",
    labels: tuple[str, ...] = ("emotion", "age", "gender", "event"),
    index: int | str = 0,
    max_seconds: float = 30.0,
) -> None:
    """Print one sample as ids, with what each predicts, which of it the loss counts, and where audio goes.

    Args:
        shards: Tar files, globs, list files, or folders with index.json.
        tokens: As the model has it.
        task: Name of the task, for instance transcribe_and_label.
        labels: Label sets asked for, where the task labels.
        index: Which sample: its place over all shards from 0, or its key. KEY#2 is the second exchange of a dialogue.
        max_seconds: Longest clip that training would take.

    Raises:
        UserError: There is no such task or sample, or the sample does not serve for the task.
    """
    asked = task_from_name(task, labels=tuple(labels))
    reader = DialogueReader(ReadingConfig(tokens=tokens, max_seconds=max_seconds))
    stored, exchange = find_dialogue(expand_shards(shards), index=index)
    try:
        parsed = _exchange(parse_dialogue(stored), exchange)
        sample = reader.with_mels(parsed, asked)
        dialogue = reader.tokenizer.tokenize(sample, asked)
    except SampleRejected as error:
        raise UserError(f"{stored.shard} {stored.key} would be skipped for task {task}: {error}") from error
    print_dialogue(sample, dialogue, reader.tokenizer, console=Console())


def find_dialogue(paths: list[str], *, index: int | str) -> tuple[StoredSample, int | None]:
    """The dialogue at a place over all shards, or with a key; and the exchange asked for after a #.

    Raises:
        UserError: There is none; an index out of range says how many there are.
    """
    wanted, _, exchange = str(index).partition("#")
    if exchange and not exchange.isdecimal():
        raise UserError(f"index {index!r}: after # stands the number of an exchange, from 1")
    number = int(wanted) if wanted.isdecimal() else None
    place = -1
    for path in paths:
        for stored in read_shard(ShardPart(path=path), counter=SkipCounter()):
            place += 1
            if place == number or stored.key == wanted:
                return stored, int(exchange) if exchange else None
    raise UserError(f"no sample {wanted} in {len(paths)} shards; they hold {place + 1}, numbered from 0")


def _exchange(parsed: ParsedDialogue, number: int | None) -> ParsedDialogue:
    prefixes = list(parsed.prefixes())
    if number is None:
        return prefixes[-1]
    if not 1 <= number <= len(prefixes):
        raise UserError(f"{parsed.sample.key} has {len(prefixes)} exchanges, not {number}")
    return prefixes[number - 1]


def spans(dialogue: TokenizedDialogue, vocabulary: Vocabulary) -> Iterator[Span]:
    """The positions of a dialogue, in order, grouped by what stands there and by whether a loss counts."""
    ids, targets = dialogue.input_ids.tolist(), dialogue.labels.tolist()

    def group(position: int) -> tuple[str, bool]:
        return _sort(ids[position], vocabulary), targets[position] != IGNORE_INDEX

    for (sort, supervised), members in groupby(range(len(ids)), key=group):
        positions = list(members)
        yield Span(
            start=positions[0],
            sort=sort,
            ids=tuple(ids[i] for i in positions),
            targets=tuple(targets[i] for i in positions) if supervised else (),
        )


def _sort(token: int, vocabulary: Vocabulary) -> str:
    if token < vocabulary.text_size:
        return "text"
    named = {
        vocabulary.speech_boundary: "speech boundary",
        vocabulary.input_speech_begin: "input speech begin",
        vocabulary.input_speech_end: "input speech end",
        vocabulary.audio_placeholder: "audio",
    }
    return named.get(token, "code")


def print_dialogue(
    sample: DialogueSample, dialogue: TokenizedDialogue, tokenizer: DialogueTokenizer, *, console: Console
) -> None:
    """The table of spans, between what the sample is and what it adds up to."""
    reference = dialogue.reference
    console.print(Text(f"{reference.shard} {reference.key} · task {reference.task} · {_softmax(dialogue)}"))
    for turn in sample.turns:
        heard = f"{len(turn.audio) / SAMPLE_RATE:.2f} s" if turn.audio is not None else "not heard"
        labels = " ".join(f"{name}={label}" for name, label in turn.labels.items())
        console.print(Text(f"{turn.role} ({heard}) {labels}: {turn.text}"))
    table = Table("positions", "ids", "what stands there", "what it predicts (*: counts)", show_lines=False)
    clip_lengths = {clip.start: len(clip.log_mel) for clip in dialogue.clips}
    for span in spans(dialogue, tokenizer.vocabulary):
        table.add_row(
            f"{span.start}–{span.start + len(span.ids) - 1}",
            str(len(span.ids)),
            Text(_content(span, tokenizer, clip_lengths)),
            Text(f"* {_spell(span.targets, tokenizer)}" if span.targets else ""),
        )
    console.print(table)
    console.print(Text(_totals(dialogue, tokenizer)))
    console.print(Text(_thinking(dialogue, tokenizer)))


def _softmax(dialogue: TokenizedDialogue) -> str:
    return "scored over text and speech codes" if dialogue.speech_scored else "scored over text"


def _content(span: Span, tokenizer: DialogueTokenizer, clip_lengths: dict[int, int]) -> str:
    if span.sort == "audio":
        frames = clip_lengths[span.start]
        return f"[audio: {frames / 100:.2f} s, {frames} mel frames -> {len(span.ids)} embeddings]"
    return _spell(span.ids, tokenizer)


def _spell(ids: tuple[int, ...], tokenizer: DialogueTokenizer) -> str:
    """Ids of any sort in words."""
    words: list[str] = []
    for sort, members in groupby(ids, key=lambda token: _sort(token, tokenizer.vocabulary)):
        group = list(members)
        if sort == "text":
            words.append(tokenizer.decode(group).replace("\n", "⏎"))
        elif sort == "code":
            codes = [str(token - tokenizer.vocabulary.first_code) for token in group]
            more = f" … {len(codes)} in all" if len(codes) > _SHOWN_CODES else ""
            words.append(f"[codes {' '.join(codes[:_SHOWN_CODES])}{more}]")
        else:
            words.append(f"[{sort}]")
    return " ".join(words)


def _totals(dialogue: TokenizedDialogue, tokenizer: DialogueTokenizer) -> str:
    sorts = [_sort(token, tokenizer.vocabulary) for token in dialogue.input_ids.tolist()]
    codes = sorts.count("code")
    seconds = sum(len(clip.log_mel) for clip in dialogue.clips) / 100
    return (
        f"{len(sorts)} ids, {dialogue.num_supervised} supervised; {sorts.count('text')} text, "
        f"{sorts.count('audio')} audio for {seconds:.2f} s of {len(dialogue.clips)} clips, "
        f"{codes} speech codes ({codes / 25:.2f} s at 25 Hz)"
    )


def _thinking(dialogue: TokenizedDialogue, tokenizer: DialogueTokenizer) -> str:
    """What a metric would read out of the answer."""
    vocabulary = tokenizer.vocabulary
    targets = [token for token in dialogue.labels.tolist() if 0 <= token < vocabulary.text_size]
    answer = tokenizer.decode([token for token in targets if token != vocabulary.end_of_text])
    if "_thinking" not in dialogue.reference.task:
        return f"answer: {answer}"
    parsed = parse_thinking(answer, tokenizer.prompt_set.thinking)
    labels = " ".join(f"{name}={label}" for name, label in parsed.labels.items())
    form = "well formed" if parsed.well_formed else "NOT well formed"
    return (
        f"thinking ({form}): words {parsed.transcript!r}, {labels}, reply emotion {parsed.reply_emotion}\n"
        f"reply: {parsed.reply}"
    )
