import itertools
import math

import pytest
import yaml

from lightning_echat.contracts import UserError
from lightning_echat.corpus.queries import queries_of
from lightning_echat.corpus.replies import ADDRESSES, EVENT_PHRASES, OPENERS, PACE_PHRASES, neutral_reply, write_reply
from lightning_echat.evaluation.items import CATEGORIES, categories_of, present_cues
from lightning_echat.evaluation.rubric import DEFAULT_RUBRIC, RUBRICS, RubricJudge, load_rubric

TRANSCRIPT = "could you find the quiet cafe"
TOPIC = "i will find the quiet cafe"
LABEL_SPACE = [
    {"emotion": emotion, "age": age, "gender": gender, "event": event}
    for emotion, age, gender, event in itertools.product(OPENERS, PACE_PHRASES, ("female", "male"), EVENT_PHRASES)
]
SAD_OLD_WOMAN = {"emotion": "sad", "age": "old", "gender": "female", "event": "cough"}


@pytest.fixture(scope="module")
def judge() -> RubricJudge:
    return RubricJudge()


def test_every_reply_of_the_corpus_is_perfect_in_every_category_over_the_whole_label_space(judge):
    assert {(labels["age"], labels["gender"]) for labels in LABEL_SPACE} == set(ADDRESSES)
    for labels in LABEL_SPACE:
        score = judge.score(TRANSCRIPT, labels=labels, reply=write_reply(TOPIC, labels=labels))
        assert score.total == 100.0, (labels, score)
        assert score.by_category == dict.fromkeys(categories_of(labels), 100.0), (labels, score)


def test_a_reply_to_the_words_alone_earns_little_in_every_category(judge):
    for labels in LABEL_SPACE:
        score = judge.score(TRANSCRIPT, labels=labels, reply=neutral_reply(TOPIC))
        assert 0.0 < score.total <= 25.0
        assert all(value <= 25.0 for value in score.by_category.values())


def test_no_answer_of_the_corpus_to_the_words_claims_anything_about_the_voice(judge):
    topics = {query.topic for reserved in (False, True) for group in queries_of(reserved=reserved) for query in group}
    claimed = {
        topic: score.phrases
        for topic in topics
        if (score := judge.score(topic, labels=SAD_OLD_WOMAN, reply=neutral_reply(topic))).phrases
    }
    assert claimed == {}


def test_a_reply_to_another_voice_altogether_earns_next_to_nothing(judge):
    for labels in LABEL_SPACE[::3]:
        strangers = [other for other in LABEL_SPACE if all(other[cue] != labels[cue] for cue in labels)]
        for other in strangers:
            score = judge.score(TRANSCRIPT, labels=labels, reply=write_reply(TOPIC, labels=other))
            assert score.total < 10.0, (labels, other, score)
            assert score.by_category["gender"] == 0.0


def test_a_reply_to_another_emotion_or_event_loses_its_category_entirely(judge):
    for labels in LABEL_SPACE:
        for cue, values in (("emotion", OPENERS), ("event", EVENT_PHRASES)):
            for value in set(values) - {labels[cue], "neutral", "none"}:
                reply = write_reply(TOPIC, labels={**labels, cue: value})
                score = judge.score(TRANSCRIPT, labels=labels, reply=reply)
                assert score.verdicts[cue] == "contradicted"
                assert score.by_category.get(cue, 0.0) == 0.0
                # An invented cue costs the categories that were met, too.
                assert score.by_category["gender"] == 50.0


@pytest.mark.parametrize(
    ("labels", "reply", "cue"),
    [
        ({"age": "adult", "gender": "male"}, "okey dokey, the key is in the box, sir", "age"),
        ({"age": "adult", "gender": "male"}, "The key is in the box, Madam.", "gender"),
        ({"emotion": "happy"}, "I'm so sorry to hear that. The key is in the box.", "emotion"),
        ({"emotion": "neutral", "gender": "male"}, "What a surprise, sir! The key is in the box.", "emotion"),
        ({"event": "none", "gender": "male"}, "Bless you, sir. The key is in the box.", "event"),
        ({"event": "laugh"}, "Please don’t cry. The key is in the box.", "event"),
    ],
)
def test_wording_for_somebody_else_is_a_contradiction(judge, labels, reply, cue):
    score = judge.score("where is the key", labels=labels, reply=reply)
    assert score.verdicts[cue] == "contradicted"
    assert score.per_dimension[cue] == 0.0
    assert not score.total > 50.0


