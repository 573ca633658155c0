"What a run was made with: what the file says, when it is written, and that writing it changes nothing."

import importlib.metadata
import json
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from ways import same_weights

from trainkit import provenance
from trainkit.callback import Callback, On
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player
from trainkit.provenance import (
    WHOLE,
    as_plain,
    code_here,
    content_of,
    digest,
    git,
    installed,
    record_of,
    repository_of,
    versions,
    without_secrets,
)
from trainkit.runs import runs, sessions_of

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def learner(run=None, rows=24, lr=0.1, cbs=(), **kw):
    torch.manual_seed(0)
    dls = {"train": TensorDataset(X[:rows], Y[:rows]), "valid": TensorDataset(X, Y)}
    return Learner(nn.Linear(3, 1), dls, "mse", OptimBuilder("sgd", lr=lr, momentum=0.5), batch_size=8, front="none", run=run,
                   cbs=cbs, **kw)  # fmt: skip


@pytest.fixture(autouse=True)
def still(monkeypatch):
    "Somebody may be editing this repository meanwhile."
    monkeypatch.setattr(provenance, "repository_of", lambda folder: {})


# ---- the file

def test_the_first_fit_writes_it_and_says_what_the_code_says(tmp_path):
    learn = learner(tmp_path / "run", seed=3, cbs=On("after_epoch", lambda learn: None))
    assert not (tmp_path / "run").exists()
    learn.fit(1)
    session, = json.loads((tmp_path / "run" / "identity.json").read_text())["sessions"]
    said = session["configuration"]
    assert (said["seed"], said["batch_size"], said["precision"]) == (3, 8, "fp32")
    assert (said["model/optimizer"], said["model/lr"], said["model/momentum"], said["model/parameters"]) == ("sgd", 0.1, 0.5, 4)
    assert "AutoSave" in said["callbacks"] and "After" not in said["callbacks"]
    assert session["data"]["training data"] == "24 samples in 3 batches of 8" and session["step"] == 0
    assert session["data"]["valid data"] == "24 samples in 3 batches of 8"
    assert torch.__version__.startswith(session["versions"]["torch"])  # which may say more: +cu130
    assert "pytest" in session["versions"]
    assert session["machine"]["device"] == "cpu" and session["losses"]["model's loss"].startswith("torch.nn.functional.mse_loss")
    assert runs(tmp_path)["run"].identity == {k: v for k, v in session.items() if isinstance(v, dict)}


def test_a_rate_that_warms_up_is_told_as_it_was_asked_for(tmp_path):
    torch.manual_seed(0)
    plan = OptimBuilder("adam", lr=0.01, schedule="cosine", warmup=2, betas=(0.5, 0.9))
    player = Player("a", nn.Linear(3, 1), "mse", opt=plan, every=2)
    learn = Learner([player], TensorDataset(X, Y), front="none", run=tmp_path / "run")
    learn.fit(steps=9)
    said = runs(tmp_path)["run"].identity["configuration"]
    assert (said["a/lr"], said["a/betas"], said["a/schedule"], said["a/every"]) == (0.01, [0.5, 0.9], "cosine", 2)


def test_another_session_adds_a_record_only_if_something_is_different(tmp_path):
    learner(tmp_path / "run").fit(1)
    before = (tmp_path / "run" / "identity.json").read_bytes()
    again = learner(tmp_path / "run")
    again.restore("last")
    again.fit(1)
    again.fit(1)
    assert (tmp_path / "run" / "identity.json").read_bytes() == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = learner(tmp_path / "run", rows=16)
        other.restore("last")
    other.fit(1)
    first, second = sessions_of(tmp_path / "run")
    assert (first["step"], second["step"]) == (0, 9)
    assert first["data"]["content of training data"] != second["data"]["content of training data"]
    assert first["data"]["content of valid data"] == second["data"]["content of valid data"]


def test_a_branch_has_its_own(tmp_path):
    learn = learner(tmp_path / "run", keep="all")
    learn.fit(1)
    learn.branch("last", "other")
    learn.fit(1)
    both = runs(tmp_path)
    assert both["run"].identity == both["other"].identity and both["other"].sessions[0]["step"] == 3


