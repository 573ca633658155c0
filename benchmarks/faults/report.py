"The page, from what was kept of each line."

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trainkit

from .plan import FAULTS
from .row import Row

HEAD = """# What was done to runs, and what came of it

Made by `python -m benchmarks.faults`, line by line: each says when, and how many processes the machine was busy with at its
end (`load`). tests/test_faults.py makes the same things happen less often. A try holds when all that is to be reached was
reached in it: the second table says what that is.

"""
Found = Mapping[str, Mapping[str, Any]]  # by name of the fault: its rows, the day, the versions, the load


def machine() -> str:
    "Processor, cores and memory."
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GB"


def file_system(folder: Path) -> str:
    "What kind of file system a folder is on."
    found = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def duration(seconds: float) -> str:
    "For people."
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def made_with(folder: Path) -> dict[str, str]:
    "What a line was made with: no paths, no names of machines in it."
    versions = f"trainkit {trainkit.__version__}, torch {torch.__version__}, NumPy {np.__version__}"
    where = f"Python {platform.python_version()}; {machine()}; files on {file_system(folder)}; one thread"
    return {"with": f"{versions}, {where}", "load": f"{os.getloadavg()[0]:.1f}"}


def summary(found: Found, names: Iterable[str] | None = None) -> str:
    "One line a fault: of these, or all."
    lines = ["| fault | tried | held | to reach | time | made | load |", "|---|--:|--:|---|--:|---|--:|"]
    for name in FAULTS if names is None else names:
        fault = FAULTS[name]
        if (made := found.get(name)) is None:
            lines.append(_line(fault.what, "–", "–", fault.reach, "–", "not yet", "–"))
            continue
        rows = [Row.of(row) for row in made["rows"]]
        faults, took = [row for row in rows if not row.control], sum(row.seconds for row in rows)
        tried, held = sum(row.tries for row in faults), sum(row.held for row in faults)
        lines.append(_line(fault.what, f"{tried:,}", f"{held:,}", fault.reach, duration(took), made["made"], made["load"]))
    return "\n".join(lines) + "\n"


def details(rows: Sequence[Row]) -> str:
    "One line for each kind of trouble."
    lines = ["| what was done | what must hold | tried | held | what the tries met |", "|---|---|--:|--:|---|"]
    for row in rows:
        met = ", ".join(f"{n:,} {what}" for what, n in row.met.items())
        what = f"control: {row.fault}" if row.control else row.fault
        lines.append(_line(what, row.reach, f"{row.tries:,}", f"{row.held:,}", met))
    return "\n".join(lines) + "\n"


def conditions(found: Found) -> str:
    "What the lines were made with; said once where it was the same."
    among: dict[str, list[str]] = {}
    for name in FAULTS:
        if name in found:
            among.setdefault(found[name]["with"], []).append(name)
    return "\n".join(f"- {'all' if len(among) == 1 else ', '.join(names)}: {text}" for text, names in among.items()) + "\n"


def page(found: Found) -> str:
    "The tables, from what was kept of each line."
    rows = [Row.of(row) for name in FAULTS if name in found for row in found[name]["rows"]]
    text = HEAD + summary(found) + "\nMade with:\n\n" + conditions(found)
    text += "\n## What each line is made of\n\nA control is no fault: it shows that one would be noticed.\n\n" + details(rows)
    failed = [f"- {row.fault}: {failure}" for row in rows for failure in row.failures]
    return text + ("\n## What did not hold\n\n" + "\n".join(failed) + "\n" if failed else "")
