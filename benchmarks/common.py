"""What the benchmarks share: alternating runs, medians of pairs, tables, the machine in a line.

A program `benchmarks/NAME.py` has `measure(tiny) -> list[Table]` and is run from the project's root:

    python -m benchmarks.NAME            writes benchmarks/results/NAME.md
    python -m benchmarks.NAME --print    shows it only
    python -m benchmarks.NAME --tiny     a few steps, shown only: does it run?

One that takes long has `PARTS`, each measured by itself; what they found is kept in benchmarks/results/NAME.json, from which
the page is written, with the day and the machine of each:

    python -m benchmarks.NAME PART …     measures these parts anew, and writes the page
    python -m benchmarks.NAME --again    measures nothing, and writes the page from what was kept (shows it, with --print)
"""
from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import io
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
ABSENT = "not installed"
Work = Callable[[], Any]  # what is measured
Maker = Callable[[], Work]  # prepares it, unmeasured
Cell = str | float | int | None
Part = Callable[[bool], list["Table"]]  # measures, in the tiny form if told so
KEYS = "tables", "machine"  # what is kept of a part, beside the day


@dataclass
class Table:
    "Rows under a head, with a title above and notes below."

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.head, tuple("---" for _ in self.head), *(tuple(map(shown, row)) for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *self.notes])


def shown(cell: Cell) -> str:
    "A cell as text: three digits are enough."
    if cell is None: return "–"
    if not isinstance(cell, float): return str(cell)
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def seconds(work: Work, clock: Callable[[], float] = time.process_time) -> float:
    "How long it takes by a clock: CPU time of all threads, if no other is given."
    gc.collect(1)
    start = clock()
    work()
    return clock() - start


def versus(
    base: Maker,  # what the others are compared with
    others: Mapping[str, Maker],
    runs: int,
    measured: Callable[[Work], Any] = seconds,
) -> dict[str, list[tuple[Any, Any]]]:
    "The base and each of the others measured beside each other, in turn; a first round is not counted."
    found: dict[str, list[tuple[Any, Any]]] = {name: [] for name in others}
    for i in range(runs + 1):
        for name, other in others.items():
            with quiet():
                works = [base(), other()]
                if i % 2: pair = measured(works[0]), measured(works[1])
                else: pair = (measured(works[1]), measured(works[0]))[::-1]
            found[name].append(pair)
    return {name: pairs[1:] for name, pairs in found.items()}


def median(values: Any) -> float:
    return statistics.median(list(values))


def ratio(pairs: list[tuple[float, float]]) -> float:
    "The median of other over base, each pair by itself."
    return median(other / base for base, other in pairs)


def spread(values: list[float]) -> str:
    "The middle half of the values."
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values * 3)
    return f"{shown(low)} – {shown(high)}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    "Inside, nobody says anything."
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def version(package: str) -> str | None:
    "What is installed of a package, if anything."
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return None


def present(peers: Mapping[str, Callable[..., Work]], *args: Any) -> tuple[dict[str, Maker], dict[str, str]]:
    "Those that are installed and can be prepared; and what is wrong with the others."
    lacking = {name: ABSENT for name in peers if version(name) is None}
    for name in peers.keys() - lacking.keys():
        try:
            with quiet(): peers[name](*args)
        except Exception as error:
            lacking[name] = f"{version(name)}, doesn't run here: {type(error).__name__}"
    return {name: partial(make, *args) for name, make in peers.items() if name not in lacking}, lacking


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(*more: str) -> str:
    "What it was measured on, with the versions of more packages."
    load = f"; load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    others = "".join(f", {package} {version(package)}" for package in more)
    return (f"Python {platform.python_version()}, torch {torch.__version__}, numpy {version('numpy')}{others}, {os.cpu_count()} "
            f"cores ({processor()}){gpu}, {torch.get_num_threads()} thread of torch's{load}.")


def opening(name: str, about: str, where: str = "") -> list[str]:
    "What stands above the tables: what the program's docstring says, its commands left out, and who wrote the page."
    head, *rest = about.strip().split("\n\n")
    prose = [" ".join(text.split()) for text in rest if not text.startswith("    ")]
    return [f"# {head}", *prose, f"Written by `python -m benchmarks.{name}`. {where}".rstrip()]