def test_without_a_folder_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(provenance, "record_of", lambda learn: pytest.fail("asked"))
    learner().fit(1)


def test_what_cannot_be_found_out_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    def nobody_knows(): raise ZeroDivisionError("nobody knows")

    monkeypatch.setattr(provenance, "versions", nobody_knows)
    with pytest.warns(UserWarning, match="can't be written down, the run goes on: nobody knows"):
        (learn := learner(tmp_path / "run")).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit(1)
    assert learn.step == 6 and sessions_of(tmp_path / "run") == []


def test_a_damaged_file_is_begun_anew(tmp_path):
    learner(tmp_path / "run").fit(1)
    for garbage in (b"{", b"[]", b'{"sessions": 3}', b"\xff\xfe"):
        (tmp_path / "run" / "identity.json").write_bytes(garbage)
        assert sessions_of(tmp_path / "run") == [] and runs(tmp_path)["run"].identity == {}
        learn = learner(tmp_path / "run")
        learn.restore("last")
        learn.fit(1)
        assert len(sessions_of(tmp_path / "run")) == 1


def test_it_changes_nothing(tmp_path):
    found = []
    for run in (None, tmp_path / "run"):
        learn = learner(run)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        learn.fit(2)
        found.append((learn, random.random(), float(np.random.rand()), torch.rand(2).tolist()))
    same_weights(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_it_is_plain_json_whatever_it_holds(tmp_path):
    plan = OptimBuilder("sgd", lr=torch.tensor(0.1), params="no_decay", schedule=lambda update, total: 1.0)
    learn = Learner(nn.Linear(3, 1), TensorDataset(X, Y), lambda p, t: (p - t).square().mean(), plan, front="none")
    json.dumps(record_of(learn), allow_nan=False)


# ---- data

def test_equal_data_has_equal_contents_and_other_data_other_ones():
    def data(x): return TensorDataset(x, Y)

    assert content_of(data(X)) == content_of(data(X.clone())) == content_of(data(X[:, [0, 1, 2]]))
    one = X.clone()
    one[17, 1] += 1e-6
    others = [data(one), data(X.flip(0)), data(X.double()), Subset(data(X), [1, 2]), Subset(data(X), [2, 1]),
              ConcatDataset([data(X), data(X)]), X.numpy(), [1, 2], [2, 1], {"a": X}, {"b": X}]  # fmt: skip
    assert len({content_of(o) for o in [data(X), *others]}) == 12


@given(st.integers(0, 23), st.integers(0, 2),
       st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]))
@settings(max_examples=40, deadline=None)
def test_each_value_of_a_small_array_counts(row, column, dtype):
    a = torch.zeros(24, 3, dtype=dtype)
    b = a.clone()
    b[row, column] = 1
    assert content_of(TensorDataset(a)) != content_of(TensorDataset(b)) == content_of(TensorDataset(b.clone()))


def test_of_a_large_array_a_part_is_looked_at(monkeypatch):
    monkeypatch.setattr(provenance, "WHOLE", 1000)
    monkeypatch.setattr(provenance, "ROWS", 50)
    a = np.zeros((1000, 4))
    first, last, unseen = (a.copy() for _ in range(3))
    first[0], last[-1], unseen[1] = 1, 1, 1
    assert content_of(a) == content_of(unseen) and len({content_of(o) for o in (a, first, last, a[:-1])}) == 4
    assert content_of(torch.from_numpy(a)) == content_of(torch.from_numpy(unseen)) != content_of(torch.from_numpy(last))
    assert WHOLE == 1 << 26


def test_no_sample_is_asked_for_and_nothing_else_than_data_is_seen():
    class Wild(Dataset):
        def __init__(self): self.x, self.count, self.folder, self.f = X, 0, "/home/me", lambda: 3
        def __getitem__(self, i): pytest.fail("asked for a sample")
        def __len__(self): return 24

    class Stream(IterableDataset):
        def __iter__(self): pytest.fail("iterated")

    one, other = Wild(), Wild()
    other.count, other.folder, other.f = 7, "/elsewhere", print
    assert content_of(one) == content_of(other) != ""
    assert content_of(Stream()) == content_of(iter([])) == content_of(object()) == ""
    learn = Learner(nn.Linear(3, 1), DataLoader(Stream(), batch_size=2), "mse", front="none")
    assert record_of(learn)["data"] == {"training data": "a DataLoader"}


