"The fault suite in its short form: python -m benchmarks.faults makes the same things happen many times."

import random
import warnings

import pytest

pytest.importorskip("fcntl", reason="the fault suite forks, kills and limits, as POSIX can")

from benchmarks.faults import damage, kills, restores, sharded
from benchmarks.faults.nursery import Nursery
from benchmarks.faults.plan import FAULTS, Fault
from benchmarks.faults.row import Row
from trainkit import checkpoint, converter, storage


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(autouse=True)
def unwarned():
    "What is to be said is recorded and checked where it is said."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


LEAST = {"kills": 10, "endings": 15, "damage": 40, "disks": 20, "hostile": 25, "restores": 20, "cells": 2, "folders": 10,
         "sharded": 10}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_every_try_holds(name, tmp_path, nursery):
    rows = [*FAULTS[name].rows(tmp_path / "here", nursery, short=True)]
    for row in rows:
        row.check()
    assert sum(row.tries for row in rows if not row.control) >= LEAST[name], "too little was tried"


def test_lines_are_kept_and_made_by_themselves(tmp_path, monkeypatch, capsys):
    "What came of a line is kept as it is made; the page is written from all that was kept, and says what was not made yet."
    import contextlib

    import benchmarks.faults.__main__ as program

    def rows(here, nursery, tries=3):
        row = Row("a | b", "it holds")
        with row.attempt("one"):
            raise ValueError(f"in {here}")
        row.tries, row.met["a thing"] = tries, 2
        yield row

    faults = {name: Fault(f"the {name}", "all", rows, rows) for name in ("first", "second")}
    for module in program, program.report:
        monkeypatch.setattr(module, "FAULTS", faults)
    monkeypatch.setattr(program.common, "RESULTS", tmp_path)
    monkeypatch.setattr(program, "Nursery", lambda folder: contextlib.nullcontext())
    assert program.main(["first", "--short"]) == 1 and not [*tmp_path.iterdir()]
    assert program.main(["first"]) == 1
    page = (tmp_path / "faults.md").read_text()
    assert "| the first | 3 | 2 | all | 0 s | 2" in page and "| the second | – | – | all | – | not yet | – |" in page
    assert "| a \\| b | it holds | 3 | 2 | 2 a thing |" in page and "ValueError at" in page and "in …/first" in page
    assert program.main(["second"]) == 1
    both = (tmp_path / "faults.md").read_text()
    assert "not yet" not in both and "- all: trainkit" in both and program.main(["--again"]) == 0
    assert (tmp_path / "faults.md").read_text() == both and str(tmp_path.parent) not in both


# --------------------------------------------------------------------------------- the suite notices what it is there for


def test_without_checksums_flipped_bits_would_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "fault_of", lambda path: "")
    monkeypatch.setattr(checkpoint, "fault_of", lambda path: "")
    scene = damage.Scene(tmp_path)
    row = damage.one_damaged(scene, [*damage.flips(scene, 40, random.Random(0))], "a bit flipped")
    assert len(row.failures) > 5


def test_without_checksums_flipped_bits_of_parts_would_be_taken(tmp_path, nursery, monkeypatch):
    "By the one process that restores beside the ranks: it has no checksums here, they do."
    monkeypatch.setattr(converter, "fault_in", lambda folder, files: "")
    row = sharded.damaged(tmp_path, nursery, 12)
    assert len(row.failures) > 3


def test_without_a_rollback_a_failed_restore_would_leave_traces(tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.state.Parts._put_back", lambda self, state: None)
    assert len(next(restores.rows(tmp_path, every=31)).failures) > 3


def test_a_kill_finds_files_half_written_that_are_written_in_place(tmp_path, nursery):
    kills.in_place(99, tmp_path, nursery, enough=1).check()
