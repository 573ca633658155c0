"Runs: what learners left in a folder, read from the disk alone."
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.history import History
from trainkit.learner import Learner
from trainkit.runs import last_step, lineage, read_run, runs


def learner(run, **kw):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x.sum(1, keepdim=True)
    return Learner(nn.Linear(3, 1), ((x, y), (x, y)), "mse", opt={"name": "sgd", "lr": 0.05}, batch_size=16, seed=1, front="none",
                   run=run, **kw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three runs: one, its branch, and a branch of the branch."
    root = tmp_path_factory.mktemp("here") / "runs"
    learn = learner(root / "first")
    learn.fit(epochs=3)
    learn.branch(8, "second")
    learn.fit(epochs=1)
    learn.branch(8, "third")
    learn.fit(steps=3)
    return root


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_list_of_what_learners_left(folder):
    found = runs(folder)
    assert found.names() == ["first", "second", "third"] and len(found) == 3
    assert [run.parent for run in found] == ["", "first/8", "second/8"]
    assert [run.step for run in found] == [12, 12, 11] and not any(run.fault for run in found)
    for run in found:
        history = History.read(run.path / "history.jsonl")
        files = [p for p in run.path.rglob("*") if p.is_file()]
        assert run.size == sum(p.stat().st_size for p in files)
        assert run.changed == max(p.stat().st_mtime for p in files)
        assert run.checkpoints == len([*run.path.glob("checkpoints/*.pt")])
        saved = [m.step for m in history.marks if m.kind == "checkpoint"]
        scores = [v for s, v in zip(*history.scalars["valid/loss"]) if s in saved]
        assert run.best == pytest.approx(min(scores))


def test_the_table_is_a_tree(folder):
    found = runs(folder)
    lines = repr(found).splitlines()
    assert lines[0] == f"3 runs in {folder}"
    assert [line.split("  ")[1:-1][0] for line in lines[2:3]] == ["first"]
    assert "└─ second" in lines[3] and "first/8" in lines[3] and "   └─ third" in lines[4]
    assert found.tree().splitlines() == ["first  12", "└─ second  8 – 12", "   └─ third  8 – 11"]
    page = found._repr_html_()
    assert page.count("<tr>") == 4 and "└─ third" in page and str(folder) in page


def test_nothing_is_written_by_looking(copied):
    for path in copied.rglob("*.json"): path.unlink()  # reading a checkpoint would write these again
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    repr(runs(copied))
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


def test_lineage_without_the_small_files(copied):
    "The history remembers what a run is a branch of."
    for path in copied.rglob("*.json"): path.unlink()
    assert [run.parent for run in runs(copied)] == ["", "first/8", "second/8"]
    assert [run.best for run in runs(copied)] == [None] * 3
    for path in copied.rglob("history.jsonl"): path.unlink()
    found = runs(copied)
    assert sorted(run.step for run in found) == [11, 12, 12] and all("No such file" in run.fault for run in found)


@pytest.mark.parametrize("harm, said", [
    (lambda run: (run / "history.jsonl").write_bytes(b"\x00\xff" * 999), "history.jsonl can't be read"),
    (lambda run: next(run.glob("checkpoints/*.pt")).write_bytes(b""), "not a whole file: ckpt-"),
    (lambda run: [p.write_bytes(p.read_bytes()[:-9]) for p in run.glob("checkpoints/*.pt")], "not a whole file: ckpt-"),
    (lambda run: ((run / "history.jsonl").unlink(), (run / "history.jsonl").mkdir()), "history.jsonl: Is a directory"),
])
def test_damage_is_named_and_hides_nothing(copied, harm, said):
    harm(copied / "second")
    found = runs(copied)
    assert len(found) == 3 and said in found["second"].fault and said in repr(found) and "damaged" in found._repr_html_()
    assert [run.fault for run in found if run.name != "second"] == ["", ""]
    assert found["second"].parent == "first/8"


@pytest.mark.parametrize("harm", [
    lambda run: [p.write_text("[1, 2]") for p in run.glob("checkpoints/*.json")],
    lambda run: [p.write_text('{"info": {"score": "good", "parent": 3}, "seq": "x"}') for p in run.glob("checkpoints/*.json")],
    lambda run: [p.write_bytes(b"\xff\xfe") for p in run.glob("checkpoints/*.json")],
    lambda run: (run / "checkpoints" / "ckpt-x.pt").mkdir(),
    lambda run: (run / "checkpoints" / "ckpt-000000999.pt").symlink_to("nowhere"),
    lambda run: shutil.rmtree(run / "checkpoints"),
    lambda run: (run / "history.jsonl").write_text(""),
])
def test_oddities_are_no_errors(copied, harm):
    harm(copied / "second")
    found = runs(copied)
    assert {"first", "second", "third"} == set(found.names()) and repr(found) and found._repr_html_() and found.tree()


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([
    b'{"step": 3, "values": {}}', b'{"mark": {"kind": "branch", "step": 2, "text": "a/1"}}', b'{"rewind": 1}', b'{"step": true}',
    b'{"marks": []}', b'{"clear": true}', b'{"mark": 3}', b'{"mark": {"kind": "branch", "text": 5}}', b"[" * 5000,
    b'{"info": {"parent": "a/b", "score": NaN}}'])), max_size=6), st.binary(max_size=80))
