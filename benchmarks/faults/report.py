"The table, with what it was made with."

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

import trainkit

from .plan import FAULTS
from .row import Row

HEAD = """# What was done to runs, and what came of it

Made by `python -m benchmarks.faults`; tests/test_faults.py makes the same things happen less often. A try holds when all
that is to be reached was reached in it: the second table says what that is.

"""


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


def summary(found: Mapping[str, Sequence[Row]]) -> str:
    "One line a fault."
    lines = ["| fault | tried | held | to reach | time |", "|---|--:|--:|---|--:|"]
    for name, rows in found.items():
        fault, faults = FAULTS[name], [row for row in rows if not row.control]
        tried, held, took = sum(r.tries for r in faults), sum(r.held for r in faults), sum(r.seconds for r in rows)
        lines.append(_line(fault.what, f"{tried:,}", f"{held:,}", fault.reach, duration(took)))
    return "\n".join(lines) + "\n"


def details(found: Mapping[str, Sequence[Row]]) -> str:
    "One line for each kind of trouble."
    lines = ["| what was done | what must hold | tried | held | what the tries met |", "|---|---|--:|--:|---|"]
    for row in (row for rows in found.values() for row in rows):
        met = ", ".join(f"{n:,} {what}" for what, n in row.met.items())
        what = f"control: {row.fault}" if row.control else row.fault
        lines.append(_line(what, row.reach, f"{row.tries:,}", f"{row.held:,}", met))
    return "\n".join(lines) + "\n"


def write(found: Mapping[str, Sequence[Row]], path: Path, folder: Path) -> None:
    "Both tables into a file: no paths, no names of machines in it."
    versions = f"trainkit {trainkit.__version__}, torch {torch.__version__}, NumPy {np.__version__}"
    where = f"Python {platform.python_version()}; {machine()}; files on {file_system(folder)}"
    text = HEAD + f"{date.today()}. {versions}, {where}. One thread.\n\n" + summary(found)
    text += "\n## What each line is made of\n\nA control is no fault: it shows that one would be noticed.\n\n" + details(found)
    failed = [f"- {row.fault}: {failure}" for rows in found.values() for row in rows for failure in row.failures]
    if failed:
        text += "\n## What did not hold\n\n" + "\n".join(failed).replace(str(folder), "…") + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
