"The command line, as a shell runs it."

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from trainkit.checkpoint import Checkpoints
from trainkit.cli import app, main
from trainkit.commands import COMMANDS
from trainkit.control import LOOKS
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.mailbox import read_status
from trainkit.optim import OptimBuilder
from trainkit.runs import runs, sessions_of
from trainkit.settings import SettingsError, load_settings

ROOT = Path(__file__).parent.parent
X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
SCRIPT = """
import sys, torch
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
x = torch.ones(8, 3)
opt = OptimBuilder("sgd", lr=0.1, momentum=0.5)
learn = Learner(torch.nn.Linear(3, 1), (x, x[:, :1]), "mse", opt, batch_size=2, run="a", seed=1)
learn.fit(1)
print("argument:", *sys.argv[1:])
sys.exit(7)
"""


def call(*words, cwd=None, **env):
    "Run the command line in a process of its own."
    found = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-m", "trainkit", *map(str, words)], cwd=cwd, env=found, capture_output=True,
                          text=True, timeout=300)  # fmt: skip


def here(*words, cwd):
    "The same in this process, which saves the second that torch takes to load."
    before = os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main([*map(str, words)])
    finally:
        os.chdir(before)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A folder with two runs, and a branch, in `runs`."
    root = tmp_path_factory.mktemp("project")

    def learner(name, lr):
        torch.manual_seed(0)
        dls = {"train": TensorDataset(X, X.sum(1, keepdim=True)), "valid": TensorDataset(X, X.sum(1, keepdim=True))}
        return Learner(nn.Linear(3, 1), dls, "mse", OptimBuilder("sgd", lr=lr), batch_size=8, front="none",
                       run=root / "runs" / name, keep="all")  # fmt: skip

    learner("slow", 0.01).fit(2)
    learner("quick", 0.1).fit(3)
    other = learner("slow", 0.01)
    other.restore(3)
    other.branch(3, "warmer")
    return root


def test_runs_lists_what_the_library_lists(project):
    done = call("runs", cwd=project)
    assert done.returncode == 0 and done.stdout.rstrip() == str(runs(project / "runs")).replace(str(project) + "/", "")
    rows = [json.loads(line) for line in here("runs", project / "runs", "--json", cwd=project).stdout.splitlines()]
    assert [(row["name"], row["step"]) for row in rows] == [("quick", 9), ("slow", 6), ("warmer", 3)]
    assert here("runs", "--tree", cwd=project).stdout.splitlines()[2].startswith("└─ warmer")
    (project / "none").mkdir()
    assert here("runs", project / "none", "--json", cwd=project).stdout == "", "no runs are no lines"
    nothing = here("runs", project / "nowhere", cwd=project)
    assert nothing.returncode == 3 and "there is no such folder" in nothing.stdout


def test_show_says_how_a_run_stands(project):
    text = call("show", "quick", cwd=project).stdout
    losses = History.read(project / "runs" / "quick" / "history.jsonl").scalars["valid/loss"][1]
    assert f"valid/loss  {losses[-1]:.4g} (best {losses.min():.4g} at" in text and "finished  step 9" in text
    assert "model/lr 0.1" in text and "checkpoint" in text
    found = json.loads(here("show", project / "runs" / "quick", "--json", cwd=project).stdout)
    assert found["step"] == 9 and found["sessions"] == sessions_of(project / "runs" / "quick")
    assert found["series"]["valid/loss"]["best"] == losses.min() and found["status"]["state"] == "finished"
    assert "a branch of slow/3" in here("show", "warmer", cwd=project).stdout


@pytest.mark.parametrize("words", [("show", "quick", "--html", "no.html", "--json"), ("runs", "--tree", "--json")])
def test_two_answers_at_once_are_refused(project, words):
    done = here(*words, cwd=project)
    assert done.returncode == 2 and " or --json: " in done.stderr and not done.stdout and not (project / "no.html").exists()


