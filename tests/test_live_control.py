"The tutorial on live control, small, in a real kernel; and its script twin, steered by the commands that it prints."

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from steered import end, until
from test_quickstart import text_of

from trainkit.attached import attach
from trainkit.control import DONE, main
from trainkit.history import History
from trainkit.journal import Journal
from trainkit.mailbox import read_status, silence

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/03_live_control.ipynb", ROOT / "examples/live_control.py"
SMALL = {"images[:2048], labels[:2048]": "images[:512], labels[:512]", "batch_size=64": "batch_size=16",
         "channels=16": "channels=4"}  # as many steps


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "The notebook after it was executed, and the folder in which it was."
    nb, folder = nbformat.read(NOTEBOOK, as_version=4), tmp_path_factory.mktemp("tutorial")
    for old, new in SMALL.items():
        assert any(old in cell.source for cell in nb.cells), old
        for cell in nb.cells:
            cell.source = cell.source.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRAINKIT_WHERE", raising=False)
        patch.setenv("TRAINKIT_REFRESH", "60")  # the pictures at the end are enough
        nbclient.NotebookClient(nb, timeout=300, kernel_name="python3").execute(cwd=str(folder))
    return nb, folder / "runs/live"


def test_the_session_is_told_again_with_the_same_weights(done):
    nb, _ = done
    said = text_of(nb)
    assert "the same weights" in said and "the same pictures: True" in said


def test_the_hand_is_in_the_journal(done):
    _, runs = done
    entries = Journal.read(runs / "digits/journal.jsonl").entries
    found = [(e.what, e.values.get("name"), e.fitting) for e in entries if not e.error]
    touches = ["set", "set", "release", "undo", "set", "pause", "step", "note", "resume", "save", "stop"]
    assert [what for what, _, fitting in found if fitting and what in touches] == [*touches, "set"]  # and the slip
    assert ("set", "noisy_reals.amount", True) in found and ("restore", None, True) in found
    slower, times, back, undone = [e for e in entries if e.old is not None][:4]
    assert slower.new == 5e-4 and times.new > 1.9 * times.old and back.new < 0.6 * back.old and undone.new > 1.9 * undone.old


def test_the_way_back_leaves_a_tail_and_the_branch_a_tree(done):
    nb, runs = done
    history = History.read(runs / "digits/history.jsonl")
    assert len(history.tails) == 1 and history.tails[0].scalars["train/generator/loss"][0][-1] >= 285
    assert (history.scalars["lr/generator"][1] < 0.01).all(), "the slip is not in what is left"
    assert re.search(r"└─ digits-quick +digits/2\d\d ", text_of(nb))


def test_another_process_is_steered_in_all_ways(done):
    nb, runs = done
    entries = Journal.read(runs / "classify/journal.jsonl").entries
    assert [(e.source, e.what, bool(e.error)) for e in entries if e.source != "code"] == [
        ("terminal", "set", False), ("terminal", "set", True), ("attached", "release", False), ("attached", "pause", False),
        ("attached", "validate", False), ("attached", "resume", False), ("attached", "note", False),
        ("signal", "save", False), ("signal", "stop", False)]  # fmt: skip
    assert re.search(r"stopped at step \d+, with \d+ as its last checkpoint", text_of(nb))


def test_a_reader_of_the_saved_notebook_sees_everything(done):
    outputs = [o for cell in done[0].cells if cell.cell_type == "code" for o in cell.outputs]
    kinds = [kind for o in outputs for kind in o.get("data", {})]
    assert kinds.count("image/png") == 9 and not [kind for kind in kinds if "widget" in kind]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", "\n".join(cell.source for cell in done[0].cells))
    assert pictures and all((NOTEBOOK.parent / picture).exists() for picture in pictures)


# --- the script -------------------------------------------------------------------------------------------------------

def printed_commands(process):
    "The lines that the script says to type, without the program's name; and its own process as it prints it."
    lines = []
    while not (line := process.stdout.readline()).lstrip().startswith("kill -TERM"):
        assert line, "it ended before it had printed all"
        if "trainkit.control" in line:
            lines.append(shlex.split(line)[3:])
    return lines, int(line.split()[2])


@pytest.fixture
def script(tmp_path, monkeypatch):
    "Starts the script in a folder of its own, and knows when it trains and listens."
    monkeypatch.chdir(tmp_path)
    started = []

    def start(*words):
        command = [sys.executable, SCRIPT, "--run", "runs/here", *words]
        started.append(process := subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        lines, pid = printed_commands(process)
        assert pid == process.pid
        until(lambda: not silence(status := read_status("runs/here")) and status["pid"] == pid and status["step"] > 0)
        return process, lines

    yield start
    for process in started:
        if process.poll() is None:
            end(process)


def stop(process):
    "A signal stops it in good order; what it said at last."
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    return end(process)


def test_the_script_is_steered_by_the_commands_that_it_prints(script, capsys):
    process, lines = script()
    for line in lines:
        if line[1] != "watch":
            assert main(line) == DONE, line
    assert "refused" not in capsys.readouterr().out
    there = attach("runs/here")
    saved = len(there.checkpoints)
    process.send_signal(signal.SIGUSR1)
    until(lambda: len(there.checkpoints) > saved)
    said = stop(process)
    assert "noisy_reals.amount: 0 → 0.1" in said and "signal" in said
    assert any(entry.pinned and entry.info["note"] == "good ones" for entry in there.checkpoints.list())
    step = there.status()["step"]  # and now the run goes on where it was stopped
    process, _ = script("--resume")
    until(lambda: there.status()["step"] > step)
    assert stop(process).count("noisy_reals.amount: 0 → 0.1") == 1, "the journal goes with the checkpoint"
