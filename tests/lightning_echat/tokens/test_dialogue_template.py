"""Rows drawn by hand, element by element: strings are text, the rest are named ids."""

from dataclasses import replace

import pytest
import torch

from lightning_echat.contracts import IGNORE_INDEX, DialogueSample, SampleRejected, Turn, UserError
from lightning_echat.testing import dummy_dialogue
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig, expand_history
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.tasks import ALL_TASK_NAMES, DialogueTask, task_from_name

ASK, ANSWER = "<|im_start|>", "<|im_end|>"
END, IN, OUT, AUDIO, BOUNDARY = "END", "IN", "OUT", "AUDIO", "BOUNDARY"
LABELS = {"emotion": "sad", "age": "old", "gender": "female", "event": "cough"}
FACTS = "words: hi ; age: <old> ; gender: <female> ; emotion: <sad> ; event: <cough> ; reply: <comforting>"
THINK = f"<think>{FACTS}<think end>"
NATURAL = "<think>an old woman says: hi. the voice sounds sad and coughs. i will sound comforting.<think end>"


def sample(*, frames: int = 17, codes: int = 3, exchanges: int = 1) -> DialogueSample:
    turns = []
    for _ in range(exchanges):
        turns += [
            Turn(role="user", text="hi", log_mel=torch.zeros(frames, 80), labels=dict(LABELS)),
            Turn(
                role="assistant",
                text="poor you",
                labels={"emotion": "comforting"},
                speech_codes=torch.arange(codes) + 5,
            ),
        ]
    return DialogueSample(turns=turns, key="k", shard="s.tar", source="src", speaker="me", voice_type="v")


def ids_of(elements, tokenizer: DialogueTokenizer) -> list[int]:
    vocabulary = tokenizer.vocabulary
    named = {
        END: vocabulary.end_of_text,
        IN: vocabulary.input_speech_begin,
        OUT: vocabulary.input_speech_end,
        AUDIO: vocabulary.audio_placeholder,
        BOUNDARY: vocabulary.speech_boundary,
    }
    ids: list[int] = []
    for element in elements:
        if isinstance(element, int):
            ids.append(vocabulary.first_code + element)
        else:
            ids += [named[element]] if element in named else tokenizer.encode(element)
    return ids


# 17 frames through strides (2, 2, 2) are ceil(17/8) = 3 embeddings.
QUERY = [IN, AUDIO, AUDIO, AUDIO, OUT]
ROWS = {
    "transcribe": (["words", ASK, *QUERY, ANSWER], ["hi", END]),
    "transcribe_and_label": (["words and", ASK, "emotion, age", *QUERY, ANSWER], ["hi<sad><old>", END]),
    "label": (["only", ASK, "emotion, age", *QUERY, ANSWER], ["<sad><old>", END]),
    "text_to_text": (["answer", ASK, "hi", ANSWER], ["poor you", END]),
    "text_to_speech": (["speak", ASK, "poor you", ANSWER], [BOUNDARY, 5, 6, 7, BOUNDARY]),
    "text_to_speech.interleaved": (
        ["speak along", ASK, "poor you", ANSWER],
        ["poor y", BOUNDARY, 5, 6, 7, BOUNDARY, "ou", END],
    ),
    "speech_to_text": (["answer", ASK, *QUERY, ANSWER], ["poor you", END]),
    "speech_to_text.label_thinking": (["think, answer", ASK, *QUERY, ANSWER], [THINK, "poor you", END]),
    "speech_to_text.natural_thinking": (["think aloud, answer", ASK, *QUERY, ANSWER], [NATURAL, "poor you", END]),
    "speech_to_speech": (
        ["answer and speak", ASK, *QUERY, ANSWER],
        ["poor you", END, BOUNDARY, 5, 6, 7, BOUNDARY],
    ),
    "speech_to_speech.interleaved": (
        ["answer and speak along", ASK, *QUERY, ANSWER],
        ["poor y", BOUNDARY, 5, 6, 7, BOUNDARY, "ou", END],
    ),
    "speech_to_speech.label_thinking": (
        ["think, answer and speak", ASK, *QUERY, ANSWER],
        [THINK, "poor you", END, BOUNDARY, 5, 6, 7, BOUNDARY],
    ),
    "speech_to_speech.label_thinking.interleaved": (
        ["think, answer and speak along", ASK, *QUERY, ANSWER],
        [THINK, "poor y", BOUNDARY, 5, 6, 7, BOUNDARY, "ou", END],
    ),
    "speech_to_speech.natural_thinking": (
        ["think aloud, answer and speak", ASK, *QUERY, ANSWER],
        [NATURAL, "poor you", END, BOUNDARY, 5, 6, 7, BOUNDARY],
    ),
    "speech_to_speech.natural_thinking.interleaved": (
        ["think aloud, answer and speak along", ASK, *QUERY, ANSWER],
        [NATURAL, "poor y", BOUNDARY, 5, 6, 7, BOUNDARY, "ou", END],
    ),
}


