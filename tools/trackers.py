"""Write a run with Trackio, W&B and MLflow themselves, and read back what they keep.

    python tools/trackers.py [trackio] [wandb] [mlflow]      all three by default

They come into an environment of their own, .venv/trackers, which sees the development environment, and work offline. A
run is trained, goes back, is steered, goes on, and goes on in another process; every way of it must be a run of the
tracker's with all its values. (The tests do the same with stand-ins that are made after these packages.)
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kernels import make

ROOT = Path(__file__).resolve().parent.parent
TRACKERS = ("trackio", "wandb", "mlflow")
Curve = list[tuple[int, float]]


def learner(tracker, run: Path):
    "A small run that a tracker follows."
    import numpy as np
    import torch

    from trainkit.callback import On
    from trainkit.learner import Learner

    torch.manual_seed(0)
    x = torch.randn(32, 3)
    data = (x, x.sum(1, keepdim=True))
    picture = np.zeros((4, 6, 3), np.uint8)
    pictures = On("after_epoch", lambda learn: learn.history.put("samples", picture, learn.step))
    return Learner(torch.nn.Linear(3, 1), {"train": data, "valid": data}, "mse", "adam", cbs=[tracker, pictures], front="none",
                   batch_size=8, run=run, keep="all")


def writer(name: str, folder: Path):
    from trainkit.ui.writers import MLflow, Trackio, WandB

    return {"trackio": lambda: Trackio("digits"), "wandb": lambda: WandB("digits"),
            "mlflow": lambda: MLflow("digits", f"sqlite:///{folder}/mlflow.db")}[name]()


def curve(history, name: str = "train/loss") -> Curve:
    return [*zip(*(column.tolist() for column in history.scalars[name]))]


def trackio_runs(folder: Path) -> list[Curve]:
    from trackio.sqlite_storage import SQLiteStorage

    names = sorted(SQLiteStorage.get_runs("digits"), key=len)  # run, run-2
    rows = [SQLiteStorage.get_logs("digits", name) for name in names]
    return [[(row["step"], row["train/loss"]) for row in found if "train/loss" in row] for found in rows]


def mlflow_runs(folder: Path) -> list[Curve]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("digits").experiment_id], order_by=["attributes.start_time"])
    return [[(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] for run in found]


def leveldb_records(path: Path) -> Iterator[bytes]:
    "The records of a .wandb file: blocks of 32 KiB with chunks of a checksum, a length, a kind (whole, first, middle, last)."
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        part, at = part + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield part
            part = b""


def wandb_runs(folder: Path) -> list[Curve]:
    from wandb.proto import wandb_internal_pb2 as format

    found: dict[str, Curve] = {}
    for path in sorted((folder / "run" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.parent.name):
        for record in map(format.Record.FromString, leveldb_records(path)):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in row:
                found.setdefault(path.stem, []).append((row["step"], row["train/loss"]))
    return [sorted(points) for points in found.values()]


def check(name: str, folder: Path) -> None:
    "Train, go back, go on, go on elsewhere; AssertionError where the tracker has something else than the history."
    learn = learner(writer(name, folder), folder / "run")
    learn.fit(epochs=3)
    left = curve(learn.history)
    learn.restore(4)
    learn.set("lr", 0.5)
    learn.fit(epochs=1)
    other = learner(writer(name, folder), folder / "run")
    other.restore("last")
    other.fit(epochs=1)
    found = {"trackio": trackio_runs, "wandb": wandb_runs, "mlflow": mlflow_runs}[name](folder)
    for mine, its in zip([left, curve(other.history)], found, strict=True):
        assert [step for step, _ in its] == [step for step, _ in mine], (its, mine)
        assert all(abs(a - b) < 1e-6 * max(1, abs(b)) for (_, a), (_, b) in zip(its, mine)), (its, mine)


def main() -> int:
    names = sys.argv[1:] or TRACKERS
    if "--here" in names:
        with tempfile.TemporaryDirectory() as folder:
            os.environ.update(HOME=folder, TRACKIO_DIR=f"{folder}/trackio", WANDB_MODE="offline", WANDB_SILENT="true",
                              MLFLOW_DISABLE_TELEMETRY="true")
            os.chdir(folder)  # MLflow keeps pictures in the working directory
            check(names[0], Path(folder))
        return 0
    python, failed = make(Path(sys.prefix) / "trackers"), []
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, *names], check=True)
    for name in names:
        done = subprocess.run([str(python), __file__, name, "--here"], cwd=ROOT, capture_output=True, text=True)
        print(f"{name}: {'as the history' if not done.returncode else done.stdout + done.stderr}", flush=True)
        failed += [name] * bool(done.returncode)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
