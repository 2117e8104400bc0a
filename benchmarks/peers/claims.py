"""What is claimed of ours beside others, and what rows say of it: met or not."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hypergrad.studies.record import Row
from hypergrad.studies.verdict import Verdict

from .harness import CLEAN
from .work import STEPS

DESCENTS = ("jaxopt", "optimistix")
JAX = (*DESCENTS, "jaxopt_lbfgs", "optimistix_lbfgs")
TORCH = (
    "torch_by_hand",
    "torch_func",
    "higher",
    "torchopt",
    "hypertorch",
    "betty",
    "boat",
    "moskomule",
    "learn2learn",
)
PEERS = (*JAX, *TORCH)
Rows = Mapping[str, Row]  # of one work, by contender
Measured = tuple[float, str]
Finder = Callable[[Rows, str], Measured]  # of a contender among them


class Missing(Exception):
    """There is no number, and why."""


class Alone(Missing):
    """No contender beside ours is right."""


def seconds(row: Row) -> float:
    """The median of a call's."""
    return float(np.median(row["seconds"]))


def usable(rows: Rows, name: str) -> Row:
    """Of a contender that is right and was clean often enough."""
    row = rows.get(name)
    if row is None:
        raise Missing(f"{name} is missing")
    if row["reason"]:
        raise Missing(f"{name}: {row['reason']}")
    if len(row["seconds"]) < CLEAN:
        raise Missing(f"{name} has {len(row['seconds'])} clean repetitions of {CLEAN}")
    return row


def fastest(rows: Rows, names: Sequence[str]) -> Row:
    """Of those that are right, all of which have to have been clean often enough."""
    there = [name for name in names if name in rows]
    if not there:
        raise Missing(f"{', '.join(names)} is missing")
    right = [usable(rows, name) for name in there if not rows[name]["reason"]]
    if not right:
        reasons = [f"{name}: {rows[name]['reason']}" for name in there]
        raise Alone(f"nothing to compare to ({'; '.join(reasons)})")
    return min(right, key=seconds)


# What is measured: a number and what it is made of.


def time_over(*names: str) -> Finder:
    """Over that of the fastest of them."""

    def find(rows: Rows, name: str) -> Measured:
        one, other = usable(rows, name), fastest(rows, names)
        a, b = seconds(one), seconds(other)
        return a / b, f"{a:.3g} s, {other['method']} {b:.3g} s"

    return find


def memory_over(*names: str) -> Finder:
    """Peaks over that of the fastest of them."""

    def find(rows: Rows, name: str) -> Measured:
        one, other = usable(rows, name), fastest(rows, names)
        a, b = one["peak"], other["peak"]
        return a / b, f"{a / 1e6:.0f} MB, {other['method']} {b / 1e6:.0f} MB"

    return find


def megabytes(column: str) -> Finder:
    """``peak`` or ``scratch``."""
    return lambda rows, name: (usable(rows, name)[column] / 1e6, "")


def a_step(rows: Rows, name: str) -> Measured:
    """Microseconds a step of the inner run."""
    return 1e6 * seconds(usable(rows, name)) / STEPS, ""


def above_base(rows: Rows, name: str) -> Measured:
    """Microseconds beyond those of the base."""
    a, b = (1e6 * seconds(usable(rows, one)) for one in (name, "base"))
    return a - b, f"{a:.3g} µs, {b:.3g} µs"


def growth(rows: Rows, name: str) -> Measured:
    """Of more steps, over ours."""
    a, b = (seconds(usable(rows, one)) for one in (name, "ours"))
    return a / b, f"{a:.3g} s, {b:.3g} s"


def longer_scratch(rows: Rows, name: str) -> Measured:
    """That of ten times the steps over that of the steps."""
    row = usable(rows, name)
    a, b = row["notes"]["longer"], row["scratch"]
    return a / b, f"{a / 1e6:.3g} MB, {b / 1e6:.3g} MB"


def unflagged(rows: Rows, name: str) -> Measured:
    """How many of two faults: a number that is none, and trust in it."""
    notes = usable(rows, name)["notes"]
    finite, trusted = bool(notes["finite"]), bool(notes["trusted"])
    text = f"{'finite' if finite else 'not finite'}, "
    text += f"{'trusted' if trusted else 'not trusted'}, residual "
    return (not finite) + trusted, text + f"{notes['adjoint_residual']:.2g}"


def least_curvature(rows: Rows, name: str) -> Measured:
    """That its solve saw."""
    notes = usable(rows, name)["notes"]
    if "ritz_min" not in notes:
        raise Missing(f"{name} saw no curvature")
    return notes["ritz_min"], ""


class Claim(NamedTuple):
    """One number, what it may be at most, and what is reached for.

    Attributes:
      work: whose rows it is of.
      what: is measured.
      find: the number and what it is made of, from the rows; or `Missing`.
      most, reach: None where nothing is asked.
      of: whose number it is.
    """

    work: str
    what: str
    find: Finder
    most: float | None = None
    reach: float | None = None
    of: str = "ours"

    def measured(self, rows: Rows) -> Measured:
        """The number, or `Missing`."""
        return self.find(rows, self.of)

    def words(self, value: float) -> tuple[str, str]:
        """Whether it is met, and reached; empty where nothing is asked."""
        met = "" if self.most is None else "met" if value <= self.most else "not met"
        far = self.reach is not None and value <= self.reach
        return met, "" if self.reach is None else "reached" if far else "not reached"

    def judge(self, rows: Rows) -> Verdict:
        """Fails where there is no number; *not met*, and wrong peers, do not."""
        text = f"{self.work}, {self.what}"
        try:
            value, parts = self.measured(rows)
        except Missing as missing:
            failed = not isinstance(missing, Alone)
            return Verdict(f"{text}: {missing}", failed)
        text += f": {value:.3g}" + (f" ({parts})" if parts else "")
        met, reached = self.words(value)
        if met:
            text += f", at most {self.most:.3g} claimed: {met}"
        if reached:
            text += f"; {self.reach:.3g} {reached}"
        return Verdict(text)


