"The pump in real kernels: what a front end sends while a cell runs, and what it gets back."
import os
import queue
import subprocess
import sys
import textwrap
import threading
from collections import defaultdict
from pathlib import Path

import ipykernel
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).resolve().parent.parent
SETUP = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import comm, ipykernel
from trainkit import pump as module
from trainkit.pump import Pump, _offers

seen, ran, threads, done = [], [], [], []
answers = {{}}

def said(text):
    "Printed in one piece: `print` writes its line's end by itself, and a message may go out before it."
    sys.stdout.write(text + chr(10))
    sys.stdout.flush()

def clicked(message):
    data = message["content"]["data"]
    threads.append(threading.current_thread().name)
    if data == "stop": done.append(data)
    elif data in answers: answers[data]()
    else: seen.append(data)

def polling(until=lambda: done, every=0.0, close=True):
    "A training loop, until somebody says stop."
    pump, end = Pump.here(), time.monotonic() + 20
    try:
        while not until():
            if time.monotonic() > end: raise TimeoutError
            pump.poll()
            time.sleep(every)
    finally:
        if close: pump.close()
    done.clear()

button = comm.create_comm(target_name="button")
button.on_msg(clicked)
shell = get_ipython()
kernel = shell.kernel
stream, reply = module._main_shell(kernel)

def state():
    "What must be afterwards as it was before."
    import signal
    hooks = [f for registered in shell.events.callbacks.values() for f in registered if hasattr(f, "__self__")]
    return (stream._recv_callback, signal.getsignal(signal.SIGINT), [f for f in hooks if isinstance(f.__self__, Pump)],
            Pump._innermost)
