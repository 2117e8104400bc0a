"""Contenders in a process each, measured in turns.

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
OPTIONS_FILE = Path(__file__).parent / "settings.json"  # and `setting` of a row
UNCOMPARED = ("inner", "base")  # contenders whose results are not compared
MAX_OTHER_LOAD = 0.08  # cores; a repetition with a higher load is discarded
NUM_CLEAN, MAX_ROUNDS = 5, 20  # clean repetitions that are needed, and rounds
REPETITION_SECONDS = 0.5  # unless one call takes longer
PAUSE_SECONDS = 0.4  # before a repetition, as other threads may still be spinning
REMOVED_PREFIXES = ("JAX_", "XLA_")  # of variables that tune a contender
TIMEOUT_SECONDS = 1800.0


def offered_works(contender: str) -> list[str]:
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
      reason: Reason why it has no ratio, or None.
      seconds: Seconds per call of the clean repetitions.
      num_discarded: Number of discarded repetitions.
    """

    def __init__(
        self,
        contender: str,
        work: str,
        data: Path,
        python: Path,
        options: Row | None = None,
        **environment: str,
    ):
        self.contender = contender
        self.options = options or {}
        self.first_line: dict[str, Any] = {}
        self.reason: str | None = None
        self.seconds: list[float] = []
        self.num_discarded, self.num_calls = 0, 1
        self.process: Any = None
        self.errors = data.parent / f"{contender}.txt"
        if not python.exists():
            self.reason = "not installed"
            return
        worker = [python, "-m", "benchmarks.peers.worker"]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*worker, contender, work, data, json.dumps(self.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=contender_environment() | environment,
                cwd=ROOT,
            )
        try:
            self.first_line = self._read_line()
            self.reason = self.first_line.pop("failed", None)
            if self.reason is None:
                seconds = self._run_calls(1)["seconds"]
                self.num_calls = max(1, math.ceil(REPETITION_SECONDS / seconds))
        except WorkerEndedError as error:
            self.reason = str(error)

    def _read_line(self) -> dict[str, Any]:
        """Returns the next line of the process."""
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_SECONDS)
        if not ready:
            raise WorkerEndedError(f"nothing in {TIMEOUT_SECONDS:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerEndedError(self._end_reason())
        return json.loads(line)

    def _run_calls(self, num_calls: int) -> dict[str, float]:
        """Returns the seconds per call, and the load by other processes."""
        try:
            self.process.stdin.write(b"%d\n" % num_calls)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerEndedError(self._end_reason()) from error
        return self._read_line()

    def _end_reason(self) -> str:
        """Returns the exit status of the process, and its last line of errors."""
        code = self.process.wait()
        status = f"signal {-code}" if code < 0 else f"exit {code}"
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        return f"ended by {status}" + (f": {lines[-1][:200]}" if lines else "")

    def repeat(self) -> None:
        """Makes one repetition, clean or not."""
        time.sleep(PAUSE_SECONDS)
        try:
            timing = self._run_calls(self.num_calls)
        except WorkerEndedError as error:
            self.reason = str(error)
            return
        if timing["others"] > MAX_OTHER_LOAD:
            self.num_discarded += 1
        else:
            self.seconds.append(timing["seconds"])

    def stop(self) -> None:
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
            "setting": self.options,
            "seconds": self.seconds,
            "discarded": self.num_discarded,
            "calls": self.num_calls,
            "prepared": self.first_line.get("prepared"),
            "first": self.first_line.get("first"),
            "peak": self.first_line.get("peak"),
            "scratch": notes.pop("scratch", None),
            "notes": notes,
            "error": error,
            "reason": self.reason,
            "library_versions": self.first_line.get("versions", {}),
        }


def relative_error(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the relative error in the 2-norm; NaN for another length."""
    a, b = np.asarray(actual), np.asarray(expected)
    if a.shape != b.shape:
        return math.nan
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def contender_environment() -> dict[str, str]:
    """Returns the environment variables of every contender."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(REMOVED_PREFIXES)
    }
    paths = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return inherited | paths | {"OMP_NUM_THREADS": str(num_cores())}


def chosen_options(work: str, contender: str) -> Row:
    """Returns the options that `tuning` chose for a contender."""
    return json.loads(OPTIONS_FILE.read_text()).get(work, {}).get(contender, {})


def check_result(
    running: Running, expected: Sequence[float] | None, max_error: float
) -> float | None:
    """Returns the error of a compared result; a wrong one stops the contender."""
    result = running.first_line.pop("answer", None)
    if running.reason or expected is None or running.contender in UNCOMPARED:
        return None
    error = relative_error(result, expected)
    if not error <= max_error:
        running.reason = (
            f"wrong: its error is {error:.2g}, at most {max_error:g} allowed"
        )
        running.stop()
    return error


def reference_result(work: str, data: Path) -> list[float] | None:
    """Returns the result of `reference` for a work."""
    reference = Running(
        "reference", work, data, Path(sys.executable), JAX_ENABLE_X64="1"
    )
    reference.stop()
    if reference.reason:
        raise RuntimeError(f"no reference for {work}: {reference.reason}")
    return reference.first_line["answer"]


def measure(
    work: str,
    contenders: Mapping[str, Path],
    *,
    small: bool = False,
    num_clean: int = NUM_CLEAN,
    max_rounds: int = MAX_ROUNDS,
) -> list[Row]:
    """Returns a row per contender of one work.

    Args:
      work: Name of a work of `WORKS`.
      contenders: ``{name: Python that runs it}``.
      small: Whether the work has the size of tests.
      num_clean: Number of clean repetitions that each contender needs.
      max_rounds: Maximum number of rounds.
    """
    spec = WORKS[work]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        save(data, spec.small() if small else spec.data())
        is_compared = math.isfinite(spec.error)
        expected = reference_result(work, data) if is_compared else None
        runs: list[Running] = []
        try:
            errors = []
            for contender, python in contenders.items():
                options = chosen_options(work, contender)
                runs.append(Running(contender, work, data, python, options))
                errors.append(check_result(runs[-1], expected, spec.error))
            run_rounds(runs, num_clean, max_rounds)
        finally:
            for run in runs:
                run.stop()
    rows = [run.row(error) for run, error in zip(runs, errors, strict=True)]
    return [{"work": work, "seed": 0} | row | hardware() for row in rows]


def run_rounds(contenders: Sequence[Running], num_clean: int, max_rounds: int) -> None:
    """Runs rounds until every valid contender has enough clean repetitions."""
    for _ in range(max_rounds):
        valid = [contender for contender in contenders if contender.reason is None]
        if all(len(contender.seconds) >= num_clean for contender in valid):
            return
        for contender in valid:
            contender.repeat()


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def hardware() -> Row:
    """Returns model and number of cores, and bytes of memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": names[0], "cores": num_cores(), "memory": memory}
