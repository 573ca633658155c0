"The tutorial on several processes: what it says holds in a kernel of its own, and its script gives the same numbers."

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from tutorials import pictures, shortened, text_of

from trainkit.launch import free_port

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/13_scale_out.ipynb", ROOT / "examples/scale_out.py"
SHORTER = {'SHORT = {"epochs": 3, "width": 8, "batch_size": 64}': 'SHORT = {"epochs": 1, "width": 4, "batch_size": 100}'}


def judge(said: str, steps: int, pictures: int) -> None:
    "Two ranks and one process tell the same; commands act; a fault is told by its own words."
    assert "rank 0 of 2 on cpu" in said
    gap, one, two = re.search(r"largest difference of a step's loss: (\S+); steps: (\d+) and (\d+)", said).groups()
    assert 0 < float(gap) < 1e-3 and int(one) == int(two) == steps
    for name in ("valid/loss", "valid/accuracy"):
        alone, together = map(float, re.search(rf"^{name} +([\d.]+) +([\d.]+)$", said, re.MULTILINE).groups())
        assert abs(alone - together) < 5e-3
    assert f"two ranks left it at step {steps}\none process went on to step" in said
    here, whole = (int(n.replace(",", "")) for n in re.search(r"rank 0 holds (\S+) of (\S+) parameters", said).groups())
    assert 0.4 * whole < here < 0.6 * whole and float(re.search(r"loss from one process: (\S+)", said)[1]) < 1e-3
    step, accuracy = re.search(r"in one process: step (\d+), accuracy (\S+)", said).groups()
    assert int(step) == steps and abs(float(accuracy) - float(re.search(r"^valid/accuracy +(\S+)", said, re.M)[1])) < 5e-3
    asked = re.search(r"^(pause.*set.*|.*lr.*)$", said, re.MULTILINE)
    assert asked and "lr" in said and "2 ranks stopped together" in said and "journal.jsonl" in said
    assert "rank 1 failed: OSError: the disk of this machine is full" in said and pictures == 2


def test_the_notebook_holds_in_a_kernel_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes that it starts
    nb = shortened(NOTEBOOK, SHORTER, tmp_path)
    judge(text_of(nb), 40, pictures(nb))


def test_the_script_is_the_same_code(tmp_path):
    "Alone, and in two processes, by torchrun and by Accelerate."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def said(*start: str) -> list[str]:
        done = subprocess.run([sys.executable, *start, str(SCRIPT), "--device", "cpu", "--epochs", "1"], cwd=tmp_path, env=env,
                              capture_output=True, text=True, check=True)  # fmt: skip
        return re.findall(r"(\d) ranks, step (\d+): .*train/loss ([\d.]+), .*valid/loss ([\d.]+)", done.stdout)

    ((_, *alone),) = said()
    ((ranks, *two),) = said("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    assert ranks == "2" and alone[0] == two[0] == "63"
    assert all(abs(float(a) - float(b)) < 2e-3 for a, b in zip(alone[1:], two[1:]))
    plainly = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    plainly += ["--main_process_port", str(free_port())]
    ((ranks, *same),) = said("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *plainly)
    assert ranks == "2" and same == two


def test_the_stored_notebook():
    nb = nbformat.read(NOTEBOOK, as_version=4)
    judge(text_of(nb), 189, pictures(nb))
    assert NOTEBOOK.stat().st_size < 200_000
