"""Records golden cases, or checks them against the recorded traces.

    python -m tests.golden.record [PATTERN]
    python -m tests.golden.record --check [PATTERN]

PATTERN selects cases by name as `fnmatch` does, such as 'estimators/Implicit*'. With
``--check`` every leaf of which a bit differs is printed, and the exit status is 1 if
there is one.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax

from tests.golden.encoding import Difference, Encoded, encode, exact_differences
from tests.golden.environment import get_environment

TRACES = Path(__file__).with_name("traces.json")
CASES_PER_CACHE = 25  # Compiled programs are freed after so many cases.
MAX_PRINTED = 300  # characters of an encoded leaf


def configure() -> None:
    """Sets the options with which the tests run."""
    os.environ.setdefault("NPROC", "8")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")


def load_traces() -> dict[str, Any]:
    """Returns the recorded environment and cases, empty if nothing is recorded."""
    if not TRACES.exists():
        return {"environment": {}, "cases": {}}
    return json.loads(TRACES.read_text())


def save_traces(cases: dict[str, Encoded]) -> None:
    """Writes the environment and the cases in the order of their names, one per line.

    The file is replaced at once, so that it is never incomplete.
    """
    compact = {"separators": (",", ":"), "sort_keys": True}
    lines = [
        f"{json.dumps(name)}: {json.dumps(cases[name], **compact)}"
        for name in sorted(cases)
    ]
    environment = json.dumps(get_environment(), indent=1)
    text = f'{{\n"environment": {environment},\n"cases": {{\n'
    text += ",\n".join(lines) + "\n}\n}\n"
    temporary = TRACES.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(TRACES)


def write(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compute_cases(
    cases: dict[str, Callable[[], Any]],
) -> Iterator[tuple[str, Encoded | None, float]]:
    """Yields name, encoded result and seconds of each case; None if it raised."""
    for index, name in enumerate(cases):
        if index % CASES_PER_CACHE == 0:
            jax.clear_caches()
        start_time = time.monotonic()
        try:
            result = encode(cases[name]())
        except Exception:
            result = None
            write(traceback.format_exc())
        yield name, result, time.monotonic() - start_time


def record(pattern: str, selected: dict[str, Callable[[], Any]]) -> int:
    """Recomputes the selected cases and writes the traces; returns the exit status."""
    traces = load_traces()
    if pattern != "*" and traces["environment"] not in ({}, get_environment()):
        write("The environment differs from the recorded one: record all cases.")
        return 1
    kept = {} if pattern == "*" else traces["cases"]
    results, num_failed = {}, 0
    for name, result, seconds in compute_cases(selected):
        write(f"[{len(results) + 1}/{len(selected)}] {seconds:5.1f} s  {name}")
        num_failed += result is None
        results[name] = result
    if num_failed:
        write(f"{num_failed} cases raised an error; nothing was written.")
        return 1
    save_traces(kept | results)
    write(f"Recorded {len(results)} cases, {TRACES.stat().st_size:,} bytes.")
    return 0


def check(pattern: str, selected: dict[str, Callable[[], Any]]) -> int:
    """Compares the selected cases with the traces; returns the exit status."""
    traces = load_traces()
    environment = get_environment()
    for name in sorted(environment.keys() | traces["environment"].keys()):
        old, new = traces["environment"].get(name), environment.get(name)
        if old != new:
            write(f"The environment differs: {name} was {old!r}, is {new!r}.")
    recorded = {
        name: case
        for name, case in traces["cases"].items()
        if fnmatchcase(name, pattern)
    }
    num_leaves, failed = 0, sorted(recorded.keys() - selected.keys())
    for name in failed:
        write(f"{name}: recorded, but there is no such case")
    for index, (name, result, seconds) in enumerate(compute_cases(selected)):
        if result is None or name not in recorded:
            message = "raised an error" if result is None else "is not recorded"
            differences, label = [], message
        else:
            differences = list(exact_differences(recorded[name], result))
            label = f"{len(differences)} leaves differ" if differences else ""
        write(f"[{index + 1}/{len(selected)}] {seconds:5.1f} s  {name}  {label}")
        for difference in differences:
            write(format_difference(name, difference))
        num_leaves += len(differences)
        if label:
            failed.append(name)
    write(
        f"{len(failed)} of {len(selected)} cases differ, in {num_leaves} leaves."
        if failed
        else f"All {len(selected)} cases are equal to the bit."
    )
    return 1 if failed else 0


def format_difference(case: str, difference: Difference) -> str:
    """Returns case, path, recorded and recomputed leaf in three lines."""
    shorten = lambda leaf: json.dumps(leaf)[:MAX_PRINTED]
    return (
        f"    {case}: {difference.path}\n"
        f"        old {shorten(difference.old)}\n"
        f"        new {shorten(difference.new)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("pattern", nargs="?", default="*", help="of case names")
    options = parser.parse_args(arguments)
    configure()
    # The modules of the cases make arrays, so they are imported after the options.
    from tests.golden.cases import CASES

    selected = {
        name: case for name, case in CASES.items() if fnmatchcase(name, options.pattern)
    }
    if not selected:
        write(f"No case matches {options.pattern!r}.")
        return 1
    run = check if options.check else record
    return run(options.pattern, selected)


if __name__ == "__main__":
    sys.exit(main())
