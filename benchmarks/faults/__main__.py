"""Everything that can happen to a run: python -m benchmarks.faults [--short] [--again] [NAME ...]

Without names all of it, half an hour; the names are those of the lines of the table: kills, endings, damage, disks, hostile,
restores, cells, folders, sharded. What came of a line is kept in benchmarks/results/faults.json as soon as it is made, and
benchmarks/results/faults.md is written from what was kept. `--short` keeps nothing; `--again` makes nothing happen, and writes
the page.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks import common

from . import report
from .nursery import Nursery
from .plan import FAULTS
from .row import Row


def main(argv: list[str]) -> int:
    "Make the faults of these names happen, or all; the number of failures."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Make faults happen to runs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)}; all of them if there is none")
    parser.add_argument("--short", action="store_true", help="fewer tries, as in the tests")
    parser.add_argument("--again", action="store_true", help="make nothing happen: write the page from what was kept")
    given = parser.parse_args(argv)
    if strange := [name for name in given.names if name not in FAULTS]:
        parser.error(f"no fault is called {', '.join(strange)}; there are: {', '.join(FAULTS)}")
    os.environ["TRAINKIT_WHERE"] = "script"
    warnings.simplefilter("ignore")  # what is to be said is recorded and checked where it is said
    if given.again:
        write()
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, Nursery(Path(folder) / "logs") as nursery:
        for name in given.names or FAULTS:
            rows = _made(name, Path(folder) / name, nursery, given.short)
            line = {"rows": [row.kept(folder) for row in rows], **report.made_with(Path(folder))}
            found[name] = {"made": "now", **line} if given.short else common.keep("faults", name, **line)[name]
            if not given.short:
                write()
    print("\n" + report.summary(found, found))
    return sum(len(row["failures"]) for line in found.values() for row in line["rows"])


def write() -> None:
    "The page, from what was kept."
    (common.RESULTS / "faults.md").write_text(report.page(common.kept("faults")), encoding="utf-8")


def _made(name: str, here: Path, nursery: Nursery, short: bool) -> list[Row]:
    rows = []
    for row in FAULTS[name].rows(here, nursery, short):
        rows.append(row)
        print(f"{report.duration(row.seconds):>8}  {row}", flush=True)
        print("".join(f"          {failure}\n" for failure in row.failures), end="", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