"""


class Kernel:
    "A front end: sends what it likes, and sorts what comes by the message it answers."

    def __init__(self):
        self.manager, self.client = start_new_kernel(kernel_name="python3", env=os.environ | {"TRAINKIT_WHERE": "notebook"})
        self.replies, self.outputs, self.iopub = {}, defaultdict(list), []
        assert self.value("ipykernel.__version__", SETUP) == repr(ipykernel.__version__)
        self.button = eval(self.value("button.comm_id"))

    def send(self, kind, content, channel="shell", **header):
        message = self.client.session.msg(kind, content)
        message["header"].update(header)
        getattr(self.client, f"{channel}_channel").send(message)
        return message["header"]["msg_id"]

    def execute(self, code):
        return self.client.execute(textwrap.dedent(code), allow_stdin=False, store_history=False)

    def click(self, data, **header):
        return self.send("comm_msg", {"comm_id": self.button, "data": data}, **header)

    def reply(self, id, channel="shell"):
        "The answer; those that come before it are kept."
        tries = 30
        while id not in self.replies:
            try: message = getattr(self.client, f"get_{channel}_msg")(timeout=1)
            except queue.Empty:
                if not (tries := tries - 1): raise
                self.wake()
                continue
            self.replies[message["parent_header"]["msg_id"]] = message
        return self.replies[id]["content"]

    def wake(self):
        "ipykernel 7.0 to 7.3 can miss a request between two cells (ipykernel issue 1554), until somebody connects."
        self.client.connect_shell().close()

    def output(self, id, last=("status", "idle")):
        "All that has come on behalf of a message, up to the last of it."
        tries = 30
        while last not in self.outputs[id]:
            try: message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                if not (tries := tries - 1): raise
                self.wake()
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            if content.get("name") == "stderr": kind = "stderr"  # what ipykernel logs
            text = content.get("execution_state", content.get("text", content.get("ename", "")))
            parent = message["parent_header"].get("msg_id")
            self.outputs[parent].append((kind, text))
            self.iopub.append((parent, kind, text))
        return self.outputs[id]

    def text(self, id):
        return "".join(text for kind, text in self.output(id) if kind == "stream")

    def run(self, code):
        id = self.execute(code)
        content = self.reply(id)
        assert content["status"] == "ok", content
        return self.text(id)

    def start(self, code):
        "Execute, and come back as soon as it runs."
        id = self.execute(code)
        self.output(id, ("execute_input", ""))
        return id

    def value(self, expression, code=""):
        return self.run(f"{textwrap.dedent(code)}\nprint(repr(({expression})))").strip()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def session():
    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(session):
    session.run("seen.clear(); ran.clear(); threads.clear(); done.clear(); answers.clear(); before = state()")
    yield session
    assert session.value("state() == before") == "True"


def test_clicks_are_handled_in_the_running_cell(kernel):
    cell = kernel.start("polling(); print(seen, set(threads))")
    for i in range(50): kernel.click(i)
    kernel.click("stop")
    assert kernel.text(cell).strip() == f"{list(range(50))} {{'MainThread'}}"


def test_more_than_one_look_takes(kernel):
    cell = kernel.start("ready = Pump.here(); time.sleep(0.3); polling(); ready.close(); print(len(seen), seen == sorted(seen))")
    for i in range(333): kernel.click(i)
    kernel.click("stop")
    assert kernel.text(cell).split() == ["333", "True"]


def test_queued_cells_run_afterwards_once_and_in_order(kernel):
    cells = [kernel.execute(f"polling(lambda: len(seen) >= {10 * (i + 1)}); ran.append({i})") for i in range(4)]
    for i in range(40):
        kernel.click(i)
        if i % 4 == 0: cells.append(kernel.execute(f"ran.append({len(cells)})"))
    assert [kernel.reply(id)["status"] for id in cells] == ["ok"] * 14
    assert kernel.value("ran, seen") == repr((list(range(14)), list(range(40))))


def test_a_click_between_two_cells_reaches_the_next_pump(kernel):
    "Though the kernel takes it from the socket before that cell begins."
    first = kernel.start("polling(); said('closed'); time.sleep(1.5)")
    second = kernel.execute("polling(lambda: len(seen) == 3)")
    third = kernel.execute("ran.append(3)")
    kernel.click("stop")
    kernel.output(first, ("stream", "closed\n"))
    for data in "xyz": kernel.click(data)
    assert [kernel.reply(id)["status"] for id in (first, second, third)] == ["ok"] * 3
    assert kernel.value("ran, seen") == "([3], ['x', 'y', 'z'])"


def test_messages_that_wait_are_neither_lost_nor_handled_early(kernel):
    cell = kernel.start("polling()")
    complete = kernel.send("is_complete_request", {"code": "1 + 1"})
    kernel.click("stop")
    assert kernel.reply(complete)["status"] == "complete"
    assert list(kernel.replies)[-2:] == [cell, complete]


def test_what_a_reloaded_page_asks_is_answered_meanwhile(kernel):
    cell = kernel.start("polling()")
    info = kernel.reply(kernel.send("kernel_info_request", {}))
    comms = kernel.reply(kernel.send("comm_info_request", {"target_name": "button"}))
    assert cell not in kernel.replies
    assert info["language_info"]["name"] == "python" and list(comms["comms"]) == [kernel.button]
    kernel.click("stop")
    assert kernel.reply(cell)["status"] == "ok"


def test_comms_opened_and_closed_meanwhile(kernel):
    kernel.run("""
        opened, closed = [], []
        def target(c, m):
            opened.append(c.comm_id)
            c.on_close(lambda m: closed.append(c.comm_id))
        comm.get_comm_manager().register_target('page', target)""")
    cell = kernel.start("polling(); print(opened, closed)")
    kernel.send("comm_open", {"comm_id": "x", "target_name": "page", "data": {}})
    kernel.send("comm_close", {"comm_id": "x", "data": {}})
    kernel.click("stop")
    assert kernel.text(cell).strip() == "['x'] ['x']"


def test_statuses_and_outputs_belong_to_the_click_and_then_to_the_cell(kernel):
    kernel.run("answers['hello'] = lambda: said('from the click')")
    cell = kernel.start("polling(lambda: threads); print('from the cell')")
    click = kernel.click("hello")
    assert kernel.text(cell) == "from the cell\n"
    assert kernel.output(click) == [("stream", "from the click\n"), ("status", "idle")]
    story = [(parent, text) for parent, kind, text in kernel.iopub if kind == "status" and parent in (cell, click)]
    assert story == [(cell, "busy"), (click, "idle"), (cell, "busy"), (cell, "idle")]


@pytest.fixture
def patient(kernel):
    "Answers that would wait for ever."
    kernel.run("pace, Pump.ANSWER = Pump.ANSWER, 1000")
    kernel.run("answers['hello'] = lambda: said('hello')")
    yield kernel
    kernel.run("Pump.ANSWER = pace")


def test_an_answer_waits_for_its_time_but_its_message_does_not(patient):
    "Who waits for answers sends no more than there is time for; nothing waits longer than the pump is open."
    cell = patient.start("polling()")
    patient.output(patient.click("at once"))
    clicks = [patient.click("x"), patient.click("hello")]
    patient.output(clicks[1], ("stream", "hello\n"))
    patient.click("stop")
    patient.output(cell)
    for click in clicks: patient.output(click)
    statuses = [(parent, text) for parent, kind, text in patient.iopub if kind in ("status", "stream")]
    said = statuses.index((clicks[1], "hello\n"))
    assert said < statuses.index((clicks[0], "idle")) < statuses.index((clicks[1], "idle")) < statuses.index((cell, "idle"))
    assert patient.value("seen") == "['at once', 'x']"


def test_a_page_that_is_loaded_again_waits_for_nothing(patient):
    cell = patient.start("polling()")
    patient.output(patient.click("at once"))
    click, asked = patient.click("x"), patient.send("kernel_info_request", {})
    assert patient.output(asked)[-1] == ("status", "idle") == patient.output(click)[-1]
    assert cell not in patient.replies
    patient.click("stop")
    patient.output(cell)


def test_a_fit_within_a_fit_answers_for_both(patient):
    cell = patient.start("""
        outer = Pump.here()
        while 'x' not in seen: outer.poll()
        polling()
        said('the inner one is closed')
        polling(lambda: 'y' in seen)
        outer.close()""")
    patient.output(patient.click("at once"))
    click = patient.click("x")
    patient.click("stop")
    assert patient.output(click) == [("status", "idle")]
    patient.output(cell, ("stream", "the inner one is closed\n"))
    patient.click("y")
    patient.output(cell)


def test_widgets(kernel):
    "ipywidgets waits for the idle of each value before it sends the next; a value that is set is echoed."
    pytest.importorskip("ipywidgets")
    model = eval(kernel.value("slider.comm.comm_id", "import ipywidgets; slider = ipywidgets.FloatSlider()\n"
                              "slider.observe(lambda c: seen.append(c['new']), 'value')"))
    cell = kernel.start("polling(); print(slider.value, seen)")
    for value in (1.5, 2.5):
        sent = kernel.send("comm_msg", {"comm_id": model, "data": {"method": "update", "state": {"value": value}}})
        kernel.output(sent)
    kernel.click("stop")
    assert kernel.text(cell).strip() == "2.5 [1.5, 2.5]"


@pytest.mark.parametrize("close", [True, False])
def test_an_error_still_aborts_the_cells_behind_it(kernel, close):
    cell = kernel.start(f"polling(close={close}); 1 / 0")
    behind = [kernel.execute("ran.append('no')") for _ in range(3)]
    kernel.click("x")
    kernel.click("stop")
    assert kernel.reply(cell)["ename"] == "ZeroDivisionError"
    assert [kernel.reply(id)["status"] for id in behind] == ["aborted"] * 3
    kernel.output(behind[-1])
    assert kernel.value("ran, seen") == "([], ['x'])"


@pytest.mark.parametrize("error", ["ValueError", "KeyboardInterrupt", "SystemExit", "GeneratorExit"])
def test_a_fit_that_dies_closes_the_pump(kernel, error):
    kernel.run(f"def die(): raise {error}\ndef until(): return die() if done else False")
    cell = kernel.start("polling(until)")
    kernel.click("stop")
    kernel.output(cell)  # what comes before this would be aborted
    assert kernel.value("Pump._innermost") == "None"


def test_nobody_closes_it(kernel):
    "An interrupt in the `finally` that would have: the end of the cell does it."
    cell = kernel.start("polling(close=False)")
    behind = [kernel.execute(f"ran.append({i})") for i in range(3)]
    kernel.click("stop")
    assert [kernel.reply(id)["status"] for id in [cell, *behind]] == ["ok"] * 4
    assert kernel.value("ran, Pump._innermost") == "([0, 1, 2], None)"


@pytest.mark.parametrize("error", ["ValueError('no')", "KeyboardInterrupt", "SystemExit", "GeneratorExit"])
def test_a_handlers_error_does_not_enter_the_training(kernel, error):
    kernel.run(f"def bad(): raise {error}\nanswers['bad'] = bad")
    cell = kernel.start("polling(); print('trained', seen)")
    bad = kernel.click("bad")
    kernel.click("good")
    kernel.click("stop")
    assert kernel.text(cell) == "trained ['good']\n"
    assert [text for kind, text in kernel.output(bad) if kind == "status"] == ["idle"]


def test_a_message_that_is_no_message(kernel):
    "Unsigned, it is kept for the kernel, which refuses it."
    cell = kernel.start("polling(); print('trained', seen)")
    key, kernel.client.session.key = kernel.client.session.key, b"wrong"
    try: kernel.click("forged")
    finally: kernel.client.session.key = key
    kernel.click("stop")
    assert kernel.text(cell) == "trained []\n" and kernel.value("seen") == "[]"


def test_hooks_around_cells_do_not_run_around_clicks(kernel):
    "One of them would show and close the pyplot figures of the running cell."
    kernel.run("""
        calls = []
        def hook(): calls.append('hook')
        def late(): calls.append('late')
        answers['register'] = lambda: shell.events.register('post_execute', late)""")
    cell = kernel.start("shell.events.register('post_execute', hook); polling(); print('hook' in calls)")
    kernel.click("register")
    kernel.click("stop")
    assert kernel.text(cell) == "False\n"
    assert kernel.value("sorted(set(calls))") == "['hook', 'late']"  # around cells they do
    kernel.run("shell.events.unregister('post_execute', late); shell.events.unregister('post_execute', hook)")


def test_interrupts_under_load(kernel):
    "Each arrives, in the cell; no click and no cell is lost."
    cell = kernel.start("""
        interrupted = 0
        while True:
            try: polling(every=0.0005); break
            except KeyboardInterrupt: interrupted += 1
        print(interrupted > 0, len(seen))""")
    kernel.output(kernel.click("it runs"))
    sent = threading.Event()

    def clicks():
        for i in range(400):
            kernel.click(i)
            sent.wait(0.004)
    clicking = threading.Thread(target=clicks)
    behind = [kernel.execute(f"ran.append({i})") for i in range(3)]
    clicking.start()
    for _ in range(12):
        sent.wait(0.12)
        kernel.manager.interrupt_kernel()
    clicking.join()
    kernel.click("stop")
    assert kernel.text(cell).split() == ["True", "401"]
    assert [kernel.reply(id)["status"] for id in behind] == ["ok"] * 3
    assert kernel.value("ran, seen == ['it runs', *range(400)]") == "([0, 1, 2], True)"


def test_an_interrupt_between_taking_and_keeping_a_message(kernel):
    "The worst moment, without luck."
    cell = kernel.start("""
        import signal
        def worst(session, frames):
            signal.raise_signal(signal.SIGINT)
            return kind(session, frames)
        kind, module._kind = module._kind, worst
        try:
            polling()
            print('not interrupted')
        except KeyboardInterrupt: print('interrupted')
        finally: module._kind = kind""")
    behind = kernel.execute("ran.append('cell')")
    assert kernel.text(cell) == "interrupted\n"
    assert kernel.reply(behind)["status"] == "ok" and kernel.value("ran") == "['cell']"


def test_an_interrupt_goes_to_who_listens(kernel):
    "The learner's own handler, put there for the fit, is asked after the messages; once for each interrupt or fewer."
    cell = kernel.start("""
        import signal
        heard = []
        before_ = signal.signal(signal.SIGINT, lambda *args: heard.append(len(seen)))
        answers['interrupt'] = lambda: signal.raise_signal(signal.SIGINT)
        try: polling()
        finally: signal.signal(signal.SIGINT, before_)
        print(len(heard), seen)""")
    for data in ("interrupt", "x", "stop"): kernel.click(data)
    assert kernel.text(cell) == "1 ['x']\n"


def test_a_handler_that_hangs_can_be_ended(kernel):
    kernel.run("""
        def hang():
            said('hanging')
            time.sleep(20)
        answers['hang'] = hang""")
    cell = kernel.start("try: polling()\nexcept KeyboardInterrupt: print('interrupted')")
    hang = kernel.click("hang")
    kernel.output(hang, ("stream", "hanging\n"))
    for _ in range(2):
        kernel.manager.interrupt_kernel()
        threading.Event().wait(0.1)
    assert kernel.text(cell) == "interrupted\n"


def test_a_fit_within_a_fit(kernel):
    "The outer one's cells are older."
    cell = kernel.start("""
        outer = Pump.here()
        while not outer._held: outer.poll()
        said('inner')
        polling()
        outer.close()""")
    first = kernel.execute("ran.append(1)")
    kernel.output(cell, ("stream", "inner\n"))
    second = kernel.execute("ran.append(2)")
    kernel.click("stop")
    assert [kernel.reply(id)["status"] for id in (cell, first, second)] == ["ok"] * 3
    assert kernel.value("ran") == "[1, 2]"


def test_in_a_coroutine(kernel):
    cell = kernel.start("import asyncio\nawait asyncio.sleep(0)\npolling()\nprint(seen)")
    behind = kernel.execute("ran.append(1)")
    kernel.click("x")
    kernel.click("stop")
    assert kernel.text(cell) == "['x']\n" and kernel.reply(behind)["status"] == "ok"


def test_in_a_click_of_an_idle_kernel(kernel):
    "A button that starts a fit."
    kernel.run("answers['fit'] = polling")
    click = kernel.click("fit")
    kernel.click("x")
    kernel.click("stop")
    kernel.output(click)
    assert kernel.value("seen") == "['x']"


def test_subshells(kernel):
    "Where the front end uses them, callbacks come on their threads, or on the main one; none is lost."
    if int(ipykernel.__version__.split(".")[0]) < 7: pytest.skip("this kernel has none")
    id = kernel.send("create_subshell_request", {}, channel="control")
    subshell = kernel.reply(id, "control")["subshell_id"]
    cell = kernel.start("polling(); print(sorted(seen), len(set(threads)))")
    clicks = [kernel.click(i, subshell_id=subshell) for i in range(20)]
    for click in clicks: kernel.output(click)
    kernel.click("stop")
    text = kernel.text(cell).split("] ")
    assert text[0] == str(list(range(20)))[:-1] and text[1].strip() in "12"
    kernel.reply(kernel.send("delete_subshell_request", {"subshell_id": subshell}, channel="control"), "control")


def subshell_of(kernel):
    if not kernel.value("getattr(kernel, '_supports_kernel_subshells', False)") == "True":
        return None
    return kernel.reply(kernel.send("create_subshell_request", {}, "control"), "control")["subshell_id"]


@pytest.mark.parametrize("own", [False, True], ids=["main thread", "subshell"])
def test_who_lingers_ends_with_the_next_message(kernel, own):
    header = {"subshell_id": subshell} if own and (subshell := subshell_of(kernel)) else {}
    kernel.run("answers.update(linger=lambda: module.linger(3600), briefly=lambda: module.linger(0.01)); seen.clear()")
    moves = []
    for _ in range(3):
        moves.append(kernel.click("linger", **header))
        kernel.output(moves[-1], ("status", "busy"))
    last = kernel.click("briefly", **header)
    for move in (*moves, last):
        assert kernel.output(move) == [("status", "busy"), ("status", "idle")]
    for _ in range(20):  # the stream has missed nothing
        assert kernel.output(kernel.click("x", **header)) == [("status", "busy"), ("status", "idle")]
    waiting = kernel.click("linger", **header)
    kernel.output(waiting, ("status", "busy"))
    others = [kernel.send("comm_info_request", {}, **header), kernel.execute("print('cell')")]
    assert kernel.reply(others[0])["status"] == "ok"
    kernel.click("briefly", **header)
    assert kernel.output(waiting)[-1] == ("status", "idle") and kernel.text(others[1]) == "cell\n"
    assert kernel.value("seen") == repr(["x"] * 20)


def test_nobody_lingers_in_a_pump(kernel):
    kernel.run("answers.update(linger=lambda: module.linger(3600))")
    cell = kernel.start("polling()")
    kernel.click("linger")
    kernel.click("stop")
    assert kernel.reply(cell)["status"] == "ok"


def test_none_where_a_name_is_missing(kernel):
    offered = kernel.run("""
        class Without:
            "An object that lacks something somewhere within."
            def __init__(self, whole, path): self.__dict__.update(_whole=whole, _path=path)
            def __getattr__(self, name):
                head, _, rest = self._path.partition(".")
                if name == head and not rest: raise AttributeError(name)
                value = getattr(self._whole, name)
                return Without(value, rest) if name == head else value

        main = "shell_channel_thread.manager." if hasattr(kernel, "shell_channel_thread") else "shell_stream."
        paths = [*module._USED, main[:-1].split(".")[-1] if main == "shell_stream." else main[:-1]]
        if main != "shell_stream.":
            paths += [main + name for name in ("get_shell_channel_to_subshell_pair", "get_subshell_to_shell_channel_socket")]
        else: paths += [main + name for name in (*module._USED_OF_STREAM, "io_loop")]
        print(_offers(Without(kernel, "nothing")), [path for path in paths if _offers(Without(kernel, path))])
        saved = module._USED
        module._USED += ("a_name_of_the_future",)
        print(Pump.here())
        module._USED = saved""")
    assert offered == "True []\nNone\n"


def test_none_off_the_main_thread(kernel):
    kernel.run("""
        found = []
        thread = threading.Thread(target=lambda: found.append(Pump.here()))
        thread.start(); thread.join()
        assert found == [None]""")


def test_another_thread_neither_takes_nor_gives_back(kernel):
    cell = kernel.start("""
        pump = Pump.here()
        def other():
            for _ in range(50): pump.poll(); time.sleep(0.005)
            pump.close()
        thread = threading.Thread(target=other)
        thread.start(); thread.join()
        print(pump.closed, seen)
        polling()
        print(seen)""")
    kernel.click("x")
    kernel.click("stop")
    assert kernel.text(cell) == "False []\n['x']\n"


@pytest.mark.parametrize("interpreter", [[sys.executable], [sys.executable, "-m", "IPython", "--no-banner", "--quick"]])
def test_none_in_a_script_nor_a_terminal(interpreter, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom trainkit.pump import Pump\n"
                      "print(Pump.here(), 'ipykernel' in sys.modules)")
    env = os.environ | {"IPYTHONDIR": str(tmp_path)}
    done = subprocess.run([*interpreter, str(script)], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.strip() == "None False", done.stderr


def test_harmless_under_nbclient():
    from nbclient import NotebookClient
    train = "end = time.monotonic() + 0.2\npolling(lambda: time.monotonic() > end)\nprint('trained')"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (SETUP, train, "print('next')")])
    NotebookClient(nb, timeout=60, kernel_name="python3").execute()
    assert [cell.outputs[0].text for cell in nb.cells[1:]] == ["trained\n", "next\n"]
