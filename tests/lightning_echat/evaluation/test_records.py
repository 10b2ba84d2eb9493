import json
import math

import pytest
import soundfile
import torch

from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.evaluation.records import (
    RecordWriter,
    read_made_by,
    read_records,
    rescore_records,
    score_records,
)
from lightning_echat.evaluation.rubric import RubricJudge


def test_an_answer_keeps_what_was_asked_thought_and_said(make_record):
    record = make_record(codes=7)
    assert record.item.categories == ["emotion", "age", "gender", "event", "multi"]
    assert record.answer.labels == record.item.labels
    assert record.answer.well_formed
    assert record.answer.reply == "madam, let us look for my blue key."
    assert record.codes == 7


def test_answers_are_read_back_as_they_were_written_with_their_audio(tmp_path, make_record):
    tone = torch.sin(torch.arange(SAMPLE_RATE // 2) * 0.1)
    first = make_record("a/1.x", text="no thinking\u2028at all", labels={"emotion": "neutral"})
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        stored = [writer.write(first, reply=tone), writer.write(make_record("b"))]
    assert read_records(tmp_path / "dialogues.jsonl") == stored
    assert stored[0].reply_seconds == 0.5
    assert stored[0].query_audio is None
    audio, rate = soundfile.read(tmp_path / stored[0].reply_audio)
    assert rate == SAMPLE_RATE
    assert abs(audio - tone.numpy()).max() < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "dialogues.jsonl"]


def kill_after_two(folder, make_record):
    with (
        pytest.raises(KeyboardInterrupt),
        RecordWriter(folder, name="dialogues", made_by="me") as writer,
    ):
        for key in ("a", "b"):
            writer.write(make_record(key), reply=torch.zeros(160))
        raise KeyboardInterrupt


def test_an_interrupted_writer_goes_on_where_it_stopped(tmp_path, make_record):
    kill_after_two(tmp_path, make_record)
    assert not (tmp_path / "dialogues.jsonl").exists()
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        assert writer.done == {"a", "b"}
        writer.write(make_record("c"), reply=torch.zeros(160))
    records = read_records(tmp_path / "dialogues.jsonl")
    assert [record.item.key for record in records] == ["a", "b", "c"]
    assert len({record.reply_audio for record in records}) == 3


def test_a_line_torn_by_a_kill_is_done_again(tmp_path, make_record):
    kill_after_two(tmp_path, make_record)
    partial = tmp_path / "dialogues.jsonl.partial"
    partial.write_text(partial.read_text()[:-20])
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        assert writer.done == {"a"}
        writer.write(make_record("b"))
    assert [record.item.key for record in read_records(tmp_path / "dialogues.jsonl")] == ["a", "b"]


def test_a_finished_set_is_not_answered_again(tmp_path, make_record):
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        writer.write(make_record("a"))
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        assert writer.done == {"a"}
    assert len(read_records(tmp_path / "dialogues.jsonl")) == 1


def test_answers_of_another_model_are_never_continued(tmp_path, make_record, caplog):
    kill_after_two(tmp_path, make_record)
    with RecordWriter(tmp_path, name="dialogues", made_by="another checkpoint") as writer:
        assert writer.done == set()
        writer.write(make_record("z"))
    assert [record.item.key for record in read_records(tmp_path / "dialogues.jsonl")] == ["z"]
    assert read_made_by(tmp_path / "dialogues.jsonl") == "another checkpoint"
    assert "replaced" in caplog.text
    assert list((tmp_path / "audio").iterdir()) == []


def test_an_item_is_answered_once(tmp_path, make_record):
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        writer.write(make_record("a"))
        with pytest.raises(ValueError, match="there already"):
            writer.write(make_record("a"))


def test_scoring_is_a_step_that_can_be_run_again_on_the_file(tmp_path, make_record):
    path = tmp_path / "dialogues.jsonl"
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        writer.write(make_record("a"))
        writer.write(make_record("b", labels={"emotion": "neutral"}))
    judge = RubricJudge()
    scored = rescore_records(path, judge=judge)
    answers = path.read_text()
    (scores,) = (tmp_path / "scores").glob("*/dialogues.jsonl")
    text = scores.read_text()
    again = rescore_records(path, judge=judge)
    assert scores.read_text() == text
    assert path.read_text() == answers
    assert [record.score for record in read_records(path)][:1] == [scored[0].score]
    assert read_made_by(path) == "me"
    assert scored[0].score == again[0].score
    assert scored[0].judge == judge.name
    assert again[1].score is not None
    assert math.isnan(again[1].score.total)


def test_the_score_is_the_judges_own(make_record):
    judge = RubricJudge()
    record = make_record(reply="sir, here is my blue key")
    (scored,) = score_records([record], judge=judge)
    assert scored.score == judge.score(record.item.transcript, labels=record.item.labels, reply=record.answer.reply)
    assert scored.score is not None
    assert scored.score.by_category["gender"] == 0.0
    assert record.score is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no header"),
        ('{"schema": 9, "made_by": ""}\n', "schema 9"),
        ('{"schema": 2, "made_by": ""}\n{"item": {}}\n', ":2: not an answer record"),
    ],
)
def test_a_file_that_holds_no_answers_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_records(path)


def test_a_records_file_is_plain_json(tmp_path, make_record):
    with RecordWriter(tmp_path, name="dialogues", made_by="me") as writer:
        writer.write(score_records([make_record(labels={})], judge=RubricJudge())[0])
    lines = (tmp_path / "dialogues.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
