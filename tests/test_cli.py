"The command line, as a shell runs it."

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from trainkit.cli import main
from trainkit.history import History
from trainkit.learner import Learner
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


def test_compare_and_its_picture(project):
    done = call("compare", "slow", "quick", "--plot", "both.png", "--names", "valid/*", cwd=project)
    assert "model/lr    0.01" in done.stdout and "train/loss" not in done.stdout and done.returncode == 0, done.stderr
    assert np.asarray(Image.open(project / "both.png").convert("L")).std() > 5
    lines = here("compare", "slow", "quick", "--json", cwd=project).stdout.splitlines()
    rows = {row["name"]: row["values"] for row in map(json.loads, lines)}
    assert rows["model/lr"] == [0.01, 0.1] and rows["step"] == [6, 9]
    assert rows["valid/loss"][0]["last"] > rows["valid/loss"][1]["last"]


def test_control_is_the_other_command_line(project):
    mine, other = call("control", "quick", "status", cwd=project), subprocess.run(
        [sys.executable, "-m", "trainkit.control", "quick", "status"], cwd=project, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (mine.returncode, mine.stdout) == (other.returncode, other.stdout) and "finished" in mine.stdout
    absent = call("control", "quick", "set", "lr=1e-4", "--timeout", "3", cwd=project)
    assert absent.returncode == 3 and absent.stderr
    assert "pause" in call("control", "--help").stdout


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
])  # fmt: skip
def test_what_cannot_be_run_is_said_before_anything_starts(tmp_path, words, said, status):
    (tmp_path / "train.py").write_text("open('started', 'w')")
    done = here("run", *words, cwd=tmp_path)
    assert done.returncode == status and said in done.stderr and not (tmp_path / "started").exists()


def test_a_notebook_runs_in_its_folder(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    cells = ["from trainkit.settings import load_settings\nprint('rate', load_settings().optimizer.lr)",
             "from pathlib import Path\nPath('here').touch()\n6 * 7"]
    (tmp_path / "deep").mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata=kernel), tmp_path / "deep" / "a.ipynb")
    done = call("run", "--set", "optimizer.lr=0.25", "--out", "b.ipynb", "deep/a.ipynb", cwd=tmp_path)
    assert done.stdout.split() == ["rate", "0.25", "42"] and done.returncode == 0, done.stderr
    assert (tmp_path / "deep" / "here").exists()
    assert nbformat.read(tmp_path / "b.ipynb", 4).cells[1].outputs[0]["data"]["text/plain"] == "42"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")], metadata=kernel), tmp_path / "bad.ipynb")
    failed = here("run", "bad.ipynb", cwd=tmp_path)
    assert failed.returncode == 1 and "ZeroDivisionError" in failed.stderr
    assert here("run", "bad.ipynb", "--epochs", "3", cwd=tmp_path).returncode == 2


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


@pytest.mark.parametrize("to,suffix", [("torchscript", "ts"), ("pt2", "pt2")])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_model_goes_with_its_code(project, to, suffix, monkeypatch):
    from trainkit.travel import read_weights
    (project / "nets.py").write_text("from torch import nn\nclass Own(nn.Linear): pass\ndef net(): return Own(3, 1)\n"
                                     "def wide(): return nn.Linear(3, 2)\nthree = lambda: 3\n")  # fmt: skip
    def export(*words): return here("export", "quick", "--to", to, "--out", f"deep/a.{suffix}", *words, cwd=project)

    monkeypatch.delitem(sys.modules, "nets", raising=False)
    path = [*sys.path]
    done = export("--model", "nets.py:net", "--input", "4,3")
    assert done.returncode == 0, done.stderr
    file, weights = project / "deep" / f"a.{suffix}", read_weights(project / "runs" / "quick")
    module = torch.jit.load(str(file)) if to == "torchscript" else torch.export.load(file).module()
    expected = X @ weights["weight"].T + weights["bias"]
    torch.testing.assert_close(module(X), expected)  # another number of rows than it was written with
    assert export("--model", "nets:net", "--input", "4,3").returncode == 0 and sys.path == path, "by the name of a module, too"
    file.unlink()
    for words, said in [((), "--model FILE.py:NAME and --input SHAPE"),
                        (("--model", "nets.py:net", "--input", "x"), "takes a shape"),
                        (("--model", "nets.py:nut", "--input", "4,3"), "has no 'nut'; there are: nn, Own, net, wide, three"),
                        (("--model", "nets.py:wide", "--input", "4,3"), "of another shape"),
                        (("--model", "nets.py:three", "--input", "4,3"), "must make an nn.Module")]:  # fmt: skip
        failed = export(*words)
        assert failed.returncode == 2 and said in failed.stderr and not file.exists(), (failed.stdout, failed.stderr)


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
    again = here("new", "two-spirals", cwd=tmp_path)
    assert again.returncode == 2 and "isn't empty" in again.stderr
    assert here("new", "class", cwd=tmp_path).returncode == 2 and not (tmp_path / "class").exists()


def test_the_new_projects_module_is_what_its_notebook_exports(tmp_path):
    here("new", "two-spirals", cwd=tmp_path)
    folder = tmp_path / "two-spirals"
    before = (folder / "two_spirals" / "core.py").read_text()
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(tmp_path)}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert (folder / "two_spirals" / "core.py").read_text() == before
    assert not [p for p in folder.iterdir() if p.suffix == ".py" and p.name != "train.py"]


def test_the_new_projects_notebook_runs(tmp_path):
    here("new", "a", cwd=tmp_path)
    done = call("run", "--set", "front=none", "nbs/00_core.ipynb", cwd=tmp_path / "a", IN_TEST="1",
                PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path / 'a'}")  # fmt: skip
    assert done.returncode == 0 and "valid/loss" in done.stdout, done.stderr


# ---- the line itself

def test_help_names_every_command():
    text = call("--help").stdout
    for name in ("runs", "show", "compare", "control", "run", "export", "new", "completion"):
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


def test_without_click_it_says_what_is_missing():
    code = "import sys; sys.modules['click'] = None; from trainkit.cli import main; main(['runs'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "pip install click" in done.stderr


def test_a_scripts_own_options_of_these_names_stand_behind_two_dashes(tmp_path):
    (tmp_path / "say.py").write_text("import sys; print(sys.argv[1:])")
    done = call("run", "say.py", "-x", "--set", "seed=3", "--", "--set", "a", "--help", cwd=tmp_path)
    assert done.stdout.strip() == "['-x', '--set', 'a', '--help']", done.stderr
