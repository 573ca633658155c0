"The table's lines: which faults there are, how often each is made to happen, in full and in short."

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cells, damage, disks, endings, folders, hostile, kills, mixups, restores, sharded
from .nursery import Nursery
from .row import Row

Rows = Callable[[Path, Nursery], Iterator[Row]]  # given a folder of its own


@dataclass(frozen=True)
class Fault:
    "A line of the table."

    what: str
    reach: str
    full: Rows
    short: Rows

    def rows(self, here: Path, nursery: Nursery, short: bool = False) -> Iterator[Row]:
        "What the line is made of, one after the other, with the time that each took."
        here.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        for row in (self.short if short else self.full)(here, nursery):
            row.seconds = time.monotonic() - begin
            yield row
            begin = time.monotonic()


def killed(n: int, controls: int, operations: int) -> Rows:
    "At random moments, in files written in place, before operations on the disk."

    def rows(here: Path, nursery: Nursery) -> Iterator[Row]:
        yield kills.at_random(n, here / "random", nursery)
        if controls:
            yield kills.in_place(controls, here / "in place", nursery)
        yield kills.at_operations(operations, here / "operations", nursery)

    return rows


def ended(every: int, n: int) -> Rows:
    "At each `every`-th of the events, and at `n` random moments."

    def rows(here: Path, nursery: Nursery) -> Iterator[Row]:
        yield endings.at_events(here / "events", every)
        yield endings.at_random(n, here / "random")

    return rows


def damaged(n: int | None) -> Rows:
    "In all the ways, or in about `n` of them twice."

    def rows(here: Path, nursery: Nursery) -> Iterator[Row]:
        scene, rng = damage.Scene(here), random.Random(0)
        yield from damage.of_one_file(scene, rng, n)
        yield from mixups.of_several_files(scene, rng, n)

    return rows


def refused(firsts: list[int], delays: tuple[float, ...]) -> Rows:
    "By the disk, from these writes on; and slow ones."

    def rows(here: Path, nursery: Nursery) -> Iterator[Row]:
        yield disks.full(here / "full", nursery, firsts)
        yield disks.gone(here / "gone", nursery)
        yield disks.slow(here / "slow", delays)

    return rows


def shared(rounds: int, readers: int) -> Rows:
    "By two learners, or by one and readers."

    def rows(here: Path, nursery: Nursery) -> Iterator[Row]:
        yield folders.at_once(here / "at once", nursery, rounds)
        yield folders.beside(here / "beside", nursery)
        yield folders.readers(here / "readers", nursery, readers)

    return rows


def parted(kills: int, cases: int | None) -> Rows:
    "A rank killed so many times, and so many cases of damaged parts, or all."

    def rows(here: Path, nursery: Nursery) -> Iterator[Row]:
        yield sharded.at_random(kills, here / "killed", nursery)
        yield sharded.damaged(here / "damaged", nursery, cases)

    return rows


FAULTS: dict[str, Fault] = {
    "kills": Fault(
        "kill -9 at random moments, saves and deletions included",
        "every restart resumes from a complete checkpoint; final weights equal those of the run that was never killed",
        killed(200, 40, 100), killed(8, 0, 4)),
    "endings": Fault(
        "interrupt and exception at every event (in the foreground and in the background; without commands and pauses)",
        "learner usable, resume exact, no batch lost or repeated",
        ended(1, 100), ended(29, 4)),
    "damage": Fault(
        "truncation at every part boundary, single bit flips, missing or swapped files, edited JSON",
        "all noticed, message names file and fault, memory untouched",
        damaged(None), damaged(32)),
    "disks": Fault(
        "disk full, read-only, folder removed during a run",
        "nothing earlier lost, message",
        refused([*range(1, 21), 30, 50, 80], (0.005, 0.03)), refused([2], (0.005,))),
    "hostile": Fault(
        "hostile pickles and archives (code execution, path traversal, gigantic sizes)",
        "refused without execution, without memory blow-up",
        lambda here, nursery: hostile.rows(here, nursery),
        lambda here, nursery: hostile.rows(here, nursery, every=11, mutants=20)),
    "restores": Fault(
        "restore failing at each of its parts",
        "all-or-nothing",
        lambda here, nursery: restores.rows(here),
        lambda here, nursery: restores.rows(here, every=29)),
    "cells": Fault(
        "the same cells run 100 times",
        "no growth in memory, threads, handlers, hooks or callbacks",
        lambda here, nursery: cells.rows(here, nursery),
        lambda here, nursery: cells.rows(here, nursery, rounds=6, warm=6, every=3)),
    "folders": Fault(
        "two learners or processes in one folder",
        "one trains on and keeps everything, the other is told",
        shared(50, 3), shared(2, 2)),
    "sharded": Fault(
        "two ranks with sharded saves: kill -9 of one at random moments; parts damaged, exchanged, missing",
        "a complete checkpoint remains, all ranks restore it alike, message names the part",
        parted(100, None), parted(2, 8)),
}  # fmt: skip