INNER, PEER = "time over inner", "time over the fastest PyTorch peer"
ANY = "time over the fastest peer"
FAULTS = "faults: not finite, trusted"
DEFAULTS = (
    "w1-unrolled", "w1-forward", "w1-solve", "w1-whole", "w2-unrolled", "w2-implicit",
    "w3-1000", "overhead", "overhead-solve",
)  # fmt: skip
CLAIMS = (
    Claim("w1-unrolled", INNER, time_over("inner"), 2.1, 1.95),
    Claim("w1-unrolled", PEER, time_over(*TORCH), 0.5, 0.35),
    Claim("w1-unrolled", ANY, time_over(*PEERS)),
    Claim("w1-unrolled", "time over JAXopt", time_over("jaxopt"), 0.12),
    Claim("w1-unrolled", "memory over JAXopt", memory_over("jaxopt"), 1 / 20),
    Claim("w1-forward", INNER, time_over("inner"), 2.1),
    Claim("w1-forward", "time over torch.func", time_over("torch_func"), 0.2, 0.12),
    Claim("w1-forward", ANY, time_over(*PEERS)),
    Claim("w1-solve", INNER, time_over("inner"), 0.06, 0.047),
    Claim("w1-solve", PEER, time_over(*TORCH), 0.5, 0.3),
    Claim("w1-solve", ANY, time_over(*PEERS), 0.5, 0.3),
    Claim(
        "w1-whole",
        "time over descent by JAXopt or Optimistix",
        time_over(*DESCENTS),
        0.3,
        0.13,
    ),
    Claim(
        "w1-whole",
        "time over the best solver of JAXopt or Optimistix",
        time_over(*JAX),
        0.3,
        0.13,
    ),
    Claim("w1-whole", PEER, time_over(*TORCH), 0.1, 0.05),
    Claim("w2-unrolled", INNER, time_over("inner"), 2.25, 2.1),
    Claim("w2-unrolled", PEER, time_over(*TORCH), 0.85, 0.78),
    Claim("w2-unrolled", "memory over that peer", memory_over(*TORCH), 1.0),
    Claim("w2-unrolled", ANY, time_over(*PEERS), 0.85, 0.78),
    Claim("w2-unrolled", "peak, MB", megabytes("peak"), None, 750),
    Claim("w2-lowmem", INNER, time_over("inner"), 3.0, 2.6),
    Claim("w2-lowmem", "peak, MB", megabytes("peak"), 520),
    Claim("w2-implicit", "time over plain JAX", time_over("plain"), 1.05),
    Claim("w2-implicit", PEER, time_over(*TORCH), 0.65, 0.57),
    Claim("w2-implicit", ANY, time_over(*PEERS), 0.65, 0.57),
    Claim("w2-indefinite", FAULTS, unflagged, 0),
    Claim("w2-indefinite", "least curvature seen, 0: negative", least_curvature, 0),
    Claim("w2-indefinite", f"Gauss-Newton, {FAULTS}", unflagged, 0, of="gauss_newton"),
    Claim("w3-1000", INNER, time_over("inner"), 4.0, 3.5),
    Claim("w3-1000", "scratch, MB", megabytes("scratch"), 80, 60),
    Claim("w3-1000", PEER, time_over(*TORCH), 0.8, 0.65),
    Claim("w3-10000", INNER, time_over("inner"), 4.3, 3.5),
    Claim("w3-10000", "peak, MB", megabytes("peak"), 800, 600),
    Claim("w3-forward", INNER, time_over("inner"), 4.2),
    Claim("w3-forward", "scratch of ten times the steps over", longer_scratch, 1.01),
    Claim("w4", PEER, time_over(*TORCH), 1.0, 0.6),
    Claim("w4", "peak, MB", megabytes("peak"), 1300),
    Claim("overhead", "microseconds a step", a_step, 2.0, 0.75),
    Claim("overhead", PEER, time_over(*TORCH), 1 / 100, 1 / 300),
    Claim("overhead", ANY, time_over(*PEERS)),
    Claim("overhead-solve", ANY, time_over(*PEERS)),
    Claim("dispatch", "microseconds above the jitted core", above_base, 30, 10),
    Claim("compile", "time over plain JAX", time_over("plain"), 1.3, 1.1),
    Claim("compile", "time of a hundred times the steps over", growth, 1.1, of="base"),
    Claim("eight", "time over one loss", time_over("base"), 3.0, 2.5),
    Claim("w6", "a hypergradient over a training", time_over("inner"), 1.15),
    Claim("w6", ANY, time_over(*PEERS)),
    *(
        Claim(work, f"by defaults, {what}", time_over(*names), of="defaults")
        for work in DEFAULTS
        for what, names in ((INNER, ("inner",)), (ANY, PEERS))
    ),
)


def by_work(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows by work and contender."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["work"], {})[row["method"]] = row
    return found


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every claim; a fault of a peer is no failure of the table."""
    found = by_work(rows)
    return [claim.judge(found.get(claim.work, {})) for claim in CLAIMS]
