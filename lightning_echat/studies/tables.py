"""The table of a study, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

from lightning_echat.studies.results import Estimate, StudyResults
from lightning_echat.studies.study_file import Figure

MISSING = "–"


def number(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """`57.31 ± 2.04`, `57.31 ± ?` for a single seed, `–` for none."""
    if estimate.n == 0:
        return MISSING
    sign = "+" if signed else ""
    width = "?" if math.isnan(estimate.half_width) else f"{estimate.half_width:.{digits}f}"
    return f"{estimate.mean:{sign}.{digits}f} ± {width}"


def heads(results: StudyResults) -> list[str]:
    """The figures, each with the direction that is better."""
    return [f"{figure.name} {'↑' if figure.better == 'higher' else '↓'}" for figure in results.study.figures]


def score_rows(results: StudyResults) -> list[list[str]]:
    """A row a variant: name, figures, seeds that came to an end, minutes and optimizer steps of a run."""
    rows = []
    for variant in results.study.variants:
        figures = [number(results.estimate(variant.name, f.name), f.digits) for f in results.study.figures]
        ended = sum(run.variant == variant.name and not run.failure for run in results.runs)
        seconds, steps = results.cost(variant.name)
        cost = [MISSING, MISSING] if math.isnan(seconds) else [f"{seconds / 60:.1f}", f"{steps:.0f}"]
        rows.append([variant.name, *figures, f"{ended}/{len(results.study.seeds)}", *cost])
    return rows


def difference_rows(results: StudyResults) -> list[list[str]]:
    """A row for every other variant: how much it differs from the one compared to, seed by seed."""
    return [
        [variant.name, *(number(results.difference(variant.name, f.name), f.digits, signed=True) for f in figures)]
        for figures in [results.study.figures]
        for variant in results.study.variants
        if variant.name != results.study.compare_to
    ]


def reference_rows(results: StudyResults) -> list[list[str]]:
    """The numbers of others."""
    reference = results.study.reference
    if reference is None:
        return []
    return [
        [name, *(_given(values.get(figure.name)) for figure in results.study.figures)]
        for name, values in reference.values.items()
    ]


def _given(value: float | None) -> str:
    return MISSING if value is None else f"{value:g}"


def absent_figures(results: StudyResults) -> list[Figure]:
    """Figures that no run has: a wrong path, more likely than not."""
    ended = [run for run in results.runs if not run.failure]
    return [f for f in results.study.figures if ended and all(math.isnan(run.figures[f.name]) for run in ended)]


def how(results: StudyResults) -> str:
    """What the table is of, and what it cost."""
    study = results.study
    return (
        f"{study.path}, seeds {', '.join(map(str, study.seeds))}. Mean over seeds ± half of the 95 % t interval. "
        f"{results.seconds_spent / 60:.1f} minutes of work in all, stages that variants share counted once; the "
        "minutes of a row are those of one run alone."
    )


def score_head(results: StudyResults) -> list[str]:
    """Heads of `score_rows`."""
    return ["variant", *heads(results), "seeds", "minutes", "steps"]


def failures(results: StudyResults) -> list[str]:
    """The runs without figures, and why."""
    return [f"{run.variant}, seed {run.seed}: {run.failure}" for run in results.failed]


def as_values(results: StudyResults) -> dict[str, Any]:
    """Everything that a page shows, as rows of text."""
    study = results.study
    return {
        "notes": study.notes,
        "how": how(results),
        "figures": [figure.name for figure in study.figures],
        "head": ["variant", *heads(results)],
        "score_head": score_head(results),
        "scores": score_rows(results),
        "compare_to": study.compare_to,
        "differences": difference_rows(results),
        "reference_source": study.reference.source if study.reference else "",
        "reference": reference_rows(results),
        "failed": failures(results),
        "absent": [f"{figure.name} ({figure.path} in report.json)" for figure in absent_figures(results)],
    }


def as_markdown(results: StudyResults) -> str:
    """The whole result as a document."""
    study = results.study
    lines = [f"# {study.title}", ""]
    if study.notes:
        lines += [study.notes, ""]
    lines += [
        how(results),
        "",
        *_markdown_table(score_head(results), score_rows(results)),
        "",
        f"Differences from *{study.compare_to}*, seed by seed:",
        "",
        *_markdown_table(["variant", *heads(results)], difference_rows(results)),
    ]
    if study.reference:
        names = ["variant", *(figure.name for figure in study.figures)]
        lines += ["", f"Not ours: {study.reference.source}", "", *_markdown_table(names, reference_rows(results))]
    lines += [*_remarks(results)]
    return "\n".join(lines) + "\n"


def _remarks(results: StudyResults) -> Iterator[str]:
    if results.failed:
        yield from ("", "Runs without figures:", "")
        yield from (f"- {line}" for line in failures(results))
    for figure in absent_figures(results):
        yield from ("", f"No run has {figure.name!r} (`{figure.path}` in report.json).")


def _markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def as_csv(results: StudyResults) -> str:
    """A row for every run and figure, for other programs: nothing is averaged."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", "seed", "figure", "value", "seconds", "steps", "failure"])
    for run in results.runs:
        for figure in results.study.figures:
            value = run.figures.get(figure.name, math.nan)
            cost = ["", ""] if run.failure else [f"{run.seconds:.1f}", run.trained_steps]
            writer.writerow(
                [run.variant, run.seed, figure.name, "" if math.isnan(value) else value, *cost, run.failure]
            )
    return stream.getvalue()


def as_latex(results: StudyResults) -> str:
    """A tabular for a paper (booktabs)."""
    study = results.study
    head = " & ".join(["variant", *(_latex(f"{figure.name}") for figure in study.figures), "min", "steps"])
    body = [
        " & ".join(map(_latex, [*row[: 1 + len(study.figures)], *row[-2:]])) + r" \\" for row in score_rows(results)
    ]
    if study.reference:
        span = 3 + len(study.figures)
        body += [r"\midrule", rf"\multicolumn{{{span}}}{{l}}{{{_latex('Not ours: ' + study.reference.source)}}} \\"]
        body += [" & ".join(map(_latex, [*row, MISSING, MISSING])) + r" \\" for row in reference_rows(results)]
    columns = "l" + "c" * (len(study.figures) + 2)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rf"{head} \\", r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex(text: str) -> str:
    for plain, ours in (("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#")):
        text = text.replace(plain, ours)
    return text.replace(" ± ", r" $\pm$ ").replace("–", "--").replace("×", r"$\times$").replace("→", r"$\to$")
