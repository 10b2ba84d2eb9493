"""`echat evaluate`: a checkpoint answers the evaluation sets; a judge scores what was answered; report.json says both.

Answering and scoring are two steps. Answers stay in `OUT/evaluation/`; those that are already there, made by the same
checkpoint with the same settings, are not made again. `echat evaluate score OUT` scores them again, with another judge
or an improved one, without the model.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.answering import Answerer, QuestionConfig
from lightning_echat.evaluation.chat import open_voice
from lightning_echat.evaluation.item_sets import EvaluationSet, set_files
from lightning_echat.evaluation.judging import make_judge
from lightning_echat.evaluation.machine import machine_facts, package_versions
from lightning_echat.evaluation.run_facts import what_the_run_left
from lightning_echat.evaluation.scores import file_name
from lightning_echat.evaluation.scoring import ANSWERS, read_run_facts, score_run, write_run_facts
from lightning_echat.evaluation.summary import write_report_json
from lightning_echat.nn.weights import TrainedModel, load_trained


def evaluate(
    checkpoint: Path,
    sets: list[EvaluationSet],
    out: Path,
    *,
    questions: QuestionConfig | None = None,
    judge: str = "rubric",
    judge_args: dict[str, Any] | None = None,
    speech_tokenizer: Path | None = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Answer, score, and write OUT/report.json and OUT/evaluation/.

    Args:
        checkpoint: A .ckpt file, the folder of a run, or one of echat convert.
        sets: Understanding is measured on all of them, dialogue on the first. Shards or JSON lines, as
            docs/evaluation.md describes.
        out: The run folder. What stages and data left there (stage_summary.json, data_health.json) joins the report.
        questions: How they are put.
        judge: Who scores replies: rubric, llm, or the path of a class. echat evaluate score asks another one later.
        judge_args: Arguments of the judge.
        speech_tokenizer: Folder of the speech tokenizer, where the checkpoint names none that still exists.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, …
        seed: Of the bootstrap intervals.
    """
    started = time.perf_counter()
    _check_sets(sets)
    # What can be wrong with judge and device is told before the first answer.
    chosen, place = make_judge(judge, judge_args), choose_device(device)
    trained = load_trained(checkpoint)
    _answer(trained, sets, out, questions or QuestionConfig(), speech_tokenizer=speech_tokenizer, device=place)
    run = what_the_run_left(out)
    before = run.pop("seconds")
    sections = score_run(out, judge=chosen, seed=seed)
    spent = time.perf_counter() - started
    report = {
        "seconds": round(before + spent, 1),
        "evaluation_seconds": round(spent, 1),
        "checkpoint": read_run_facts(out)["checkpoint"],
        "machine": machine_facts(),
        "versions": package_versions(),
        "seed": seed,
        **run,
        **sections,
    }
    write_report_json(out / "report.json", report)


def _answer(
    trained: TrainedModel,
    sets: list[EvaluationSet],
    out: Path,
    questions: QuestionConfig,
    *,
    speech_tokenizer: Path | None,
    device: torch.device,
) -> None:
    """Everything that needs the model, stored in `out`."""
    voice = open_voice(trained, speech_tokenizer)
    trained.model.to(device)
    answerer = Answerer(trained, voice, questions, folder=out / ANSWERS, device=device)
    for entry in sets:
        answerer.understanding(entry)
    answerer.dialogues(sets[0])
    left_out = answerer.controls(sets[0])
    earlier = read_run_facts(out).get("items_skipped", {})
    facts = {
        "checkpoint": {"path": str(trained.path), "step": trained.step, "sha256": answerer.checkpoint_hash},
        "sets": [{"name": entry.name, "max_items": entry.max_items, "files": set_files(entry)} for entry in sets],
        "questions": asdict(questions),
        "controls": [name for name in questions.controls if name not in left_out],
        "controls_left_out": left_out,
        # What is not asked again was skipped as often as when it was.
        "items_skipped": {**earlier, **answerer.skipped},
    }
    write_run_facts(out, facts)
    for name, reasons in facts["items_skipped"].items():
        if reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            Console().print(f"{name}: items skipped: {counts}", highlight=False, soft_wrap=True)


def choose_device(name: str) -> torch.device:
    """The device of that name; `UserError` where this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; give auto, cpu or cuda:NUMBER") from error
    return device


def _check_sets(sets: list[EvaluationSet]) -> None:
    """Every set has a file of answers of its own."""
    if not sets:
        raise UserError("no evaluation set; give --sets '[{name: NAME, shards: [FOLDER]}]'")
    names = [file_name(entry.name) for entry in sets]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two evaluation sets are called {repeated!r}; give each a name of its own")
