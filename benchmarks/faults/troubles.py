"In a process of its own: a run whose disk is full by the kernel's word, or whose folder goes away."

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from trainkit.callback import On
from trainkit.checkpoint import CheckpointError

from .disks import FIRST, Trial, reference_of
from .subjects import EPOCHS, STEPS, digest, go_on, supervised

NOBODY = 65534


def trial(tell: Callable[..., None], kind: str, folder: str) -> None:
    "One kind of trouble, in a process of its own."
    here = Path(folder)
    here.mkdir(parents=True)
    met = TROUBLES[kind](here, reference_of(here))
    tell(met=met)


def _limited(here: Path, reference: dict[int, str]) -> str:
    "The kernel refuses files of more than 2 kB."
    trial = Trial(here / "run", reference)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trial.fit(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trial.trained_on()
    trial.nothing_lost()
    trial.said_once("File too large")
    trial.saves_again()
    return "by RLIMIT_FSIZE"


def _no_handles(here: Path, reference: dict[int, str]) -> str:
    "The process may not open any more files."
    trial = Trial(here / "run", reference)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    trial.fit(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, before[1])))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    trial.trained_on()
    trial.nothing_lost()
    trial.said_once("Too many open files")
    trial.saves_again()
    return "by RLIMIT_NOFILE"


def _history_full(here: Path, reference: dict[int, str]) -> str:
    "The history's file is /dev/full, where every write finds no space."
    trial = Trial(here / "run", reference)

    def strike() -> None:
        (here / "run" / "history.jsonl").unlink()
        (here / "run" / "history.jsonl").symlink_to("/dev/full")

    trial.fit(strike)
    trial.trained_on()
    trial.nothing_lost()
    trial.said_once("No space left on device")
    assert len(trial.messages) == 1, trial.messages
    return "by /dev/full"


def _small_disk(here: Path, reference: dict[int, str]) -> str:
    "A file system in memory that is filled up by something else."
    (disk := here / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True)
    if mounted.returncode:
        return "not tried: nothing may be mounted here"
    try:
        trial = Trial(disk / "run", reference)

        def fill() -> None:
            with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        trial.fit(fill)
        (disk / "other").unlink()
        trial.trained_on()
        trial.nothing_lost()
        trial.said_once("No space left on device")
        trial.saves_again()
    finally:
        subprocess.run(["umount", disk], check=True)
    return "by a full tmpfs"


def _removed(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: (shutil.rmtree(here / "run"), trial.before.clear()))
    trial.trained_on()
    trial.nothing_lost()
    trial.saves_again()
    return "saved anew" if len(trial.learn.checkpoints) > 1 else "message"


def _checkpoints_removed(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: (shutil.rmtree(here / "run" / "checkpoints"), trial.before.clear()))
    trial.trained_on()
    trial.nothing_lost()
    trial.saves_again()
    return "saved anew" if len(trial.learn.checkpoints) > 1 else "message"


def _moved(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: (here / "run").rename(here / "moved"))
    trial.trained_on()
    old = {path.name: path.read_bytes() for path in (here / "moved" / "checkpoints").glob("ckpt-*.pt")}
    assert old == trial.before, "what was moved has changed"
    trial.before.clear()
    trial.nothing_lost()
    trial.saves_again()
    return "saved anew" if len(trial.learn.checkpoints) > 1 else "message"


def _replaced(here: Path, reference: dict[int, str]) -> str:
    trial = Trial(here / "run", reference)
    trial.fit(lambda: ((here / "run").rename(here / "moved"), (here / "run").write_text("a file")))
    trial.trained_on()
    assert trial.messages, "nobody says anything"
    assert (here / "run").read_text() == "a file"
    return "message"


def _as_nobody(folder: Path) -> None:
    "Root may write anywhere, so become somebody who may not."
    if os.getuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        for parent in folder.parents:
            if not os.access(parent, os.X_OK):
                break
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _reachable(here: Path) -> Path:
    "A folder that nobody, too, can reach."
    found = Path(tempfile.mkdtemp(prefix="faults-"))
    found.chmod(0o755)
    return found


def _read_only(here: Path, reference: dict[int, str]) -> str:
    place = _reachable(here)
    _as_nobody(place)
    try:
        trial = Trial(place / "run", reference)
        trial.fit(lambda: [path.chmod(0o555) for path in (place / "run" / "checkpoints", place / "run")])
        trial.trained_on()
        trial.nothing_lost()
        trial.said_once("Permission denied")
        for path in (place / "run", place / "run" / "checkpoints"):
            path.chmod(0o755)
        trial.saves_again()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return "message"


def _read_only_from_the_start(here: Path, reference: dict[int, str]) -> str:
    place = _reachable(here)
    learn = supervised(place / "run", save_every=2)
    learn.add(On("after_batch", lambda learn: learn.step == FIRST + 2 and learn.stop()))
    learn.fit(epochs=EPOCHS)
    _as_nobody(place)
    try:
        everything = [*place.rglob("*")]
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        learn = supervised(place / "run", save_every=2)
        learn.restore("last")
        assert digest(learn.state_dict()) == reference[learn.step], "a run that can't be written can't be restored"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            go_on(learn)
        assert digest(learn.state_dict()) == reference[STEPS], "the training itself was changed"
        assert any("Permission denied" in str(w.message) for w in said), [str(w.message) for w in said]
    finally:
        for path in (place / "run", place / "run" / "checkpoints"):
            path.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)
    return "message"


def _never_there(here: Path, reference: dict[int, str]) -> str:
    (here / "file").write_text("")
    learn = supervised(here / "file" / "run", save_every=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn.fit(epochs=EPOCHS)
    assert digest(learn.state_dict()) == reference[STEPS], "the training itself was changed"
    assert any("could not make the folder" in str(w.message) for w in said), [str(w.message) for w in said]
    with contextlib.suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the run can't be kept: said before
        learn.save()
        raise AssertionError("a save into nowhere succeeds")
    return "message"


TROUBLES: dict[str, Callable[[Path, dict[int, str]], str]] = {
    "limited": _limited, "no_handles": _no_handles, "history_full": _history_full, "small_disk": _small_disk, "removed": _removed,
    "checkpoints_removed": _checkpoints_removed, "moved": _moved, "replaced": _replaced, "read_only": _read_only,
    "read_only_from_the_start": _read_only_from_the_start, "never_there": _never_there,
}  # fmt: skip
