"""Claims about the speed and memory of hypergrad beside other libraries."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hypergrad.bench import Finding, Row

from .harness import MAX_OTHER_LOAD, NUM_CLEAN, offered_works
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
OURS = ("ours", "defaults", "base", "gauss_newton")
#: Order of the contenders in a round.
ORDER = ("inner", "plain", *OURS, *JAX, *TORCH)
Rows = Mapping[str, Row]  # of one work, by contender
Measured = tuple[float, str]
#: ``(rows, contender) -> (number, its details in words)``
Measure = Callable[[Rows, str], Measured]


class MissingNumberError(Exception):
    """A claim has no number; the message states the reason."""


class NoPeerError(MissingNumberError):
    """No contender of another library has a valid result."""


def seconds(row: Row) -> float:
    """Returns the median seconds of a call."""
    return float(np.median(row["seconds"]))


def valid_row(rows: Rows, name: str) -> Row:
    """Returns the row of a contender that is right and was clean often enough."""
    row = rows.get(name)
    if row is None:
        raise MissingNumberError(f"{name} is missing")
    if row["reason"]:
        raise MissingNumberError(f"{name}: {row['reason']}")
    if len(row["seconds"]) < NUM_CLEAN:
        raise MissingNumberError(
            f"{name} has {len(row['seconds'])} clean repetitions of {NUM_CLEAN}"
        )
    return row


def fastest(rows: Rows, names: Sequence[str]) -> Row:
    """Returns the fastest row that is right; all right ones must be clean enough."""
    present = [name for name in names if name in rows]
    if not present:
        raise MissingNumberError(f"{', '.join(names)} is missing")
    right = [valid_row(rows, name) for name in present if not rows[name]["reason"]]
    if not right:
        reasons = [f"{name}: {rows[name]['reason']}" for name in present]
        raise NoPeerError(f"nothing to compare to ({'; '.join(reasons)})")
    return min(right, key=seconds)


# Measures: a number, and its details in words.


def time_over(*names: str) -> Measure:
    """Returns the measure of the time over that of the fastest of the names."""

    def measure(rows: Rows, name: str) -> Measured:
        row, other = valid_row(rows, name), fastest(rows, names)
        a, b = seconds(row), seconds(other)
        return a / b, f"{a:.3g} s, {other['method']} {b:.3g} s"

    return measure


def memory_over(*names: str) -> Measure:
    """Returns the measure of the peak memory over that of the fastest of the names."""

    def measure(rows: Rows, name: str) -> Measured:
        row, other = valid_row(rows, name), fastest(rows, names)
        a, b = row["peak"], other["peak"]
        return a / b, f"{a / 1e6:.0f} MB, {other['method']} {b / 1e6:.0f} MB"

    return measure


def megabytes(column: str) -> Measure:
    """Returns the measure of ``peak`` or ``scratch``."""
    return lambda rows, name: (valid_row(rows, name)[column] / 1e6, "")


def time_per_step(rows: Rows, name: str) -> Measured:
    """Returns microseconds per step of the inner run."""
    return 1e6 * seconds(valid_row(rows, name)) / STEPS, ""


def above_base(rows: Rows, name: str) -> Measured:
    """Returns microseconds above those of the base."""
    a, b = (1e6 * seconds(valid_row(rows, x)) for x in (name, "base"))
    return a - b, f"{a:.3g} µs, {b:.3g} µs"


def growth(rows: Rows, name: str) -> Measured:
    """Returns the time of more steps over ours."""
    a, b = (seconds(valid_row(rows, x)) for x in (name, "ours"))
    return a / b, f"{a:.3g} s, {b:.3g} s"


def longer_scratch(rows: Rows, name: str) -> Measured:
    """Returns the scratch memory of ten times the steps over that of the steps."""
    row = valid_row(rows, name)
    a, b = row["notes"]["longer"], row["scratch"]
    return a / b, f"{a / 1e6:.3g} MB, {b / 1e6:.3g} MB"


def unflagged(rows: Rows, name: str) -> Measured:
    """Returns how many of two faults occur: not finite, and trusted."""
    notes = valid_row(rows, name)["notes"]
    finite, trusted = bool(notes["finite"]), bool(notes["trusted"])
    text = f"{'finite' if finite else 'not finite'}, "
    text += f"{'trusted' if trusted else 'not trusted'}, residual "
    return (not finite) + trusted, text + f"{notes['adjoint_residual']:.2g}"


def least_curvature(rows: Rows, name: str) -> Measured:
    """Returns the smallest curvature that the solve detected."""
    notes = valid_row(rows, name)["notes"]
    if "ritz_min" not in notes:
        raise MissingNumberError(f"{name} detected no curvature")
    return notes["ritz_min"], ""


class PeerClaim(NamedTuple):
    """A number with an upper bound and an aim.

    Attributes:
      work: Work whose rows are used.
      quantity: Name of the number.
      measure: ``(rows, contender) -> (number, details)``; raises `MissingNumberError`.
      max_value: The claimed bound; None if nothing is claimed.
      aim: A lower value that is aimed at, or None.
      contender: Contender that the number belongs to.
    """

    work: str
    quantity: str
    measure: Measure
    max_value: float | None = None
    aim: float | None = None
    contender: str = "ours"

    def measured(self, rows: Rows) -> Measured:
        """Returns the number with its details."""
        return self.measure(rows, self.contender)

    def verdicts(self, value: float) -> tuple[str, str]:
        """Returns whether the bound is met and the aim reached; empty without one."""
        met = "" if self.max_value is None else "met"
        if self.max_value is not None and not value <= self.max_value:
            met = "not met"
        reached = "" if self.aim is None else "reached"
        if self.aim is not None and not value <= self.aim:
            reached = "not reached"
        return met, reached

    def evaluate(self, rows: Rows) -> Finding:
        """Returns how the claim ends; it fails only if our number is missing."""
        text = f"{self.work}, {self.quantity}"
        try:
            value, details = self.measured(rows)
        except MissingNumberError as error:
            is_failed = not isinstance(error, NoPeerError)
            return Finding(f"{text}: {error}", "FAILED" if is_failed else None)
        text += f": {value:.3g}" + (f" ({details})" if details else "")
        met, reached = self.verdicts(value)
        if met:
            text += f", at most {self.max_value:.3g} claimed"
        if reached:
            text += f"; {self.aim:.3g} {reached}"
        if not met:
            return Finding(text)
        return Finding(text, "supported" if met == "met" else "not supported")


INNER, PEER = "time over inner", "time over the fastest PyTorch peer"
ANY = "time over the fastest peer"
FAULTS = "faults: not finite, trusted"
DEFAULTS = (
    "w1-unrolled", "w1-forward", "w1-solve", "w1-whole", "w2-unrolled", "w2-implicit",
    "w3-1000", "overhead", "overhead-solve",
)  # fmt: skip
CLAIMS = (
    PeerClaim("w1-unrolled", INNER, time_over("inner"), 2.1, 1.95),
    PeerClaim("w1-unrolled", PEER, time_over(*TORCH), 0.5, 0.35),
    PeerClaim("w1-unrolled", ANY, time_over(*PEERS)),
    PeerClaim("w1-unrolled", "time over JAXopt", time_over("jaxopt"), 0.12),
    PeerClaim("w1-unrolled", "memory over JAXopt", memory_over("jaxopt"), 1 / 20),
    PeerClaim("w1-forward", INNER, time_over("inner"), 2.1),
    PeerClaim("w1-forward", "time over torch.func", time_over("torch_func"), 0.2, 0.12),
    PeerClaim("w1-forward", ANY, time_over(*PEERS)),
    PeerClaim("w1-solve", INNER, time_over("inner"), 0.06, 0.047),
    PeerClaim("w1-solve", PEER, time_over(*TORCH), 0.5, 0.3),
    PeerClaim("w1-solve", ANY, time_over(*PEERS), 0.5, 0.3),
    PeerClaim(
        "w1-whole",
        "time over descent by JAXopt or Optimistix",
        time_over(*DESCENTS),
        0.3,
        0.13,
    ),
    PeerClaim(
        "w1-whole",
        "time over the best solver of JAXopt or Optimistix",
        time_over(*JAX),
        0.3,
        0.13,
    ),
    PeerClaim("w1-whole", PEER, time_over(*TORCH), 0.1, 0.05),
    PeerClaim("w2-unrolled", INNER, time_over("inner"), 2.25, 2.1),
    PeerClaim("w2-unrolled", PEER, time_over(*TORCH), 0.85, 0.78),
    PeerClaim("w2-unrolled", "memory over that peer", memory_over(*TORCH), 1.0),
    PeerClaim("w2-unrolled", ANY, time_over(*PEERS), 0.85, 0.78),
    PeerClaim("w2-unrolled", "peak, MB", megabytes("peak"), None, 750),
    PeerClaim("w2-lowmem", INNER, time_over("inner"), 3.0, 2.6),
    PeerClaim("w2-lowmem", "peak, MB", megabytes("peak"), 520),
    PeerClaim("w2-implicit", "time over plain JAX", time_over("plain"), 1.05),
    PeerClaim("w2-implicit", PEER, time_over(*TORCH), 0.65, 0.57),
    PeerClaim("w2-implicit", ANY, time_over(*PEERS), 0.65, 0.57),
    PeerClaim("w2-indefinite", FAULTS, unflagged, 0),
    PeerClaim("w2-indefinite", "least curvature, 0: negative", least_curvature, 0),
    PeerClaim(
        "w2-indefinite",
        f"Gauss-Newton, {FAULTS}",
        unflagged,
        0,
        contender="gauss_newton",
    ),
    PeerClaim("w3-1000", INNER, time_over("inner"), 4.0, 3.5),
    PeerClaim("w3-1000", "scratch, MB", megabytes("scratch"), 80, 60),
    PeerClaim("w3-1000", PEER, time_over(*TORCH), 0.8, 0.65),
    PeerClaim("w3-10000", INNER, time_over("inner"), 4.3, 3.5),
    PeerClaim("w3-10000", "peak, MB", megabytes("peak"), 800, 600),
    PeerClaim("w3-forward", INNER, time_over("inner"), 4.2),
    PeerClaim(
        "w3-forward", "scratch of ten times the steps over", longer_scratch, 1.01
    ),
    PeerClaim("w4", PEER, time_over(*TORCH), 1.0, 0.6),
    PeerClaim("w4", "peak, MB", megabytes("peak"), 1300),
    PeerClaim("overhead", "microseconds a step", time_per_step, 2.0, 0.75),
    PeerClaim("overhead", PEER, time_over(*TORCH), 1 / 100, 1 / 300),
    PeerClaim("overhead", ANY, time_over(*PEERS)),
    PeerClaim("overhead-solve", ANY, time_over(*PEERS)),
    PeerClaim("dispatch", "microseconds above the jitted core", above_base, 30, 10),
    PeerClaim("compile", "time over plain JAX", time_over("plain"), 1.3, 1.1),
    PeerClaim(
        "compile",
        "time of a hundred times the steps over",
        growth,
        1.1,
        contender="base",
    ),
    PeerClaim("eight", "time over one loss", time_over("base"), 3.0, 2.5),
    PeerClaim("w6", "a hypergradient over a training", time_over("inner"), 1.15),
    PeerClaim("w6", ANY, time_over(*PEERS)),
    *(
        PeerClaim(
            work, f"by defaults, {quantity}", time_over(*names), contender="defaults"
        )
        for work in DEFAULTS
        for quantity, names in ((INNER, ("inner",)), (ANY, PEERS))
    ),
)


def by_work(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Returns the rows by work and contender."""
    works: dict[str, dict[str, Row]] = {}
    for row in rows:
        works.setdefault(row["work"], {})[row["method"]] = row
    return works


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Returns how every claim ends whose work has rows."""
    works = by_work(rows)
    return [
        claim.evaluate(works[claim.work]) for claim in CLAIMS if claim.work in works
    ]


def contenders_of(work: str) -> list[str]:
    """Returns the contenders that offer a work, in the order of their turns."""
    return [name for name in ORDER if work in offered_works(name)]


def hardware_text(rows: Sequence[Row]) -> str:
    """Returns hardware and versions, in one sentence each.

    Two peers are distributed as `hypergrad`: they are named by their contenders.
    """
    row = rows[0]
    versions = {
        (x["method"] if name == "hypergrad" else name, version)
        for x in rows
        for name, version in x["library_versions"].items()
    } | {("hypergrad-jax", x["versions"]["hypergrad"]) for x in rows}
    names = ", ".join(f"{name} {version}" for name, version in sorted(versions))
    return (
        f"{row['cpu']}, {row['cores']} cores, {row['memory'] / 2**30:.0f} GiB, "
        f"float32; repetitions in turns, discarded while others took over "
        f"{MAX_OTHER_LOAD:.0%} of a core. Versions: {names}."
    )
