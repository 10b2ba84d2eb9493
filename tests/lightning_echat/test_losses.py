"""Losses against the naive form: full-vocabulary logits, one softmax over text or over text and speech codes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_echat import losses
from lightning_echat.contracts import IGNORE_INDEX
from lightning_echat.losses import ctc_loss_sum, label_loss_sum, token_loss

TEXT, SPEECH, WIDTH = 11, 5, 6


class Case:
    """Hidden states of three rows and heads."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(3, 7, WIDTH, generator=generator).requires_grad_()
        self.labels = torch.randint(0, TEXT + SPEECH, (3, 7), generator=generator)
        self.scored = torch.rand(3, 7, generator=generator) < 0.5
        # Only positions that both softmaxes score may have a speech target.
        self.labels = self.labels.where(self.scored | (self.labels < TEXT), self.labels - TEXT)
        self.labels[torch.rand(3, 7, generator=generator) < 0.3] = IGNORE_INDEX
        torch.manual_seed(seed)
        self.text_head = nn.Linear(WIDTH, TEXT, bias=False)
        self.speech_head = nn.Linear(WIDTH, SPEECH)

    def loss(self) -> losses.TokenLoss:
        return token_loss(self.hidden, self.labels, self.scored, text_head=self.text_head, speech_head=self.speech_head)

    def naive(self) -> tuple[Tensor, Tensor]:
        text, speech = self.hidden.new_zeros(()), self.hidden.new_zeros(())
        for row in range(3):
            for place in range(7):
                target = int(self.labels[row, place])
                if target == IGNORE_INDEX:
                    continue
                state = self.hidden[row, place]
                logits = self.text_head(state)
                if self.scored[row, place]:
                    logits = torch.cat([logits, self.speech_head(state)])
                nll = -logits.log_softmax(0)[target]
                text, speech = (text + nll, speech) if target < TEXT else (text, speech + nll)
        return text, speech

    def gradients(self, total: Tensor) -> list[Tensor]:
        parts = [self.hidden, self.text_head.weight, self.speech_head.weight, self.speech_head.bias]
        return list(torch.autograd.grad(total, parts))


@pytest.mark.parametrize("seed", range(4))
def test_sums_and_gradients_are_those_of_the_full_softmax(seed):
    case = Case(seed)
    found, (text, speech) = case.loss(), case.naive()
    torch.testing.assert_close(found.text, text)
    torch.testing.assert_close(found.speech, speech)
    supervised = case.labels[case.labels != IGNORE_INDEX]
    assert int(found.num_text) == int((supervised < TEXT).sum()) > 0
    assert int(found.num_speech) == int((supervised >= TEXT).sum()) > 0
    for ours, theirs in zip(case.gradients(found.text + found.speech), case.gradients(text + speech), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, chunk):
    case = Case()
    whole = case.loss()
    expected = case.gradients(whole.text + whole.speech)
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    cut = case.loss()
    torch.testing.assert_close((cut.text, cut.speech), (whole.text, whole.speech))
    for ours, theirs in zip(case.gradients(cut.text + cut.speech), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_logits_never_exist_for_more_than_a_chunk(monkeypatch):
    case = Case()
    monkeypatch.setattr(losses, "_CHUNK", 4)
    scored: list[int] = []
    case.text_head.register_forward_hook(lambda module, given, logits: scored.append(len(logits)))
    loss = case.loss()
    loss.text.backward()
    count = int((case.labels != IGNORE_INDEX).sum())
    assert max(scored) == 4
    # Once forward, once more backward.
    assert sum(scored) == 2 * count


def test_what_text_tasks_learn_is_no_matter_of_speech_codes():
    case = Case()
    case.scored[:] = False
    case.labels = case.labels.clamp(max=TEXT - 1)
    before = case.loss().text
    with torch.no_grad():
        case.speech_head.bias.add_(50)
    torch.testing.assert_close(case.loss().text, before)
    gradient = case.gradients(case.loss().text)[2]
    assert not gradient.any()


def test_nothing_supervised_is_no_loss_with_a_gradient_for_both_heads():
    case = Case()
    case.labels[:] = IGNORE_INDEX
    found = case.loss()
    assert (found.text.item(), found.speech.item()) == (0, 0)
    assert (int(found.num_text), int(found.num_speech)) == (0, 0)
    (found.text + found.speech).backward()
    for parameter in (case.hidden, case.text_head.weight, case.speech_head.weight, case.speech_head.bias):
        assert parameter.grad is not None and not parameter.grad.any()


def test_large_logits_stay_finite():
    case = Case()
    with torch.no_grad():
        case.text_head.weight *= 1e4
        case.speech_head.weight *= 1e4
    found = case.loss()
    assert all(gradient.isfinite().all() for gradient in case.gradients(found.text + found.speech))


def test_ctc_counts_the_clips_that_have_a_transcript():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 6, requires_grad=True)
    lengths = torch.tensor([9, 7, 9, 2])
    targets = torch.tensor([[1, 2, 3], [4, 4, 0], [0, 0, 0], [1, 2, 3]])
    # The third has no transcript, the fourth more characters than frames.
    target_lengths = torch.tensor([3, 2, 0, 3])
    found, scored = ctc_loss_sum(logits, lengths, targets, target_lengths)
    assert int(scored) == 5
    expected = torch.zeros(())
    for clip in (0, 1):
        log_probs = logits[clip, : lengths[clip]].log_softmax(1)[:, None]
        expected = expected + F.ctc_loss(
            log_probs,
            targets[clip : clip + 1],
            lengths[clip : clip + 1],
            target_lengths[clip : clip + 1],
            reduction="sum",
        )
    torch.testing.assert_close(found, expected)
    found.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert [bool(gradient.any()) for gradient in logits.grad] == [True, True, False, False]


def test_any_class_may_be_the_blank_of_ctc():
    torch.manual_seed(0)
    logits, lengths, ones = torch.randn(1, 9, 6), torch.tensor([9]), torch.tensor([3])
    found, _ = ctc_loss_sum(logits, lengths, torch.tensor([[0, 2, 1]]), ones, blank=5)
    # The same with the classes turned by one, so that the last becomes the first.
    expected, _ = ctc_loss_sum(logits.roll(1, 2), lengths, torch.tensor([[1, 3, 2]]), ones)
    torch.testing.assert_close(found, expected)


def test_ctc_without_any_transcript_is_nothing():
    logits = torch.randn(2, 5, 6, requires_grad=True)
    none = torch.zeros(2, dtype=torch.long)
    found, scored = ctc_loss_sum(logits, torch.tensor([5, 3]), torch.zeros(2, 0, dtype=torch.long), none)
    assert found.item() == scored.item() == 0
    found.backward()
    assert logits.grad is not None and not logits.grad.any()


def test_labels_that_nobody_gave_do_not_count():
    torch.manual_seed(0)
    logits = {"gender": torch.randn(3, 2), "age": torch.randn(3, 3)}
    clip_labels = torch.tensor([[2, IGNORE_INDEX], [IGNORE_INDEX, 1], [0, 0]])
    found = label_loss_sum(logits, clip_labels, ("age", "gender"))
    age, gender = logits["age"].log_softmax(1), logits["gender"].log_softmax(1)
    torch.testing.assert_close(found, -(age[0, 2] + age[2, 0] + gender[1, 1] + gender[2, 0]))
    nobody = torch.full((3, 2), IGNORE_INDEX)
    assert float(label_loss_sum(logits, nobody, ("age", "gender"))) == 0