def test_a_circle_of_data_sets_ends():
    class Circle(Dataset):
        def __init__(self): self.x, self.me = X, self

    assert content_of(Circle())


# ---- code and versions

@pytest.fixture
def repository(tmp_path):
    def do(*words):
        said = subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], capture_output=True)
        assert said.returncode == 0, said.stderr
        return said.stdout.decode().strip()

    do("init", "-b", "main")
    (tmp_path / "a.py").write_text("1")
    do("add", "a.py")
    do("commit", "-m", "one")
    return tmp_path, do


def test_commit_branch_and_whether_something_has_changed(repository):
    folder, do = repository
    clean = {"commit": do("rev-parse", "HEAD"), "branch": "main", "dirty": False}
    (folder / "b.py").write_text("untracked")
    (folder / "deep").mkdir()
    assert repository_of(folder) == repository_of(folder / "deep") == clean
    seen = []
    for text in "2", "3":
        (folder / "a.py").write_text(text)
        seen.append(repository_of(folder))
    assert [s["dirty"] for s in seen] == [True, True] and seen[0]["changes"] != seen[1]["changes"]
    do("add", "a.py")
    assert repository_of(folder) == seen[1]  # staged or not, the same code
    do("checkout", "-q", "-f", "--detach")
    assert repository_of(folder) == {**clean, "branch": "(detached)"}


def test_no_repository_no_git_and_no_answer(tmp_path, monkeypatch, repository):
    folder, _ = repository
    assert git(tmp_path.parent / "nowhere", "status") == b"" and repository_of(tmp_path.parent / "nowhere") == {}
    assert git(folder, "status", seconds=0) == b""
    monkeypatch.setenv("PATH", "")
    assert repository_of(folder) == {}


def test_the_program_and_its_own_repository(repository, tmp_path_factory):
    folder, _ = repository
    (folder / "train.py").write_text("import json; from trainkit.provenance import code_here; print(json.dumps(code_here()))")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    said = subprocess.run([sys.executable, folder / "train.py"], cwd=elsewhere, capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    assert found["program"] == {"file": "train.py", "code": digest((folder / "train.py").read_bytes())}
    assert found["git"]["branch"] == "main"


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_DIFF_OPTS", "GIT_EXTERNAL_DIFF"])
def test_the_folder_says_which_repository_and_nobody_else(repository, tmp_path_factory, monkeypatch, name):
    folder, _ = repository
    other = tmp_path_factory.mktemp("other")
    subprocess.run(["git", "init", "-b", "wrong", other], capture_output=True, check=True)
    (folder / "a.py").write_text("2")
    found = repository_of(folder)
    value = {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other / "index", "GIT_DIFF_OPTS": "-u0"}
    monkeypatch.setenv(name, str(value.get(name, "echo")))
    assert found["branch"] == "main" and "changes" in found and repository_of(folder) == found
    assert repository_of(other.parent) == {}


@pytest.mark.parametrize("line", ["color.ui always", "diff.external echo", "core.abbrev 5"])
def test_a_persons_configuration_makes_no_other_diff(repository, line):
    folder, do = repository
    (folder / ".gitattributes").write_text("*.py diff=loud")
    (folder / "a.py").write_text("2")
    found = repository_of(folder)
    do("config", *line.split(" "))
    do("config", "diff.loud.textconv", "echo")
    assert "changes" in found and repository_of(folder) == found


def test_a_diff_that_fails_has_no_digest(repository, monkeypatch):
    folder, _ = repository
    (folder / "a.py").write_text("2")
    monkeypatch.setattr(provenance, "git", lambda folder, *words, git=git: git(folder, *words) if words[0] != "diff" else b"")
    assert {**repository_of(folder), "commit": ""} == {"commit": "", "branch": "main", "dirty": True, "changed files": 1}


def test_the_changes_of_a_picture_count(repository):
    folder, do = repository
    (folder / "a.png").write_bytes(b"\0one")
    do("add", "a.png")
    do("commit", "-m", "two")
    seen = []
    for content in b"\0two", b"\0six":
        (folder / "a.png").write_bytes(content)
        seen.append(repository_of(folder)["changes"])
    assert seen[0] != seen[1]


def test_the_notebook_as_its_server_calls_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "digits.ipynb"))
    assert code_here()["program"] == {"file": "digits.ipynb"}  # which isn't there
    cells = [{"cell_type": "code", "source": ["a = 1\n", "b"], "outputs": [1]}, {"cell_type": "markdown", "source": "why"}]

    def digest_with(cells):
        (tmp_path / "digits.ipynb").write_text(json.dumps({"cells": cells}))
        return code_here()["program"]["code"]

    first = digest_with(cells)
    assert first == digest_with([cells[0] | {"source": "a = 1\nb", "outputs": []}, cells[1] | {"source": "because"}])
    assert len({first, digest_with(cells[1:]), digest_with([cells[0] | {"source": "a = 2"}])}) == 3
    monkeypatch.setenv("JPY_SESSION_NAME", "a-uuid")
    assert "program" not in code_here()


