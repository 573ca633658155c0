"""What an import takes over `import torch`

    python -m benchmarks.imports

A new interpreter imports torch, then notes CPU time and resident memory, imports the other thing and notes them again; the
files are in the cache. Medians.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.common import Table, version

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = ("ipywidgets", "matplotlib", "IPython", "fastprogress", "accelerate", "pandas", "torchmetrics")
CODE = """
import json, os, sys, time
import torch
def resident():
    with open("/proc/self/statm") as file: return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, memory, start, wall = {*sys.modules}, resident(), time.process_time(), time.perf_counter()
exec(sys.argv[1])
took = time.process_time() - start, time.perf_counter() - wall, resident() - memory
print(json.dumps([*took, sorted({name.split(".")[0] for name in {*sys.modules} - before})]))
"""
OURS = {"import trainkit": ("0.15", "15"), "from trainkit.learner import Learner": (None, None),
        "from trainkit.gan.learner import GANLearner": (None, None), "import trainkit.ui.front": (None, None)}  # fmt: skip
PEERS = {"pytorch-ignite": "import ignite.engine", "skorch": "import skorch", "poutyne": "import poutyne",
         "accelerate": "import accelerate", "lightning": "import lightning", "fastai": "import fastai.basics"}  # fmt: skip


def imported(line: str) -> tuple[float, float, float, list[str]] | None:
    "CPU seconds, seconds by the clock, bytes, and the packages that came with it; None if it fails."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else there is nothing to be warm
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE, line], capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def measure(tiny: bool = False) -> list[Table]:
    runs = 1 if tiny else 3
    head = ("", "version", "CPU s", "to reach", "s by the clock", "MB", "to reach", "loads")
    table, lines = Table("Over `import torch`", head), [*OURS] if not tiny else [*OURS][:1]
    lines += [line for package, line in PEERS.items() if version(package) and not tiny]
    if not tiny: imported(lines[0])  # warms the cache
    found = {line: [imported(line) for line in [line] * runs] for line in lines}
    packages = {line: package for package, line in PEERS.items()}
    for line, results in found.items():
        good = [result for result in results if result is not None]
        if not good:
            table.rows.append((f"`{line}`", "doesn't run here", *[None] * 6))
            continue
        cpu, wall, memory = (statistics.median(result[i] for result in good) for i in range(3))
        seconds, megabytes = OURS.get(line, (None, None))
        loaded = ", ".join(name for name in FORBIDDEN if name in good[0][3]) or "none of them"
        row = (version(packages.get(line, "trainkit")), cpu, seconds, wall, memory / 1e6, megabytes, loaded)
        table.rows.append((f"`{line}`", *row))
    table.rows += [(f"`{line}`", common.ABSENT, *[None] * 6) for package, line in PEERS.items() if version(package) is None]
    table.notes.append(f"The last column looks for {', '.join(FORBIDDEN)}. {runs} times each.")
    return [table]


if __name__ == "__main__":
    common.main("imports", measure, __doc__)
