"""Contenders side by side: one process each, measured in turns.

In each round every contender makes one repetition, A B C A B C and so on, so that slow
changes of the machine affect all alike. A repetition while other processes are busy is
discarded and counted.
"""

import ast
import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.bench import Row

from .work import WORKS
from .worker import save

ROOT = Path(__file__).parents[2]
CONTENDERS = Path(__file__).parent / "contenders"
SETTINGS = Path(__file__).parent / "settings.json"
FREE = ("inner", "base")  # whose answers are not compared
OTHERS = 0.08  # of a core, above which a repetition is thrown away
CLEAN, ROUNDS = 5, 20  # repetitions needed, and rounds at the most
SECONDS = 0.5  # of a repetition, or one call
PAUSE = 0.4  # seconds before a repetition: the last one's threads may still spin
TUNING = ("JAX_", "XLA_")  # variables that a contender is not to be tuned by
LIMIT = 1800.0  # seconds until an answer is given up


def offers(contender: str) -> list[str]:
    """Returns the works of a contender from its source, without importing it."""
    path = CONTENDERS / f"{contender}.py"
    if not path.exists():
        return []
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.Assign([ast.Name("WORKS")], ast.Dict(keys)):
                return [ast.literal_eval(key) for key in keys if key is not None]
    return []


class WorkerEndedError(Exception):
    """A contender's process sends no further line; the message states why."""


class Running:
    """A contender's process, and its measurements.

    Attributes:
      first_line: The first line: seconds, bytes, notes, versions and answer.
      reason: Why it has no ratio, or None.
      seconds: Seconds per call of the clean repetitions.
      discarded: Number of other repetitions.
    """

    def __init__(
        self,
        contender: str,
        work: str,
        data: Path,
        python: Path,
        setting: Row | None = None,
        **environment: str,
    ):
        self.contender = contender
        self.setting = setting or {}
        self.first_line: dict[str, Any] = {}
        self.reason: str | None = None
        self.seconds: list[float] = []
        self.discarded, self.number = 0, 1
        self.process: Any = None
        self.errors = data.parent / f"{contender}.txt"
        if not python.exists():
            self.reason = "not installed"
            return
        worker = [python, "-m", "benchmarks.peers.worker"]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*worker, contender, work, data, json.dumps(self.setting)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=surroundings() | environment,
                cwd=ROOT,
            )
        try:
            self.first_line = self._read_line()
            self.reason = self.first_line.pop("failed", None)
            if self.reason is None:
                once = self._run_calls(1)["seconds"]
                self.number = max(1, math.ceil(SECONDS / once))
        except WorkerEndedError as error:
            self.reason = str(error)

    def _read_line(self) -> dict[str, Any]:
        """Returns the next line of the process."""
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        if not ready:
            raise WorkerEndedError(f"nothing in {LIMIT:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerEndedError(self._last_words())
        return json.loads(line)

    def _run_calls(self, number: int) -> dict[str, float]:
        """Returns the seconds of so many calls, and the load by other processes."""
        try:
            self.process.stdin.write(b"%d\n" % number)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerEndedError(self._last_words()) from error
        return self._read_line()

    def _last_words(self) -> str:
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit {code}"
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        return f"ended by {how}" + (f": {lines[-1][:200]}" if lines else "")

    def repeat(self) -> None:
        """Makes one repetition, clean or not."""
        time.sleep(PAUSE)
        try:
            took = self._run_calls(self.number)
        except WorkerEndedError as error:
            self.reason = str(error)
            return
        if took["others"] > OTHERS:
            self.discarded += 1
        else:
            self.seconds.append(took["seconds"])

    def end(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # the process has ended
                self.process.stdin.close()
            self.process = None

    def row(self, error: float | None) -> Row:
        """Returns the fields of the row."""
        notes = dict(self.first_line.get("notes", {}))
        return {
            "method": self.contender,
            "setting": self.setting,
            "seconds": self.seconds,
            "discarded": self.discarded,
            "calls": self.number,
            "prepared": self.first_line.get("prepared"),
            "first": self.first_line.get("first"),
            "peak": self.first_line.get("peak"),
            "scratch": notes.pop("scratch", None),
            "notes": notes,
            "error": error,
            "reason": self.reason,
            "library_versions": self.first_line.get("versions", {}),
        }


def distance(answer: Sequence[float], truth: Sequence[float]) -> float:
    """Returns the relative error in the 2-norm; NaN for another length."""
    a, b = np.asarray(answer), np.asarray(truth)
    if a.shape != b.shape:
        return math.nan
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def surroundings() -> dict[str, str]:
    """Returns the variables of every contender's process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(TUNING)}
    paths = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return inherited | paths | {"OMP_NUM_THREADS": str(cores())}


def setting_of(work: str, contender: str) -> Row:
    """Returns the setting that `tuning` chose for a contender."""
    return json.loads(SETTINGS.read_text()).get(work, {}).get(contender, {})


def check_answer(
    running: Running, expected: Sequence[float] | None, max_error: float
) -> float | None:
    """Returns the error of a compared answer; a wrong one ends the contender."""
    answer = running.first_line.pop("answer", None)
    if running.reason or expected is None or running.contender in FREE:
        return None
    error = distance(answer, expected)
    if not error <= max_error:
        running.reason = (
            f"wrong: its error is {error:.2g}, at most {max_error:g} allowed"
        )
        running.end()
    return error


def truth_of(work: str, data: Path) -> list[float] | None:
    """Returns the answer of `reference` for a work."""
    reference = Running(
        "reference", work, data, Path(sys.executable), JAX_ENABLE_X64="1"
    )
    reference.end()
    if reference.reason:
        raise RuntimeError(f"no reference for {work}: {reference.reason}")
    return reference.first_line["answer"]


def measure(
    work: str,
    contenders: Mapping[str, Path],
    *,
    small: bool = False,
    clean: int = CLEAN,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Returns a row per contender of one work.

    Args:
      work: Name of a work of `WORKS`.
      contenders: ``{name: Python that runs it}``.
      small: Whether the work has the size of tests.
      clean: Number of clean repetitions that each contender needs.
      rounds: Maximum number of rounds.
    """
    stated = WORKS[work]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        save(data, stated.small() if small else stated.data())
        is_compared = math.isfinite(stated.error)
        expected = truth_of(work, data) if is_compared else None
        runs: list[Running] = []
        try:
            errors = []
            for contender, python in contenders.items():
                setting = setting_of(work, contender)
                runs.append(Running(contender, work, data, python, setting))
                errors.append(check_answer(runs[-1], expected, stated.error))
            run_rounds(runs, clean, rounds)
        finally:
            for run in runs:
                run.end()
    rows = [run.row(error) for run, error in zip(runs, errors, strict=True)]
    return [{"work": work, "seed": 0} | row | hardware() for row in rows]


def run_rounds(contenders: Sequence[Running], clean: int, rounds: int) -> None:
    """Runs rounds until every valid contender has enough clean repetitions."""
    for _ in range(rounds):
        alive = [one for one in contenders if one.reason is None]
        if all(len(one.seconds) >= clean for one in alive):
            return
        for one in alive:
            one.repeat()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def hardware() -> Row:
    """Returns model and number of cores, and bytes of memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": names[0], "cores": cores(), "memory": memory}
