"""Judges are named by a short name or a class path, and a mistake is one line."""

from pathlib import Path

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.judging import JudgedReply, JudgeScore, make_judge
from lightning_echat.evaluation.llm_rubric import LLM_RUBRICS, load_llm_rubric


class LengthJudge:
    """A judge of one's own."""

    def __init__(self, points: float = 1.0) -> None:
        self.points = points
        self.name = f"length/{points:g}"

    def score_all(self, replies, *, folder):
        return [JudgeScore(total=self.points * len(said.reply), by_category={}, per_dimension={}) for said in replies]


class NoJudge:
    """Has a name and no scores."""

    name = "none"


def test_a_judge_of_ones_own_is_named_by_its_class_path():
    judge = make_judge(f"{__name__}.LengthJudge", {"points": 2.0})
    said = JudgedReply(key="a", transcript="", labels={}, categories=[], reply="four")
    assert [score and score.total for score in judge.score_all([said], folder=Path())] == [8.0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rubrik", {}, "no judge 'rubrik'.*did you mean 'rubric'"),
        ("lightning_echat.evaluation.rubric.RubricJugde", {}, "did you mean 'RubricJudge'"),
        ("no.such.Module", {}, "No module named 'no'"),
        (f"{__name__}.NoJudge", {}, "has no 'score_all'"),
        (f"{__name__}.LengthJudge", {"pionts": 1}, "unknown key 'pionts'; did you mean 'points'"),
        (f"{__name__}.LengthJudge", {"points": "many"}, "points: expected"),
        ("rubric", {"rubric": "echat_en_v2"}, "no rubric 'echat_en_v2'.*did you mean 'echat_en_v1'"),
        ("llm", {}, "base_url|missing"),
        ("llm", {"base_url": "localhost:8000", "model": "m"}, "no http"),
        ("llm", {"base_url": "http://x/v1", "model": "m", "rubric": "echat_judge_v2"}, "did you mean 'echat_judge_v1'"),
        ("llm", {"base_url": "http://x/v1", "model": "m", "n": 0}, "at least once"),
        ("llm", {"base_url": "http://x/v1", "model": "m", "reply_emotion": "understandin"}, "mean 'understanding"),
    ],
)  # fmt: skip
def test_a_mistake_in_naming_a_judge_is_one_line_with_the_nearest_choice(name, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        make_judge(name, arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{transcript}", "{transkript}", "stands for nothing"),
        ("reply: {reply}", "reply", "shows no {reply}"),
        ("name: content", "name: contents", "output_schema scores"),
        ("low: 1", "low: 9", "scale runs"),
        ("    needs: reply_emotion", "    needs: ears", "known: reply_emotion"),
        ("version: 1", "versoin: 1", "'version' is missing"),
    ],
)
def test_a_rubric_file_that_cannot_be_asked_is_refused(tmp_path, old, new, message):
    text = (LLM_RUBRICS / "echat_judge_v1.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load_llm_rubric(path)


def test_braces_in_a_reply_stay_what_they_are():
    rubric = load_llm_rubric()
    said = rubric.messages("say {schema}", labels={}, reply="{transcript}", reply_emotion=None, with_voice=False)
    assert '"say {schema}"' in said[1]["content"] and 'reply: "{transcript}"' in said[1]["content"]


def test_the_shipped_rubric_says_that_it_is_not_the_authors():
    for path in LLM_RUBRICS.glob("*.yaml"):
        assert "not the authors" in path.read_text().lower()
        assert load_llm_rubric(path.stem).identifier == path.stem
