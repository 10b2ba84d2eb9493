import base64
import csv
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.machine import machine_facts, package_versions
from lightning_echat.evaluation.records import RecordWriter, rescore_records
from lightning_echat.evaluation.report_page import DIALOGUES_SHOWN, report, write_report
from lightning_echat.evaluation.report_plots import draw_curves
from lightning_echat.evaluation.rubric import RubricJudge
from lightning_echat.evaluation.run_folder import read_run
from lightning_echat.evaluation.summary import summarize, write_report_json

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.attributes if name == tag]


def write_metrics(path, rows):
    path.parent.mkdir(parents=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def run(tmp_path, make_record):
    folder = tmp_path / "my-run"
    answers = {}
    for name, reply in (("dialogues", "dear grandma, take a <b>key</b>."), ("text_only", "here is the key.")):
        with RecordWriter(folder / "evaluation", name=name, made_by="test") as writer:
            for place in range(12):
                writer.write(make_record(f"d{place}", reply=reply), reply=torch.zeros(800))
        answers[name] = rescore_records(folder / "evaluation" / f"{name}.jsonl", judge=RubricJudge())
    summary = summarize(
        understanding=answers["dialogues"],
        dialogues=answers["dialogues"],
        controls={"text_only": answers["text_only"]},
        seed=0,
    )
    stages = {"understanding": {"seconds": 61.0, "steps": 900, "loss_first": 3.0, "loss_last": 0.5}}
    data = {
        "samples": 3600,
        "skipped": {"audio too long": 3},
        "padding_share": 0.07,
        "stages": {"empathy": {"positions": 77}},
    }
    made_with = {"machine": machine_facts(), "versions": package_versions()}
    write_report_json(
        folder / "report.json", {"seconds": 90.0, "seed": 4711, "stages": stages, "data": data, **made_with, **summary}
    )
    training = [{"step": step, "epoch": 0, "train/loss": 3.0 - step / 10} for step in range(20)]
    validation = [{"step": 19, "epoch": 0, "val/voices/wer": 0.25, "perf/tokens_per_second": 1234.0}]
    write_metrics(folder / "understanding" / "version_0" / "metrics.csv", [*training, *validation])
    return folder


def test_the_page_shows_every_part_of_a_run_and_needs_nothing_from_outside(run):
    target = report(run)
    assert target == run / "report.html"
    text = target.read_text()
    page = Page(text)
    assert "Not in this run" not in page.text.replace("Not in this run: the query's audio", "")
    for expected in (
        "100.0 %",
        "audio too long: 3",
        "1 min 1 s",
        "train/loss",
        "val/voices/wer",
        "text only",
        "1,234",
        "77",
        "4,711",
    ):
        assert expected in page.text, expected
    links = [value for _, found in page.attributes for name, value in found.items() if name in ("src", "href")]
    assert all(value.startswith(("data:", "#")) for value in links)
    assert "<script" not in text
    assert "@import" not in text


def test_dialogues_can_be_listened_to_and_come_from_the_model_not_the_control(run):
    page = Page(report(run).read_text())
    players = page.all("audio")
    assert len(players) == len(page.all("article")) == DIALOGUES_SHOWN
    wav = (run / "evaluation" / "audio" / "dialogues-00000-reply.wav").read_bytes()
    assert base64.b64decode(players[0]["src"].split(",")[1]) == wav
    assert "here is the key." not in page.text


def test_what_a_model_writes_cannot_become_markup(run):
    text = report(run).read_text()
    assert "<b>key</b>" not in text
    assert "take a <b>key</b>." in Page(text).text


def test_parts_that_a_run_lacks_are_named(tmp_path):
    write_report_json(tmp_path / "report.json", {"seconds": 3.0})
    page = Page(report(tmp_path).read_text())
    for part in ("empathy scores", "understanding figures", "scored dialogues", "training curves", "package versions"):
        assert f"Not in this run: {part}" in page.text


def test_scores_without_data_are_said_and_not_drawn(tmp_path):
    report_content = summarize(understanding=[], dialogues=[], controls={"text_only": []}, seed=0)
    write_report_json(tmp_path / "report.json", report_content)
    page = Page(report(tmp_path).read_text())
    assert page.text.count("no data") >= 10


def test_a_run_that_only_trained_has_a_page_too(tmp_path):
    write_metrics(tmp_path / "a" / "metrics.csv", [{"step": 1, "epoch": 0, "train/loss": 1.0}])
    page = Page(write_report(tmp_path, out=tmp_path / "pages" / "x.html").read_text())
    assert "train/loss" in page.text
    assert (tmp_path / "pages" / "x.html").exists()


def test_the_curves_of_a_resumed_stage_continue_one_another(tmp_path):
    write_metrics(tmp_path / "s" / "version_0" / "metrics.csv", [{"step": step, "loss": 1.0} for step in range(6)])
    write_metrics(tmp_path / "s" / "version_1" / "metrics.csv", [{"step": step, "loss": 2.0} for step in range(4, 9)])
    steps, values = read_run(tmp_path).curves["s"]["loss"]
    assert steps.tolist() == list(range(9))
    assert values.tolist() == [1.0] * 4 + [2.0] * 5


def test_stages_never_share_a_curve_however_deep_their_logs_stand(tmp_path):
    for stage, folder in (("understanding", "metrics"), ("empathy", "version_0")):
        write_metrics(tmp_path / "logs" / stage / folder / "metrics.csv", [{"step": 1, "loss": 1.0}])
    write_report_json(tmp_path / "report.json", {"stages": {"understanding": {}, "empathy": {}}})
    page = Page(report(tmp_path).read_text())
    assert 0 < page.text.index("logs/understanding") < page.text.index("logs/empathy")
    assert "logs/understanding/metrics" not in page.text


def test_a_drawing_is_an_svg_that_takes_the_colour_of_the_page_and_shares_no_ids():
    series = (np.arange(5), np.arange(5.0))
    one, two = draw_curves({"loss": series}, name="one"), draw_curves({"loss": series}, name="two")
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (one, two)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"#([\w.-]+)", one)) - ids[0] == {"3b82f6"}
    assert "currentColor" in one
    assert ET.fromstring(one).tag.endswith("svg")
    assert one == draw_curves({"loss": series}, name="one")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not a run folder"),
        ({"report.json": "{"}, "not valid JSON"),
        ({"a/metrics.csv": "step,loss\nx,1\n"}, "not numbers"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report(tmp_path / "missing")
