"""Contenders side by side: one process each, in turns, and what came of it.

In each round every contender makes one repetition, A B C A B C and so on, so that what
the machine does over minutes meets all alike. A repetition while other processes were
busy is thrown away and counted.
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

from hypergrad.studies.record import Row

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
    """Its works, read off its source: its library may not be installed here."""
    path = CONTENDERS / f"{contender}.py"
    if not path.exists():
        return []
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.Assign([ast.Name("WORKS")], ast.Dict(keys)):
                return [ast.literal_eval(key) for key in keys if key is not None]
    return []


class Silent(Exception):
    """A contender that will say no more, and why."""


class Running:
    """A contender's process, and what it said.

    Attributes:
      told: its first line: seconds, bytes, notes, versions and answer.
      reason: why it has no ratio, if so.
      seconds: of a call, of the clean repetitions.
      discarded: how many were not.
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
        self.told: dict[str, Any] = {}
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
            self.told = self._hear()
            self.reason = self.told.pop("failed", None)
            if self.reason is None:
                once = self._ask(1)["seconds"]
                self.number = max(1, math.ceil(SECONDS / once))
        except Silent as silence:
            self.reason = str(silence)

    def _hear(self) -> dict[str, Any]:
        """Its next line."""
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        if not ready:
            raise Silent(f"nothing in {LIMIT:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise Silent(self._last_words())
        return json.loads(line)

    def _ask(self, number: int) -> dict[str, float]:
        """For so many calls."""
        try:
            self.process.stdin.write(b"%d\n" % number)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Silent(self._last_words()) from error
        return self._hear()

    def _last_words(self) -> str:
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit {code}"
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        return f"ended by {how}" + (f": {lines[-1][:200]}" if lines else "")

    def repeat(self) -> None:
        """One repetition, clean or not."""
        time.sleep(PAUSE)
        try:
            took = self._ask(self.number)
        except Silent as silence:
            self.reason = str(silence)
            return
        if took["others"] > OTHERS:
            self.discarded += 1
        else:
            self.seconds.append(took["seconds"])

    def end(self) -> None:
        """No more of it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # a question it did not hear
                self.process.stdin.close()
            self.process = None

    def row(self, error: float | None) -> Row:
        """What is kept."""
        notes = dict(self.told.get("notes", {}))
        return {
            "method": self.contender,
            "setting": self.setting,
            "seconds": self.seconds,
            "discarded": self.discarded,
            "calls": self.number,
            "prepared": self.told.get("prepared"),
            "first": self.told.get("first"),
            "peak": self.told.get("peak"),
            "scratch": notes.pop("scratch", None),
            "notes": notes,
            "error": error,
            "reason": self.reason,
            "versions": self.told.get("versions", {}),
        }


def distance(answer: Sequence[float], truth: Sequence[float]) -> float:
    """Relative, in the 2-norm; NaN for another length."""
    a, b = np.asarray(answer), np.asarray(truth)
    if a.shape != b.shape:
        return math.nan
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def surroundings() -> dict[str, str]:
    """Variables of every contender's process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(TUNING)}
    place = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return kept | place | {"OMP_NUM_THREADS": str(cores())}


def setting_of(work: str, contender: str) -> Row:
    """What `tuning` chose of what the work leaves open to the contender."""
    return json.loads(SETTINGS.read_text()).get(work, {}).get(contender, {})


def judged(running: Running, truth: Sequence[float] | None, most: float):
    """Error of an answer, where it is compared; a wrong one is said to be so."""
    answer = running.told.pop("answer", None)
    if running.reason or truth is None or running.contender in FREE:
        return None
    error = distance(answer, truth)
    if not error <= most:
        running.reason = f"wrong: its error is {error:.2g}, at most {most:g} allowed"
        running.end()
    return error


def truth_of(work: str, data: Path) -> list[float] | None:
    """What `reference` answers, where it does this work."""
    reference = Running(
        "reference", work, data, Path(sys.executable), JAX_ENABLE_X64="1"
    )
    reference.end()
    if reference.reason:
        raise RuntimeError(f"no reference for {work}: {reference.reason}")
    return reference.told["answer"]


def measure(
    work: str,
    contenders: Mapping[str, Path],
    *,
    small: bool = False,
    clean: int = CLEAN,
    rounds: int = ROUNDS,
) -> list[Row]:
    """A row a contender of one work.

    Args:
      work: of `WORKS`.
      contenders: names, and the Python that runs each.
      small: at the size for tests.
      clean: repetitions that each is to have.
      rounds: at the most.
    """
    stated = WORKS[work]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        save(data, stated.small() if small else stated.data())
        compared = math.isfinite(stated.error)
        truth = truth_of(work, data) if compared else None
        all_of_them: list[Running] = []
        try:
            errors = []
            for contender, python in contenders.items():
                chosen = setting_of(work, contender)
                all_of_them.append(Running(contender, work, data, python, chosen))
                errors.append(judged(all_of_them[-1], truth, stated.error))
            in_rounds(all_of_them, clean, rounds)
        finally:
            for one in all_of_them:
                one.end()
    rows = [one.row(e) for one, e in zip(all_of_them, errors, strict=True)]
    return [{"work": work, "seed": 0} | row | hardware() for row in rows]


def in_rounds(contenders: Sequence[Running], clean: int, rounds: int) -> None:
    """Until every one that lives and is right has so many clean repetitions."""
    for _ in range(rounds):
        alive = [one for one in contenders if one.reason is None]
        if all(len(one.seconds) >= clean for one in alive):
            return
        for one in alive:
            one.repeat()


def cores() -> int:
    """That this process and those it starts may use."""
    return len(os.sched_getaffinity(0))


def hardware() -> Row:
    """Model and number of cores, and bytes of memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": names[0], "cores": cores(), "memory": memory}
