"""Probabilities of labels against the plain way: every label written out and scored from the beginning."""

from dataclasses import replace

import pytest
import torch

from lightning_echat.data.batching import collate
from lightning_echat.data.log_mel import LogMel
from lightning_echat.evaluation.label_probabilities import NamedLabels, label_probabilities
from lightning_echat.testing import dummy_dialogue
from lightning_echat.tokens.paralinguistics import LABEL_SETS, write_label
from lightning_echat.tokens.tasks import DialogueTask


@pytest.fixture
def prompts(tokenizer):
    task = DialogueTask(kind="transcribe_and_label", labels=("gender", "emotion"))
    found = []
    for number in range(3):
        sample = dummy_dialogue(number)
        turns = [turn if turn.audio is None else replace(turn, log_mel=LogMel()(turn.audio)) for turn in sample.turns]
        found.append(tokenizer.prompt(replace(sample, turns=turns), task))
    return found


def plainly(model, tokenizer, prompt, before, label_set):
    """log p of each label's ids after `before`, one pass each, normalised over the set."""
    scores = []
    with torch.no_grad():
        for label in LABEL_SETS[label_set]:
            known = tokenizer.encode(before)
            ids = tokenizer.encode(before + write_label(label))
            assert ids[: len(known)] == known
            row = replace(prompt, input_ids=torch.cat([prompt.input_ids, torch.tensor(ids)]))
            row.labels = torch.full_like(row.input_ids, -100)
            hidden = model(collate([row], padding=tokenizer.vocabulary.padding)).hidden_states[0]
            logs = model.lm.text_head(hidden).log_softmax(1)
            start = len(prompt.input_ids) + len(known)
            scores.append(sum(logs[start + i - 1, ids[len(known) + i]] for i in range(len(ids) - len(known))))
    return torch.stack(scores).softmax(0).tolist()


def test_each_label_has_the_probability_of_its_ids_among_those_of_its_set(model, tokenizer, prompts):
    answers = [
        NamedLabels(prompt=prompt, words=words, labels={"gender": "male", "emotion": "sad"})
        for prompt, words in zip(prompts, ("find me", "", "a quiet cafe"), strict=True)
    ]
    found = label_probabilities(model, tokenizer, answers, device=torch.device("cpu"))
    for answer, sets in zip(answers, found, strict=True):
        assert list(sets) == ["gender", "emotion"]
        for name, before in (("gender", answer.words), ("emotion", f"{answer.words}<male>")):
            assert list(sets[name]) == list(LABEL_SETS[name])
            expected = plainly(model, tokenizer, answer.prompt, before, name)
            assert list(sets[name].values()) == pytest.approx(expected, abs=1e-5)


def test_from_the_first_label_that_an_answer_does_not_name_nothing_is_scored(model, tokenizer, prompts):
    answers = [
        NamedLabels(prompt=prompts[0], words="a", labels={"emotion": "sad"}),
        NamedLabels(prompt=prompts[1], words="a", labels={"gender": "male"}),
    ]
    found = label_probabilities(model, tokenizer, answers, device=torch.device("cpu"))
    assert [list(sets) for sets in found] == [[], ["gender"]]
