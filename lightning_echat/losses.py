"""Losses as sums. The stage divides by the supervised ids of all ranks and of the whole accumulation window.

Text-only tasks are scored by the softmax over text, spoken ones by the softmax over text ⊕ speech codes, as released
weights were trained. With two log-sum-exps both are one code path:

    log Z = logsumexp(text logits)                                  text only
    log Z = logaddexp(logsumexp(text logits), logsumexp(speech logits))   text ⊕ speech
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_echat.contracts import IGNORE_INDEX

_CHUNK = 1024
"""Supervised positions scored at once: the most full-vocabulary logits that ever exist."""


@dataclass(slots=True, kw_only=True)
class TokenLoss:
    """Sums over supervised positions, by what the target is.

    Attributes:
        text, speech: Summed negative log-likelihood in nats, scalars with gradient.
        num_text, num_speech: Int64 scalars, the targets of each kind.
    """

    text: Tensor
    speech: Tensor
    num_text: Tensor
    num_speech: Tensor


def token_loss(
    hidden_states: Tensor,
    labels: Tensor,
    speech_scored: Tensor,
    *,
    text_head: nn.Linear,
    speech_head: nn.Linear,
) -> TokenLoss:
    """Cross-entropy at the supervised positions only, in chunks that backward computes again.

    Memory grows with chunk · vocabulary, never with the batch.

    Args:
        hidden_states: [R, T, D].
        labels: [R, T] unified ids, already shifted, IGNORE_INDEX elsewhere.
        speech_scored: [R, T] bool.
        text_head: [T, D] weight of the language model's head.
        speech_head: Scores the ids from T on.
    """
    supervised = labels != IGNORE_INDEX
    if not supervised.any():
        # Both heads stay in the graph of a batch that supervises nothing: all ranks reduce the same gradients.
        dummy = _chunk_loss(hidden_states[:1, 0], labels.new_zeros(1), speech_scored[:1, 0], text_head, speech_head)
        nothing = labels.new_zeros(())
        return TokenLoss(text=0.0 * dummy.sum(), speech=0.0 * dummy.sum(), num_text=nothing, num_speech=nothing)
    hidden, targets, scored = hidden_states[supervised], labels[supervised], speech_scored[supervised]
    is_speech = targets >= text_head.weight.shape[0]
    chunks = list(zip(hidden.split(_CHUNK), targets.split(_CHUNK), scored.split(_CHUNK), strict=True))
    if len(chunks) == 1:
        nll = _chunk_loss(hidden, targets, scored, text_head, speech_head)
    else:
        losses = [checkpoint(_chunk_loss, *chunk, text_head, speech_head, use_reentrant=False) for chunk in chunks]
        nll = torch.cat(cast(list[Tensor], losses))
    return TokenLoss(
        text=(nll * ~is_speech).sum(),
        speech=(nll * is_speech).sum(),
        num_text=(~is_speech).sum(),
        num_speech=is_speech.sum(),
    )


def _chunk_loss(
    hidden: Tensor, targets: Tensor, scored: Tensor, text_head: nn.Linear, speech_head: nn.Linear
) -> Tensor:
    """[N, D], [N], [N] -> [N] negative log-likelihood in float32."""
    text_logits = text_head(hidden).float()
    speech_logits = speech_head(hidden).float()
    text_size, speech_size = text_logits.shape[1], speech_logits.shape[1]
    text_norm = text_logits.logsumexp(1)
    norm = torch.where(scored, torch.logaddexp(text_norm, speech_logits.logsumexp(1)), text_norm)
    of_text = text_logits.gather(1, targets.clamp(max=text_size - 1)[:, None])[:, 0]
    of_speech = speech_logits.gather(1, (targets - text_size).clamp(0, speech_size - 1)[:, None])[:, 0]
    return norm - torch.where(targets < text_size, of_text, of_speech)


def ctc_loss_sum(
    logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int = 0
) -> tuple[Tensor, Tensor]:
    """Summed CTC loss over the clips whose transcript fits into their frames; others add nothing.

    Args:
        logits: [C, F, classes].
        lengths: [C] valid frames.
        targets: [C, longest] zero-padded classes, the blank never among them.
        target_lengths: [C]; a clip without transcript has 0.
        blank: The class that stands for no target.

    Returns:
        The sum, and the number of targets it is over.
    """
    log_probs = logits.float().log_softmax(2).transpose(0, 1)
    losses = F.ctc_loss(log_probs, targets, lengths, target_lengths, blank=blank, reduction="none", zero_infinity=True)
    # An infinite loss, that of a transcript which does not fit, has become zero.
    scored = (target_lengths > 0) & (losses > 0)
    return (losses * scored).sum(), (target_lengths * scored).sum()


def label_loss_sum(label_logits: dict[str, Tensor], clip_labels: Tensor, label_sets: tuple[str, ...]) -> Tensor:
    """Summed cross-entropy of the auxiliary label heads over the clips that carry the label.

    Args:
        label_logits: Label set -> [C, classes].
        clip_labels: [C, L] class indices in the order of `label_sets`.
        label_sets: Names of the columns.
    """
    losses = [
        F.cross_entropy(
            logits.float(), clip_labels[:, label_sets.index(name)], ignore_index=IGNORE_INDEX, reduction="sum"
        )
        for name, logits in label_logits.items()
    ]
    return torch.stack(losses).sum()
