"Files that arrive in a run's control folder: whole ones are done once and in order, all others are refused and hurt nobody."

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainkit import mailbox
from trainkit.commands import COMMANDS, Command, as_line, check_command, parse
from trainkit.journal import Entry
from trainkit.mailbox import (
    LATE,
    LIMIT,
    OLD,
    REPLACED,
    Mailbox,
    NotListening,
    born,
    machine,
    post,
    post_command,
    read_command,
    read_status,
    silence,
    write_status,
)

ROOT = Path(__file__).resolve().parent.parent
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)
KINDS = {"text": TEXT, "count": st.integers(1, 10**6), "number": st.floats(allow_nan=False, allow_infinity=False),
         "flag": st.booleans()}


@st.composite
def commands(draw, text=TEXT):
    "Any command of the table with values that it takes."
    kinds = {**KINDS, "text": text, "place": st.one_of(text, st.integers(1, 10**6))}
    name = draw(st.sampled_from(sorted(COMMANDS)))
    takes = {key: value.kind for key, value in COMMANDS[name].takes.items()}
    values = {key: draw(kinds[kind] if kind in kinds else st.sampled_from(kind.split("|"))) for key, kind in takes.items()}
    if name == "set":
        values["value" if draw(st.booleans()) else "times"] = None
    return name, check_command(name, values)


class Learner:
    "Takes commands at once, and remembers what became of them."

    def __init__(self, run):
        self.run, self.sent, self.refused = Path(run), [], []

    def send(self, command):
        if command.name == "sample":
            raise ValueError("this learner draws no samples")
        self.sent.append(command)

    def refuse(self, command, reason):
        self.refused.append((command.values.get("name", command.name), reason))

    def listen(self, **parts):
        kinds = {"send": self.send, "refuse": self.refuse, "status": lambda: {"state": "training", "step": 7}, **parts}
        mail = Mailbox(self.run, **kinds)
        mail.every = 0
        return mail


@pytest.fixture
def learn(tmp_path):
    return Learner(tmp_path)


def names(learn):
    return [command.name for command in learn.sent]


# --- what a file says -------------------------------------------------------------------------------------------------

@given(commands())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_posted_is_what_is_read(tmp_path, command):
    (tmp_path / "control").mkdir(exist_ok=True)
    sent = Command(*command, source="attached")
    path = post_command(tmp_path, sent)
    read = read_command(path.read_bytes())
    assert (read.name, read.values, read.source, read.id) == (sent.name, sent.values, "attached", sent.id)
    path.unlink()


@given(commands(text=st.from_regex(r"[a-z][a-z0-9_. ]{0,20}[a-z]", fullmatch=True)))
@settings(deadline=None)
def test_what_is_typed_is_what_is_meant(command):
    assert parse(as_line(*command)) == command
    read = read_command(as_line(*command).encode() + b"\n")
    assert (read.name, read.values) == command


KEYS = st.sampled_from(["name", "values", "id", "source", "n"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner))  # fmt: skip
LINES = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)


@given(st.binary(max_size=200) | LINES.map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"name": "pause", "name": []}')
@example(b"[" * 5000)
@example(b'{"name": "note", "values": {"text": ' + b"9" * 5000 + b"}}")
@settings(deadline=None)
def test_anything_is_a_command_or_refused(raw):
    try:
        command = read_command(raw)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        assert check_command(command.name, command.values) == command.values
        json.dumps(command.values, ensure_ascii=False, allow_nan=False).encode()


def test_a_command_too_long_is_not_posted(tmp_path):
    (tmp_path / "control").mkdir()
    with pytest.raises(ValueError, match="too long"):
        post(tmp_path, "note", text="x" * LIMIT)
    assert not [*(tmp_path / "control").iterdir()]


# --- order and number -------------------------------------------------------------------------------------------------

WRITER = """
import sys
from trainkit.mailbox import post
sys.stdin.readline()
for i in range(60): post(sys.argv[1], "note", source=sys.argv[2], text=str(i))
"""


