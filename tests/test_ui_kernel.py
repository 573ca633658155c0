"The views in a real kernel, under nbclient and papermill, and on a real terminal."
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

TESTS = Path(__file__).parent
SETUP = f"""
import sys, time, warnings
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
import torch
from torch import nn
from standin import Run
from trainkit.learner import Learner
from trainkit.callback import On
from trainkit.ui.front import front

def watched(**kw):
    run = Run(**kw)
    run.cbs.add(*front(run))
    return run

def line(seconds=0.0):
    torch.manual_seed(0)
    x = torch.randn(64, 1)
    batches = [(x[i:i + 1], 3 * x[i:i + 1]) for i in range(64)]
    return Learner(nn.Linear(1, 1), batches, "mse", cbs=[On("before_batch", lambda learn: time.sleep(seconds))])
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


def environment():
    "Nobody says where we are: the kernel has to find out."
    return {k: v for k, v in os.environ.items() if not k.startswith("TRAINKIT_")} | {"OMP_NUM_THREADS": "1"}


class Outputs:
    "What a front end would make of a cell's messages."

    def __init__(self):
        self.messages, self.opened, self.closed, self.shown, self.streams, self.error = [], [], [], {}, "", None

    def receive(self, msg):
        kind, content = msg["header"]["msg_type"], msg["content"]
        size = len(json.dumps(content, default=str)) + sum(len(b) for b in msg.get("buffers", ()))
        if kind in ("display_data", "update_display_data"):
            self.messages.append((kind, size))
            self.shown.setdefault(content["transient"]["display_id"], []).append(content["data"])
        elif kind == "stream": self.streams += content["text"]
        elif kind == "error": self.error = content["ename"]
        elif kind == "comm_open": self.opened.append(content["comm_id"])
        elif kind == "comm_close": self.closed.append(content["comm_id"])
        if kind.startswith("comm"): self.messages.append((kind, size))

    @property
    def last(self): return [bundles[-1] for bundles in self.shown.values()]


class Kernel:
    def __init__(self, manager, client): self.manager, self.client = manager, client

    def run(self, code, watched=True, during=None):
        "Execute as JupyterLab does (somebody can answer questions), or as a program would."
        out, started = Outputs(), time.perf_counter()
        todo = [during] if during else []

        def hook(msg):
            out.receive(msg)
            if todo and msg["header"]["msg_type"] == "update_display_data": todo.pop()(self)
        reply = self.client.execute_interactive(textwrap.dedent(code), allow_stdin=watched, output_hook=hook, timeout=60)
        out.seconds, out.status = time.perf_counter() - started, reply["content"]["status"]
        return out


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3", env=environment())
    k = Kernel(manager, client)
    first = k.run(SETUP)
    assert first.status == "ok", first.error
    yield k
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def check_static(out, word, watched=True):
    "A last word without bars, then curves and samples as pictures that need nobody: in one of a dashboard, else in two."
    bars, *pictures = out.last
    assert len(pictures) == (1 if watched else 2)
    assert f'class="end {word}"' in bars["text/html"] and "<progress" not in bars["text/html"]
    assert "<style>" in bars["text/html"] and bars["text/plain"].splitlines()[-1].startswith(word)
    assert set(bars) == {"text/html", "text/plain"}
    for picture in pictures:
        assert set(picture) == {"image/png", "text/plain"} and len(picture["image/png"]) > 100


@pytest.mark.parametrize("watched", [True, False])
def test_what_stays_is_static(kernel, watched):
    out = kernel.run("watched(batches=40, seconds=0.02).fit(2)", watched)
    assert out.status == "ok"
    check_static(out, "finished", watched)
    assert out.streams == ""
    live = [[WIDGET in bundle for bundle in bundles] for bundles in out.shown.values()]
    if not watched:  # widgets only where they can be seen
        assert not any(map(any, live)) and out.opened == []
        assert all("image/png" in bundles[0] for bundles in list(out.shown.values())[1:])
    else:
        assert live == [[False, True, False], [False, False]]
        assert "image/png" in list(out.shown.values())[0][1]  # saved while it runs: a picture


def test_messages_and_bytes_do_not_grow_with_steps(kernel):
    "A hundred times the steps cost no more than the time they take, beside what the widgets cost to make."
    def live(out): return [size for kind, size in out.messages if kind in ("comm_msg", "update_display_data")]

    kernel.run("watched(batches=2).fit(1)")
    made = len(live(kernel.run("watched(batches=2).fit(1)")))
    for steps in (50, 5000):
        out = kernel.run(f"watched(batches={steps}, seconds={1.5 / steps}).fit(1)")
        assert len(live(out)) <= made + 10 * out.seconds, (steps, out.seconds, made, len(live(out)))
        assert sum(live(out)) < 100_000 * out.seconds + 600_000, (steps, out.seconds, sum(live(out)))


def test_many_epochs_cost_no_more(kernel):
    made = len(kernel.run("watched(batches=2).fit(1)").messages)
    out = kernel.run("watched(batches=2).fit(500)")
    assert len(out.messages) <= made + 10 * out.seconds + 20
    assert max(size for kind, size in out.messages) < 400_000


def test_every_cell_has_its_own_display_with_styles(kernel):
    out = kernel.run("learn = line(); learn.fit(epochs=1); learn.fit(epochs=1)")
    bars = [b for b in out.last if "text/html" in b and WIDGET not in b]
    assert len(bars) == 2 and all("<style>" in b["text/html"] for b in bars)
    again = kernel.run("learn.fit(epochs=1)")
    assert "<style>" in again.last[0]["text/html"] and not set(again.shown) & set(out.shown)


def test_a_failure_is_shown_and_raised(kernel):
    out = kernel.run("watched(batches=20, seconds=0.02).fit(2, end=ValueError('bad <batch>'), at=15)")
    assert out.error == "ValueError"
    check_static(out, "failed")
    assert "ValueError: bad &lt;batch&gt;" in out.last[0]["text/html"]


def test_stopped(kernel):
    out = kernel.run("watched(batches=20).fit(2, end='stopped', at=15)")
    check_static(out, "stopped")
    assert "stopped at step 15 of 40" in out.last[0]["text/plain"]


def test_interrupted_by_the_stop_button_and_continued(kernel):
    out = kernel.run("learn = line(seconds=0.03); learn.fit(epochs=2)", during=lambda k: k.manager.interrupt_kernel())
    assert out.status == "ok" and out.streams == ""  # the cell returns
    assert out.last[0]["text/plain"].startswith("interrupted at step")
    assert re.search(r"interrupted at step \d+ .* learn\.fit\(\) goes on", out.last[0]["text/html"])
    assert "<progress" not in out.last[0]["text/html"] and WIDGET not in out.last[1]
    after = kernel.run("learn.remove(On); learn.fit(); print(learn.step)")
    assert after.streams.strip() == "128" and after.last[0]["text/plain"].splitlines()[-1].startswith("finished · step 128")


def test_without_ipywidgets(kernel):
    out = kernel.run("""
        import sys
        kept, sys.modules['ipywidgets'] = sys.modules.get('ipywidgets'), None
        try: watched(batches=20, seconds=0.02).fit(2)
        finally:
            del sys.modules['ipywidgets']
            if kept is not None: sys.modules['ipywidgets'] = kept""")
    check_static(out, "finished", watched=False)
    assert out.opened == [] and "UserWarning: not installed: ipywidgets" in out.streams


def test_weights_do_not_depend_on_being_watched(kernel):
    out = kernel.run("""
        def trained(**kw):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.2), nn.Conv2d(3, 1, 1))
            x = torch.rand(32, 1, 8, 8)
            learn = Learner(net, [(x[i:i + 4], x[i:i + 4]) for i in range(0, 32, 4)], "mse", seed=3, **kw)
            learn.fit(epochs=3)
            return torch.cat([p.detach().flatten() for p in net.state_dict().values()])

        from trainkit.ui.samples import Samples, compare
        x = torch.rand(4, 1, 8, 8)
        print(torch.equal(trained(front='none'), trained(cbs=[Samples(compare(x, x), every=1e-6)])))""")
    assert out.streams.strip() == "True", out.error


# ---- executed by programs

def notebook():
    cells = [nbformat.v4.new_code_cell(c) for c in (SETUP, "line().fit(epochs=2)", "watched(batches=10).fit(2)")]
    kernel = {"name": "python3", "display_name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def check_executed(nb):
    first, fit, gan = nb.cells[-3:]
    assert first.outputs == [] and "widgets" not in nb.metadata  # no widget state for nobody
    assert [o.output_type for o in fit.outputs] == ["display_data"] * 2
    assert [o.output_type for o in gan.outputs] == ["display_data"] * 3
    assert 'class="end finished"' in "".join(gan.outputs[0].data["text/html"])
    assert "<progress" not in "".join(gan.outputs[0].data["text/html"])
    assert all("image/png" in o.data for o in gan.outputs[1:])


def test_nbclient(monkeypatch):
    from nbclient import NotebookClient
    for name in [n for n in os.environ if n.startswith("TRAINKIT_")]: monkeypatch.delenv(name)
    nb = notebook()
    NotebookClient(nb, timeout=60, kernel_name="python3").execute()
    check_executed(nb)


def test_papermill(monkeypatch, tmp_path):
    papermill = pytest.importorskip("papermill")
    for name in [n for n in os.environ if n.startswith("TRAINKIT_")]: monkeypatch.delenv(name)
    nbformat.write(notebook(), tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False)
    check_executed(nbformat.read(tmp_path / "out.ipynb", 4))


# ---- on a terminal

def screen(text):
    "The lines a terminal shows: carriage returns overwrite."
    out = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells = []
        for part in line.split("\r"): cells[: len(part)] = part
        out.append("".join(cells).rstrip())
    return [line for line in out if line]


def spawn(tmp_path, code, columns=80):
    pexpect = pytest.importorskip("pexpect")
    (tmp_path / "train.py").write_text(SETUP + textwrap.dedent(code))
    return pexpect.spawn(sys.executable, [str(tmp_path / "train.py")], env=environment(), encoding="utf8",
                         dimensions=(24, columns), timeout=60, cwd=str(tmp_path))


def test_terminal(tmp_path):
    import pexpect
    child = spawn(tmp_path, "line(seconds=0.01).fit(epochs=2)")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert child.before.count("█") and max(map(len, re.split(r"[\r\n]+", child.before))) < 80
    assert [line.split(" · ")[0] for line in screen(child.before)] == ["epoch 1/2", "epoch 2/2", "finished"]


def test_terminal_interrupted(tmp_path):
    import pexpect
    child = spawn(tmp_path, "line(seconds=0.05).fit(epochs=9)")
    child.expect("steps/s")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus != 0 and "KeyboardInterrupt" in child.before  # in a script it travels on
    assert re.search(r"interrupted at step \d+ \(epoch 1 of 9\)", child.before)


def test_piped(tmp_path):
    import subprocess
    (tmp_path / "train.py").write_text(SETUP + "line().fit(epochs=2)")
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout
    assert [line.split(" · ")[0] for line in done.stdout.splitlines()] == ["epoch 1/2", "epoch 2/2", "finished"]
