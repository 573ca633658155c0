"The fault suite in its short form: python -m benchmarks.faults makes the same things happen many times."

import random
import warnings

import pytest

pytest.importorskip("fcntl", reason="the fault suite forks, kills and limits, as POSIX can")

from benchmarks.faults import damage, kills, restores
from benchmarks.faults.nursery import Nursery
from benchmarks.faults.plan import FAULTS
from trainkit import checkpoint, storage


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


LEAST = {"kills": 10, "endings": 15, "damage": 40, "disks": 20, "hostile": 25, "restores": 20, "cells": 2, "folders": 10}


@pytest.mark.parametrize("name", FAULTS)
def test_every_try_holds(name, tmp_path, nursery):
    rows = [*FAULTS[name].rows(tmp_path / "here", nursery, short=True)]
    for row in rows:
        row.check()
    assert sum(row.tries for row in rows if not row.control) >= LEAST[name], "too little was tried"


# --------------------------------------------------------------------------------- the suite notices what it is there for


def test_without_checksums_flipped_bits_would_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "fault_of", lambda path: "")
    monkeypatch.setattr(checkpoint, "fault_of", lambda path: "")
    scene = damage.Scene(tmp_path)
    row = damage.one_damaged(scene, [*damage.flips(scene, 40, random.Random(0))], "a bit flipped")
    assert len(row.failures) > 5


def test_without_a_rollback_a_failed_restore_would_leave_traces(tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.state.Parts._put_back", lambda self, state: None)
    assert len(next(restores.rows(tmp_path, every=31)).failures) > 3


def test_a_kill_finds_files_half_written_that_are_written_in_place(tmp_path, nursery):
    kills.in_place(99, tmp_path, nursery, enough=1).check()