@settings(max_examples=80, deadline=None)
def test_no_content_raises(tmp_path_factory, lines, other):
    run = tmp_path_factory.mktemp("runs") / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "history.jsonl").write_bytes(b"\n".join(lines))
    (run / "checkpoints" / "ckpt-000000001.pt").write_bytes(other)
    (run / "checkpoints" / "ckpt-000000001.json").write_bytes((lines or [b""])[0])
    found = runs(run.parent)
    assert found.names() == ["run"] and "ckpt-000000001.pt" in found[0].fault and repr(found)


def test_the_last_step_is_found_from_the_end(tmp_path):
    history = History(tmp_path / "h.jsonl")
    for step in range(5000): history.add("train/loss", 0.1, step)
    history.close()
    assert last_step(history.path, block=200) == 4999
    history.rewind(70)
    for _ in range(50): history.mark("note", 70, 100 * "x")
    history.load_state_dict(history.state_dict())  # one line, longer than any block
    history.close()
    assert last_step(history.path, block=200) == 70
    with open(history.path, "ab") as file: file.write(b'{"step": 71, "val')
    assert last_step(history.path) == 70


def test_where_runs_are_looked_for(copied, monkeypatch):
    shutil.move(copied / "third", copied / "later" / "deep" / "third")
    (copied / ".trash").mkdir()
    shutil.copytree(copied / "first", copied / ".trash" / "first")
    (copied / "notes").mkdir()
    assert runs(copied).names() == ["first", "second", "later/deep/third"]  # still a branch of second
    assert runs(copied / "first").names() == ["first"]
    monkeypatch.chdir(copied.parent)
    assert runs().names() == runs("runs").names() == runs(copied).names()
    assert repr(runs("nowhere")) == "0 runs in nowhere (there is no such folder)"
    with pytest.raises(KeyError, match="there are: first, second"): runs(copied)["fourth"]


def test_lines_of_a_tree():
    def run(name, parent=""): return read_run(Path("nowhere") / name).__class__(name, Path("x") / name, parent=parent)
    found = lineage([run("c", "b/7"), run("b", "a/3"), run("d", "a/1"), run("a"), run("self", "self/1"), run("x", "y/1"),
                     run("y", "x/1")])
    assert [before + r.name for before, r in found] == ["a", "├─ d", "└─ b", "   └─ c", "self", "x", "└─ y"]


def test_scores_by_the_newest_mode(tmp_path):
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    for seq, (score, mode) in enumerate([(0.5, "max"), (0.9, "max"), (None, "")]):
        path = tmp_path / "r" / "checkpoints" / f"ckpt-00000000{seq}.pt"
        with zipfile.ZipFile(path, "w") as archive: archive.writestr("x", "y")
        path.with_suffix(".json").write_text(json.dumps({"seq": seq, "info": {"score": score, "mode": mode}}))
    assert runs(tmp_path)[0].best == 0.9


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(copied):
    (copied / "second").chmod(0)
    try: assert "first" in runs(copied).names()
    finally: (copied / "second").chmod(0o700)
