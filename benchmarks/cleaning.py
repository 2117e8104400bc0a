"""Hyper-cleaning: the study of the command `hypergrad run cleaning`, and its check."""

import numpy as np

from hypergrad import studies
from hypergrad.studies import report
from hypergrad.studies.record import Row

from .table import Request, Table, Verdict, conclude

STUDY = studies.STUDIES["cleaning"]


def plan(seeds: int) -> list[Row]:
    return [
        {"method": method, "seed": seed}
        for method in STUDY.methods
        for seed in range(seeds)
    ]


def run(table: Table, request: Request) -> None:
    """All of it: seeds share a program and the figure needs curves that no row holds.

    A minute, so that an interrupted run starts anew.
    """
    methods, seeds = STUDY.methods, range(request.seeds)
    with studies.progress(len(methods) * (len(STUDY.grid) + 1)) as tick:
        results = studies.run(STUDY, methods, seeds, tick)
    text = report.markdown(STUDY, results, request.command)
    studies.write(STUDY, results, seeds, text, request.folder)


def judge(rows: list[Row]) -> list[Verdict]:
    """The criterion of each learned row; the other lines only inform."""
    accuracy = lambda method: [
        row["test_accuracy"] for row in by_seed if row["method"] == method
    ]
    by_seed = sorted(rows, key=lambda row: row["seed"])
    results = {
        method: {"test_accuracy": np.array(accuracy(method), dtype=float)}
        for method in STUDY.methods
    }
    claims = report.claims(STUDY, results)
    lines = report.verdicts(STUDY, results)
    verdicts = [
        conclude(
            line.rpartition(":")[0],
            claim.reproduced,
            len(accuracy(claim.method)),
            (claim.high - claim.low) / 2,
            report.POINTS,
        )
        for line, claim in zip(lines, claims, strict=False)
    ]
    return verdicts + [Verdict(line) for line in lines[len(claims) :]]


TABLE = Table(
    name=STUDY.name,
    source=STUDY.source,
    minutes=2,
    seeds=10,
    plan=plan,
    run=run,
    judge=judge,
)