@pytest.mark.parametrize("words", [("show", "quick", "--html", "no.x"), ("compare", "quick", "slow", "--plot", "no.x")])
def test_what_draws_says_what_it_lacks(project, words, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = here(*words, cwd=project)
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr and not done.stdout
    assert not (project / "no.x").exists()


def test_a_run_whose_history_is_lost_is_shown_without_it(project, tmp_path):
    shutil.copytree(project / "runs" / "quick", run := tmp_path / "runs" / "lost")
    (run / "history.jsonl").write_bytes(b"\xff\x00 garbage\n")
    text, told = here("show", "lost", cwd=tmp_path), here("show", "lost", "--json", cwd=tmp_path)
    assert text.returncode == told.returncode == 0 and not text.stderr, text.stderr
    for said in ("history.jsonl can't be read", "model/lr 0.1", "3 checkpoints in", "finished  step"): assert said in text.stdout
    assert json.loads(told.stdout)["series"] == {} and "history.jsonl" in json.loads(told.stdout)["fault"]
    (run / "history.jsonl").unlink()
    (run / "history.jsonl").mkdir()
    assert "history.jsonl: Is a directory" in here("show", "lost", cwd=tmp_path).stdout
    assert here("show", "lost", "--html", "deep/lost.html", cwd=tmp_path).returncode == 0
    page = (tmp_path / "deep" / "lost.html").read_text()
    assert "Is a directory" in page and "model/lr" in page


def test_a_warning_is_one_line_and_told_once(project, tmp_path):
    shutil.copytree(project / "runs" / "quick", run := tmp_path / "runs" / "torn")
    with open(run / "history.jsonl", "a") as file: file.write("torn{\n")
    done = call("show", "torn", cwd=tmp_path)
    assert done.returncode == 0 and "valid/loss" in done.stdout
    where = os.path.join("runs", "torn", "history.jsonl")
    lines = (run / "history.jsonl").read_text().count("\n")
    assert done.stderr == f"warning: {where}: left out 1 unreadable of {lines} lines: {lines}\n"


@pytest.mark.parametrize("words", [("compare", "slow", "quick", "--plot"), ("show", "slow", "--html"),
                                   ("export", "slow", "--to", "safetensors", "--out")])  # fmt: skip
def test_a_files_folder_is_made_and_a_folder_is_no_file(project, words):
    name = f"new-{words[0]}/deep/a.png"
    done = here(*words, name, cwd=project)
    assert done.returncode == 0 and (project / name).stat().st_size > 100, done.stderr
    before = sorted(project.rglob("*"))
    refused = here(*words, "runs", cwd=project)
    assert refused.returncode == 2 and refused.stderr == "runs is a folder: say the name of a file in it\n"
    assert sorted(project.rglob("*")) == before


def test_compare_names_what_there_is(project):
    done = here("compare", "slow", "quick", "--names", "vlid/*", cwd=project)
    assert done.returncode == 2 and "there are: valid/loss" in done.stderr and "train/loss" in done.stderr


def test_compare_and_its_picture(project):
    done = call("compare", "slow", "quick", "--plot", "both.png", "--names", "valid/*", cwd=project)
    assert "model/lr    0.01" in done.stdout and "train/loss" not in done.stdout and done.returncode == 0, done.stderr
    assert np.asarray(Image.open(project / "both.png").convert("L")).std() > 5
    lines = here("compare", "slow", "quick", "--json", cwd=project).stdout.splitlines()
    rows = {row["name"]: row["values"] for row in map(json.loads, lines)}
    assert rows["model/lr"] == [0.01, 0.1] and rows["step"] == [6, 9] and rows["name"] == ["slow", "quick"]
    assert rows["valid/loss"][0]["last"] > rows["valid/loss"][1]["last"]


def test_control_is_the_other_command_line(project):
    mine, other = call("control", "quick", "status", cwd=project), subprocess.run(
        [sys.executable, "-m", "trainkit.control", "quick", "status"], cwd=project, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (mine.returncode, mine.stdout) == (other.returncode, other.stdout) and "finished" in mine.stdout
    absent = call("control", "quick", "set", "lr=1e-4", "--timeout", "3", cwd=project)
    assert absent.returncode == 3 and absent.stderr
    text = call("control", "--help").stdout
    assert "pause" in text and text.startswith("usage: trainkit control [-h] RUN COMMAND")
    assert call("control", "quick", "pause", "--help", cwd=project).stdout.startswith("usage: trainkit control RUN pause")
    wrong = call("control", "quick", "puase", cwd=project)
    assert wrong.returncode == 2 and "usage: trainkit control" in wrong.stderr


# ---- run

@pytest.mark.parametrize("order", ["before", "behind"])
def test_what_is_set_holds_over_the_script_and_nothing_else_changes(tmp_path, order):
    (tmp_path / "settings.ini").write_text("[optimizer]\nlr = 5\n[trainkit]\nbatch_size = 3\nfront = none\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    sets, script = ["--set", "optimizer.lr=1e-4", "--set", "batch_size=4"], ["train.py", "--epochs", "3"]
    args = [*sets, *script] if order == "before" else [*script, *sets]
    done = call("run", *args, cwd=tmp_path, TRAINKIT_OPTIMIZER_LR="9")
    assert done.returncode == 7 and "argument: --epochs 3" in done.stdout, done.stderr
    said = runs(tmp_path / "runs")["a"].identity["configuration"]
    assert (said["model/lr"], said["model/momentum"], said["batch_size"], said["seed"]) == (1e-4, 0.5, 4, 1)
    assert History.read(tmp_path / "runs" / "a" / "history.jsonl").last("lr/model") == 1e-4


@pytest.mark.parametrize("words,said,status", [
    (["--set", "optimizer.learning_rate=1", "train.py"], "unknown key 'learning_rate' in [optimizer]; accepted, nearest", 2),
    (["--set", "optimizer.lr=much", "train.py"], "--set: [optimizer] lr received 'much'; accepted: a number >= 0", 2),
    (["--set", "lr", "train.py"], "accepted: KEY=VALUE", 2),
    (["gone.py"], "there is no file gone.py", 3),
    (["--out", "x.ipynb", "train.py"], "--out is for notebooks", 2),
    (["README.md"], "a Python script (.py) or a notebook (.ipynb) is run; received README.md", 2),
    (["--out", "deep", "a.ipynb"], "deep is a folder", 2),
])  # fmt: skip
def test_what_cannot_be_run_is_said_before_anything_starts(tmp_path, words, said, status, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *words: pytest.fail("a script took this process's place"))
    for file in ("train.py", "README.md"): (tmp_path / file).write_text("open('started', 'w')")
    notebook(tmp_path / "a.ipynb", "open('started', 'w')")
    (tmp_path / "deep").mkdir()
    done = here("run", *words, cwd=tmp_path)
    assert done.returncode == status and said in done.stderr and not (tmp_path / "started").exists()


def test_a_script_that_has_no_suffix_is_run(tmp_path):
    (tmp_path / "train").write_text("print(6 * 7)")
    done = call("run", "train", cwd=tmp_path)
    assert done.stdout == "42\n" and done.returncode == 0, done.stderr


def test_a_setting_that_the_fit_refuses_is_named(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = call("run", "--set", "monitor=valid/foo", "train.py", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("(settings: --set [trainkit] monitor)\n"), done.stderr


def test_a_notebook_runs_in_its_folder(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    cells = ["from trainkit.settings import load_settings\nprint('rate', load_settings().optimizer.lr)",
             "from pathlib import Path\nPath('here').touch()\n6 * 7"]
    (tmp_path / "deep").mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata=kernel), tmp_path / "deep" / "a.ipynb")
    done = call("run", "--set", "optimizer.lr=0.25", "--out", "new/b.ipynb", "deep/a.ipynb", cwd=tmp_path)
    assert done.stdout.split() == ["rate", "0.25", "42"] and done.returncode == 0, done.stderr
    assert done.stderr == "", "nobody is told of ports that are not used"
    assert (tmp_path / "deep" / "here").exists()
    assert nbformat.read(tmp_path / "new" / "b.ipynb", 4).cells[1].outputs[0]["data"]["text/plain"] == "42"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")], metadata=kernel), tmp_path / "bad.ipynb")
    failed = here("run", "bad.ipynb", cwd=tmp_path)
    assert failed.returncode == 1 and "ZeroDivisionError" in failed.stderr
    assert "bad.ipynb: a cell failed" in failed.stderr and "\x1b" not in failed.stderr
    assert here("run", "bad.ipynb", "--epochs", "3", cwd=tmp_path).returncode == 2


def notebook(path, *cells, kernel="python3"):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    spec = {"kernelspec": {"name": kernel, "display_name": kernel}}
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata=spec), path)


def test_a_notebook_is_heard_while_it_runs_and_interrupted_as_a_script(tmp_path):
    "Its first cell ends only after what it printed was read here; what follows an interrupted cell doesn't run."
    wait = "import os, time\nprint('ready', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.05)\nprint('gone on')"
    shown = "from IPython.display import display\nh = display('first', display_id=True)\nprint('between')\nh.update('last')"
    where = "from trainkit.environment import where\nprint(where(), os.environ['JPY_SESSION_NAME'])"
    loop = "print('looping', flush=True)\nwhile True: time.sleep(0.05)"
    notebook(tmp_path / "a.ipynb", wait, shown, where, loop, "open('after', 'w')")
    env = {k: v for k, v in os.environ.items() if k != "TRAINKIT_WHERE"} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "trainkit", "run", "a.ipynb"], cwd=tmp_path, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        (tmp_path / "go").touch()
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines == ["gone on\n", "between\n", "'last'\n", f"script {tmp_path / 'a.ipynb'}\n", "looping\n"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and not (tmp_path / "after").exists()
    assert "KeyboardInterrupt" in err and err.endswith("a.ipynb: interrupted\n") and "nbclient" not in err


def test_what_grows_is_heard_line_by_line(tmp_path):
    "The second line is read here while the cell waits for it; what the cell ends in comes behind the rest."
    grow = """
import os, time
from IPython.display import display
def text(*lines): return {"text/plain": "\\n".join(lines)}
h = display(text("1%"), raw=True, display_id=True)
h.update(text("head", "2%"), raw=True)
h.update(text("head", "first", "3%"), raw=True)
h.update(text("head", "first", "second", "4%"), raw=True)
for _ in range(1200):
    if os.path.exists("go"): break
    time.sleep(0.05)
print("heard" if os.path.exists("go") else "nobody heard")
h.update(text("head", "first", "second", "finished"), raw=True)
6 * 7"""
    notebook(tmp_path / "a.ipynb", grow)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "trainkit", "run", "a.ipynb", "--out", "b.ipynb"], cwd=tmp_path, env=env,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["head\n", "first\n"]
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert out == "heard\nsecond\nfinished\n42\n" and process.returncode == 0, err


@pytest.mark.parametrize("text,said", [("{", "is no notebook"), ("[1]", "is no notebook"), (None, "isn't installed; there are")])
def test_what_is_no_notebook_or_has_no_kernel_is_said(tmp_path, text, said):
    file = tmp_path / "a.ipynb"
    if text is None: notebook(file, "1", kernel="cobol")
    else: file.write_text(text)
    done = here("run", "a.ipynb", cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "a.ipynb" in done.stderr and "Traceback" not in done.stderr


def test_json_is_json_where_numbers_are_none(tmp_path):
    for name, last in (("a", math.nan), ("b", math.inf)):
        history = History(tmp_path / "runs" / name / "history.jsonl")
        for step, value in enumerate([1.0, last]): history.add("valid/loss", value, step)
        for series in ("valid/gizmo", "train/loss"): history.add(series, last, 1)
        history.close()

    def strict(words):
        def refused(word): pytest.fail(f"{words[0]} prints {word}")
        return [json.loads(line, parse_constant=refused) for line in here(*words, "--json", cwd=tmp_path).stdout.splitlines()]
    assert [row["best"] for row in strict(["runs"])] == [None, None]
    shown, = strict(["show", "a"])
    assert shown["series"]["valid/loss"] == {"last": None, "best": 1.0, "step": 0}
    rows = {row["name"]: row["values"] for row in strict(["compare", "a", "b"])}
    assert rows["valid/gizmo"] == [{"last": None, "best": None, "step": None}] * 2


def learner(opt="adam", **kw):
    return Learner(nn.Linear(3, 1), (X, X[:, :1]), "mse", opt, front="none", **kw)


@pytest.mark.parametrize("said,plan", [
    ("optimizer.lr=0.5", OptimBuilder("adamw", lr=0.5, weight_decay=0.1, schedule="cosine", warmup=2)),
    ("optimizer.betas=0.5,0.9", OptimBuilder("adamw", lr=0.1, weight_decay=0.1, betas=(0.5, 0.9), schedule="cosine", warmup=2)),
    ("optimizer.name=sgd\noptimizer.weight_decay=0", OptimBuilder("sgd", lr=0.1, weight_decay=0.0, schedule="cosine", warmup=2)),
    ("optimizer.name=adam\nscheduler.name=linear",
     OptimBuilder("adam", lr=0.1, weight_decay=0.1, schedule={"name": "linear"}, warmup=2)),
    ("scheduler.name=linear", OptimBuilder("adamw", lr=0.1, weight_decay=0.1, schedule={"name": "linear"}, warmup=2)),
    ("scheduler.warmup=7\nscheduler.end=0.5",
     OptimBuilder("adamw", lr=0.1, weight_decay=0.1, schedule={"name": "cosine", "end": 0.5}, warmup=7)),
    ("seed=5", OptimBuilder("adamw", lr=0.1, weight_decay=0.1, schedule="cosine", warmup=2)),
])  # fmt: skip
def test_a_plan_of_the_code_is_changed_where_it_is_told(monkeypatch, said, plan):
    monkeypatch.setenv("TRAINKIT_SET", said)
    learn = learner(OptimBuilder("adamw", lr=0.1, weight_decay=0.1, schedule="cosine", warmup=2))
    assert learn.players[0].builder == plan


def test_a_plan_that_does_not_take_it_says_where_it_came_from(monkeypatch):
    monkeypatch.setenv("TRAINKIT_SET", "optimizer.momentum=0.9")
    with pytest.raises((TypeError, ValueError), match=r"momentum.*\(settings: --set \[optimizer\] momentum\)"): learner("adam")


def test_what_is_said_over_the_code_is_the_last_word(monkeypatch):
    monkeypatch.setenv("TRAINKIT_SET", "device=cpu\n trainkit.keep = 7 \n\noptimizer.lr=2")
    monkeypatch.setenv("TRAINKIT_OPTIMIZER_LR", "3")
    found = load_settings(keep=9, optimizer_lr=4)
    assert (found.keep, found.optimizer.lr, found.device) == (7, 2.0, "cpu") and found.source("trainkit", "keep") == "--set"
    monkeypatch.setenv("TRAINKIT_SET", "optimizer.lrr=2")
    with pytest.raises(SettingsError, match=r"--set: unknown key 'lrr' in \[optimizer\]; accepted, nearest first: lr"):
        load_settings()


# ---- export

def test_weights_are_given_away(project):
    from safetensors.torch import load_file

    from trainkit.travel import read_weights
    done = call("export", "quick", "--to", "safetensors", "--checkpoint", "last", cwd=project)
    assert done.returncode == 0 and done.stdout == "quick.safetensors\n", done.stderr
    weights = read_weights(project / "runs" / "quick")
    found = load_file(project / "quick.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


def test_of_several_modules_one_is_named(project):
    from trainkit.player import Player
    x = torch.ones(4, 2)
    pair = [Player(name, nn.Linear(2, 1), step=lambda learn, batch: learn.player.modules[learn.player.name](x).mean())
            for name in ("one", "two")]  # fmt: skip
    Learner(pair, x, batch_size=2, front="none", run=project / "runs" / "pair").fit(1)
    assert "one, two; which of them?" in (done := here("export", "pair", "--to", "safetensors", cwd=project)).stderr
    assert done.returncode == 2 and "--module" in done.stderr and not (project / "pair.safetensors").exists()
    assert here("export", "pair", "--to", "safetensors", "--module", "two", cwd=project).returncode == 0
    wrong = here("export", "quick", "--to", "safetensors", "--module", "generator", "--out", "wrong.safetensors", cwd=project)
    assert wrong.returncode == 2 and "has the modules model, and none is 'generator'" in wrong.stderr
    assert not (project / "wrong.safetensors").exists()
    assert here("export", "quick", "--to", "safetensors", "--module", "model", cwd=project).returncode == 0


def by_onnx(file):
    import onnx
    from onnx.reference import ReferenceEvaluator
    onnx.checker.check_model(onnx.load(file), full_check=True)
    found = ReferenceEvaluator(str(file))
    return lambda x: torch.from_numpy(found.run(None, {found.input_names[0]: x.numpy()})[0])


@pytest.mark.parametrize("to,suffix", [("torchscript", "ts"), ("pt2", "pt2"), ("onnx", "onnx")])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_model_goes_with_its_code(project, to, suffix, monkeypatch):
    from trainkit.travel import read_weights
    (project / "nets.py").write_text("from torch import nn\nclass Own(nn.Linear):\n"
                                     "    def forward(self, x): return super().forward(x.reshape(x.shape[0], -1))\n"
                                     "def net(): return Own(3, 1)\n"
                                     "def wide(): return nn.Linear(3, 2)\nthree = lambda: 3\n")  # fmt: skip
    def export(*words): return here("export", "quick", "--to", to, "--out", f"deep/a.{suffix}", *words, cwd=project)

    monkeypatch.delitem(sys.modules, "nets", raising=False)
    path = [*sys.path]
    done = export("--model", "nets.py:net", "--input", "4,3")
    assert done.returncode == 0, done.stderr
    file, weights = project / "deep" / f"a.{suffix}", read_weights(project / "runs" / "quick")
    read = {"torchscript": lambda file: torch.jit.load(str(file)), "pt2": lambda file: torch.export.load(file).module()}
    module = read.get(to, by_onnx)(file)
    expected = X @ weights["weight"].T + weights["bias"]
    torch.testing.assert_close(module(X), expected)  # another number of rows than it was written with
    assert export("--model", "nets.py:net", "--input", "1,3").returncode == 0
    module = read.get(to, by_onnx)(file)
    for rows in (1, 2, 5): torch.testing.assert_close(module(X[:rows]), expected[:rows])
    assert export("--model", "nets:net", "--input", "4,3").returncode == 0 and sys.path == path, "by the name of a module, too"
    file.unlink()
    for words, said in [((), "--model FILE.py:NAME and --input SHAPE"),
                        (("--model", "nets.py:net", "--input", "x"), "takes a shape"),
                        (("--model", "nets.py:nut", "--input", "4,3"), "has no 'nut'; there are: nn, Own, net, wide, three"),
                        (("--model", "nets.py:wide", "--input", "4,3"), "of another shape"),
                        (("--model", "nets.py:three", "--input", "4,3"), "must make an nn.Module")]:  # fmt: skip
        failed = export(*words)
        assert failed.returncode == 2 and said in failed.stderr and not file.exists(), (failed.stdout, failed.stderr)


@pytest.mark.parametrize("to", ["torchscript", "pt2", "onnx"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning", "default::UserWarning")
def test_a_file_that_takes_so_many_rows_only_is_written_with_a_warning(project, to):
    (project / "fixed.py").write_text("from torch import nn\nclass Net(nn.Linear):\n"
                                      "    def forward(self, x): return super().forward(x).view(1, 1)\n"
                                      "def net(): return Net(3, 1)\n")  # fmt: skip
    done = here("export", "quick", "--to", to, "--out", f"fixed.{to}", "--model", "fixed.py:net", "--input", "1,3", cwd=project)
    assert done.returncode == 0 and (project / f"fixed.{to}").exists(), done.stderr
    assert f"warning: fixed.{to} takes 1 row at a time, and no other number: " in done.stderr


def test_what_onnx_needs_is_named(project, monkeypatch):
    (project / "nets.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 1)\n")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    done = here("export", "quick", "--to", "onnx", "--model", "nets.py:net", "--input", "4,3", cwd=project)
    assert done.returncode == 2 and "pip install onnxscript" in done.stderr and not [*project.glob("*quick.onnx*")]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_module_that_draws_is_not_given_away(project):
    (project / "odd.py").write_text("import torch\nclass Odd(torch.nn.Linear):\n    def forward(self, x):\n"
                                    "        return super().forward(x) + torch.rand(())\n"
                                    "def net(): return Odd(3, 1)\n")  # fmt: skip
    done = here("export", "quick", "--to", "torchscript", "--out", "odd.ts", "--model", "odd.py:net", "--input", "4,3",
                cwd=project)  # fmt: skip
    assert done.returncode and "gives other numbers" in done.stderr and not [*project.glob("*odd.ts*")]


def test_what_cannot_be_written_is_said_by_its_own_error(project):
    (project / "without.py").write_text("from torch import nn\nclass Net(nn.Linear): forward = nn.Module.forward\n"
                                        "def net(): return Net(3, 1)\n")  # fmt: skip
    done = here("export", "quick", "--to", "torchscript", "--out", "no.ts", "--model", "without.py:net", "--input", "4,3",
                cwd=project)  # fmt: skip
    assert done.returncode and "forward" in done.stderr and "not checked" not in done.stderr and not [*project.glob("*no.ts*")]


@pytest.mark.filterwarnings("default::UserWarning")
def test_an_onnx_file_that_nothing_here_opens_is_written_with_a_warning(project, monkeypatch):
    class Old:
        def __init__(self, path, providers):
            raise RuntimeError("opset 99 is too new")

    (project / "nets.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 1)\n")
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Old))
    done = here("export", "quick", "--to", "onnx", "--out", "new.onnx", "--model", "nets.py:net", "--input", "4,3", cwd=project)
    assert "warning: new.onnx is not checked, nothing here runs it: onnxruntime: opset 99 is too new\n" in done.stderr
    assert done.returncode == 0 and (project / "new.onnx").exists()


@pytest.mark.filterwarnings("default::UserWarning")
def test_an_onnx_file_is_run_before_it_is_given_away(project, monkeypatch):
    from onnx.reference import ReferenceEvaluator
    (project / "nets.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 1)\n")
    words = ("export", "quick", "--to", "onnx", "--out", "run.onnx", "--model", "nets.py:net", "--input", "4,3")
    monkeypatch.setattr(ReferenceEvaluator, "run", lambda self, names, given: [np.zeros((4, 1), np.float32)])
    done = here(*words, cwd=project)
    assert done.returncode == 2 and "gives other numbers" in done.stderr and not [*project.glob("*run.onnx*")]
    monkeypatch.setattr(ReferenceEvaluator, "run", lambda self, names, given: 1 / 0)
    unread = "warning: run.onnx is not checked, nothing here runs it: ReferenceEvaluator: division by zero\n"
    assert unread in here(*words, cwd=project).stderr
    assert (project / "run.onnx").exists()


def test_a_checkpoint_that_is_not_there(project):
    done = here("export", "quick", "--to", "safetensors", "--checkpoint", "777", cwd=project)
    assert done.returncode and "777" in done.stderr
    assert here("export", "quack", "--to", "safetensors", cwd=project).returncode == 3


# ---- new

def test_a_new_project_trains_and_its_test_passes(tmp_path):
    done = call("new", "two-spirals", cwd=tmp_path)
    folder = tmp_path / "two-spirals"
    assert done.returncode == 0 and "cd two-spirals" in done.stdout and "{" not in (folder / "train.py").read_text()
    trained = call("run", "--set", "optimizer.lr=5e-3", "train.py", "--epochs", "6", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    found = runs(folder / "runs")["first"]
    assert found.identity["configuration"]["model/lr"] == 5e-3 and found.history.last("valid/accuracy") > 0.9
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert tested.returncode == 0 and "1 passed" in tested.stdout, tested.stdout + tested.stderr
    over = call("run", "train.py", "--resume", cwd=folder)
    assert over.returncode == 0 and over.stderr.endswith("\nthis run is finished; --epochs N makes N more of them\n"), over.stderr
    assert "Traceback" not in over.stderr
    assert 'pip install "CLONE[notebook,cli]"' in (folder / "README.md").read_text()
    more = call("run", "train.py", "--resume", "--epochs", "2", cwd=folder)
    assert more.returncode == 0 and "epoch 8, finished" in more.stdout, more.stderr
    again = here("new", "two-spirals", cwd=tmp_path)
    assert again.returncode == 2 and "isn't empty" in again.stderr
    assert here("new", "class", cwd=tmp_path).returncode == 2 and not (tmp_path / "class").exists()


def test_the_new_projects_module_is_what_its_notebook_exports(tmp_path):
    here("new", "two-spirals", cwd=tmp_path)
    folder = tmp_path / "two-spirals"
    before = (folder / "two_spirals" / "core.py").read_text()
    in_nbdev("from nbdev.doclinks import nbdev_export; nbdev_export()", folder, tmp_path)
    assert (folder / "two_spirals" / "core.py").read_text() == before
    assert not [p for p in folder.iterdir() if p.suffix == ".py" and p.name != "train.py"]


def test_each_function_of_the_new_project_has_a_cell_of_its_own(tmp_path):
    here("new", "two-spirals", cwd=tmp_path)
    cells = json.loads((tmp_path / "two-spirals" / "nbs" / "00_core.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    assert not [text for text in texts if "# %%" in text] and max(text.count("#| export") for text in texts) == 1
    assert [len(re.findall("^def ", text, re.M)) for text in texts if "\ndef " in text] == [1, 1, 1]
    module = (tmp_path / "two-spirals" / "two_spirals" / "core.py").read_text()
    marks = [line for line in module.splitlines() if line.startswith("# %%")]
    ids = [cell["id"] for cell, text in zip(cells, texts) if text.startswith("#| export")]
    assert marks == ["# %% auto #0", *(f"# %% ../nbs/00_core.ipynb #{key}" for key in ids)] and "#|" not in module


def test_no_epochs_are_none_and_what_is_not_there_is_not_resumed(tmp_path):
    here("new", "two-spirals", cwd=tmp_path)
    folder = tmp_path / "two-spirals"
    none = call("run", "train.py", "--epochs", "0", cwd=folder)
    assert none.returncode == 0 and "epoch 0" in none.stdout and "epoch 20" not in none.stdout, none.stderr
    for words in [("--run", "gone"), ("--run", "gone", "--epochs", "2")]:
        done = call("run", "train.py", "--resume", *words, cwd=folder)
        place = os.path.join("runs", "gone")
        assert done.stderr == f"nothing to resume: no checkpoint lies in {place}\n" and done.returncode == 2 and not done.stdout
    assert not (folder / "runs" / "gone").exists()


def test_a_project_begins_in_the_folder_one_is_in(tmp_path):
    (folder := tmp_path / "my-spirals").mkdir()
    done = here("new", ".", cwd=folder)
    assert done.returncode == 0 and done.stdout.endswith("\nnext: python train.py\n"), done.stderr
    assert (folder / "my_spirals" / "core.py").exists() and 'name = "my-spirals"' in (folder / "pyproject.toml").read_text()


@pytest.mark.parametrize("name,owner", [
    ("click", "the installed package click"), ("sympy", "the installed package sympy"), ("Typing_Extensions", "typing"),
    ("torchgen", "the module "), ("json", "Python's own library"), ("lambda", "Python"), ("torch", "the project")])  # fmt: skip
def test_a_name_that_somebody_has_is_refused(tmp_path, name, owner):
    "In the project's folder, it would be imported in their place."
    done = here("new", name, cwd=tmp_path)
    assert done.returncode == 2 and "is taken by" in done.stderr and owner in done.stderr and not [*tmp_path.iterdir()]


def test_a_folder_beside_it_has_no_name(tmp_path):
    "What lies in the working folder is no reason to refuse a name; a folder that isn't empty is."
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    again = call("new", "mine", cwd=tmp_path)
    assert again.returncode == 2 and "isn't empty" in again.stderr and "taken" not in again.stderr
    assert call("new", "deep/mine", cwd=tmp_path).returncode == 0


def in_nbdev(code, folder, home):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_cells_become_a_script_and_cells_again_and_train_the_same_weights(tmp_path):
    "The notebook, and the script that uses what nbdev exports of it; then a change of the module goes back to the cells."
    from trainkit.travel import read_weights
    here("new", "both", cwd=tmp_path)
    folder = tmp_path / "both"
    book, module = folder / "nbs" / "00_core.ipynb", folder / "both" / "core.py"

    def trained(*words):
        path = f"{ROOT}{os.pathsep}{folder}"
        done = call("run", "--set", "trainkit.front=none", *words, cwd=folder, PYTHONPATH=path, IN_TEST="1")
        assert done.returncode == 0, done.stderr
        return done.stdout

    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    in_nbdev(export, folder, tmp_path)
    (folder / "nbs" / "kept.ipynb").write_text(book.read_text().replace("run=None", "run='kept'"))
    assert "valid/loss" in trained("nbs/kept.ipynb")
    trained("train.py", "--epochs", "3", "--run", "script")
    cells, script = read_weights(folder / "nbs" / "runs" / "kept"), read_weights(folder / "runs" / "script")
    assert len(cells) == 6 and cells.keys() == script.keys() and all(torch.equal(cells[name], script[name]) for name in cells)
    (folder / "nbs" / "kept.ipynb").unlink()
    module.write_text(module.read_text().replace("lr=3e-3", "lr=1e-3"))
    changed = module.read_text()
    in_nbdev("from nbdev.sync import nbdev_update; nbdev_update()", folder, tmp_path)
    assert "lr=1e-3" in book.read_text() and "lr=3e-3" not in book.read_text()
    in_nbdev(export, folder, tmp_path)
    assert module.read_text() == changed


# ---- the line itself

def test_the_page_says_what_the_line_accepts():
    "Every command on the how-to is one, with options that are there."
    page = (ROOT / "docs" / "howto" / "command-line.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S)
    said = [line.partition(" #")[0] for block in blocks for line in block.splitlines()]
    lines = [shlex.split(line)[1:] for line in said if line.startswith("trainkit ")]
    for name, *words in lines: app().commands[name].make_context(name, words).close()
    assert {name for name, *_ in lines} | {"completion"} == {*app().commands}
    with pytest.raises(click.UsageError): app().commands["show"].make_context("show", ["first", "--jsonn"])


def test_help_names_every_command():
    text = call("--help").stdout
    for name in ("runs", "show", "compare", "control", "run", "export", "convert", "new", "completion"):
        assert f"\n  {name} " in text
        if name != "control": assert "Usage: trainkit " + name in here(name, "-h", cwd=ROOT).stdout
    wrong = here("shwo", cwd=ROOT)
    assert wrong.returncode == 2 and "shwo" in wrong.stderr
    assert call("--version").stdout.startswith("trainkit, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell):
    done = here("completion", shell, cwd=ROOT)
    assert done.returncode == 0 and "_TRAINKIT_COMPLETE" in done.stdout
    assert here("completion", "tcsh", cwd=ROOT).returncode == 2


def test_names_of_runs_are_completed(project):
    def complete(*words): return call(cwd=project, _TRAINKIT_COMPLETE="bash_complete", COMP_WORDS=" ".join(["trainkit", *words]),
                                      COMP_CWORD=str(len(words))).stdout.split()
    assert complete("show", "sl") == ["plain,slow"] and complete("sho") == ["plain,show"]
    assert "plain,quick" in complete("compare", "slow", "q")
    assert complete("show", "runs/sl") == ["dir,runs/sl"]


def test_what_can_be_asked_of_a_run_is_completed(project, monkeypatch):
    from click.shell_completion import BashComplete
    monkeypatch.chdir(project)
    complete = BashComplete(app(), {}, "trainkit", "_TRAINKIT_COMPLETE")

    def found(*words): return [item.value for item in complete.get_completions([*words[:-1]], words[-1])]
    knobs = {knob["name"] for knob in read_status(project / "runs" / "quick")["controls"]}
    assert found("control", "qu") == ["quick"] and found("control", "quick", "pa") == ["pause"]
    assert {*found("control", "quick", "")} == {*COMMANDS, *LOOKS} and not {"quick", "slow"} & {*COMMANDS, *LOOKS}
    assert found("control", "quick", "set", "l") == ["lr="] and found("control", "gone", "set", "l") == []
    assert {*found("control", "quick", "release", "")} == knobs and found("control", "quick", "pause", "") == []
    assert found("run", "--set", "optimizer.l") == ["optimizer.lr="] and found("run", "--set", "monit") == ["monitor="]
    ids = [entry.id for entry in Checkpoints(project / "runs" / "quick" / "checkpoints")]
    assert found("export", "quick", "--checkpoint", "") == ["best", "last", *ids]
    assert found("export", "quick", "--checkpoint", "be") == ["best"] and found("export", "--checkpoint", "la") == ["last"]


def test_bash_completes(project, tmp_path):
    "What a shell makes of it: the script is sourced, and asked as readline asks."
    (program := tmp_path / "trainkit").write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -m trainkit \"$@\"\n")
    program.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def complete(*words):
        line = " ".join(map(shlex.quote, ["trainkit", *words]))
        ask = (f'eval "$(trainkit completion bash)"; compopt() {{ echo "$@"; }}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; '
               '$(complete -p trainkit | sed "s/.*-F \\([^ ]*\\).*/\\1/") trainkit; printf "%s\\n" "${COMPREPLY[@]}"')
        done = subprocess.run(["bash", "-c", ask], cwd=project, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()
    assert complete("show", "sl") == ["slow"] and complete("export", "slow", "--to", "to") == ["torchscript"]
    assert {*complete("co")} == {"compare", "completion", "control", "convert"}
    assert complete("control", "quick", "pa") == ["pause"]
    assert complete("run", "--set", "optimizer.l") == ["-o", "nospace", "optimizer.lr="]
    assert complete("show", "runs/sl") == ["-o", "dirnames"]


def test_without_click_it_says_what_is_missing():
    code = "import sys; sys.modules['click'] = None; from trainkit.cli import main; main(['runs'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "pip install click" in done.stderr


def test_a_scripts_own_options_of_these_names_stand_behind_two_dashes(tmp_path):
    (tmp_path / "say.py").write_text("import sys; print(sys.argv[1:])")
    done = call("run", "say.py", "-x", "--set", "seed=3", "--", "--set", "a", "--help", cwd=tmp_path)
    assert done.stdout.strip() == "['-x', '--set', 'a', '--help']", done.stderr
