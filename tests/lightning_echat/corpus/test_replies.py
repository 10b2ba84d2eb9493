import itertools
import re

import numpy as np
import pytest

from lightning_echat.corpus.dialogues import AGES, EMOTIONS, EVENTS, GENDERS, Split, draw_cues, write_script
from lightning_echat.corpus.queries import SLOTS, TEMPLATES, draw_query, queries_of
from lightning_echat.corpus.replies import (
    ADDRESSES,
    EVENT_PHRASES,
    OPENERS,
    PACE_PHRASES,
    choose_reply_emotion,
    neutral_reply,
    write_reply,
)
from lightning_echat.tokens.paralinguistics import REPLY_EMOTIONS, check_label
from lightning_echat.tokens.thinking import parse_thinking, wrap_thinking

TRAIN = Split(name="train", number=0, dialogues=3000, speakers=300)
ALL_LABELS: list[dict[str, str]] = [
    {"age": age, "gender": gender, "emotion": emotion, "event": event}
    for age, gender, emotion, event in itertools.product(AGES, GENDERS, ("neutral", *EMOTIONS), ("none", *EVENTS))
]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text)


def all_exchanges(count: int = 3000):
    return [exchange for index in range(count) for exchange in write_script(TRAIN, index=index, seed=0).exchanges]


def test_each_cue_adds_its_own_wording_to_the_reply_and_absent_cues_add_nothing():
    topic = "i will find the quiet cafe"
    for labels in ALL_LABELS:
        reply = write_reply(topic, labels=labels)
        for table, key in (
            (OPENERS, labels["emotion"]),
            (EVENT_PHRASES, labels["event"]),
            (PACE_PHRASES, labels["age"]),
        ):
            present = {label for label, phrase in table.items() if phrase and phrase in reply}
            assert present == ({key} if table[key] else set()), reply
        assert ADDRESSES[labels["age"], labels["gender"]] in reply
        assert topic in reply


def test_age_and_gender_are_each_recoverable_from_the_reply():
    genders = {
        gender: {phrase.split()[-1] for (_, g), phrase in ADDRESSES.items() if g == gender} for gender in GENDERS
    }
    assert not genders["female"] & genders["male"]
    assert len({PACE_PHRASES[age] for age in AGES}) == 3


def test_replies_differ_whenever_the_labels_differ_and_are_short():
    replies = [write_reply("yes, bring my reading glasses", labels=labels) for labels in ALL_LABELS]
    assert len(set(replies)) == len(ALL_LABELS)
    assert max(len(words_of(reply)) for reply in replies) <= 18


def test_a_plain_adult_gets_only_an_address_and_the_answer():
    labels = {"age": "adult", "gender": "male", "emotion": "neutral", "event": "none"}
    assert write_reply("i will find the quiet cafe", labels=labels) == "sir, i will find the quiet cafe."
    assert neutral_reply("i will find the quiet cafe") == "i will find the quiet cafe."


def test_reply_emotion_follows_emotion_then_event_and_is_known():
    assert choose_reply_emotion({"emotion": "happy", "event": "cry"}) == "comforting"
    assert choose_reply_emotion({"emotion": "angry", "event": "laugh"}) == "calm"
    assert choose_reply_emotion({"emotion": "neutral", "event": "cough"}) == "worried"
    assert all(choose_reply_emotion(labels) in REPLY_EMOTIONS for labels in ALL_LABELS)


def test_every_template_answers_over_slots_that_exist_and_every_slot_is_used():
    used = set(re.findall(r"\{(\w+)\}", "".join(asked for asked, _ in TEMPLATES)))
    assert used == set(SLOTS)
    assert len(set(itertools.chain(*SLOTS.values()))) == sum(map(len, SLOTS.values()))


