"The store on the day something else went wrong: bits flipped, disk full, process killed, file from somebody else."

import builtins
import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import trainkit.checkpoint as checkpoint
import trainkit.storage as storage
from trainkit.checkpoint import CheckpointError, Checkpoints, read_entry
from trainkit.storage import check_plain, clear_leftovers, diff_state, fault_of, read_checkpoint, write_atomically


def state_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    model = {f"layer{i}": torch.randn(4, 3, generator=g) for i in range(3)}
    return {"model": model, "step": seed, "lr": [0.1, 0.2], "name": "run", "flag": True, "none": None}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a)


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir())


# --- plain data ------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(codec="utf-8"))
    | st.binary(min_size=1)
    | st.sampled_from([torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), torch.arange(3), torch.zeros(2, 0)]),
    lambda c: (
        st.lists(c, max_size=3)
        | st.tuples(c, c)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3) | st.integers(), c, max_size=3)
    ),
    max_leaves=8,
)


@given(state=st.dictionaries(st.text(st.characters(codec="utf-8")), plain, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_plain_comes_back(tmp_path, state):
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    Checkpoints(folder).save(state, 1)
    loaded, _ = Checkpoints(folder).load()
    assert equal(loaded, state) or repr(loaded) == repr(state)  # NaN inside complex numbers


def test_everything_that_training_has_comes_back(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    opt = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.randn(2, 1, 5, 5)).sum().backward()
    opt.step()
    state = {
        "model": model.state_dict(),
        "opt": opt.state_dict(),
        "schedule": torch.optim.lr_scheduler.OneCycleLR(opt, 1.0, total_steps=9).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "rng": (torch.get_rng_state(), random.getstate()),
        "sparse": torch.eye(3).to_sparse(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "set": {1, "a"},
        "counter": Counter("aab"),
    }
    Checkpoints(tmp_path).save(state, 3)
    loaded, _ = Checkpoints(tmp_path).load()
    assert equal(
        {k: v for k, v in loaded.items() if k != "sparse"}, {k: v for k, v in check_plain(state).items() if k != "sparse"}
    )
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3)) and loaded["counter"] == {"a": 2, "b": 1}
    assert loaded["model"]._metadata == state["model"]._metadata
    nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).load_state_dict(loaded["model"])


class Enumish(int):
    pass


@pytest.mark.parametrize(
    "bad, why",
    [
        (print, "builtin_function_or_method"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (frozenset([1]), "builtins.frozenset"),
        (range(3), "builtins.range"),
        (deque([1]), "collections.deque"),
        (Path("x"), "PosixPath"),
        (Enumish(3), "Enumish"),
        (np.array(["a"]), "NumPy array of <U1"),
        (np.array([object()]), "NumPy array of object"),
        (np.datetime64("2020-01-01"), "numpy.datetime64"),
        (torch.empty(2, device="meta"), "meta device"),
        (nn.UninitializedParameter(), "UninitializedParameter"),
        ({(1, 2): 3}, "the key is a tuple"),
        ({True: 3}, "the key is a bool"),
        (torch.Generator(), "Generator"),
        (b"", "empty bytes"),
        (2**2040, "2039 bits"),
    ],
)
def test_what_is_not_plain_is_named_before_anything_is_written(tmp_path, bad, why):
    store = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match=r"cannot save players/g\[1\]/x.*" + why):
        store.save({"players": {"g": [0, {"x": bad}]}}, 1)
    assert files(tmp_path) == []


def test_a_state_that_contains_itself():
    loop = {"a": []}
    loop["a"].append(loop)
    with pytest.raises(TypeError, match="it contains itself"):
        check_plain(loop)
    twice = [1]
    assert check_plain([twice, twice]) == [[1], [1]]


def test_numpy_becomes_torch_and_python():
    out = check_plain(
        {"f": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True), "s": np.str_("x"), "a": np.eye(2), "z": np.array(3.0)}
    )
    assert (type(out["f"]), type(out["i"]), type(out["b"]), type(out["s"])) == (float, int, bool, str)
    assert torch.equal(out["a"], torch.eye(2, dtype=torch.float64)) and out["z"].shape == ()


def test_tensors_are_stored_bare_and_small(tmp_path):
    big = torch.randn(1000, 100)
    store = Checkpoints(tmp_path)
    entry = store.save({"row": big[3], "cols": big.t()[:2], "conj": torch.ones(2, dtype=torch.complex64).conj()}, 1)
    assert entry.size < 20_000
    loaded, _ = store.load()
    assert torch.equal(loaded["row"], big[3]) and torch.equal(loaded["cols"], big.t()[:2])
    weight = nn.Parameter(torch.randn(200, 200))
    entry = store.save({"a": weight, "b": weight, "c": {"tied": weight.data}}, 2)
    assert entry.size < 200 * 200 * 4 + 20_000  # tied weights are stored once
    assert not store.load()[0]["a"].requires_grad
    before = weight.detach().clone()
    check_plain({"a": weight})["a"].requires_grad_(False)
    assert weight.requires_grad and torch.equal(weight, before)


