"""Everything that can happen to a run: python -m benchmarks.faults [--short] [NAME ...]

Without names all of it, ten minutes on a core; the names are those of the lines of the table: kills, endings, damage, disks,
hostile, restores, cells, folders. Writes benchmarks/results/faults.md when nothing was left out or shortened.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

from . import ROOT, report
from .nursery import Nursery
from .plan import FAULTS
from .row import Row

RESULTS = ROOT / "benchmarks" / "results" / "faults.md"


def main(argv: list[str]) -> int:
    "Make the faults of these names happen, or all; the number of failures."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Make faults happen to runs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)}; all of them if there is none")
    parser.add_argument("--short", action="store_true", help="fewer tries, as in the tests")
    given = parser.parse_args(argv)
    if strange := [name for name in given.names if name not in FAULTS]:
        parser.error(f"no fault is called {', '.join(strange)}; there are: {', '.join(FAULTS)}")
    os.environ["TRAINKIT_WHERE"] = "script"
    warnings.simplefilter("ignore")  # what is to be said is recorded and checked where it is said
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, Nursery(Path(folder) / "logs") as nursery:
        found = {name: _made(name, Path(folder) / name, nursery, given.short) for name in given.names or FAULTS}
        if not (given.names or given.short):
            report.write(found, RESULTS, Path(folder))
    print("\n" + report.summary(found))
    return sum(len(row.failures) for rows in found.values() for row in rows)


def _made(name: str, here: Path, nursery: Nursery, short: bool) -> list[Row]:
    rows = []
    for row in FAULTS[name].rows(here, nursery, short):
        rows.append(row)
        print(f"{report.duration(row.seconds):>8}  {row}", flush=True)
        print("".join(f"          {failure}\n" for failure in row.failures), end="", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
