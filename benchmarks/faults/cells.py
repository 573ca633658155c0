"The same cells, run again and again in one process: nothing may grow."

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .nursery import Nursery
from .row import Row

SETUP = """
import torch
from benchmarks.faults.subjects import SUBJECTS, X
"""
CELLS = {  # what a person runs over and over; `subject`, `run` and `front` are given
    "all of the notebook": [
        "learn = SUBJECTS[subject](run, keep=2, save_every=3, front=front)",
        "if len(learn.checkpoints): learn.restore(first)",
        "learn.fit(epochs=1, schedule='hold')",
        "first = first or learn.save(pin=True)",
        "learn.checkpoints; repr(learn.checkpoints); learn.checkpoints._repr_html_(); repr(learn)",
        "learn.restore('last')",
        "with learn.at('last'): pass",
    ],
    "only the cells that train": [
        "learn.restore(first)",
        "learn.fit(epochs=1, schedule='hold')",
        "learn.restore('last'); learn.save()",
        "with learn.at(first): pass",
    ],
}  # fmt: skip
FRONT = "trainkit.ui.front:front"
CASES = [("supervised", "all of the notebook", "none"), ("supervised", "only the cells that train", FRONT),
         ("adversarial", "only the cells that train", "none"), ("adversarial", "all of the notebook", FRONT)]  # fmt: skip
OBJECTS, RSS = 50, 10  # what 100 rounds may leave: objects, MB


def footprint(learn: Any) -> dict[str, int]:
    "What a process holds."
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system: it isn't held
    modules = [m for player in learn.players for module in player.modules.values() for m in module.modules()]
    parameters = [p for player in learn.players for p in player.parameters()]
    objects = gc.get_objects()
    return {
        "objects": len(objects),
        "tensors": sum(isinstance(o, torch.Tensor) for o in objects),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
        + sum(len(m._state_dict_hooks) for m in modules) + sum(len(p._backward_hooks or ()) for p in parameters),
        "callbacks": len(learn.cbs),
        "warning filters": len(warnings.filters),
        "modules": len(sys.modules),
        "handler": id(signal.getsignal(signal.SIGINT)),
        "RSS": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**10,
    }  # fmt: skip


def again(tell: Callable[..., None], run: str, subject: str, which: str, rounds: int, warm: int, front: str) -> None:
    "In a child: the cells in one namespace, as a kernel would run them."
    os.environ["TRAINKIT_WHERE"] = "terminal" if front != "none" else "script"
    space: dict[str, Any] = {"subject": subject, "run": Path(run), "front": front, "first": None}
    warnings.simplefilter("ignore")
    exec(SETUP, space)
    for cell in CELLS["all of the notebook"]:
        exec(cell, space)
    for i in range(warm + rounds):
        for cell in CELLS[which]:
            exec(cell, space)
        if i in (warm - 1, warm + rounds - 1):
            space["learn"].checkpoints.wait()
            files = len([path for path in Path(run).rglob("*") if path.is_file()])
            tell(**footprint(space["learn"]), **{"files on disk": files, "runs": len([*Path(run).parent.iterdir()])})


def rows(folder: Path, nursery: Nursery, rounds: int = 100, warm: int = 20, every: int = 1) -> Iterator[Row]:
    "Each kind of cells (or each `every`-th) for each subject, after the rounds in which what is cached gets cached."
    row = Row(f"the same cells run {rounds} times",
              f"no growth: threads, handlers, hooks, callbacks, files, tensors; at most {OBJECTS} objects, {RSS} MB")  # fmt: skip
    for subject, which, how in CASES[::every]:
        shown = "" if how == "none" else ", with what shows the run"
        with row.attempt(f"{subject}, {which}{shown}"):
            run = str(folder / "runs" / "run")
            how_often = {"rounds": rounds, "warm": warm}
            child = nursery.start("cells", "again", run=run, subject=subject, which=which, front=how, **how_often)
            first, end = child.done(900)
            grown = {key: end[key] - first[key] for key in first if end[key] != first[key]}
            objects, rss = grown.pop("objects", 0), grown.pop("RSS", 0)
            row.met["objects more"] += objects
            row.met["kB more"] += rss
            assert not grown, f"after {rounds} rounds more: {grown}"
            assert objects <= OBJECTS, f"{objects} objects more after {rounds} rounds"
            assert rss <= RSS * 2**10, f"{rss} kB more after {rounds} rounds"
            assert end["runs"] == 1, f"{end['runs']} runs on disk"
        shutil.rmtree(folder / "runs", ignore_errors=True)
    yield row
