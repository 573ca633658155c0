"""Live control

    python -m benchmarks.live            all parts: clicks, sliders, dashboard, long, many
    python -m benchmarks.live sliders    this one anew

What it costs, and how long a click takes, in a real JupyterLab that a real browser looks at. A GAN on digits trains in one
thread. The page notes when it sees a click, the journal when it has been applied; both read the same clock. Rates are in CPU time
too, as kernel, server and browser share the cores. `load` is the machine's average number of busy processes over the last
minute: above the number of cores, everything waits. Each figure is of a single run.
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from playwright.sync_api import expect, sync_playwright  # noqa: E402

from benchmarks import common  # noqa: E402
from benchmarks.common import Table  # noqa: E402
from tests.browser.conftest import CHROMIUM, FLAGS, Lab, serving  # noqa: E402
from tests.browser.labpage import LabPage  # noqa: E402
from tests.browser.test_live import CLICKS, MAKE, Shown  # noqa: E402

SECONDS = 180  # of the long run
REFRESHES = 100_000  # of that without a browser
PATIENT = """
nap.update(after_batch=0)
import os, threading
seen, spent = [], [0.0]  # for each step: clock; CPU time of thread, process, commands; time without a core
files = {}  # of each thread that trains: how long it ran, how long it had no core
def note(learn):
    me = threading.get_native_id()
    if me not in files: files[me] = os.open(f"/proc/self/task/{me}/schedstat", os.O_RDONLY)
    waited = int(os.pread(files[me], 99, 0).split()[1]) / 1e9
    seen.append((time.time(), time.thread_time(), time.process_time(), spent[0], waited))
def timed(heed):
    def heeding():
        begin = time.thread_time()
        try: heed()
        finally: spent[0] += time.thread_time() - begin
    return heeding
