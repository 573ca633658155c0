"Signals that carry commands: what they may be, that none gets lost or does harm, and that nothing of it stays."

import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from trainkit.commands import CommandQueue
from trainkit.signals import OTHERS, Signals, accepted_signals, read_signals

ROOT = Path(__file__).resolve().parent.parent
SAVE = ("save", {"note": "", "pin": None})


def raised(name):
    os.kill(os.getpid(), getattr(signal, name))


def handlers():
    return {name: signal.getsignal(number) for name, number in signal.Signals.__members__.items()}


@pytest.fixture(autouse=True)
def nothing_stays():
    before = handlers()
    yield
    assert handlers() == before


# --- the plan ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("plan, carried", [
    ("SIGUSR1=save", {"SIGUSR1": SAVE}),
    ("  SIGUSR1 = save,  SIGTERM=stop after=epoch\n", {"SIGUSR1": SAVE, "SIGTERM": ("stop", {"after": "epoch"})}),
    ("SIGTERM=stop; SIGUSR2=step 3", {"SIGTERM": ("stop", {"after": "step"}), "SIGUSR2": ("step", {"n": 3})}),
    ({"SIGHUP": "note 'the line is gone'"}, {"SIGHUP": ("note", {"text": "the line is gone"})}),
    ("", {}),
    ({}, {}),
])  # fmt: skip
def test_a_plan_says_what_each_signal_carries(plan, carried):
    assert read_signals(plan) == carried


@pytest.mark.parametrize("plan, said", [
    ("SIGINT=stop", "'SIGINT' can't carry a command"),
    ("SIGKILL=stop", "can't carry"),
    ("SIGUSER1=save", "nearest first: SIGUSR1"),
    ("USR1=save", "received 'USR1=save'"),
    ("save", "given as SIGUSR1=save"),
    ("SIGUSR1=save SIGUSR1=stop", "each signal carries one"),
    ("SIGUSR1=sav", "SIGUSR1: no command 'sav'; did you mean save"),
    ("SIGUSR1=", "SIGUSR1: "),
    ("SIGUSR1=set lr=fast", "SIGUSR1: set: value takes a finite number"),
    ({"sigusr1": "save"}, "nearest first: "),
])  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused_before_anything_changes(plan, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Signals(plan, print)


def test_what_others_need_is_left_to_them():
    assert not {*accepted_signals()} & {*OTHERS} and {"SIGUSR1", "SIGUSR2", "SIGTERM", "SIGHUP"} <= {*accepted_signals()}


# --- listening --------------------------------------------------------------------------------------------------------

def test_commands_are_sent_at_the_poll_in_order_and_none_is_lost():
    sent = []
    with Signals("SIGUSR1=save SIGUSR2=step 2", sent.append) as heard:
        for name in "SIGUSR1", "SIGUSR2", "SIGUSR1":
            raised(name)
        assert not sent
        heard.poll()
        assert [(c.name, c.source) for c in sent] == [("save", "signal"), ("step", "signal"), ("save", "signal")]
        heard.poll()
        assert len(sent) == 3 and len({c.id for c in sent}) == 3
        raised("SIGUSR1")  # in the last step
    assert len(sent) == 4
    heard.close()
    assert len(sent) == 4


def test_a_signal_while_the_queue_is_locked_waits_for_nobody():
    queue = CommandQueue()
    with Signals("SIGUSR1=save", queue.put) as heard:
        with queue._changed:  # the thread that handles the signal holds the lock
            raised("SIGUSR1")
        assert not queue
        heard.poll()
        assert [c.name for c in queue.pending] == ["save"]


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_handlers_are_put_back_however_it_ends(before, error):
    old = {name: signal.signal(getattr(signal, name), before) for name in ("SIGUSR1", "SIGTERM")}
    try:
        with pytest.raises(error or ZeroDivisionError):
            with Signals("SIGUSR1=save SIGTERM=stop", print):
                assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL)
                raise (error or ZeroDivisionError)
        assert {signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)} == {before}
    finally:
        for name, handler in old.items():
            signal.signal(getattr(signal, name), handler)


def test_a_handler_set_by_somebody_else_meanwhile_stays():
    theirs = lambda number, frame: None  # noqa: E731
    with Signals("SIGUSR1=save SIGUSR2=stop", print):
        signal.signal(signal.SIGUSR1, theirs)
    assert signal.signal(signal.SIGUSR1, signal.SIG_DFL) is theirs
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_one_fit_inside_another():
    outer, inner = [], []
    with Signals("SIGUSR1=save", outer.append):
        with Signals("SIGUSR1=stop", inner.append):
            raised("SIGUSR1")
        raised("SIGUSR1")
    assert ([c.name for c in outer], [c.name for c in inner]) == (["save"], ["stop"])


def test_what_the_learner_refuses_is_written_down_and_nothing_comes_out():
    def refuse(command, reason):
        refused.append((command.name, reason))
        raise OSError("no journal")

    refused = []
    with Signals("SIGUSR1=set lr=1", lambda command: {}["lr"], refuse) as heard:
        raised("SIGUSR1")
        heard.poll()
    assert refused == [("set", "'lr'")]


def test_another_thread_goes_without_and_says_so():
    def listen():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with Signals("SIGUSR1=save", print):
                seen.extend([signal.getsignal(signal.SIGUSR1), *(str(w.message) for w in said)])

    seen = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen[0] == signal.SIG_DFL and "main thread alone" in seen[1] and len(seen) == 2
    with Signals("", print):
        pass


# --- processes --------------------------------------------------------------------------------------------------------

FORKED = """
import os, signal, sys, time
from trainkit.signals import Signals
ready, tell = os.pipe()
with Signals("SIGTERM=stop", print):
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)  # Python drops what comes while it forks
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""
STOPPED = """
import sys, time
from trainkit.commands import CommandQueue
from trainkit.signals import Signals
queue = CommandQueue()
with Signals("SIGUSR1=note by-signal SIGTERM=stop", queue.put) as heard:
    print("ready", flush=True)
    done = []
    while "stop" not in done:
        heard.poll()
        if command := queue.take(0, 0): done.append(command.name)
        time.sleep(0.001)
print(*done, flush=True)
time.sleep(60)
"""


def test_a_forked_process_is_not_deaf():
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(int(signal.SIGTERM))], done.stderr


def test_a_process_stops_in_good_order_and_is_mortal_afterwards():
    running = subprocess.Popen([sys.executable, "-c", STOPPED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGUSR1)
    running.send_signal(signal.SIGTERM)
    assert {*running.stdout.readline().split()} == {"note", "stop"}
    running.terminate()
    assert running.wait(30) == -signal.SIGTERM
    running.stdout.close()