def test_one_text_in_ten_is_reserved_and_made_of_words_that_training_has():
    kept = [query.text for group in queries_of(reserved=True) for query in group]
    trained = [query.text for group in queries_of(reserved=False) for query in group]
    assert not set(kept) & set(trained)
    assert len(kept) == pytest.approx(len(trained) / 9, rel=0.02)
    assert set(words_of(" ".join(kept))) <= set(words_of(" ".join(trained)))


def test_words_say_nothing_about_the_labels():
    # Queries and cues are drawn independently: the mutual information of template and label is what chance gives.
    exchanges = all_exchanges()
    first_words = [" ".join(exchange.query.split()[:3]) for exchange in exchanges]
    for label_set in ("age", "gender", "emotion", "event"):
        labels = [exchange.labels[label_set] for exchange in exchanges]
        table = np.zeros((len(set(first_words)), len(set(labels))))
        np.add.at(
            table,
            (np.unique(first_words, return_inverse=True)[1], np.unique(labels, return_inverse=True)[1]),
            1,
        )
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        chi_square, freedom = ((table - expected) ** 2 / expected).sum(), (table.shape[0] - 1) * (table.shape[1] - 1)
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom), label_set


def test_no_query_names_a_cue():
    telling = set(words_of(" ".join([*OPENERS.values(), *ADDRESSES.values(), *EVENT_PHRASES.values()])))
    telling -= {"i", "a", "do", "not", "what", "you", "your", "am", "like", "how"}
    asked = {word for reserved in (True, False) for group in queries_of(reserved=reserved) for query in group
             for word in words_of(query.text)}  # fmt: skip
    assert not telling & asked


def test_label_marginals_are_as_documented():
    rng = np.random.default_rng(0)
    cues = [draw_cues(rng) for _ in range(8000)]
    share = lambda key, label: sum(cue[key] == label for cue in cues) / len(cues)  # noqa: E731
    assert share("emotion", "neutral") == pytest.approx(0.26, abs=0.02)
    assert share("event", "none") == pytest.approx(0.40, abs=0.02)
    assert all(share("emotion", emotion) == pytest.approx(0.185, abs=0.02) for emotion in EMOTIONS)
    assert all(share("event", event) == pytest.approx(0.12, abs=0.02) for event in EVENTS)


def test_thinking_says_what_the_labels_say_and_parses_back():
    for exchange in all_exchanges(200):
        assert exchange.thinking is not None
        parsed = parse_thinking(wrap_thinking(exchange.thinking) + exchange.reply)
        assert parsed.well_formed
        assert parsed.labels == exchange.labels
        assert (parsed.transcript, parsed.reply_emotion) == (exchange.query, exchange.reply_emotion)
        assert len(words_of(exchange.thinking)) <= 30


def test_labels_are_known_and_the_vocabulary_is_small_and_plain():
    exchanges = all_exchanges()
    for exchange in exchanges[:200]:
        for label_set, label in exchange.labels.items():
            check_label(label_set, label)
    text = " ".join(f"{exchange.query} {exchange.reply} {exchange.thinking}" for exchange in exchanges)
    assert set(re.sub(r"[a-z ]", "", text)) <= set(",.?':")
    assert 250 <= len(set(words_of(text))) <= 350


def test_text_pairs_have_no_labels_and_the_reply_of_a_reader():
    split = Split(name="text", number=4, dialogues=5, speakers=0, spoken=False)
    script = write_script(split, index=3, seed=0)
    assert script.speaker is None
    assert script.exchanges[0].labels == {}
    assert script.exchanges[0].thinking is None
    assert not any(phrase and phrase in script.exchanges[0].reply for phrase in OPENERS.values())


def test_a_script_is_a_function_of_seed_split_and_index():
    assert write_script(TRAIN, index=7, seed=0) == write_script(TRAIN, index=7, seed=0)
    assert write_script(TRAIN, index=7, seed=0) != write_script(TRAIN, index=7, seed=1)
    assert draw_query(np.random.default_rng(1), reserved=True) in {
        query for group in queries_of(reserved=True) for query in group
    }