def writer(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_writers_lose_nothing_and_keep_their_order(learn):
    mail = learn.listen()
    writers = [writer(WRITER, learn.run, name) for name in ("one", "two")]
    for process in writers:
        process.stdin.write("go\n")
        process.stdin.flush()
    while any(process.poll() is None for process in writers):
        mail.poll()
    for process in writers:
        process.communicate()
    for _ in range(3):
        mail.poll()
    for name in ("one", "two"):
        assert [int(c.values["text"]) for c in learn.sent if c.source == name] == [*range(60)]
    assert len(learn.sent) == 120 and not learn.refused
    assert len({c.id for c in learn.sent}) == 120


def test_a_writer_that_is_killed_leaves_nothing_half_done(learn):
    mail = learn.listen()
    code = WRITER.replace("range(60)", "iter(int, 1)").replace("str(i)", "'x' * 9000")
    process = writer(code, learn.run, "killed")
    process.stdin.write("go\n")
    process.stdin.flush()
    while len(learn.sent) < 20:
        mail.poll()
    process.kill()
    process.communicate()
    for _ in range(500):
        mail.poll()
    assert not learn.refused and {len(c.values["text"]) for c in learn.sent} == {9000}
    draft = mail.folder / f".{1:019d}-000000-abc.json"
    draft.write_text('{"name": "sto')
    os.utime(draft, (1, 1))
    learn.listen()
    assert not draft.exists()


def test_commands_of_one_writer_keep_their_order_when_the_clock_is_put_back(learn, monkeypatch):
    mail = learn.listen()
    ids = [post(learn.run, "pause")]
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    ids += [post(learn.run, "resume") for _ in range(5)]
    mail.poll()
    assert [c.id for c in learn.sent] == ids


def test_a_flood_is_taken_a_few_at_a_time_and_in_order(learn):
    mail = learn.listen()
    ids = [post(learn.run, "note", text=str(i)) for i in range(150)]
    mail.poll()
    assert [c.id for c in learn.sent] == ids[: mail.at_once]
    mail.poll()
    mail.poll()
    assert [c.id for c in learn.sent] == ids


def test_only_one_of_two_mailboxes_takes_a_command(learn, tmp_path):
    mail, other = learn.listen(), learn.listen()
    for _ in range(20):
        post(learn.run, "pause")
        other.poll()
        mail.poll()
    assert len(learn.sent) == len({c.id for c in learn.sent}) == 20


# --- what is refused --------------------------------------------------------------------------------------------------

def test_what_lay_there_before_is_refused_and_what_comes_too_late(learn):
    box = learn.run / "control"
    box.mkdir()
    old = post(learn.run, "stop")
    (box / "now").write_text("set lr=9")  # even half a command is an old one
    (box / ".taken-1-now").write_text("pause\n")  # its reader was killed before it could say so
    mail = learn.listen()
    assert {reason for _, reason in learn.refused} == {OLD} and len(learn.refused) == 3 and not [*box.iterdir()]
    post(learn.run, "save")
    (box / "now").write_text("pause")
    mail.close()
    assert not learn.sent and old
    assert ("save", LATE) in learn.refused and len(learn.refused) == 5
    assert not box.exists() and silence(read_status(learn.run)).startswith("no fit is running")
    with pytest.raises(NotListening):
        post(learn.run, "pause")


def test_a_file_that_is_still_being_written_is_waited_for(learn):
    mail = learn.listen()
    with open(mail.folder / "now", "w") as file:
        for part in "set ", "lr=1e", "-4":
            file.write(part)
            file.flush()
            mail.poll()
        assert not learn.sent and not learn.refused
        file.write("\n")
    mail.poll()
    assert [c.values["value"] for c in learn.sent] == [1e-4]


def test_a_file_without_a_newline_is_whole_after_a_while(learn):
    mail = learn.listen()
    (mail.folder / "now").write_text("pause")
    mail.poll()
    mail.poll()
    assert not learn.sent  # it might grow
    mail.settle = 0
    mail.poll()
    assert names(learn) == ["pause"]
    (mail.folder / "now").touch()
    mail.poll()
    assert "0 lines" in learn.refused[0][1]


def test_what_is_no_plain_small_file_is_refused_once(learn):
    mail = learn.listen()
    (mail.folder / "folder").mkdir()
    (mail.folder / "link").symlink_to("/dev/zero")
    os.mkfifo(mail.folder / "pipe")  # opening it would wait for a writer
    (mail.folder / "big").write_bytes(bytes(3 * LIMIT))
    with open(os.fsencode(mail.folder) + b"/\xff\xfe", "w") as file:
        file.write("fly\n")
    for _ in range(4):
        mail.poll()
    post(learn.run, "pause")
    mail.poll()
    assert names(learn) == ["pause"]
    refused = dict(learn.refused)
    assert len(learn.refused) == len(refused) == 5
    assert "at most" in refused["big"] and "no command 'fly'" in refused["??"]
    assert {refused[name] for name in ("folder", "link", "pipe")} == {"a control file is a plain file"}
    json.dumps(refused).encode()


def test_what_is_no_command_is_never_deleted(learn):
    box = learn.run / "control"  # the control group of an experiment
    box.mkdir()
    files = {"a.csv": b"1,2\n3,4\n", "notes": b"set aside\n", "raw.bin": bytes(10**5), "a.json": b'{"name": "Ada"}', "empty": b""}
    for name, content in files.items():
        (box / name).write_bytes(content)
    mail = learn.listen()
    for _ in range(3):
        mail.poll()
    assert not learn.refused  # nobody asked for anything
    (box / "late.csv").write_text("5,6\n")
    for _ in range(3):
        mail.poll()
    assert [name for name, _ in learn.refused] == ["late.csv"]
    (box / "notes").write_text("pause\n")
    mail.poll()
    mail.close()
    assert names(learn) == ["pause"] and len(learn.refused) == 1
    del files["notes"]
    assert {p.name: p.read_bytes() for p in box.iterdir()} == {**files, "late.csv": b"5,6\n"}


def test_a_link_to_another_folder_is_not_listened_to(learn, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "a").write_text("pause\n")
    (learn.run / "control").symlink_to(other)
    with pytest.warns(UserWarning, match="is a link to somewhere else"):
        mail = learn.listen()
        mail.poll()
        mail.close()
    assert not learn.sent and not learn.refused and (other / "a").exists()


def test_a_refusal_by_the_learner_is_written_down(learn):
    mail = learn.listen()
    (mail.folder / "now").write_text("sample\n")
    mail.poll()
    assert learn.refused == [("sample", "this learner draws no samples")]

    def answers(command):
        command.done(Entry(command.name, error="I told you myself"))
        raise ValueError("no")

    mail._send = answers
    post(learn.run, "pause")
    mail.poll()
    assert len(learn.refused) == 1


def test_a_command_that_gave_way_to_a_later_one_is_answered(learn):
    mail = learn.listen()
    post(learn.run, "set", name="lr", value=1)
    mail.poll()
    learn.sent[0].done(None)  # what the queue does
    mail.poll()
    assert learn.refused == [("lr", REPLACED)]


# --- a folder in which things happen ----------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_written_does_nothing_twice(learn, monkeypatch):
    mail = learn.listen()
    post(learn.run, "pause")

    def rename(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(mailbox.os, "rename", rename)
        patch.setattr(mailbox.os, "replace", rename)
        mail._tell_at = 0
        for _ in range(5):
            mail.poll()
    assert not learn.sent and not learn.refused
    assert sorted(str(w.message).split(";")[0].split()[-1] for w in said) == ["read", "written"]
    mail.poll()
    assert names(learn) == ["pause"]


def test_a_run_that_is_deleted_and_comes_back(learn):
    learn.run /= "run"
    learn.run.mkdir()
    mail = learn.listen()
    for path in sorted(learn.run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    learn.run.rmdir()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mail._tell_at = 0
        for _ in range(5):
            mail.poll()
    assert len(said) == 2 and not learn.run.exists()  # it isn't made again
    learn.run.mkdir()
    mail.poll()
    post(learn.run, "pause")
    mail.poll()
    assert names(learn) == ["pause"]
    mail.close()


@pytest.mark.parametrize("broken", ["send", "refuse", "status"])
def test_nothing_comes_out_of_a_poll(learn, broken):
    def fail(*args):
        raise KeyError(broken)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mail = learn.listen(**{broken: fail})
        (mail.folder / "a").write_text("fly\n")
        (mail.folder / "b").write_text("pause\n")
        for _ in range(3):
            mail._tell_at = 0
            mail.poll()
        mail.close()
    if broken != "send":
        assert names(learn) == ["pause"]
    else:
        assert len(learn.refused) == 2


# --- who is there -----------------------------------------------------------------------------------------------------

def here(pid, other=()):
    return {"pid": pid, "born": born(pid), "machine": machine(), "time": time.time(), "listening": True, "state": "training",
            "step": 3, **dict(other)}  # fmt: skip


def test_a_process_is_there_until_it_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status = here(process.pid)
    assert silence(status) == ""
    assert "killed perhaps (training at step 3)" in silence({**status, "born": "12"})  # its number was given to another one
    process.send_signal(signal.SIGKILL)
    while born(process.pid) is not None:  # dead, and not yet waited for
        time.sleep(0.01)
    assert f"process {process.pid} ended without a word" in silence(status)
    process.wait()
    assert silence(status)


@pytest.mark.parametrize("odd", [{"pid": None}, {"pid": "1"}, {"pid": -1}, {"born": 7}, {"listening": 0},
                                 {"machine": "x", "time": 0}, {"machine": None, "time": "now"}])  # fmt: skip
def test_a_status_that_makes_no_sense_is_nobodys(odd):
    assert not silence(here(os.getpid())) and silence(here(os.getpid(), odd)) and silence({})


def test_a_status_is_there_whole_or_not_at_all(tmp_path):
    code = "import sys\nfrom trainkit.mailbox import write_status\nwhile True: write_status(sys.argv[1], {'state': 'x' * 50000})"
    process = writer(code, tmp_path)
    while not read_status(tmp_path):
        time.sleep(0.01)
    assert {len(read_status(tmp_path).get("state", "")) for _ in range(300)} == {50000}
    process.kill()
    process.communicate()
    write_status(tmp_path, {"state": float("nan"), "controls": (1, 2), Path: {3}})
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "nan"


def test_a_status_is_written_at_most_once_a_second_and_after_each_answer(learn):
    told = []
    mail = learn.listen(status=lambda: told.append(1) or {})
    for _ in range(50):
        mail.poll()
    assert len(told) == 1
    post(learn.run, "pause")
    mail.poll()
    learn.sent[0].done(None)
    mail.poll()
    assert len(told) == 2