def report(name: str, tables: list[Table], about: str) -> str:
    "The page of a program without parts."
    return "\n\n".join([*opening(name, about, machine()), *map(str, tables)]) + "\n"


def write(file: str, text: str) -> None:
    "Among the results; a program that ends in between leaves the old file whole."
    RESULTS.mkdir(parents=True, exist_ok=True)
    fresh = RESULTS / f"{file}.new"
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, RESULTS / file)


def arguments(about: str) -> argparse.ArgumentParser:
    "What every program can be given."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="show the tables only")
    parser.add_argument("--tiny", action="store_true", help="a few steps, shown only")
    return parser


# --- programs in parts


def kept(name: str, *keys: str) -> dict[str, dict[str, Any]]:
    "What a program has kept, by its parts. ValueError: it can't be read, or a part has no day or not all of these keys."
    path = RESULTS / f"{name}.json"
    if not path.is_file(): return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for part, said in found.items():
            if lacking := {"made", *keys} - said.keys():
                raise ValueError(f"part {part!r} lacks {', '.join(sorted(lacking))}; it has {', '.join(said) or 'nothing'}")
    except (ValueError, AttributeError) as error:  # the second, of what is no object
        raise ValueError(f"{path} can't be used: {error}. It must be a JSON object of parts, each with "
                         f"{', '.join(('made', *keys))}. Put back an older one, or remove it.") from None  # fmt: skip
    return found


def keep(name: str, part: str, **found: Any) -> dict[str, dict[str, Any]]:
    "Keep what a part has found, with the day; returns what is kept of all of them."
    every = kept(name) | {part: {"made": f"{date.today()}", **found}}
    write(f"{name}.json", json.dumps(every, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return every


def page(
    name: str,
    parts: Mapping[str, Any],  # in their order
    found: Mapping[str, Mapping[str, Any]],  # as `kept` gives it
    about: str,
    computed: list[Table] | None = None,  # tables that nothing is measured for
) -> str:
    "The page of a program in parts: of each its tables, the day and the machine."
    lines = opening(name, about)
    for part in parts:
        said = found.get(part, {"tables": [], "made": "not yet", "machine": ""})
        lines += [str(Table(**table)) for table in said["tables"]]
        lines.append(f"Measured ({part}): {said['made']}. {said['machine']}".rstrip())
    return "\n\n".join([*lines, *map(str, computed or ())]) + "\n"


def main_in_parts(
    name: str,
    parts: Mapping[str, Part],
    about: str,
    computed: list[Table] | None = None,  # as for `page`
    packages: tuple[str, ...] = (),  # others whose versions matter
) -> None:
    "Measure the parts that are named, or all; keep what each has found, and write the page, each time."
    parser = arguments(about)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all of them if there is none")
    parser.add_argument("--again", action="store_true", help="measure nothing, write the page from what was kept")
    given = parser.parse_args()
    if strange := {*given.parts} - {*parts}:
        parser.error(f"no part is called {', '.join(sorted(strange))}; there are: {', '.join(parts)}")
    if given.again and (given.parts or given.tiny):
        parser.error(f"--again measures nothing, and can't be given with {' '.join(given.parts) or '--tiny'}")
    torch.set_num_threads(1)
    paged, only_shown = partial(page, name, parts, about=about, computed=computed), given.tiny or given.print
    if given.again or not only_shown:
        text = paged(kept(name, *KEYS))  # what can't be used is told before hours are spent
    if given.again:
        if given.print: print(text)
        else: write(f"{name}.md", text)
        return
    for part in given.parts or parts:
        tables = parts[part](given.tiny)
        print(*tables, machine(*packages), sep="\n\n", flush=True)
        if not only_shown:
            found = keep(name, part, tables=[asdict(table) for table in tables], machine=machine(*packages))
            write(f"{name}.md", paged(found))


def main(name: str, measure: Callable[[bool], list[Table]], about: str) -> None:
    "Measure, then write or show."
    given = arguments(about).parse_args()
    torch.set_num_threads(1)
    text = report(name, measure(given.tiny), about or "")
    print(text)
    if not (given.tiny or given.print): write(f"{name}.md", text)
