"""The waveform behind a reference. Batches carry log-mels only, so it is read from the shard once more."""

from __future__ import annotations

from torch import Tensor

from lightning_echat.contracts import DialogueReference, SampleRejected
from lightning_echat.data.decoding import ParsedDialogue, parse_dialogue, with_audio
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, read_shard

_MAX_SECONDS = 120.0


def read_query_audio(reference: DialogueReference) -> Tensor:
    """[samples] float32 at `SAMPLE_RATE`, what the last user turn of the dialogue says.

    Reads its shard up to the dialogue: meant for the few that somebody listens to.

    Raises:
        SampleRejected: The shard or the dialogue is gone, or the turn holds no usable audio.
    """
    parsed = _find(reference)
    spoken = max(i for i, turn in enumerate(parsed.sample.turns) if turn.role == "user")
    audio = with_audio(parsed, turns=[spoken], max_seconds=_MAX_SECONDS).turns[spoken].audio
    if audio is None:
        raise SampleRejected("no query audio", reference.key)
    return audio


def _find(reference: DialogueReference) -> ParsedDialogue:
    for stored in read_shard(ShardPart(path=reference.shard), counter=SkipCounter()):
        # An exchange of a longer dialogue has a key of its own, which starts with the dialogue's.
        if reference.key.startswith(stored.key):
            parsed = parse_dialogue(stored)
            for candidate in (parsed, *parsed.prefixes()):
                if candidate.sample.key == reference.key:
                    return candidate
    raise SampleRejected("dialogue not found", f"{reference.key} in {reference.shard or 'no shard'}")
