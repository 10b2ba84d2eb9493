"""A tiny model answers dummy sets; what is stored is not asked again."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.data.writers import encode_audio
from lightning_echat.decoding import DecodingConfig
from lightning_echat.evaluation import answering
from lightning_echat.evaluation.answering import QuestionConfig
from lightning_echat.evaluation.compare import compare
from lightning_echat.evaluation.evaluate import choose_device, evaluate
from lightning_echat.evaluation.item_sets import EvaluationSet
from lightning_echat.evaluation.records import read_records
from lightning_echat.evaluation.scoring import score
from lightning_echat.nn.token2wav.kmeans import fit_kmeans, log_mel_blocks
from lightning_echat.testing import CODEBOOK_SIZE, dummy_audio, save_tiny_checkpoint, tiny_model, write_dummy_shards
from lightning_echat.tokens.dialogue_template import TokensConfig

QUESTIONS = QuestionConfig(
    batch=3,
    thinking="none",
    audio_items=2,
    controls=("text_only",),
    decoding=DecodingConfig(max_text_ids=8, max_speech_ids=20),
)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory, tokens) -> TokensConfig:
    torch.manual_seed(0)
    folder = Path(tmp_path_factory.mktemp("voice"))
    fit_kmeans(log_mel_blocks(0.1 * torch.randn(6 * SAMPLE_RATE)), codebook_size=CODEBOOK_SIZE).save(folder)
    return replace(tokens, speech_tokenizer=str(folder))


@pytest.fixture
def checkpoint(tmp_path, speaking) -> Path:
    return save_tiny_checkpoint(tmp_path / "last.ckpt", tiny_model(speaking), speaking)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[EvaluationSet]:
    folders = [Path(tmp_path_factory.mktemp("shards")) for _ in range(2)]
    write_dummy_shards(folders[0], shards=1, samples_per_shard=5)
    write_dummy_shards(folders[1], shards=1, samples_per_shard=2, first=50)
    names = ("held-out voices", "held-out types")
    return [EvaluationSet(name=name, shards=[str(folder)]) for name, folder in zip(names, folders, strict=True)]


@pytest.fixture
def generated(monkeypatch) -> list[list[str]]:
    """Keys of each batch that is answered."""
    batches: list[list[str]] = []
    generate = answering.generate

    def counted(model, batch, *args):
        batches.append([reference.key for reference in batch.references])
        return generate(model, batch, *args)

    monkeypatch.setattr(answering, "generate", counted)
    return batches


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in ("seconds", "evaluation_seconds", "machine")}


def test_the_report_has_every_section(tmp_path, checkpoint, sets):
    out = tmp_path / "run"
    evaluate(checkpoint, sets, out, questions=QUESTIONS)
    report = report_of(out)
    assert {
        "seconds",
        "machine",
        "versions",
        "stages",
        "understanding",
        "thinking",
        "empathy",
        "speech",
        "data",
    } <= set(report)
    understanding = report["understanding"]
    assert (understanding["set"], understanding["items"]) == ("held-out voices", 5)
    assert understanding["other_sets"]["held-out types"]["items"] == 2
    for figure in ("accuracy", "majority_baseline", "confusion"):
        assert set(understanding[figure]) == {"age", "gender", "emotion", "event"}
    assert understanding["wer"] > 0 and 0 < understanding["majority_baseline"]["gender"] <= 1
    assert {"parse_rate", "accuracy"} <= set(report["thinking"])
    empathy = report["empathy"]
    assert empathy["judge"].startswith("rubric/") and empathy["items"] == 5
    assert all(len(empathy[category]) == 3 for category in ("emotion", "age", "gender", "event", "multi"))
    assert empathy["controls"]["text_only"]["items"] == 5
    # An untrained model ends its text at once and its speech never: a boundary and 19 codes.
    assert report["speech"]["replies"] == 5 and report["speech"]["speech_codes"] == 5 * 19
    assert report["speech"]["seconds_of_audio"] == pytest.approx(19 / 25)
    assert {"samples", "skipped", "padding_share"} <= set(report["data"])
    assert report["checkpoint"]["step"] == 7
    names = ("dialogues", "text_only", "understanding-held-out_types", "understanding-held-out_voices")
    assert sorted(path.stem for path in (out / "evaluation").glob("*.jsonl")) == sorted(names)


def test_answers_are_stored_with_some_of_their_sound(tmp_path, checkpoint, sets):
    evaluate(checkpoint, sets[:1], tmp_path, questions=QUESTIONS)
    records = read_records(tmp_path / "evaluation" / "dialogues.jsonl")
    assert [record.item.key for record in records] == [f"dialogue-{number:06d}" for number in range(5)]
    assert all(record.score is not None and record.judge for record in records)
    # One in sixteen is kept, beginning with the first.
    assert [record.reply_audio is not None for record in records] == [True, False, False, False, False]
    first = records[0]
    assert first.query_audio and first.reply_audio
    assert soundfile.info(tmp_path / "evaluation" / first.reply_audio).frames == 19 * 640
    assert first.query_seconds == pytest.approx(soundfile.info(tmp_path / "evaluation" / first.query_audio).duration)


def test_a_second_run_asks_nothing_again(tmp_path, checkpoint, sets, generated):
    out = tmp_path / "run"
    evaluate(checkpoint, sets, out, questions=QUESTIONS)
    # Two batches of the first set for each of three questions, one of the second.
    assert len(generated) == 7
    before, files = report_of(out), _contents(out)
    generated.clear()
    evaluate(checkpoint, sets, out, questions=QUESTIONS)
    assert generated == []
    assert timeless(report_of(out)) == timeless(before)
    assert _contents(out) == files


def test_another_checkpoint_is_asked_anew(tmp_path, checkpoint, sets, speaking, generated):
    out = tmp_path / "run"
    evaluate(checkpoint, sets[:1], out, questions=QUESTIONS)
    generated.clear()
    save_tiny_checkpoint(checkpoint, tiny_model(speaking, seed=1), speaking)
    evaluate(checkpoint, sets[:1], out, questions=QUESTIONS)
    assert len(generated) == 6
    generated.clear()
    evaluate(checkpoint, sets[:1], out, questions=replace(QUESTIONS, decoding=DecodingConfig(max_text_ids=4)))
    assert len(generated) == 6


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, checkpoint, sets, generated, monkeypatch):
    whole = tmp_path / "whole"
    evaluate(checkpoint, sets[:1], whole, questions=QUESTIONS)
    generated.clear()
    counted = answering.generate

    def interrupted(*args):
        if len(generated) == 3:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(answering, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, sets[:1], tmp_path / "run", questions=QUESTIONS)
    assert not (tmp_path / "run" / "report.json").exists()
    generated.clear()
    monkeypatch.setattr(answering, "generate", counted)
    evaluate(checkpoint, sets[:1], tmp_path / "run", questions=QUESTIONS)
    # The second half of the dialogues, and the control.
    assert len(generated) == 3
    found, expected = (read_records(folder / "evaluation" / "dialogues.jsonl") for folder in (tmp_path / "run", whole))
    strip = [replace(record, timings={}) for record in found]
    assert strip == [replace(record, timings={}) for record in expected]


def test_what_stages_and_data_left_joins_the_report(tmp_path, checkpoint, sets):
    for age, (name, padding) in enumerate((("understanding", 0.5), ("empathy", 0.1))):
        folder = tmp_path / name
        folder.mkdir()
        summary = {"seconds": 10.0, "steps": 5, "loss_first": 6.0, "loss_last": 2.0, "more": 1}
        health = {"samples": 100, "skipped": {"no turns": 2}, "positions": 1000 * (age + 1), "padding_share": padding}
        (folder / "stage_summary.json").write_text(json.dumps(summary))
        (folder / "data_health.json").write_text(json.dumps(health))
        os.utime(folder / "stage_summary.json", (1000 + age, 1000 + age))
    evaluate(checkpoint, sets[:1], tmp_path, questions=QUESTIONS)
    report = report_of(tmp_path)
    assert list(report["stages"]) == ["understanding", "empathy"]
    assert report["stages"]["empathy"] == {"seconds": 10.0, "steps": 5, "loss_first": 6.0, "loss_last": 2.0}
    assert report["data"]["samples"] == 200 and report["data"]["skipped"] == {"no turns": 4}
    assert report["data"]["padding_share"] == pytest.approx(700 / 3000)
    assert report["seconds"] >= 20


def test_sets_must_be_given_and_told_apart(tmp_path, checkpoint, sets):
    with pytest.raises(UserError, match="no evaluation set"):
        evaluate(checkpoint, [], tmp_path, questions=QUESTIONS)
    twins = [sets[0], replace(sets[1], name="held-out/voices")]
    with pytest.raises(UserError, match="two evaluation sets"):
        evaluate(checkpoint, twins, tmp_path, questions=QUESTIONS)


def _contents(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((out / "evaluation").rglob("*")) if path.is_file()}


CONTROLS = replace(
    QUESTIONS, thinking="label", controls=("text_only", "label_oracle", "neutral_voice", "shuffled_audio")
)


@pytest.fixture(scope="module")
def own_items(tmp_path_factory) -> list[EvaluationSet]:
    """Five items as JSON lines, four of them with a neutral voice, one without sound at all."""
    folder = Path(tmp_path_factory.mktemp("items"))
    rows = []
    for number in range(5):
        for kind in ("query", "neutral"):
            audio = dummy_audio(0.5, seed=10 * number + (kind == "neutral"))
            (folder / f"{kind}{number}.wav").write_bytes(encode_audio(audio, audio_format="wav"))
        rows.append(
            {
                "key": f"item-{number}",
                "category": "emotion",
                "audio": f"query{number}.wav",
                "neutral_audio": f"neutral{number}.wav",
                "transcript": f"find cafe {number}",
                "labels": {"emotion": "sad", "age": "old", "gender": "male", "event": "none"},
                "source": "held-out voices" if number % 2 else "unseen voice types",
            }
        )
    (folder / "query4.wav").write_bytes(b"no sound")
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [EvaluationSet(name="mine", shards=[str(folder / "items.jsonl")])]


def test_controls_stand_in_the_same_table_and_what_is_skipped_is_counted(tmp_path, checkpoint, own_items):
    evaluate(checkpoint, own_items, tmp_path, questions=replace(CONTROLS, batch=5))
    report = report_of(tmp_path)
    controls = report["empathy"]["controls"]
    assert list(controls) == ["text_only", "label_oracle", "neutral_voice", "shuffled_audio"]
    # The broken file is heard by the model itself, the oracle, and by the item that is given its sound.
    assert report["empathy"]["items"] == 4
    assert {name: found["items"] for name, found in controls.items()} == {
        "text_only": 5, "label_oracle": 4, "neutral_voice": 5, "shuffled_audio": 4,
    }  # fmt: skip
    assert report["items_skipped"]["dialogues"] == {"unreadable audio": 1}
    assert report["items_skipped"]["neutral_voice"] == {}
    assert set(report["understanding"]["by_source"]) == {"held-out voices", "unseen voice types"}
    replies = report["empathy"]["by_source"]
    assert {name: found["items_in_category"]["emotion"] for name, found in replies.items()} == {
        "unseen voice types": 2, "held-out voices": 2,
    }  # fmt: skip
    shuffled = read_records(tmp_path / "evaluation" / "shuffled_audio.jsonl")
    assert all(record.heard_key not in ("", record.item.key, "item-4") for record in shuffled)
    assert len({record.heard_key for record in shuffled}) == 4
    oracle = read_records(tmp_path / "evaluation" / "label_oracle.jsonl")
    for record in oracle:
        assert record.text.startswith(f"<think>words: {record.item.transcript} ; age: <old> ; gender: <male>")
        assert record.answer.transcript == record.item.transcript
        assert {**record.answer.labels, "event": "none"} == record.item.labels
        assert record.item.task == "speech_to_speech.label_thinking"


def test_neutral_voices_are_what_the_control_hears(tmp_path, checkpoint, own_items, monkeypatch):
    heard: dict[str, list[float]] = {}
    generate = answering.generate

    def listen(model, batch, *args):
        for reference in batch.references:
            heard.setdefault(reference.key, []).append(float(batch.log_mels.sum()))
        return generate(model, batch, *args)

    monkeypatch.setattr(answering, "generate", listen)
    evaluate(
        checkpoint,
        own_items,
        tmp_path,
        questions=replace(CONTROLS, batch=1, controls=("label_oracle", "neutral_voice")),
    )
    # Asked in this order: understanding, dialogue, oracle, neutral voice.
    understanding, dialogue, oracle, neutral = heard["item-0"]
    assert understanding == dialogue == oracle != neutral


def test_the_neutral_voice_is_asked_where_only_some_items_bring_one(tmp_path, checkpoint, own_items):
    path = Path(own_items[0].shards[0])
    rows = [json.loads(line) for line in path.read_text().splitlines()[:4]]
    del rows[0]["neutral_audio"]
    some = path.with_name("some.jsonl")
    some.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = replace(CONTROLS, batch=4, controls=("neutral_voice",))
    evaluate(checkpoint, [EvaluationSet(name="some", shards=[str(some)])], tmp_path, questions=asked)
    report = report_of(tmp_path)
    assert report["empathy"]["controls"]["neutral_voice"]["items"] == 3
    assert report["items_skipped"]["neutral_voice"] == {"no neutral voice": 1}


def test_a_control_that_cannot_be_asked_is_left_out_and_says_why(tmp_path, checkpoint, sets):
    evaluate(checkpoint, sets[:1], tmp_path, questions=replace(CONTROLS, thinking="none"))
    empathy = report_of(tmp_path)["empathy"]
    assert list(empathy["controls"]) == ["text_only", "shuffled_audio"]
    assert "does not think" in empathy["controls_left_out"]["label_oracle"]
    assert "neutral_audio" in empathy["controls_left_out"]["neutral_voice"]


def test_every_answer_says_what_made_it_and_how_sure_the_model_was(tmp_path, checkpoint, sets, monkeypatch):
    said = answering.generate

    def labelled(model, batch, tokenizer, config):
        replies = said(model, batch, tokenizer, config)
        return [replace(reply, text="a cafe<old><male>") for reply in replies]

    monkeypatch.setattr(answering, "generate", labelled)
    evaluate(checkpoint, sets[:1], tmp_path, questions=replace(QUESTIONS, controls=()))
    records = read_records(tmp_path / "evaluation" / "understanding-held-out_voices.jsonl")
    digest = report_of(tmp_path)["checkpoint"]["sha256"]
    for record in records:
        assert (record.checkpoint, record.seed) == (digest, 0)
        assert set(record.label_probabilities) == {"age", "gender"}
        assert sum(record.label_probabilities["age"].values()) == pytest.approx(1.0)
    calibration = report_of(tmp_path)["understanding"]["calibration"]
    assert calibration["age"]["items"] == 5 and calibration["event"]["unscored"] == 5


def test_scoring_again_needs_no_model_and_keeps_the_other_judge(tmp_path, checkpoint, sets, monkeypatch):
    evaluate(checkpoint, sets[:1], tmp_path, questions=QUESTIONS)
    before, answers = report_of(tmp_path), _contents(tmp_path)
    checkpoint.unlink()
    score(tmp_path, judge="tests.lightning_echat.evaluation.test_judging.LengthJudge", judge_args={"points": 3.0})
    report = report_of(tmp_path)
    assert report["empathy"]["judge"] == "length/3"
    assert report["other_judges"]["rubric/echat_en_v1"]["emotion"] == before["empathy"]["emotion"]
    score(tmp_path)
    assert report_of(tmp_path)["empathy"]["emotion"] == before["empathy"]["emotion"]
    kept = {path: content for path, content in _contents(tmp_path).items() if "/scores/" not in path}
    assert kept == {path: content for path, content in answers.items() if "/scores/" not in path}
    with pytest.raises(UserError, match="give a folder that echat evaluate has finished"):
        score(tmp_path / "nowhere")


def test_two_runs_are_compared_over_the_items_that_both_answered(tmp_path, checkpoint, sets, speaking, capsys):
    evaluate(checkpoint, sets[:1], tmp_path / "a", questions=QUESTIONS)
    evaluate(checkpoint, [replace(sets[0], max_items=3)], tmp_path / "b", questions=QUESTIONS)
    path = tmp_path / "b" / "evaluation" / "scores" / "rubric_echat_en_v1" / "dialogues.jsonl"
    header, *lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["score"]["by_category"] = {"gender": 40.0}
    path.write_text("\n".join([header, *map(json.dumps, rows)]) + "\n")
    compare([tmp_path / "a", tmp_path / "b"], out=tmp_path / "compare.json")
    assert "nan" not in (said := capsys.readouterr().out) and "no data" in said
    found = json.loads((tmp_path / "compare.json").read_text())["replies"]["gender"]
    assert (found["items"], found["only_in_one"]) == (3, 2)
    assert found["second"] == 40.0
    assert found["difference"][0] == pytest.approx(40.0 - found["first"])
    assert found["difference"][1] <= found["difference"][0] <= found["difference"][2]
    assert found["share_better"] == 1.0
    understanding = json.loads((tmp_path / "compare.json").read_text())["understanding"]["held-out_voices"]
    assert understanding["age"]["difference"] == [0.0, 0.0, 0.0] and understanding["age"]["share_better"] == 0.5
    with pytest.raises(UserError, match="two runs are compared"):
        compare([tmp_path / "a"])
    with pytest.raises(UserError, match="not scored by rubric/other"):
        compare([tmp_path / "a", tmp_path / "b"], judge="rubric/other")


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"--device tpuu: .*give auto, cpu or cuda") as raised:
        choose_device("tpuu")
    assert "\n" not in str(raised.value)
