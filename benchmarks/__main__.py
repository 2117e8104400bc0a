"""`python -m benchmarks list`, `python -m benchmarks NAME`, `... NAME --check`."""

import argparse
import importlib.util
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
#: Of the extra, so that what is missing is named with it.
NEEDED = ("cmaes", "evosax", "matplotlib", "optuna", "rich", "scipy")
HELP = "benchmarks need their extra: pip install '.[benchmarks]'"


def main(arguments: list[str]) -> int:
    """Runs or checks a table; the exit status."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"benchmarks: no {', '.join(missing)}; {HELP}", file=sys.stderr)
        return 1

    from hypergrad.studies.table import Request, check

    from .tables import ALIASES, TABLES

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "name", choices=["list", *TABLES, *ALIASES], help="of the table"
    )
    parser.add_argument("--seeds", type=int, help="how many, from 0")
    parser.add_argument("--scale", choices=["small", "paper"], default="small")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument(
        "--check",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="DIR",
        help="judge the rows in DIR (benchmarks/results) instead of measuring",
    )
    given = parser.parse_args(arguments)
    if given.name == "list":
        for table in TABLES.values():
            print(f"{table.name:12}  {table.minutes:3} min  {table.source}")
        for alias, name in ALIASES.items():
            print(f"{alias:12}  is {name}")
        return 0
    table = TABLES[ALIASES.get(given.name, given.name)]
    if given.check is not None:
        verdicts = check(table, given.check)
        for verdict in verdicts:
            print(f"{'FAILED' if verdict.failed else '      '} {verdict.text}")
        return int(any(verdict.failed for verdict in verdicts))
    seeds = table.seeds if given.seeds is None else given.seeds
    if seeds < 1:
        parser.error(f"--seeds must be at least 1, got {seeds}")
    if given.scale not in table.scales:
        parser.error(f"{table.name} has no scale {given.scale!r}: {table.scales}")
    command = f"python -m benchmarks {table.name} --seeds {seeds} --scale {given.scale}"
    if given.out != RESULTS:
        command += f" --out {given.out}"
    try:
        table.run(table, Request(given.scale, seeds, given.out, command))
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    print(table.file(given.out, "md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
