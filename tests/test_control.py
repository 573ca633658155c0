"A script that trains, steered from a terminal: what is typed is done, answered, and told by the exit status."

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading

import pexpect
import pytest
from steered import ROOT, end, train, until

from trainkit.commands import COMMANDS
from trainkit.control import ABSENT, DONE, KEYS, REFUSED, UNANSWERED, asked, main, make_parser, report, single_keys, summary
from trainkit.journal import Entry, Journal
from trainkit.mailbox import OLD, Mailbox, read_status, scan, write_status

CONTROL = [sys.executable, "-m", "trainkit.control"]


def typed(*words):
    "A command line in a process of its own: exit status, what it printed, and where."
    done = subprocess.run([*CONTROL, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def control(run, capsys):
    "A command line in this process: what it printed, if its exit status is the expected one."

    def control(*words, status=DONE):
        assert main([str(run), *words]) == status
        printed = capsys.readouterr()
        return (printed.out if status == DONE else printed.err).strip()

    return control


# --- a real run -------------------------------------------------------------------------------------------------------

def test_a_script_is_steered_killed_and_taken_up_again(run, control):
    process = train(run)
    try:
        code, out, err = typed(run, "pause")
        assert (code, out.endswith(": pause"), err) == (DONE, True, "")
        step = int(out.split()[3].rstrip(":"))
        pressed = steer(run, control, step)
        entry = json.loads(control("undo", "--json"))
        assert (entry["new"], entry["step"]) == (1e-3, step + 3), pressed
        control("set", "lr=1e-4")
        kept = control("save", "kept")
        killed_while_asked(process, run)
    finally:
        end(process)
    process = train(run, "last")
    try:
        asked = [e for e in Journal.read(run / "journal.jsonl").entries if e.source == "terminal"][-2:]
        assert [(e.what, e.error) for e in asked] == [("stop", OLD), ("validate", OLD)]
        assert "lr of model = 0.0001" in control("status") and f"at step {step + 3}" in kept
        stopped(process, run, control)
    finally:
        end(process)


def steer(run, control, step):
    "What a terminal can ask of a run that is paused at this step."
    assert control("set", "lr=1e-4") == f"done at step {step}: lr: 0.001 → 0.0001"
    assert "unknown knob 'learning_rate'" in control("set", "learning_rate=1", status=REFUSED)
    assert control("step", "3") == f"done at step {step}: step n=3; it holds at step {step + 3}"
    assert read_status(run)["step"] == step + 3 and read_status(run)["state"] == "paused"
    assert f"done at step {step + 3}: save" in control("save", "before", "the", "experiment")
    control("set", "lr*=0.5")
    assert control("step", "--no-wait").startswith("sent; its answer will have the id")
    until(lambda: read_status(run)["step"] == step + 4 and read_status(run)["state"] == "paused")
    assert "lr of model = 0.0005" in control("status")
    assert f"(step {step + 3})" in control("restore", "last")
    assert "valid/loss" in control("validate")
    stepping(run, control)
    assert json.loads(control("note", "half way", "--json"))["what"] == "note"


def stepping(run, control):
    "Steps that take longer than one waits, and that somebody else cuts short."
    assert "the steps are not made yet: it is at step" in control("step", "1000000", "--timeout", "0.5", status=UNANSWERED)
    waiting = subprocess.Popen([*CONTROL, run, "step", "1000000", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    until(lambda: [e.what for e in Journal.read(run / "journal.jsonl").entries[-2:]] == ["step", "step"])
    assert waiting.poll() is None
    control("pause")
    told = json.loads(waiting.communicate(timeout=30)[0])
    assert (told["what"], told["end"], waiting.returncode) == ("step", f"it holds at step {read_status(run)['step']}", DONE)
    control("restore", "last")


def killed_while_asked(process, run):
    "Two commands are on their way when the process is killed: one that is waited for, one that isn't any more."
    process.send_signal(signal.SIGSTOP)
    waiting = subprocess.Popen([*CONTROL, run, "stop"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: scan(run / "control"))
    assert typed(run, "validate", "--timeout", "0.1")[0] == UNANSWERED
    process.kill()
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == ABSENT and "killed perhaps" in err
    code, out, _ = typed(run, "status")
    assert code == ABSENT and out.startswith("gone") and "killed perhaps (paused at step" in out
    assert typed(run, "pause")[0] == ABSENT


def stopped(process, run, control):
    "By the end of its epoch, after a file that `echo` might have written."
    (run / "control" / "now").write_text("set lr=0.25\n")
    until(lambda: Journal.read(run / "journal.jsonl").entries[-1].new == 0.25)
    assert "file" in control("journal").splitlines()[-1]
    control("stop", "--after", "epoch")
    state, last, lr = process.communicate(timeout=30)[0].split()
    assert (state, int(last) % 8, float(lr), process.returncode) == ("stopped", 0, 0.25, 0)
    assert "no fit is running (stopped at step" in control("pause", status=ABSENT)
    assert not (run / "control").exists()


# --- what is typed ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, command", [
    ("pause", ("pause", {})),
    ("step 3", ("step", {"n": 3})),
    ("step --n 3 --json", ("step", {"n": 3})),
    ("stop --after epoch", ("stop", {"after": "epoch"})),
    ("set lr=1e-4 player=d", ("set", {"name": "lr", "player": "d", "value": 1e-4, "times": None})),
    ("step --wait", ("step", {"n": 1})),
    ("set --no-wait 'lr*=0.5' --player g", ("set", {"name": "lr", "player": "g", "value": None, "times": 0.5})),
    ("set weights.fit=-2", ("set", {"name": "weights.fit", "player": None, "value": -2.0, "times": None})),
    ("release lr", ("release", {"name": "lr", "player": None})),
    ("save a good one --pin yes", ("save", {"note": "a good one", "pin": True})),
    ("save \"it's here\"", ("save", {"note": "it's here", "pin": None})),
    ("restore 120", ("restore", {"which": 120})),
    ("restore best", ("restore", {"which": "best"})),
    ("note 'lr = 1 is too high'", ("note", {"text": "lr = 1 is too high"})),
    ("note -- --pin is a good option", ("note", {"text": "--pin is a good option"})),
])  # fmt: skip
def test_what_is_typed_is_what_is_meant(line, command):
    assert asked(make_parser().parse_args(["run", *shlex.split(line)])) == command


@pytest.mark.parametrize("line", ["", "fly", "set", "set lr", "set lr=fast", "step 0", "stop --after lunch", "pause now",
                                  "release", "save --pin perhaps", "status now", "--json", "watch --no-wait"])  # fmt: skip
def test_what_is_not_understood_has_its_own_exit_status(line, tmp_path, capsys):
    (tmp_path / "history.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *shlex.split(line)])
    assert ended.value.code == 2 and "usage: python -m trainkit.control" in capsys.readouterr().err


def test_the_help_is_made_from_the_table(capsys):
    for words in ["-h"], *(["x", name, "-h"] for name in COMMANDS):
        with pytest.raises(SystemExit) as ended:
            main([*words])
        said = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        for name, spec in COMMANDS.items() if words == ["-h"] else [(words[1], COMMANDS[words[1]])]:
            assert name in said and spec.help in said
            assert words == ["-h"] or all(key.lower() in said.lower() for key in spec.takes if key != "times")


def test_a_command_waits_for_no_torch():
    code = "import sys, trainkit.control, trainkit.attached; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


# --- endings ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def listening(tmp_path):
    "A mailbox that answers in a thread."
    journal, stop = Journal(tmp_path / "journal.jsonl"), threading.Event()

    def entry(command, **more):
        return journal.add(Entry(command.name, command.values, 7, source=command.source, id=command.id, **more))

    def send(command):
        if command.name != "resume":  # which has no answer
            command.done(entry(command))
        if command.name == "stop":
            stop.set()

    def listen():
        while not stop.wait(0.005):
            mail.poll()
        mail.close()

    def refuse(command, reason):
        entry(command, error=reason)

    mail = Mailbox(tmp_path, send, refuse, lambda: {"state": "training", "step": 7})
    mail.every = 0.01
    thread = threading.Thread(target=listen)
    thread.start()
    yield tmp_path
    stop.set()
    thread.join()


def test_each_ending_has_its_exit_status(listening, tmp_path_factory, capsys):
    nowhere = tmp_path_factory.mktemp("nowhere")
    assert main([str(listening), "pause"]) == DONE
    assert main([str(listening), "pause", "--no-wait", "--json"]) == DONE
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "done at step 7: pause"
    until(lambda: Journal.read(listening / "journal.jsonl").entries[-1].id == json.loads(out[1])["id"])
    assert main([str(listening), "resume", "--timeout", "0.05"]) == UNANSWERED
    assert main([str(nowhere / "x"), "pause"]) == ABSENT
    err = capsys.readouterr().err
    assert "it waits for the next step" in err and f"no run lies in {nowhere / 'x'}" in err
    assert main([str(listening), "status", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["step"] == 7
    assert main([str(listening), "journal", "--json"]) == DONE
    assert [json.loads(line)["what"] for line in capsys.readouterr().out.splitlines()] == ["pause", "pause"]


def test_watching_in_a_terminal(listening):
    def terminal():
        words = [*CONTROL[1:], str(listening), "watch"]
        return pexpect.spawn(CONTROL[0], words, cwd=str(ROOT), encoding="utf-8", timeout=20, dimensions=(24, 30))

    watch = terminal()
    assert termios.tcgetattr(watch.child_fd)[3] & termios.ICANON  # a key is given out with the line that it is in
    watch.expect("p pause · r resume")
    watch.expect("training  step 7")
    assert not termios.tcgetattr(watch.child_fd)[3] & termios.ICANON
    for key, seen in ("p", "terminal: done at step .*pause"), (" ", "step n=1"), ("s", "save"), ("?", ""), ("v", "validate"):
        watch.send(key)
        watch.expect(seen)
    assert main([str(listening), "note", "from elsewhere"]) == DONE
    watch.expect("note text=from elsewhere")
    shown = [line for line in re.split(r"[\r\n]|\x1b\[K", watch.before) if "training" in line]
    assert shown and max(map(len, shown)) < 30
    watch.send("q")
    until(lambda: termios.tcgetattr(watch.child_fd)[3] & termios.ICANON)
    watch.expect(pexpect.EOF)
    watch.close()
    assert watch.exitstatus == DONE
    watch = terminal()
    watch.expect("training")
    watch.send("x")
    watch.expect("no fit is running")
    watch.expect(pexpect.EOF)
    watch.close()
    assert watch.exitstatus == DONE


def test_a_run_by_its_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[trainkit]\nruns = all\n")
    for name in "digits", "faces":
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "history.jsonl").touch()
    write_status(tmp_path / "all" / "digits", {"state": "finished", "step": 9})
    assert main(["digits", "status"]) == ABSENT and "finished  step 9" in capsys.readouterr().out
    assert main(["digit", "pause"]) == ABSENT and "there is: digits, faces" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(listening):
    for _ in range(300):
        Journal(listening / "journal.jsonl").add(Entry("note", {"text": "x" * 900}))
    command = f"{shlex.quote(sys.executable)} -m trainkit.control {listening} journal --json | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 0 and json.loads(done.stdout)["what"] == "note"


# --- what is shown ----------------------------------------------------------------------------------------------------

def test_a_status_says_how_an_interrupted_fit_goes_on():
    line = "interrupted at step 9 (epoch 2 of 3), saved as 9; learn.fit() goes on"
    assert report({"state": "interrupted", "step": 9, "ending": line}).splitlines()[1:] == [f"  {line}"]


@pytest.mark.parametrize("status", [
    {},
    {"state": "training", "steps": None, "rate": None, "eta": None, "losses": None, "controls": None},
    {"state": "gone", "losses": {"loss": "nan"}, "rate": "inf", "eta": "nan", "memory": "x", "run": 3},
])  # fmt: skip
def test_a_status_that_says_little_can_be_shown(status):
    assert summary(status) and report(status)


def test_keys_need_a_terminal():
    with open(os.devnull) as nothing, single_keys(nothing) as key:
        assert key(0) == ""
    assert {*KEYS.values()} <= {*COMMANDS} and "q" not in KEYS