# --- the store -------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    store = Checkpoints(tmp_path / "new" / "run")
    assert len(store) == 0 and not (tmp_path / "new").exists()
    for step in (5, 10):
        entry = store.save(
            state_of(step), step, {"epoch": step, "metrics": {"loss": np.float32(0.5)}, "t": torch.tensor(2)}, b"png"
        )
    state, again = Checkpoints(tmp_path / "new" / "run").load("last")
    assert equal(state, state_of(10)) and again == entry
    assert (again.id, again.step, again.thumbnail, again.info["t"]) == ("10", 10, b"png", 2)
    assert equal(store.load(5)[0], state_of(5)) and equal(store.load("5")[0], state_of(5))


def test_a_second_save_at_a_step_gets_a_suffix(tmp_path):
    store = Checkpoints(tmp_path, keep=None)
    ids = [store.save({"n": n}, 7).id for n in range(3)]
    assert ids == ["7", "7-1", "7-2"]
    assert [store.load(i)[0]["n"] for i in ids] == [0, 1, 2] and store.load(7)[0]["n"] == 2


def test_last_is_the_last_saved_not_the_highest_step(tmp_path):
    store = Checkpoints(tmp_path)
    for step in (100, 500, 150):
        store.save({}, step)
    assert store.load("last")[1].step == 150 and [e.step for e in store] == [100, 500, 150]


@pytest.mark.parametrize("mode, best", [("min", "20"), ("max", "10"), (None, "20")])
def test_best_by_the_score_of_its_own_step(tmp_path, mode, best):
    store = Checkpoints(tmp_path, keep=2)
    for step, score in ((10, 0.9), (20, 0.1), (30, 0.5), (40, float("nan")), (50, None), (60, 0.2)):
        store.save({}, step, {"score": score, "mode": mode} if mode else {"score": score})
    assert store.best.id == store.load("best")[1].id == best
    assert [e.id for e in store] == [best, "50", "60"]
    assert Checkpoints(tmp_path).best.id == best  # also for the next process


def test_a_checkpoint_is_meant_by_its_entry_or_its_file(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path / "run")
    first, again, last = store.save(state_of(1), 5), store.save(state_of(2), 5), store.save(state_of(3), 6)
    monkeypatch.chdir(tmp_path)
    for entry, seed in (first, 1), (again, 2), (last, 3):
        for which in entry, entry.path, Path("run", entry.path.name), store.find(entry.id):
            assert store.find(which) == entry
            state, found = store.load(which)
            assert (state["step"], found) == (seed, entry)
    assert Checkpoints("run").load(first)[0]["step"] == 1  # the same folder by another name
    assert store.pin(first).pinned and store.find(first.path).pinned
    with pytest.raises(CheckpointError, match="is pinned"):
        store.delete(first)
    assert not store.pin(first.path, False).pinned
    store.delete(first)
    store.delete(last.path)
    assert [e.id for e in store] == ["5-1"]


def test_an_entry_or_a_file_that_is_not_there(tmp_path):
    store, other = Checkpoints(tmp_path / "a"), Checkpoints(tmp_path / "b")
    mine, foreign = store.save(state_of(1), 5), other.save(state_of(2), 5)
    for which in foreign, foreign.path, tmp_path / "a", mine.path.with_suffix(".json"), Path(mine.path.name):
        for act in store.find, store.load, store.pin, store.delete:
            with pytest.raises(CheckpointError, match="there is no checkpoint .*; there is: 5$"):
                act(which)
    mine.path.unlink()  # what somebody did by hand
    mine.path.with_suffix(".json").unlink()
    replaced = store.save(state_of(3), 5)
    assert replaced.path == mine.path
    with pytest.raises(CheckpointError, match="ckpt-000000005.pt is another one, saved later"):  # and not the other one's state
        store.load(mine)
    assert store.load(mine.path)[1] == replaced


def test_a_damaged_checkpoint_is_still_found_by_its_entry(tmp_path):
    store = Checkpoints(tmp_path)
    entry = store.save(state_of(), 5)
    entry.path.write_bytes(entry.path.read_bytes()[:100])
    entry.path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match="ckpt-000000005.pt") as raised:
        store.load(entry)
    assert "there is no checkpoint" not in str(raised.value)
    store.delete(store.find(entry))
    assert not files(tmp_path)