def task_of(name: str) -> DialogueTask:
    return task_from_name(name, labels=("emotion", "age"))


def test_every_task_is_drawn_here():
    assert set(ROWS) == set(ALL_TASK_NAMES)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_reads_as_drawn(compact, name):
    prompt, target = (ids_of(part, compact) for part in ROWS[name])
    dialogue = compact.tokenize(sample(), task_of(name))
    assert dialogue.input_ids.tolist() == (prompt + target)[:-1]
    assert dialogue.reference.prompt_length == len(prompt)
    assert dialogue.reference.task == name


@pytest.mark.parametrize("name", ROWS)
def test_each_label_is_the_next_id_and_only_the_target_counts(compact, name):
    prompt, target = (ids_of(part, compact) for part in ROWS[name])
    dialogue = compact.tokenize(sample(), task_of(name))
    # The position before the target predicts its first id; the last id of the target is only ever predicted.
    assert dialogue.labels.tolist() == [IGNORE_INDEX] * (len(prompt) - 1) + target
    assert dialogue.num_supervised == len(target)


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_is_the_row_up_to_the_target_and_supervises_nothing(compact, name):
    prompt = ids_of(ROWS[name][0], compact)
    dialogue = compact.prompt(sample(), task_of(name))
    assert dialogue.input_ids.tolist() == prompt
    assert dialogue.num_supervised == 0
    assert len(dialogue.labels) == len(prompt)


@pytest.mark.parametrize("name", ROWS)
def test_speech_is_scored_with_speech_and_text_with_text_alone(compact, name):
    dialogue = compact.tokenize(sample(), task_of(name))
    assert dialogue.speech_scored == ("to_speech" in name)


def test_a_clip_fills_exactly_its_placeholders(compact):
    dialogue = compact.tokenize(sample(exchanges=2), task_of("speech_to_text"))
    placeholders = (dialogue.input_ids == compact.vocabulary.audio_placeholder).nonzero().flatten().tolist()
    spans = [place for clip in dialogue.clips for place in range(clip.start, clip.start + clip.length)]
    assert spans == placeholders
    assert len(dialogue.clips) == 2


def test_a_clip_carries_what_the_auxiliary_losses_want(compact):
    (clip,) = compact.tokenize(sample(), task_of("transcribe")).clips
    classes = {name: int(clip.labels[i]) for i, name in enumerate(LABEL_SETS)}
    assert classes == {"age": 2, "gender": 0, "emotion": 2, "event": 1, "style": IGNORE_INDEX}
    assert clip.characters.tolist() == [9, 10]  # h, i; 0 is the blank and 1 the space


def test_history_holds_queries_and_reply_texts_and_is_not_learned(compact):
    dialogue = compact.tokenize(sample(exchanges=2), task_of("speech_to_speech.label_thinking"))
    prompt = ids_of(["think, answer and speak", ASK, *QUERY, ANSWER, "poor you", END, ASK, *QUERY, ANSWER], compact)
    assert dialogue.input_ids[: len(prompt)].tolist() == prompt
    assert (dialogue.labels[: len(prompt) - 1] == IGNORE_INDEX).all()


def test_history_is_text_for_a_written_chat(compact):
    dialogue = compact.tokenize(sample(exchanges=2), task_of("text_to_text"))
    prompt = ids_of(["answer", ASK, "hi", ANSWER, "poor you", END, ASK, "hi", ANSWER], compact)
    assert dialogue.input_ids[: len(prompt)].tolist() == prompt
    assert not dialogue.clips


def test_understanding_looks_at_the_last_query_alone(compact):
    dialogue = compact.tokenize(sample(exchanges=2), task_of("transcribe"))
    assert len(dialogue.clips) == 1


