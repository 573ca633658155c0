"Processes to be killed, limited or blown up: forked from one that has everything loaded."

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from . import ROOT
from .subjects import SUBJECTS


class Child:
    "A process that runs one job and tells of it in a file, line by line."

    def __init__(self, nursery: Nursery, pid: int, log: Path):
        self.nursery, self.pid, self.log = nursery, pid, log
        self.status: int | None = None

    def kill(self) -> bool:
        "SIGKILL; False when it had ended before."
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)  # it isn't reaped yet, so the number is still its own
        return self.wait() == -signal.SIGKILL

    def wait(self, seconds: float = 60) -> int:
        "Its exit status, as `subprocess` gives it; one that hangs is killed, and that is a TimeoutError."
        end, pause = time.monotonic() + seconds, 0.0005
        while self.status is None:
            self.status = self.nursery.ask("poll", pid=self.pid)
            if self.status is None and time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                self.status = self.nursery.ask("wait", pid=self.pid)
                raise TimeoutError(f"a process was still running after {seconds} seconds; it told {self.told()[-1:]}")
            time.sleep(pause := min(2 * pause, 0.02))
        return self.status

    def done(self, seconds: float = 60) -> list[dict[str, Any]]:
        "What it told, once it has ended well."
        status = self.wait(seconds)
        told = self.told()
        assert status == 0, f"a process ended with {status}: {(told or [{}])[-1].get('failed', told[-1:])}"
        return self.told()

    def told(self) -> list[dict[str, Any]]:
        "What it has told so far; a line that a kill cut off is left out."
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return [json.loads(line) for line in lines]


class Nursery:
    "Starts children in milliseconds."

    def __init__(self, folder: Path):  # where their logs go
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRAINKIT_WHERE": "script",
                                    "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
        code = "from benchmarks.faults.nursery import serve; serve()"
        self.server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        self.folder, self.born = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.ask("ready")

    def ask(self, what: str, **kw: Any) -> Any:
        "A question to the server, and its answer."
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps({"what": what, **kw}) + "\n")
        self.server.stdin.flush()
        if not (answer := self.server.stdout.readline()):
            raise SystemExit("the process that forks the others is gone; what it said stands above")
        return json.loads(answer)

    def start(self, module: str, job: str, **kw: Any) -> Child:
        "A child that calls `job(tell, **kw)` of a module of this package; `tell(**facts)` writes a line."
        self.born += 1
        log = self.folder / f"child-{self.born}.jsonl"
        return Child(self, self.ask("fork", module=module, job=job, log=str(log), kw=kw), log)

    def close(self) -> None:
        "End the server; children that run are not waited for."
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _status(pid: int, how: int) -> int | None:
    found, status = os.waitpid(pid, how)
    return os.waitstatus_to_exitcode(status) if found else None


def _live(module: str, job: str, log: str, kw: dict[str, Any]) -> None:
    "In the child: do the job and leave without the server's exit."
    handle, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # the server's own: not the child's to read or to write
        os.dup2(nothing, stream)

    def tell(**facts: Any) -> None:
        os.write(handle, (json.dumps(facts) + "\n").encode())

    code = 1
    try:
        getattr(importlib.import_module(f"benchmarks.faults.{module}"), job)(tell, **kw)
        code = 0
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "site-packages" not in f.filename][-4:]
        tell(failed=f"{type(error).__name__} at {', '.join(ours)}: {error}")
    finally:
        os._exit(code)


def _warm_up() -> None:
    "What torch loads only when first used is loaded before the first fork."
    with tempfile.TemporaryDirectory() as folder:
        for name, make in SUBJECTS.items():
            learn = make(Path(folder) / name)
            learn.fit(epochs=1)
            learn.restore("last")


def serve() -> None:
    "The server: forks on request, and says how children ended."
    for module in ("life", "troubles", "hostile", "folders", "cells", "rank"):
        importlib.import_module(f"benchmarks.faults.{module}")
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        what, answer = request.pop("what"), None
        if what == "fork":
            if (answer := os.fork()) == 0:
                _live(**request)
        elif what != "ready":
            answer = _status(request["pid"], os.WNOHANG if what == "poll" else 0)
        print(json.dumps(answer), flush=True)
