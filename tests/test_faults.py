"The fault suite in its short form: python -m benchmarks.faults makes the same things happen many times."

import os
import random
import warnings
import zipfile

import pytest

pytest.importorskip("fcntl", reason="the fault suite forks, kills and limits, as POSIX can")

from benchmarks.faults import cells, damage, disks, endings, folders, hostile, kills, restores
from benchmarks.faults.nursery import Nursery
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


def test_kill_at_random_moments(tmp_path, nursery):
    row = kills.at_random(12, tmp_path, nursery)
    row.check()
    assert row.tries == 12 and row.met["with a temporary file"] >= 3


def test_kill_before_each_operation_on_the_disk(tmp_path, nursery):
    row = kills.at_operations(8, tmp_path, nursery)
    row.check()
    assert row.tries >= 6


def test_endings_at_every_event(tmp_path):
    row = endings.at_events(tmp_path, every=11)
    row.check()
    assert row.tries > 30


def test_interrupts_at_random_moments(tmp_path):
    endings.at_random(10, tmp_path).check()


def test_damage(tmp_path):
    rows = damage.rows(tmp_path, 60)
    for row in rows:
        row.check()
    assert sum(row.tries for row in rows) > 100 and rows[1].met["refused"] > 10


def test_disk_full(tmp_path, nursery):
    row = disks.full(tmp_path, nursery, [1, 7])
    row.check()
    assert row.met["writes refused"] >= 9


def test_folder_gone_or_read_only(tmp_path, nursery):
    disks.gone(tmp_path, nursery).check()


def test_slow_disk(tmp_path):
    disks.slow(tmp_path, (0.01,)).check()


def test_hostile_files(tmp_path, nursery):
    row, control, fuzz = hostile.rows(tmp_path, nursery, every=9, mutants=30)
    row.check()
    fuzz.check()
    assert control.met["ran"] == control.tries > 0, "the payloads are not real"


def test_restore_failing_at_its_parts(tmp_path):
    for row in restores.rows(tmp_path, every=13):
        row.check()


def test_two_on_one_folder(tmp_path, nursery):
    folders.at_once(tmp_path / "at_once", nursery, 4).check()
    folders.beside(tmp_path / "beside", nursery).check()
    folders.readers(tmp_path / "readers", nursery).check()


def test_the_same_cells_again_and_again(tmp_path, nursery):
    for row in cells.rows(tmp_path, nursery, rounds=20, warm=10, every=4):
        row.check()


# --------------------------------------------------------------------------------- the suite notices what it is there for


def test_without_checksums_flipped_bits_would_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "fault_of", lambda path: "")
    monkeypatch.setattr(checkpoint, "fault_of", lambda path: "")
    scene = damage.Scene(tmp_path)
    row = damage.one_damaged(scene, [*damage.flips(scene, 40, random.Random(0))], "a bit flipped")
    assert len(row.failures) > 5


def test_without_a_rollback_a_failed_restore_would_leave_traces(tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.state.Parts._put_back", lambda self, state: None)
    assert len(restores.rows(tmp_path, every=31)[0].failures) > 3


def test_what_writes_in_place_would_be_caught_by_a_kill(tmp_path):
    "A temporary file that already has the final name."
    path = tmp_path / "ckpt-000000001.pt"
    hostile.archive(path, hostile.content(b"}"))
    boundaries = damage.boundaries(path)
    assert boundaries[0] == 0 and boundaries[-1] == path.stat().st_size
    for at in boundaries[:-1]:
        hostile.archive(path, hostile.content(b"}"))
        os.truncate(path, at)
        with pytest.raises((checkpoint.CheckpointError, zipfile.BadZipFile)):
            checkpoint.read_checkpoint(path)