def test_the_reference_says_where_the_dialogue_came_from(compact):
    reference = compact.tokenize(sample(), task_of("transcribe_and_label")).reference
    assert (reference.key, reference.shard, reference.source) == ("k", "s.tar", "src")
    assert reference.asked_labels == ("emotion", "age")
    assert reference.transcript == "hi"
    assert reference.labels == LABELS
    chat = compact.tokenize(sample(), task_of("speech_to_text")).reference
    assert (chat.reply, chat.reply_emotion) == ("poor you", "comforting")


def test_a_prompt_may_end_in_the_query_as_in_a_live_chat(compact):
    asked = sample()
    live = replace(asked, turns=asked.turns[:1])
    task = task_of("speech_to_text.label_thinking")
    assert torch.equal(compact.prompt(live, task).input_ids, compact.prompt(asked, task).input_ids)


def test_a_corpus_own_thinking_is_used_as_it_is(compact):
    asked = sample()
    asked.turns[1].thinking = "An old lady coughs."
    ids = compact.tokenize(asked, task_of("speech_to_text.natural_thinking")).labels
    text = compact.decode([i for i in ids.tolist() if i >= 0])
    assert text == "<think>An old lady coughs.<think end>poor you<|im_end|>"


@pytest.mark.parametrize("number", range(5))
def test_instructions_rotate_and_name_the_labels(english, number):
    task = task_of("transcribe_and_label")
    texts = {
        english.decode(english.prompt(sample(), task, choice=choice).input_ids.tolist()) for choice in range(number + 1)
    }
    assert len(texts) == min(number + 1, len(english.prompt_set.instructions[task.name]))
    assert all("emotion, age" in text for text in texts)


def without(field: str, place: int, value) -> DialogueSample:
    changed = sample()
    changed.turns[place] = replace(changed.turns[place], **{field: value})
    return changed


@pytest.mark.parametrize(
    ("broken", "task", "reason"),
    [
        (without("log_mel", 0, None), "transcribe", "no query audio"),
        (without("log_mel", 0, torch.zeros(0, 80)), "transcribe", "empty query audio"),
        (without("text", 0, ""), "transcribe", "no transcript"),
        (without("text", 0, ""), "text_to_text", "no query text"),
        (without("labels", 0, {"age": "old"}), "label", "no emotion label"),
        (without("text", 1, ""), "speech_to_text", "no reply text"),
        (without("text", 1, ""), "text_to_speech", "no text to speak"),
        (without("labels", 1, {}), "speech_to_text.label_thinking", "no reply emotion to think of"),
        (without("speech_codes", 1, None), "speech_to_speech", "no speech codes"),
        (without("speech_codes", 1, torch.zeros(0, dtype=torch.long)), "speech_to_speech", "no speech codes"),
        (without("speech_codes", 1, torch.tensor([64])), "speech_to_speech", "speech code out of range"),
        (without("speech_codes", 1, torch.tensor([-1])), "text_to_speech", "speech code out of range"),
        (replace(sample(), turns=[]), "transcribe", "no turns"),
        (replace(sample(), turns=sample().turns[:1]), "speech_to_text", "no reply"),
        (replace(sample(), turns=sample().turns[1:]), "speech_to_text", "no user turn"),
    ],
)
def test_a_sample_that_does_not_serve_is_rejected_with_its_reason(compact, broken, task, reason):
    with pytest.raises(SampleRejected) as error:
        compact.tokenize(broken, task_of(task))
    assert error.value.reason == reason


def test_each_prefix_that_ends_in_a_reply_is_a_sample():
    dialogue = dummy_dialogue(3, exchanges=3)
    prefixes = list(expand_history(dialogue))
    assert [len(prefix.turns) for prefix in prefixes] == [2, 4, 6]
    assert [prefix.key for prefix in prefixes] == [f"{dialogue.key}#{n}" for n in (1, 2, 3)]
    assert next(expand_history(dummy_dialogue(3))).key == dialogue.key


def test_a_missing_tokenizer_is_the_users_to_mend(tmp_path):
    for name in (str(tmp_path / "none"), "runs/quickstart/none"):
        with pytest.raises(UserError, match=r"cannot load tokenizer .*none': there is no such folder"):
            DialogueTokenizer.from_config(TokensConfig(tokenizer=name, text_vocabulary_size=10))