def test_versions_of_what_is_loaded(monkeypatch):
    class Module: __version__ = "7.7"
    monkeypatch.setitem(sys.modules, "odd_one", Module)
    monkeypatch.setitem(sys.modules, "mute_one", object())
    found = versions()
    assert found["odd_one"] == "7.7" and "mute_one" not in found and "json" not in found
    assert found["numpy"] == np.__version__ and [*found][0] == "python"


def test_an_installed_version_is_what_importlib_says():
    for distribution in list(importlib.metadata.distributions())[:150]:
        name = distribution.metadata["Name"]
        assert installed(name) == importlib.metadata.version(name), name
    assert installed("no-such-package") is None and installed("") is None


# ---- what must not stand there

@pytest.mark.parametrize("said", ["api_key='{}'", 'token="{}"', "password={}", "hf_token: {}", "'client_secret': '{}'",
                                  "uri='postgres://me:{}@host:5432/x'", "AWS_SECRET_ACCESS_KEY={}", "X-Api-Key: {}"])  # fmt: skip
def test_what_calls_itself_a_secret_is_taken_out(tmp_path, said):
    class Notify(Callback):
        def __repr__(self): return f"Notify({said.format('hunter2')}, every=3)"

    learner(tmp_path / "run", cbs=Notify()).fit(1)
    text = (tmp_path / "run" / "identity.json").read_text()
    assert "hunter2" not in text and "Notify(" in text and "every=3)" in text


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_only_what_calls_itself_a_secret_is_taken_out(text):
    if not any(word in text.lower() for word in ("token", "pass", "secret", "key", "://")): assert without_secrets(text) == text


def test_values_under_a_name_of_a_secret():
    harmless = {"max_tokens": 5, "pad_token": "<pad>", "token": ""}
    found = as_plain({"opt/API_KEY": "x", "password": "x", **harmless, "deep": {"secret": [1]}})
    assert found == {"opt/API_KEY": "…", "password": "…", **harmless, "deep": {"secret": "…"}}


# ---- seeds

def test_a_run_without_a_seed_says_where_it_began(tmp_path):
    torch.manual_seed(77)
    learn = Learner(nn.Linear(3, 1), TensorDataset(X, Y), "mse", "sgd", front="none", run=tmp_path / "run")
    learn.fit(1)
    torch.manual_seed(78)
    again = Learner(nn.Linear(3, 1), TensorDataset(X, Y), "mse", "sgd", front="none", run=tmp_path / "run")
    again.restore("last")
    again.fit(1)
    session, = sessions_of(tmp_path / "run")  # whoever goes on has the old random state, and so its seed
    assert session["configuration"]["initial seed"] == 77 and "seed" not in session["configuration"]
    assert "initial seed" not in record_of(learner(seed=3))["configuration"]


def test_another_activation_is_another_architecture():
    def made(kind): return record_of(Learner(nn.Sequential(nn.Linear(3, 1), kind()), TensorDataset(X, Y), "mse", front="none"))

    relu, again, tanh = made(nn.ReLU), made(nn.ReLU), made(nn.Tanh)
    assert relu["architecture"] == again["architecture"] != tanh["architecture"] and [*relu["architecture"]] == ["model"]