def test_retention_keeps_the_newest_the_best_and_the_pinned(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    store.save({}, 1, {"pinned": True})
    store.save({}, 2)
    store.pin(2)
    for step in range(3, 10):
        store.save({}, step)
    assert [e.id for e in store] == ["1", "2", "7", "8", "9"]
    with pytest.raises(CheckpointError, match="is pinned"):
        store.delete(2)
    store.pin(2, False)
    store.save({}, 10)
    assert [e.id for e in store] == ["1", "8", "9", "10"]
    store.delete("9")
    assert [e.id for e in store] == ["1", "8", "10"] and len(files(tmp_path)) == 6


def test_retention_of_several_best_and_of_each_so_many_steps(tmp_path):
    store = Checkpoints(tmp_path, keep=2, keep_best=2, keep_every=50)
    for step in range(10, 160, 10):
        store.save(state_of(step), step, {"score": abs(step - 75)})
    assert [e.id for e in store] == ["50", "70", "80", "100", "140", "150"]
    for name, value in (("keep_best", -1), ("keep_every", 0), ("keep_best", True), ("keep_every", 1.5)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Checkpoints(tmp_path, **{name: value})


def test_the_only_good_one_is_never_deleted(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match="is the only one .* that can be read; it is not deleted"):
        store.delete(store.save(state_of(1), 1))
    store.save(state_of(2), 2)
    for entry in store:
        if entry.step == 2:
            entry.path.write_bytes(b"damaged")
    store.keep = 1 + 1
    (tmp_path / "ckpt-000000003.pt").write_bytes(b"damaged, too")  # now the newest two can't be read
    store.retire()
    assert "1" in [e.id for e in store] and store.load("1")[1].step == 1
    store.save(state_of(4), 4)  # something newer is safely there
    assert "1" not in [e.id for e in store]


@pytest.mark.parametrize("keep", [0, 1, -1, True, 2.0, "3"])
def test_keep_is_at_least_two(tmp_path, keep):
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=keep)


def test_nothing_is_deleted_before_the_new_one_is_there(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        store.save({}, step)
    seen = []
    monkeypatch.setattr(checkpoint, "_remove", lambda path: seen.append((path.stem, len(files(tmp_path)))))
    store.save({}, 3)
    assert seen == [("ckpt-000000001", 6)]


def test_a_delete_that_fails_does_not_fail_the_save(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, keep=2)
    store.save({}, 1)
    store.save({}, 2)

    def refuse(path):
        raise PermissionError("no")

    monkeypatch.setattr(checkpoint, "_remove", refuse)
    assert store.save({}, 3).id == "3" and len(store) == 3


@pytest.mark.parametrize("which", ["nope", "12", 12, "best", "ckpt-000000012.pt", ""])
def test_unknown_ids_are_named_with_what_there_is(tmp_path, which):
    store = Checkpoints(tmp_path)
    store.save({}, 3)
    with pytest.raises(CheckpointError, match=rf"no checkpoint {which!r} in .*; there is: 3"):
        store.load(which)
    with pytest.raises(CheckpointError, match="no checkpoint 'last' in .*nowhere; there is: none"):
        Checkpoints(tmp_path / "nowhere").load()


@pytest.mark.parametrize("step", [-1, 1.0, True, "3", None])
def test_steps_are_numbers(tmp_path, step):
    with pytest.raises(ValueError, match="step >= 0"):
        Checkpoints(tmp_path).save({}, step)


@pytest.mark.parametrize("info", [{"a": {"b": print}}, {"a": [torch.ones(2)]}, {"a": {1: 2}}, {"a": Path(".")}])
def test_info_is_json_or_refused(tmp_path, info):
    with pytest.raises(TypeError, match="cannot save info/a"):
        Checkpoints(tmp_path).save({}, 1, info)
    assert files(tmp_path) == []


@pytest.mark.parametrize("content", [None, "", "{torn", "[]", "null", '{"seq": "x"}', '{"info": 3}'])
def test_a_lost_or_damaged_description_is_made_again(tmp_path, content):
    store = Checkpoints(tmp_path)
    entries = [store.save({}, step, {"score": step, "note": "été"}, b"png") for step in (1, 2)]
    side = entries[0].path.with_suffix(".json")
    side.unlink() if content is None else side.write_text(content)
    assert list(Checkpoints(tmp_path)) == entries
    assert json.loads(side.read_text())["info"]["note"] == "été"


def test_tables(tmp_path):
    store = Checkpoints(tmp_path)
    assert repr(store) == f"0 checkpoints in {tmp_path}"
    store.save({}, 1, {"note": "<b>bold</b>", "score": 0.25, "epoch": 3, "pinned": True}, b"\x89PNG")
    text, html = repr(store), store._repr_html_()
    assert "0.25" in text and "pinned best" in text and "<b>bold</b>" in text
    assert "&lt;b&gt;bold" in html and "<b>" not in html and "data:image/png;base64,iVBORw==" in html


@pytest.mark.parametrize("name", ["with space", "ünï-çødé", "a" * 120])
def test_odd_folders(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for folder in (tmp_path / name, tmp_path / "link" / name):
        Checkpoints(folder, keep=None).save({"a": 1}, 1)
    assert len(Checkpoints(tmp_path / name)) == 2


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    store = Checkpoints(tmp_path / "run")
    entry = store.save(state_of(1), 1, {"score": 1.0})
    return entry.path, entry.path.read_bytes(), store.load()[0]


def outcome(path, good):
    "How reading a damaged file ends."
    try:
        state = read_checkpoint(path)["state"]
    except CheckpointError as error:
        assert str(path) in str(error)
        return "refused"
    return "harmless" if equal(state, good) else "SILENT"


def test_no_flipped_bit_is_silent(saved):
    path, data, good = saved
    rng = random.Random(0)
    results = Counter()
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        results[outcome(path, good)] += 1
        path.with_suffix(".json").unlink(missing_ok=True)
        read_entry(path)  # a list of checkpoints never fails for a damaged one
    assert results["SILENT"] == 0 and results["refused"] > 200


def test_torch_alone_would_be_silent(saved):
    "What the checksums are for; should torch check them one day, this fails and fault_of may go."
    path, data, good = saved
    needle = good["model"]["layer1"].numpy().tobytes()
    damaged = bytearray(data)
    damaged[data.index(needle)] ^= 1
    path.write_bytes(damaged)
    assert not equal(torch.load(path, weights_only=True)["state"], good)
    assert "checksum" in fault_of(path)


def test_truncations_and_zeroed_pages(saved):
    path, data, good = saved
    sizes = [0, 1, *range(64, len(data), 97), len(data) - 1]
    for size in sizes:
        path.write_bytes(data[:size])
        assert outcome(path, good) == "refused"
    for start in range(0, len(data), 512):
        path.write_bytes(data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :])
        assert outcome(path, good) in ("refused", "harmless")
    path.write_bytes(data)
    assert outcome(path, good) == "harmless"


def zipped(**records):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, content)

    return write


WRONG = {
    "text": lambda p: p.write_text("hello"),
    "folder": lambda p: p.mkdir(),
    "other zip": zipped(a=b"x"),
    "bomb": lambda p: zipfile.ZipFile(p, "w", zipfile.ZIP_DEFLATED).writestr("archive/data/0", bytes(10**7)),
    "legacy": lambda p: torch.save({"state": {}}, p, _use_new_zipfile_serialization=False),
    "raw pickle": lambda p: p.write_bytes(pickle.dumps({"state": {}})),
    "somebody else's": lambda p: torch.save({"model": {}}, p),
    "a list": lambda p: torch.save([1, 2], p),
    "later format": lambda p: torch.save({"format": 99, "meta": "{}", "state": {}}, p),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "ckpt-000000001.pt"
    WRONG[kind](path)
    with pytest.raises(CheckpointError, match="ckpt-000000001.pt"):
        read_checkpoint(path)
    store = Checkpoints(tmp_path)
    assert repr(store) and store._repr_html_()  # listed as unreadable
    if kind == "folder":
        return  # it is no file, and not listed
    with pytest.raises(CheckpointError, match="can be read"), pytest.warns(UserWarning, match="ckpt-000000001.pt"):
        store.load()


def test_last_passes_over_damage_and_ids_do_not(tmp_path):
    store = Checkpoints(tmp_path)
    entries = [store.save(state_of(step), step, {"score": -step}) for step in (1, 2, 3)]
    for entry in entries[1:]:
        entry.path.write_bytes(entry.path.read_bytes()[:-30])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state, entry = store.load("last")
    assert equal(state, state_of(1)) and entry == entries[0]
    assert [("000000003.pt" in str(w.message), "000000002.pt" in str(w.message)) for w in said] == [(True, False), (False, True)]
    for which in (3, "3", "best"):
        with pytest.raises(CheckpointError, match="000000003.pt"):
            store.load(which)
    store.save(state_of(4), 4)
    assert store.load()[1].step == 4


class Payload:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(canary):
    touch = f"touch {canary}"
    yield Payload(os.system, touch)
    yield Payload(eval, f"open({str(canary)!r}, 'w')")
    yield Payload(exec, f"open({str(canary)!r}, 'w')")
    yield Payload(subprocess.check_call, ["touch", str(canary)])
    yield Payload(torch.hub.load, str(canary.parent), "x")
    yield OrderedDict(a=[{"b": Payload(os.system, touch)}])
    yield Payload(getattr, Payload(__import__, "os"), "system")


def renamed(path, change):
    "A checkpoint whose records are written anew: name and content go through `change`, checksums are right."
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in change(records):
            archive.writestr(name, content)


BOMB = b"\x80\x02cbuiltins\nbytearray\nJ" + (1_500_000_000).to_bytes(4, "little") + b"\x85R."
TABLES = {
    "other case": lambda r: [(n.replace("data.pkl", "DATA.PKL"), BOMB if n.endswith("data.pkl") else c) for n, c in r],
    "twice": lambda r: [("archive/data.pkl", BOMB), *r],
    "path": lambda r: [*r, ("archive/../../owned", b"x")],
    "two tops": lambda r: [*r, ("other/version", b"3")],
    "absolute": lambda r: [*r, ("/tmp/owned", b"x")],
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_contents_that_torch_does_not_write(tmp_path, table):
    path = Checkpoints(tmp_path).save(state_of(1), 1).path
    renamed(path, TABLES[table])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="records that torch doesn't write"):
        read_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path):
    path = Checkpoints(tmp_path).save(state_of(1), 1).path
    torch.save({"format": 1, "meta": "{}", "state": {"x": [torch.zeros(1).expand(10**9)]}}, path)
    with pytest.raises(CheckpointError, match="larger than what is stored of it"):
        read_checkpoint(path)
    store = Checkpoints(tmp_path / "own")
    store.save({"x": torch.zeros(1).expand(5), "y": torch.arange(9.0)[2:4]}, 1)
    assert equal(store.load()[0], {"x": torch.zeros(5), "y": torch.tensor([2.0, 3.0])})


def test_what_is_no_file_is_not_listed(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(state_of(1), 1)
    os.mkfifo(tmp_path / "ckpt-000000002.pt")
    (tmp_path / "ckpt-000000003.pt").mkdir()
    assert [e.id for e in store] == ["1"]


def test_swapped_and_foreign_files_are_refused(tmp_path):
    mine, other = Checkpoints(tmp_path / "a", keep=None), Checkpoints(tmp_path / "b", keep=None)
    for store, seed in ((mine, 0), (other, 10)):
        store.claim()
        for step in (1, 2, 3):
            store.save(state_of(seed + step), step)
    one, two = mine.find(1).path, mine.find(2).path
    for suffix in (".pt", ".json"):  # swapped, with what describes them
        keep = one.with_suffix(suffix).read_bytes()
        one.with_suffix(suffix).write_bytes(two.with_suffix(suffix).read_bytes())
        two.with_suffix(suffix).write_bytes(keep)
    for step in (1, 2):
        with pytest.raises(CheckpointError, match="was it renamed, or swapped"):
            mine.load(step)
    newest = mine.find(3).path
    newest.write_bytes(other.find(3).path.read_bytes())
    with pytest.raises(CheckpointError, match="belongs to another run"):
        mine.load(3)
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"), pytest.warns(UserWarning):
        mine.load()


@pytest.mark.parametrize("said", [
    '{"seq": 1e400}', "[" * 100_000, '{"time": 1e300}', '{"info": {"score": "high"}}', '{"seq": -5}', '{"info": {"score": -1e9}}',
    "5", "null", '{"seq": 0, "time": 1}', '{"seq": "x"}', '{"info": []}',
])  # fmt: skip
def test_an_edited_description_changes_nothing(tmp_path, said):
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        store.save(state_of(step), step, {"score": float(step)})
    store.find(2).path.with_suffix(".json").write_text(said)
    with pytest.warns(UserWarning, match="000000002.json can't be trusted and is made again"):
        entries = store.list()
    assert [(e.id, e.score) for e in entries] == [("1", 1.0), ("2", 2.0)] and repr(store) and store._repr_html_()
    assert store.best.id == "1" and store.load()[1].id == "2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.list()  # made again


@pytest.mark.parametrize("meta", [5, None, "[1]", '{"seq":1e999}', '{"seq":[]}', "[" * 100_000, '{"time": NaN}', '{"info": 3}'])
def test_a_checkpoint_that_describes_itself_badly_is_listed_as_unreadable(tmp_path, meta):
    torch.save({"format": 1, "meta": meta, "state": {}}, tmp_path / "ckpt-000000001.pt")
    store = Checkpoints(tmp_path)
    assert [(e.id, e.seq) for e in store] == [("1", -1)] and repr(store) and store._repr_html_()
    store.save(state_of(2), 2)
    assert store.load()[1].id == "2"


@pytest.mark.parametrize("owner", ["5", "[1]", '{"token":"x","time":"y"}', "[" * 100_000, "", '{"token": []}'])
def test_a_damaged_owner_file_is_nobodys_claim_or_anothers(tmp_path, owner):
    store = Checkpoints(tmp_path)
    store.claim()
    (tmp_path / "owner.json").write_text(owner)
    if '"token":"x"' in owner:
        with pytest.raises(CheckpointError, match="belongs to another learner"):
            store.save(state_of(1), 1)
    else:
        store.save(state_of(1), 1)
        assert store.load()[1].id == "1"


def repickled(path, code):
    "A checkpoint whose pickled part is replaced, checksums and all."
    torch.save({"format": 1, "meta": "{}", "state": {"a": torch.ones(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, code if name.endswith("data.pkl") else content)


STRANGE = [b"builtins\nbytearray", b"__builtin__\nbytearray", b"torch\nzeros", b"torch.nn\nLinear", b"numpy\nones",
           b"torch._utils\n_rebuild_wrapper_subclass", b"collections\nCounter"]  # fmt: skip


@pytest.mark.parametrize("called", STRANGE)
def test_a_name_that_no_plain_state_needs_is_not_called(tmp_path, called):
    "torch's weights_only would make a bytearray of two billion bytes for a file of one kilobyte."
    size = b"J" + (2_000_000_000).to_bytes(4, "little", signed=True) + b"\x85R."
    repickled(tmp_path / "ckpt-000000001.pt", b"\x80\x02c" + called + b"\n" + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"it would call {called.decode().replace(chr(10), ' ')}"):
        read_checkpoint(tmp_path / "ckpt-000000001.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert read_entry(tmp_path / "ckpt-000000001.pt").seq == -1


def test_hostile_files_do_not_run(tmp_path):
    canary = tmp_path / "owned"
    for i, payload in enumerate(hostile(canary)):
        for content in (
            payload,
            {"format": 1, "meta": "{}", "state": payload},
            {"format": payload, "meta": payload, "state": {}},
        ):
            path = tmp_path / f"ckpt-{i:09d}.pt"
            torch.save(content, path)
            with pytest.raises(CheckpointError, match="weights_only data need"):
                read_checkpoint(path)
            read_entry(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError):
            Checkpoints(tmp_path).load()
    assert not canary.exists()
    Payload(os.system, f"touch {canary}").call[0](f"touch {canary}")
    assert canary.exists()  # the payload would have worked


# --- writing goes wrong ----------------------------------------------------------------------------------------------


class Full:
    "A file on a disk that takes so many writes more."

    def __init__(self, file, budget, error):
        self.file, self.budget, self.error = file, budget, error

    def write(self, data):
        self.budget -= 1
        if self.budget < 0:
            raise self.error
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")])
def test_a_full_disk_at_every_write(tmp_path, monkeypatch, error):
    store = Checkpoints(tmp_path)
    store.save(state_of(1), 1)
    before = files(tmp_path)
    for budget in range(12):
        monkeypatch.setattr(storage, "open", lambda *a, n=budget: Full(builtins.open(*a), n, error), raising=False)
        with pytest.raises(CheckpointError, match=error.strerror):
            store.save(state_of(2), 2)
        assert files(tmp_path) == before
    monkeypatch.undo()
    assert equal(store.load()[0], state_of(1))
    store.save(state_of(2), 2)
    assert equal(store.load()[0], state_of(2))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_other_refusals_of_the_system(tmp_path, monkeypatch, call):
    store = Checkpoints(tmp_path)
    store.save(state_of(1), 1)
    before = files(tmp_path)

    def refuse(*args):
        raise OSError(errno.EXDEV, "refused")

    monkeypatch.setattr(checkpoint.os, call, refuse)
    with pytest.raises(CheckpointError, match=r"could not write .*ckpt-000000002.pt: .*refused"):
        store.save(state_of(2), 2)
    monkeypatch.undo()
    assert files(tmp_path) == before and equal(store.load()[0], state_of(1))


def test_an_interrupt_while_writing(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    write_atomically(tmp_path / "x", lambda file: file.write(b"whole"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", interrupted)
    assert files(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"whole"


def test_a_real_file_size_limit(tmp_path):
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from pathlib import Path
        from trainkit.checkpoint import CheckpointError, Checkpoints
        store = Checkpoints(sys.argv[1])
        store.save({"x": torch.zeros(100)}, 1)
        before = sorted(p.name for p in Path(sys.argv[1]).iterdir())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.save({"x": torch.zeros(100_000)}, 2)
        except CheckpointError as error:
            assert "File too large" in str(error), error
        else:
            raise SystemExit("no error")
        assert sorted(p.name for p in Path(sys.argv[1]).iterdir()) == before
        assert store.load()[1].step == 1
        print("survived")
        """
    )
    root = Path(checkpoint.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=root)
    assert done.stdout == "survived\n", done.stderr


def test_a_folder_that_is_read_only():
    "In a child that is nobody, since root may write anywhere."
    folder = Path(tempfile.mkdtemp())
    Checkpoints(folder).save(state_of(1), 1)
    os.chmod(folder, 0o555)
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            store = Checkpoints(folder)
            loaded = equal(store.load()[0], state_of(1))
            try:
                store.save(state_of(2), 2)
            except CheckpointError as error:
                os.write(writer, f"{loaded} {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"True could not write" in (said := os.read(reader, 1000)) and b"Permission denied" in said
    assert files(folder) == ["ckpt-000000001.json", "ckpt-000000001.pt"]
    os.close(reader), os.close(writer)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not make the folder"):
        Checkpoints(tmp_path / "file" / "run").save({}, 1)


# --- killed ----------------------------------------------------------------------------------------------------------


def keep_saving(folder, tell, step):
    "A child that saves for ever and tells each step that is safely saved."
    store = Checkpoints(folder, keep=2)
    while True:
        step += 1
        store.save(state_of(step), step)
        os.write(tell, step.to_bytes(4, "big"))


def test_killed_at_any_moment(tmp_path):
    rng, promised, torn = random.Random(1), 0, 0
    for kill in range(100):
        if kill >= 15 and torn >= 3:  # a slow disk is met more often than a fast one
            break
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                keep_saving(tmp_path, writer, promised)
            finally:
                os._exit(1)
        os.close(writer)
        first = os.read(reader, 4)  # it has begun
        time.sleep(rng.uniform(0.001, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        told = first + os.read(reader, 1 << 16)
        os.close(reader)
        promised = int.from_bytes(told[-4:], "big")
        torn += any(name.startswith(".tmp") for name in files(tmp_path))
        store = Checkpoints(tmp_path, keep=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is passed over
            state, entry = store.load()
        assert entry.step >= promised and equal(state, state_of(entry.step))
        assert not any(name.startswith(".tmp") for name in files(tmp_path))
        promised = entry.step
    assert torn >= 3, "the kills didn't meet a write; the test proves nothing"


def test_leftovers_of_the_living_stay(tmp_path):
    old = tmp_path / f".tmp-{os.getpid()}-0"
    names = [old, tmp_path / f".tmp-{os.getpid()}-1", tmp_path / f".tmp-{os.getppid()}-0", tmp_path / ".tmp-x-0"]
    for path in names:
        path.touch()
    os.utime(old, (1, 1))  # our number, but from before we began
    assert clear_leftovers(tmp_path) == 1 and files(tmp_path) == sorted(p.name for p in names[1:])


# --- differences -----------------------------------------------------------------------------------------------------


def test_diff_of_models_lists_every_difference():
    was = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).state_dict()
    now = nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 1).half(), nn.BatchNorm1d(1)).state_dict()
    lines = diff_state({"model": was}, {"model": now})
    assert "model/0.weight: shape (3, 2) in the checkpoint, (4, 2) here" in lines
    assert "model/1.bias: dtype torch.float32 in the checkpoint, torch.float16 here" in lines
    assert "model/2.running_mean: missing from the checkpoint" in lines
    assert len(lines) == 2 + 2 + 5
    assert "model/2.weight: only in the checkpoint" in diff_state({"model": now}, {"model": was})


def test_diff_of_other_kinds():
    assert diff_state({"a": None, "b": 1}, {"a": 1.0, "b": 2.5}) == ["a: a None in the checkpoint, a number here"]
    assert diff_state([1, 2], [1], "groups") == ["groups: 2 items in the checkpoint, 1 here"]
    assert diff_state({"a": torch.ones(1)}, {"a": 1.0}) == ["a: a tensor in the checkpoint, a number here"]
    assert diff_state({"a": [{"b": "x"}]}, {"a": [{"b": 3}]}) == ["a[0]/b: a str in the checkpoint, a number here"]


@given(plain)
@settings(max_examples=50)
def test_nothing_differs_from_itself(state):
    assert diff_state(state, state) == [] == diff_state(check_plain(state), state)


@pytest.mark.parametrize("owner", ["", "5", None, '{"token"'])
def test_a_lost_owner_file_is_no_other_run(tmp_path, owner):
    store = Checkpoints(tmp_path)
    store.claim()
    for step in (1, 2):
        store.save(state_of(step), step)
    path = tmp_path / "owner.json"
    path.unlink() if owner is None else path.write_text(owner)
    later = Checkpoints(tmp_path)
    assert later.load()[1].id == "2"
    later.claim()
    later.save(state_of(3), 3)
    assert [later.load(step)[1].id for step in (1, 2, 3)] == ["1", "2", "3"]


def test_a_checkpoint_that_somebody_took_away_is_missed(tmp_path):
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        store.save(state_of(step), step)
    store.find(2).path.unlink()
    with pytest.warns(UserWarning, match="ckpt-000000002.json describe checkpoints that are gone"):
        assert store.load()[1].id == "1"


# --- retention ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    "Saves a checkpoint with parts beside it: those of one that was converted."
    from trainkit.converter import convert

    made = Checkpoints(tmp_path_factory.mktemp("apart")).save({"players": {"model": torch.ones(3)}}, 0).path
    convert(made, "sharded")
    state = read_checkpoint(made, whole=False)["state"]

    def save(store, step, info=None):
        folder = store.folder / f"ckpt-{step:09d}.parts"
        shutil.copytree(made.with_suffix(".parts"), folder)
        return store.save({**state, "parts": {**state["parts"], "folder": folder.name}}, step, info)

    return save


def break_file(path):
    path.write_bytes(path.read_bytes()[:-5])


HARMS = {
    "nothing": lambda path: None,
    "file": break_file,
    "part": lambda path: break_file(path.with_suffix(".parts") / "__0_0.distcp"),
    "lost part": lambda path: (path.with_suffix(".parts") / ".metadata").unlink(),
    "parts": lambda path: shutil.rmtree(path.with_suffix(".parts")),
    "renamed": lambda path: path.rename(path.with_name(f"ckpt-0000000{50 + int(path.stem[-1])}.pt")),
}


def restorable(store):
    "Ids of the checkpoints that can be loaded, as the one who restores finds out."
    good = []
    for entry in store:
        with contextlib.suppress(CheckpointError):
            store.load(entry)
            good.append(entry.id)
    return good


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([*HARMS]), st.booleans()), min_size=3, max_size=6), st.integers(2, 3))
def test_after_any_retention_something_can_be_restored(in_parts, saves, keep):
    "Whichever checkpoints are damaged, and in which of their files: retention leaves one that was good, if one was."
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = Checkpoints(folder, keep=None)
        for step, (apart, harm, _) in enumerate(saves):
            entry = in_parts(store, step) if apart else store.save({"players": {}}, step)
            if apart or harm in ("nothing", "file", "renamed"):
                HARMS[harm](entry.path)
        good = restorable(store)
        store.keep, store.keep_best, newest = keep, 0, store.list()[-keep:]
        store.retire()
        left = restorable(store)
        assert {*left} <= {*good} and (left or not good)
        assert len(store) == (keep if {e.id for e in newest} & {*good} else len(saves))
        for entry, (*_, delete) in zip(list(store), saves):
            with contextlib.suppress(CheckpointError):
                if delete:
                    store.delete(entry)
        assert restorable(store) or not good


@pytest.mark.parametrize("harm", ["part", "lost part", "parts"])
def test_what_lies_in_parts_counts_only_with_its_parts(tmp_path, in_parts, harm):
    "The newest ones have lost a part: the last good one stays, and isn't deleted by hand either."
    store = Checkpoints(tmp_path, keep=None)
    store.save({}, 1)
    whole = in_parts(store, 7)
    assert whole.size == sum(p.stat().st_size for p in (whole.path, *whole.path.with_suffix(".parts").iterdir()))
    store.delete("7")
    for step in 2, 3:
        HARMS[harm](in_parts(store, step).path)
    store.keep = 2
    store.retire()
    assert [e.id for e in store] == ["1", "2", "3"] and restorable(store) == ["1"]
    with pytest.raises(CheckpointError, match="the only one in .* that can be read"):
        store.delete("1")
    store.save({}, 4)
    assert [e.id for e in store] == ["3", "4"]


def test_a_new_one_whose_parts_did_not_get_there_costs_no_old_one(tmp_path, in_parts):
    "The disk has taken the file, and not the parts that it speaks of; the one before has lost a part since."
    store = Checkpoints(tmp_path, keep=2)
    first, second = in_parts(store, 1), in_parts(store, 2)
    HARMS["part"](second.path)
    store.save({**read_checkpoint(first.path, whole=False)["state"], "parts": {"folder": "gone.parts", "files": {}}}, 3)
    assert restorable(store) == ["1"]
