"""Who hears a spoken reply: what was heard reaches the judge, and is not heard twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from lightning_echat.contracts import SAMPLE_RATE, GeneratedReply
from lightning_echat.evaluation import reply_emotion
from lightning_echat.evaluation.records import RecordWriter, read_records
from lightning_echat.evaluation.reply_emotion import AudioClassifier, UnderstandingRecogniser, hear_replies
from lightning_echat.evaluation.scoring import score, write_run_facts
from lightning_echat.testing import dummy_audio, save_tiny_checkpoint, tiny_model
from tests.lightning_echat.evaluation.chat_server import ChatServer, says
from tests.lightning_echat.evaluation.tiny_recognisers import save_emotion_model

SCORES = {"voice": 3, "content": 5, "attention": 3, "empathy": 4, "naturalness": 1}


@pytest.fixture
def run(tmp_path: Path, make_record) -> Path:
    """A run of three answered dialogues, of which the last has not spoken."""
    folder = tmp_path / "run"
    with RecordWriter(folder / "evaluation", name="dialogues", made_by="a test") as writer:
        for number in range(3):
            reply = dummy_audio(0.5, seed=number) if number < 2 else None
            writer.write(make_record(f"d{number}", codes=12, transcript=f"where is key {number}"), reply=reply)
    with RecordWriter(folder / "evaluation", name="understanding-set", made_by="a test") as writer:
        writer.write(make_record(task="transcribe_and_label", text="where"))
    facts = {"controls": [], "controls_left_out": {}, "items_skipped": {}, "sets": [{"name": "set"}]}
    write_run_facts(folder, facts)
    return folder


def judged(run: Path, **arguments: Any) -> tuple[list[str], dict[str, Any]]:
    """The prompts that the judge got, in the order of the dialogues, and the report."""
    with ChatServer(then=says(json.dumps({"reason": "fits", "scores": SCORES}))) as server:
        score(run, judge="llm", judge_args={"base_url": server.base_url, "model": "m", "concurrency": 1, **arguments})
        prompts = [body["messages"][1]["content"] for body in server.bodies]
    return prompts, json.loads((run / "report.json").read_text())


def test_what_a_classifier_hears_in_the_replies_reaches_the_judge_and_its_score_of_the_voice_is_stored(
    run: Path, tmp_path: Path, capsys
) -> None:
    model = save_emotion_model(tmp_path / "emotions")
    (model / "labels.json").write_text(json.dumps({"ANGRY": "angry"}))
    prompts, report = judged(run, reply_emotion="hf", reply_emotion_args={"model": str(model)})
    assert ['emotion heard in the reply\'s voice: "angry"' in prompt for prompt in prompts] == [True, True, False]
    assert "nothing could be heard" in prompts[2]
    assert "1 of 3 replies have no stored sound" in capsys.readouterr().out
    name = report["empathy"]["judge"]
    assert "/hears hf-emotions-" in name and str(tmp_path) not in name
    assert report["empathy"]["dimensions"]["voice"][0] == 50.0
    records = read_records(run / "evaluation" / "dialogues.jsonl", judge=name)
    assert all(record.score and record.score.per_dimension["voice"] == 50.0 for record in records)


def test_what_the_understanding_stage_hears_reaches_the_judge(run: Path, tmp_path: Path, tokens, monkeypatch) -> None:
    path = save_tiny_checkpoint(tmp_path / "stage" / "last.ckpt", tiny_model(tokens), tokens)

    def answer(model, batch, *_: Any) -> list[GeneratedReply]:
        # The wav was heard: as many frames as half a second has.
        assert batch.log_mel_lengths.tolist() == [50]
        nothing = torch.zeros(0, dtype=torch.long)
        text = "find me <old> <male> <happy> <none>"
        return [
            GeneratedReply(
                reference=batch.references[0], text_ids=[1], text=text, speech_codes=nothing, finished=True, timings={}
            )
        ]

    monkeypatch.setattr(reply_emotion, "generate", answer)
    prompts, report = judged(run, reply_emotion="understanding", reply_emotion_args={"checkpoint": str(path)})
    assert ['reply\'s voice: "happy"' in prompt for prompt in prompts] == [True, True, False]
    assert "/hears understanding-" in report["empathy"]["judge"] and report["empathy"]["dimensions"]["voice"][0] == 50.0


def test_a_recogniser_is_named_by_its_weights_and_not_by_its_place(tmp_path: Path, tokens) -> None:
    """Else scores of two recognisers would be taken for those of one."""
    folder = save_emotion_model(tmp_path / "emotions")
    before = AudioClassifier(str(folder)).name
    moved = folder.rename(tmp_path / "elsewhere") / "x"
    assert AudioClassifier(str(moved.parent)).name == before.replace("emotions", "elsewhere")
    names = []
    for number, place in enumerate(["a", "b", "a"]):
        path = save_tiny_checkpoint(tmp_path / place / "last.ckpt", tiny_model(tokens, seed=number // 2), tokens)
        names.append(UnderstandingRecogniser(path).name)
    assert names[0] == names[1] != names[2]


class _Interrupted:
    name = "interrupted"

    def __init__(self, after: int) -> None:
        self.after = after

    def hear(self, path: Path) -> str:
        if self.after == 0:
            raise KeyboardInterrupt
        self.after -= 1
        return path.stem


def test_what_was_heard_before_an_interruption_is_not_heard_again(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.wav" for number in range(3)]
    for number, path in enumerate(paths):
        soundfile.write(path, dummy_audio(0.1, seed=number).numpy(), SAMPLE_RATE)
    with pytest.raises(KeyboardInterrupt):
        hear_replies(paths, _Interrupted(2), folder=tmp_path)
    assert hear_replies(paths, _Interrupted(1), folder=tmp_path) == ["0", "1", "2"]
    again = [None, *paths]
    assert hear_replies(again, _Interrupted(0), folder=tmp_path) == [None, "0", "1", "2"]