gan._heed = timed(gan._heed)
gan.add(On("after_batch", note))
"""
CLICKED = """
steps = [b[0] - a[0] for a, b in zip(seen, seen[1:])]
rows = [(e.what, e.time) for e in gan.journal.entries if e.source == "panel"]
print(json.dumps([rows, sorted(steps)[len(steps) // 2]]))
"""
PAIRS = """
def again(front):
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    d = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))
    return GANLearner(g, d, digits[:1024], latent=16, opt=opt, batch_size=32, n_samples=16, seed=1, device="cpu",
                      save_every="none", cbs=[On("after_batch", note)], **front)
costs = {"dashboard": [], "none": []}
pair = {"dashboard": again({}), "none": again({"front": "none"})}
for _ in range(3):
    for name, learn in pair.items():
        seen.clear()
        learn.fit(steps=STEPS, schedule="stretch")
        first, last = seen[STEPS // 9], seen[-1]  # what is made once, at the beginning, is left out
        costs[name].append([(b - a) / (len(seen) - 1 - STEPS // 9) for a, b in zip(first, last)])
open("costs.json", "w").write(json.dumps(costs))
"""
WHICH = """
def tell(learn):
    from trainkit.ui.dashboard import Dashboard
    live = learn.cbs.get(Dashboard).live
    if live is not None and learn.step == 5:
        dials = live.stage.panel.view.deck.dials
        dial = next(dial for key, dial in dials.items() if key[:2] == ("generator", "lr"))
        open("slider.json", "w").write(json.dumps(dial.slider.model_id))
        live.drawing.pictures.next = float("inf")
gan.add(On("after_batch", tell))
"""
LONG = """
import ipywidgets
from trainkit.ui.dashboard import Dashboard
from trainkit.ui.view import Budget

kernel, sent, said, rows = get_ipython().kernel, [0], [0, 0], []
send = kernel.session.send
def counted(stream, *args, **kw):
    sent[0] += stream is kernel.iopub_socket
    return send(stream, *args, **kw)

def hurried(learn):
    live = learn.cbs.get(Dashboard).live
    if live.ticker.every == 0.25 and fast[0]:
        live.ticker.every, d = 0.0005, live.drawing
        d.words = Budget(0, 1e9, credit=1e9)
        d.pictures = Budget(0.05, 1e9, credit=1e9)
        say, draw = d.say, d.draw
        def saying(told):
            said[0] += 1
            say(told)
        def drawing():
            said[1] += 1
            return draw()
        d.say, d.draw = saying, drawing
    if said[0] >= most_words[0]: learn.stop()
    elif rows and time.time() - rows[-1][0] < 2: return
    with open("/proc/self/statm") as file: size = int(file.read().split()[1]) * 4096
    rows.append((time.time(), *said, sent[0], size, len(kernel.comm_manager.comms),
                 len(ipywidgets.widgets.widget._instances), learn.step))

kernel.session.send = counted
fast, most_words = [False], [10**9]
gan.remove(On)
gan.add(On("after_batch", lambda learn: (time.sleep(0.01), hurried(learn))))
"""
GROWS = "refreshes", "pictures", "IOPub messages per refresh", "resident MB", "comms", "widgets", "steps"
LONG_FIT = ("fast[0] = FAST\nrows.clear()\ngan.fit(steps=10**7, schedule='stretch')\n"
            "open('rows.json', 'w').write(json.dumps(rows))")  # fmt: skip


def opened(lab: Lab, page: Any, name: str, *sources: str) -> LabPage:
    "A notebook whose first cell has made the GAN."
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nb.cells = [nbformat.v4.new_code_cell(source.strip()) for source in (MAKE.replace("NAME", name) + PATIENT, *sources)]
    nbformat.write(nb, lab.folder / f"{name}.ipynb")
    page.add_init_script(CLICKS)
    notebook = LabPage(page, lab.address(f"{name}.ipynb"))
    notebook.run(0, wait=120)
    return notebook


def answer(notebook: LabPage, index: int) -> Any:
    "The JSON that a cell has printed."
    return json.loads(notebook.output(index).inner_text())


def stop(notebook: LabPage, shown: Shown, index: int) -> None:
    shown.press("Stop", "stop")
    expect(shown.area).to_contain_text("stopped at step", timeout=60_000)
    notebook.wait_done(index)


def clicked(lab: Lab, page: Any, background: bool, rounds: int) -> tuple:
    "A row: how long clicks took, five a round and one at the end."
    how = "background" if background else "foreground"
    notebook = opened(lab, page, f"clicks-{how}", f"gan.fit(steps=10**6, background={background})", CLICKED)
    notebook.run(1, wait=None)
    shown = Shown(page, notebook.output(1))
    shown.runs()
    for _ in range(rounds):
        shown.press("Pause", "pause", shows="Resume")
        shown.press("One step", "step")
        shown.press("Validate", "validate")
        expect(shown.area).to_contain_text(re.compile(r"Step \d+: validate"))
        shown.press("Resume", "resume", shows="Pause")
        shown.press("Sample", "sample")
    stop(notebook, shown, 1)
    notebook.wait_idle()
    pressed = page.evaluate("clicks")
    notebook.run(2)
    rows, step = answer(notebook, 2)
    heard, asked = [what for what, _ in rows], [what for what, _ in shown.clicked]
    assert heard == asked and len(pressed) == 5 * rounds + 1, (heard, asked, pressed)
    late = sorted(1000 * applied - at for (_, at), (_, applied) in zip(pressed, rows))
    p95, most = late[int(0.95 * len(late))], late[-1]
    return how, f"{statistics.median(late):.0f}", f"{p95:.0f}", f"{most:.0f}", f"{1000 * step:.1f}", len(late)


def drag(page: Any, row: Any, milliseconds: float) -> None:
    "To and fro, for so long."
    handle, base = (row.locator(f".slider-container:visible .noUi-{part}").bounding_box() for part in ("handle", "base"))
    y, end = base["y"] + base["height"] / 2, page.evaluate("Date.now()") + milliseconds
    page.mouse.move(handle["x"] + handle["width"] / 2, y)
    page.mouse.down()
    for place in itertools.cycle([*range(30, 70, 2), *range(70, 30, -2)]):
        page.mouse.move(base["x"] + place / 100 * base["width"], y)
        page.wait_for_timeout(10)
        if page.evaluate("Date.now()") > end:
            return page.mouse.up()


def dragged(lab: Lab, page: Any, background: bool, rounds: int, milliseconds: int = 2500) -> list[tuple]:
    "Steps while a slider is dragged, while another one is that tells nobody, and while nothing is touched, in turns."
    how = "background" if background else "foreground"
    notebook = opened(lab, page, f"dragged-{how}", WHICH + f"\ngan.fit(steps=10**6, background={background})",
                      "open('seen.json', 'w').write(json.dumps(seen))")  # fmt: skip
    notebook.run(1, wait=None)
    shown = Shown(page, notebook.output(1))
    shown.runs()
    page.wait_for_timeout(3000)
    rows = {True: shown.row("generator", "learning rate"), False: shown.row("discriminator", "learning rate")}
    rows[True].scroll_into_view_if_needed()
    rows[False].locator(".slider-container:visible .noUi-target").evaluate("slider => slider.noUiSlider.off()")
    windows = []
    for order in [*itertools.permutations((True, False, None))] * (rounds // 6):
        for kind in order:
            begin = page.evaluate("Date.now()")
            page.wait_for_timeout(milliseconds) if kind is None else drag(page, rows[kind], milliseconds)
            windows.append((kind, begin / 1000, page.evaluate("Date.now()") / 1000))
            page.wait_for_timeout(700)  # what a hand has left is brought up to date
    stop(notebook, shown, 1)
    notebook.wait_idle()
    notebook.run(2)
    seen = json.loads((lab.folder / "seen.json").read_text())
    return [row_of(f"a page, {how}: one that tells nobody, beside none", windows, seen, False, None),
            row_of(f"a page, {how}: one that is heard, beside one that tells nobody", windows, seen, True, False)]  # fmt: skip


def window_of(seen: list[Any], begin: float, end: float) -> tuple[float, float, float]:
    "Steps a second, and the per cent of it that went to commands, and to other threads; while others had the core stands still."
    rows = [row for row in seen if begin <= row[0] <= end]
    clock, cpu, process, heed, waited = [b - a for a, b in zip(rows[0], rows[-1])]
    had = clock - waited
    return (len(rows) - 1) / had, 100 * heed / had, 100 * (process - cpu) / had


def row_of(name: str, windows: list[tuple[bool | None, float, float]], seen: list[Any], one: Any, other: Any) -> tuple:
    "Windows of two kinds, compared in the order in which they came."
    kinds = {kind: [window_of(seen, a, b) for which, a, b in windows if which is kind] for kind in (one, other)}
    slower = [100 * (without[0] / with_it[0] - 1) for with_it, without in zip(kinds[one], kinds[other])]
    low, middle, high = statistics.quantiles(slower, n=4)
    dragged, left = ([statistics.median(column) for column in zip(*kinds[kind])] for kind in (one, other))
    return (name, f"{dragged[0]:.0f}", f"{left[0]:.0f}", f"{middle:.1f} % ({low:.1f} to {high:.1f}, {len(slower)} pairs)",
            f"{dragged[1]:.1f} % and {left[1]:.1f} %", f"{dragged[2]:.1f} % and {left[2]:.1f} %")  # fmt: skip


def unfailing(message: dict[str, Any]) -> None:
    "For what a kernel says: a cell that fails ends the measurement."
    if message["msg_type"] == "error":
        raise RuntimeError("\n".join(["a cell failed:", *message["content"]["traceback"]]))


def await_file(file: Path, client: Any, seconds: float) -> None:
    "Until a cell that runs has written it. RuntimeError: the cell failed; TimeoutError: neither came in so many seconds."
    end = time.monotonic() + seconds
    while not file.exists():
        while client.iopub_channel.msg_ready():
            unfailing(client.get_iopub_msg(timeout=1))
        if time.monotonic() > end:
            raise TimeoutError(f"the cell that is to write {file.name} has not done so in {seconds:g} s, nor failed")
        time.sleep(0.5)
        client.connect_shell().close()  # ipykernel 7.0 to 7.3 can miss a request until somebody connects


def dragged_alone(pairs: int, seconds: float = 2.0, wait: float = 120.0) -> tuple:
    "The same messages from a client that draws nothing: the next one when the last one is answered, 60 a second at most."
    from jupyter_client.manager import start_new_kernel

    windows = []
    with tempfile.TemporaryDirectory() as folder:
        manager, client = start_new_kernel(kernel_name="python3", cwd=folder)
        try:
            client.execute_interactive(MAKE.replace("NAME", "alone") + PATIENT + WHICH, output_hook=unfailing)
            client.execute("gan.fit(steps=10**6)", allow_stdin=True)
            await_file(name := Path(folder) / "slider.json", client, wait)
            time.sleep(3)
            slider = json.loads(name.read_text())
            for moved in (True, None, None, True) * (pairs // 2):
                begin = time.time()
                move(client, slider if moved else "", begin + seconds)
                windows.append((moved, begin, time.time()))
                time.sleep(0.7)  # what a hand has left is brought up to date
            manager.interrupt_kernel()
            client.execute_interactive("open('seen.json', 'w').write(json.dumps(seen))", output_hook=lambda message: None)
            seen = json.loads((Path(folder) / "seen.json").read_text())
            return row_of("a client alone, foreground: one that is heard, beside none", windows, seen, True, None)
        finally:
            manager.shutdown_kernel(now=True)


def move(client: Any, slider: str, end: float) -> None:
    "Drag a slider until then; nothing, where there is none."
    place = 0
    while time.time() < end:
        time.sleep(1 / 60)
        place = (place + 3) % 200
        if slider:
            data = {"method": "update", "state": {"value": place}, "buffer_paths": []}
            asked = client.session.msg("comm_msg", {"comm_id": slider, "data": data})
            client.shell_channel.send(asked)
            wait_idle(client, asked["header"]["msg_id"])


def wait_idle(client: Any, asked: str) -> None:
    "Until the kernel says that it is done with a message."
    while True:
        message = client.get_iopub_msg(timeout=30)
        mine = message["parent_header"].get("msg_id") == asked
        if mine and message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return


def beside_none(steps: int) -> tuple:
    "Steps with the dashboard, and with front='none', in turns in one kernel; no browser takes the other core."
    pairs = f"STEPS = {steps}\n{PAIRS}"
    costs = in_kernel([MAKE.replace("NAME", "pairs") + PATIENT, pairs], "costs.json")[0]
    wall, thread, process = ([statistics.median(row[i] for row in costs[name]) for name in costs] for i in range(3))
    more = [f"{100 * (with_it / without - 1):+.1f} %" for with_it, without in (wall, thread, process)]
    spent = f"{more[1]} (the thread that trains), {more[2]} (all threads)"
    return "the dashboard, or none", f"{1 / wall[0]:.0f}", f"{1 / wall[1]:.0f}", more[0], spent


def long_run(lab: Lab, page: Any, most: int) -> Table:
    "A normal half minute, then as many refreshes as fit: what grows?"
    notebook = opened(lab, page, "long", LONG, LONG_FIT.replace("FAST", "False"), LONG_FIT.replace("FAST", "True"))
    notebook.run(1)
    file, sizes, rows = lab.folder / "long.ipynb", list[int](), list[Any]()
    for index, seconds, parts in (2, min(30, most), 1), (3, most, 3):
        notebook.run(index, wait=None)
        shown = Shown(page, notebook.output(index))
        shown.runs()
        for _ in range(parts):
            page.wait_for_timeout(1000 * seconds / parts)
            page.keyboard.press("Control+s")
            page.wait_for_timeout(1500)
            sizes.append(file.stat().st_size)
        stop(notebook, shown, index)
        rows.append(json.loads((lab.folder / "rows.json").read_text()))
    normal, fast = rows
    a, b = normal[2], normal[-1]
    table = Table("A long run, compressed", ("", *GROWS, "notebook KB"), notes=[
        f"The display is brought up to date without any pause for {most} s. At its usual pace the dashboard sends "
        f"{(b[3] - a[3]) / (b[0] - a[0]):.0f} IOPub messages a second."])  # fmt: skip
    for i, (name, place) in enumerate((("start", 0.1), ("middle", 0.5), ("end", 0.95))):
        k = max(1, int(place * len(fast)))
        row, before = fast[k], fast[max(0, k - max(1, len(fast) // 10))]
        table.rows.append((name, *grown(row, before), f"{sizes[1 + i] / 1000:.0f}"))
    return table


def grown(row: Any, before: Any) -> tuple:
    "What has grown, or not."
    each = (row[3] - before[3]) / max(1, row[1] - before[1])
    return row[1], row[2], f"{each:.2f}", f"{row[4] / 1e6:.0f}", *row[5:8]


def in_kernel(sources: list[str], result: str) -> tuple[Any, list[int]]:
    "What cells leave in a file, and how many messages of how many bytes they send; in a kernel whose messages are only counted."
    from jupyter_client.manager import start_new_kernel

    with tempfile.TemporaryDirectory() as folder:
        manager, client = start_new_kernel(kernel_name="python3", cwd=folder)
        sizes = [0, 0]

        def count(message: dict[str, Any]) -> None:
            sizes[0] += 1
            sizes[1] += len(json.dumps(message["content"]))
            unfailing(message)

        try:
            for source in sources:
                client.execute_interactive(source, allow_stdin=True, output_hook=count, timeout=3600)
            return json.loads((Path(folder) / result).read_text()), sizes
        finally:
            manager.shutdown_kernel(now=True)


def without_browser(refreshes: int) -> Table:
    "As many refreshes as in hours: what grows?"
    fit = LONG_FIT.replace("FAST", "True").replace("gan.fit", f"most_words[0] = {refreshes}\ngan.fit")
    cells = MAKE.replace("NAME", "many") + PATIENT, LONG.replace("sleep(0.01)", "sleep(0.05)"), fit
    rows, sizes = in_kernel([*cells], "rows.json")
    table = Table("The same without a browser", GROWS, notes=[
        f"Until the display has been brought up to date {rows[-1][1]} times: {sizes[0]} messages, "
        f"{sizes[1] / sizes[0] / 1000:.1f} KB each."])  # fmt: skip
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        k = next(i for i, row in enumerate(rows) if row[1] >= share * rows[-1][1])
        table.rows.append(grown(rows[k], rows[max(0, k - 5)]))
    return table


def in_page(part: Any, *args: Any) -> Any:
    "What a part finds, in a browser context of its own."
    with tempfile.TemporaryDirectory() as home, serving(Path(home)) as lab, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": 1200, "height": 1500}).new_page()
        found = part(lab, page, *args)
        browser.close()
    return found


def loaded(row: tuple) -> tuple:
    "A row with the load of the machine, now that it has been measured."
    return *row, f"{os.getloadavg()[0]:.1f}"


def clicks(tiny: bool) -> list[Table]:
    head = "fit", "median ms", "95 %", "most", "a step, median ms", "of", "load"
    table = Table("From the click in the page to the entry in the journal", head)
    table.rows += [loaded(in_page(clicked, background, 1 if tiny else 12)) for background in (False, True)]
    return [table]


def sliders(tiny: bool) -> list[Table]:
    head = "", "steps a second with", "without", "slower", "CPU for commands, with and without", "of other threads", "load"
    table = Table("A slider that is dragged", head)
    for background in False, True:
        table.rows += [loaded(row) for row in in_page(dragged, background, 6 if tiny else 12, 300 if tiny else 2500)]
    table.rows.append(loaded(dragged_alone(2 if tiny else 24)))
    table.notes.append(
        "Windows in turns, of 2.5 seconds each. A page that draws a slider under a hand takes the same cores as the training: so "
        "much as one costs that tells nobody (its handlers are taken off). What trainkit adds to that is the row below it. A "
        "client alone draws nothing. The kernel draws no curves meanwhile (with and without alike they take a tenth of a second "
        "every few seconds). The time in which the thread that trains had no core, as another process had it, doesn't count. "
        "Slower: the median of the pairs, and their quartiles.")  # fmt: skip
    return [table]


def dashboard(tiny: bool) -> list[Table]:
    table = Table("The dashboard", ("", "steps a second with", "without", "time of a step", "its CPU time"))
    table.rows.append(beside_none(450 if tiny else 9000))
    table.notes.append("In a kernel without a browser, which would take a core.")
    return [table]


def long(tiny: bool) -> list[Table]:
    return [in_page(long_run, 6 if tiny else SECONDS)]


def many(tiny: bool) -> list[Table]:
    return [without_browser(300 if tiny else REFRESHES)]


PARTS: dict[str, common.Part] = {"clicks": clicks, "sliders": sliders, "dashboard": dashboard, "long": long, "many": many}


if __name__ == "__main__":
    common.main_in_parts("live", PARTS, __doc__, packages=("jupyterlab", "ipykernel"))
