"""Characters as targets of the auxiliary CTC loss on the speech encoder."""

from __future__ import annotations

from torch import Tensor

from lightning_echat.tokens.id_tensors import id_tensor

CTC_ALPHABET = " abcdefghijklmnopqrstuvwxyz'"
"""The characters CTC spells transcripts with. Index 0 is the blank, character i of this string has index i + 1."""

CTC_CLASSES = len(CTC_ALPHABET) + 1

_INDEX = {character: index for index, character in enumerate(CTC_ALPHABET, start=1)}


def spell(transcript: str) -> Tensor:
    """Transcript -> [n] int64 CTC targets. Case is folded; characters outside the alphabet have no target.

    A transcript in another script yields an empty target, and the auxiliary loss does not count its clip.
    """
    return id_tensor([_INDEX[c] for c in transcript.lower() if c in _INDEX])