def test_a_reply_that_names_both_genders_honours_neither(judge):
    score = judge.score("where is the key", labels={"gender": "male"}, reply="sir, madam, the key is here")
    assert score.by_category["gender"] == 0.0


def test_an_old_man_may_be_called_sir_but_that_does_not_honour_his_age(judge):
    score = judge.score("where is the key", labels={"age": "old", "gender": "male"}, reply="the key is here, sir")
    assert score.verdicts == {"age": "missed", "gender": "honoured"}


def test_an_empty_reply_earns_nothing(judge):
    for reply in ("", "  ", "...!"):
        score = judge.score(TRANSCRIPT, labels=SAD_OLD_WOMAN, reply=reply)
        assert score.total == 0.0
        assert set(score.by_category.values()) == {0.0}


def test_a_reply_that_neither_answers_nor_honours_earns_nothing(judge):
    assert judge.score(TRANSCRIPT, labels=SAD_OLD_WOMAN, reply="bananas are yellow").total == 0.0


def test_a_query_without_any_cue_has_no_score(judge):
    score = judge.score(TRANSCRIPT, labels={"emotion": "neutral", "event": "none"}, reply=TOPIC)
    assert math.isnan(score.total)
    assert score.by_category == {}


def test_phrases_match_whole_words_only_and_the_longest_wins(judge):
    assert judge.score("x", labels={"gender": "male"}, reply="the siren and the desire").phrases == []
    assert judge.score("x", labels={"age": "child"}, reply="here, young sir").phrases == ["young sir"]
    refusal = judge.score("x", labels={"emotion": "neutral"}, reply="I'm sorry, I can't do that")
    assert refusal.verdicts["emotion"] == "silent"


def test_a_label_that_no_wording_can_name_is_not_judged(judge):
    score = judge.score("where is the key", labels={"event": "other", "gender": "male"}, reply="bless you sir, the key")
    assert score.verdicts["event"] == "silent"
    assert score.total == 100.0


def test_the_judge_names_the_version_of_its_rubric(judge):
    assert judge.name == "rubric/echat_en_v1"
    for path in RUBRICS.glob("*.yaml"):
        assert load_rubric(path.stem).identifier == path.stem


def changed_rubric(tmp_path, change):
    content = yaml.safe_load((RUBRICS / f"{DEFAULT_RUBRIC}.yaml").read_text())
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rubric: rubric["claims"][1]["says"].update(emotion=["hapy"]), "did you mean 'happy'"),
        (lambda rubric: rubric["claims"].pop(), "no claim says event scream"),
        (lambda rubric: rubric["claims"][2]["phrases"].append("how lovely"), "stands twice"),
        (lambda rubric: rubric.pop("scores"), "'scores' is missing"),
        (lambda rubric: rubric["function_words"].append(True), "quote it"),
    ],
)
def test_a_mistake_in_a_rubric_is_said_in_one_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_rubric(changed_rubric(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_a_rubric_of_ones_own_is_used(tmp_path):
    def strict(rubric):
        rubric.update(name="mine", version=3)
        rubric["scores"]["missed"] = 0

    judge = RubricJudge(changed_rubric(tmp_path, strict))
    assert judge.name == "rubric/mine_v3"
    assert judge.score(TRANSCRIPT, labels=SAD_OLD_WOMAN, reply=TOPIC).total == 0.0


def test_an_unknown_rubric_names_those_that_exist():
    with pytest.raises(UserError, match="echat_en_v1"):
        load_rubric("nonsense")


def test_categories_are_the_cues_that_a_query_carries():
    assert categories_of(SAD_OLD_WOMAN) == list(CATEGORIES)
    assert categories_of({**SAD_OLD_WOMAN, "event": "none"}) == ["emotion", "age", "gender"]
    assert categories_of({**SAD_OLD_WOMAN, "emotion": "neutral"}) == ["age", "gender", "event"]
    assert categories_of({"emotion": "other", "event": "other", "style": "news"}) == []
    assert present_cues({"gender": "male"}) == ("gender",)


def test_a_corpus_of_random_labels_fills_every_category():
    for category in CATEGORIES:
        share = sum(category in categories_of(labels) for labels in LABEL_SPACE) / len(LABEL_SPACE)
        assert share > 0.5, category
