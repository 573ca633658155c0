"A GAN that trains in a real notebook while somebody clicks, drags, queues cells, loads the page again and presses stop."

import json
import re

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.labpage import LabPage
from trainkit.ui.knobs import Scale

pytestmark = pytest.mark.browser

MAKE = """
import json, time, torch
from torch import nn
from trainkit.callback import On
from trainkit.datasets import mnist_5k
from trainkit.gan.learner import GANLearner

torch.manual_seed(0)
torch.set_num_threads(1)
digits = mnist_5k()[0][:1280]
generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
discriminator = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))
opt = {"name": "adam", "lr": 1e-3, "betas": (0.5, 0.99), "schedule": "cosine"}
data = {"train": digits[:1024], "valid": digits[1024:]}
gan = GANLearner(generator, discriminator, data, latent=16, opt=opt, batch_size=32, n_samples=16, seed=1, run="runs/NAME",
                 save_every="none", device="cpu")
nap, most = {"after_batch": 0.002, "after_validate_batch": 0.0}, [0]
gan.add(*(On(event, lambda learn, event=event: time.sleep(nap[event])) for event in nap))

def watched(command, put=gan.queue.put):
    put(command)
    most[0] = max(most[0], sum(c.name == "set" for c in gan.queue.pending))
    return command
gan.queue.put = watched
""".strip()
CLICKS = """window.clicks = []
document.addEventListener("click", e => { const b = e.target.closest(".jupyter-button")
                                          if (b) clicks.push([b.innerText, Date.now()]) }, true)"""  # what the page has seen
FIT = "gan.fit(steps=100_000)"
TOLD = """
rows = [(e.what, e.values, e.new, e.error, e.step, e.source) for e in gan.journal.entries]
print(json.dumps([rows, gan.state, gan.step, most[0], [(c.values[0], c.shown) for c in gan.controls() if c.name == "lr"]]))
""".strip()


class Shown:
    "The live display in a cell's output, and what was clicked there."

    def __init__(self, page, area):
        self.page, self.area, self.clicked = page, area, []
        self.state = self.area.get_by_role("status").first

    @classmethod
    def again(cls, page, address: str, index: int):
        "The same in another tab."
        page.goto(address)
        return cls(page, page.locator(".jp-Notebook .jp-CodeCell").nth(index).locator(".jp-OutputArea").first)

    def button(self, text: str):
        return self.area.get_by_role("button", name=text, exact=True)

    def press(self, text: str, what: str, shows: str = "", **values) -> None:
        "Press a button; of Pause and Resume, the one that has something to do then."
        self.button(text).click()
        self.clicked.append((what, values))
        if shows:
            resume, highlit = expect(self.button("Resume")), re.compile("mod-primary")
            resume.to_have_class(highlit) if shows == "Resume" else resume.not_to_have_class(highlit)

    def row(self, player: str, name: str):
        section = self.area.locator(".tk-section", has=self.page.get_by_text(player, exact=True))
        return section.locator(".widget-hbox", has=self.page.get_by_label(name, exact=True))

    def type(self, player: str, value: float) -> None:
        "A learning rate, and wait until it is seen to be applied."
        field = self.row(player, "learning rate").get_by_role("textbox")
        field.fill(str(value))
        field.press("Enter")
        self.clicked.append(("set", {"name": "lr", "player": player, "value": value}))
        expect(self.row(player, "learning rate")).to_contain_text(f"{value:.4g} held")

    def save(self, note: str) -> None:
        self.area.get_by_label("note", exact=True).fill(note)
        self.press("Save", "save", note=note)

    def drag(self, row, places: list[float]) -> None:
        "Over a slider, as shares of its width."
        row.scroll_into_view_if_needed()
        handle, base = (row.locator(f".slider-container:visible .noUi-{part}").bounding_box() for part in ("handle", "base"))
        self.page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
        self.page.mouse.down()
        for share in places:
            self.page.mouse.move(base["x"] + share * base["width"], base["y"] + base["height"] / 2, steps=25)
        self.page.mouse.up()

    def settled(self, row) -> tuple[int, float]:
        "Where a slider stands, and the number beside it, once nothing moves any more."
        handle, field = row.locator(".slider-container:visible .noUi-handle"), row.get_by_role("textbox")
        seen: list = []
        for _ in range(60):
            seen.append((float(handle.get_attribute("aria-valuenow")), field.input_value()))
            if seen[-6:] == [seen[-1]] * 6:
                return round(seen[-1][0]), float(seen[-1][1])
            self.page.wait_for_timeout(300)
        pytest.fail(f"it does not come to rest: {seen[-9:]}")

    def runs(self) -> None:
        expect(self.state).to_have_text("running", timeout=60_000)


def opened(lab, page, name: str, *sources: str) -> LabPage:
    "A notebook whose first cell has made the GAN."
    cells = [nbformat.v4.new_code_cell(source) for source in (MAKE.replace("NAME", name), *sources)]
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, lab.folder / f"{name}.ipynb")
    page.add_init_script(CLICKS)
    notebook = LabPage(page, lab.address(f"{name}.ipynb"))
    notebook.run(0, wait=120)
    assert notebook.errors() == []
    return notebook


def told(notebook: LabPage, index: int):
    "What the learner says when its fit is over."
    notebook.run(index)
    return json.loads(notebook.output(index).inner_text())


def panel_rows(rows: list) -> list:
    "What was asked for in the panel, in order."
    return [row for row in rows if row[5] == "panel"]


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_fifty_clicks(lab, page, background):
    "None is lost, none counts twice, all in order."
    name = f"clicks-{'background' if background else 'foreground'}"
    notebook = opened(lab, page, name, FIT.replace(")", ", background=True)") if background else FIT, TOLD, "gan.wait()")
    notebook.run(1, wait=60 if background else None)
    shown = Shown(page, notebook.output(1))
    shown.runs()
    for i in range(5):
        shown.save(f"note {i}")
        shown.press("Validate", "validate")
        shown.type("generator", 2e-4 + i * 1e-5)
        shown.press("Undo", "undo")
        shown.press("Pause", "pause", shows="Resume")
        shown.press("One step", "step", n=1)
        shown.press("One step", "step", n=1)
        shown.type("discriminator", 3e-4 + i * 1e-5)
        shown.press("Resume", "resume", shows="Pause")
        shown.press("Undo", "undo")
    notebook.screenshot(f"live-{name}")
    shown.press("Stop", "stop", after="step")
    expect(shown.area).to_contain_text("stopped at step", timeout=30_000)
    notebook.wait_idle()
    if background:
        notebook.run(3)
    rows, state, step, *_ = told(notebook, 2)
    heard = panel_rows(rows)
    pressed = page.evaluate("clicks.filter(click => click[0]).length")
    assert pressed == 41, "the page itself has not seen a click"
    assert len(shown.clicked) == 51 and [row[0] for row in heard] == [what for what, _ in shown.clicked]
    for (what, values, _, error, *_), (_, asked) in zip(heard, shown.clicked):
        assert not error and asked.items() <= values.items(), (what, values, asked, error)
    undone = [row[1] for row in heard if row[0] == "undo"]
    assert [values["player"] for values in undone] == ["generator", "discriminator"] * 5
    steps = [row[4] for row in heard]
    assert steps == sorted(steps) and state == "stopped" and step == steps[-1]
    assert len([*(lab.folder / "runs" / name / "checkpoints").glob("ckpt-*.pt")]) >= 3
    assert notebook.errors() == []


def test_dragged_queued_and_loaded_again(lab, page):
    queued = [f"done.append({i})\nprint('cell', *done)" for i in range(3)]
    notebook = opened(lab, page, "dragged", "done, nap['after_batch'] = [], 0.05", FIT, *queued, TOLD)
    notebook.run(1)
    notebook.run(2, wait=None)
    shown = Shown(page, notebook.output(2))
    shown.runs()
    lr = shown.row("generator", "learning rate")
    shown.drag(lr, [0.0, 1.0, 0.1, 0.9, 0.37])
    place, last = shown.settled(lr)
    expect(lr).to_contain_text(re.compile(r"held; applied at step \d+"))

    page.keyboard.press("Control+s")
    page.wait_for_timeout(1000)
    page.reload()
    shown.runs()
    expect(lr.get_by_role("textbox")).to_have_value(str(last), timeout=30_000)
    shown.type("discriminator", 4e-4)
    other = Shown.again(page.context.new_page(), lab.address("dragged.ipynb").replace("/workspaces/", "/workspaces/other-"), 2)
    other.runs()
    other.press("Pause", "pause", shows="Resume")
    expect(shown.state).to_have_text("paused")
    shown.press("Resume", "resume", shows="Pause")
    expect(other.state).to_have_text("running")
    other.page.close()
    for i in (3, 4, 5):
        notebook.run(i, wait=None)
        shown.save(f"while {i} waits")
    shown.press("Stop", "stop", after="step")
    for i in (3, 4, 5):
        notebook.wait_done(i)
    notebook.wait_idle()

    rows, state, _, most, (_, (rate, (low, high))) = told(notebook, 6)
    drags = [row for row in panel_rows(rows) if row[1].get("player") == "generator"]
    assert len(drags) > 2 and drags[-1][2] == last == rate == Scale(low, high, log=True).value(place)
    assert not any(row[3] for row in rows)
    assert most == 1, "a drag leaves one command waiting, not many"
    clicks = shown.clicked[:1] + other.clicked + shown.clicked[1:]
    assert [row[0] for row in panel_rows(rows) if row not in drags] == [what for what, _ in clicks]
    for i, said in enumerate(("cell 0", "cell 0 1", "cell 0 1 2")):
        assert notebook.output(3 + i).inner_text().strip() == said
    assert state == "stopped" and notebook.errors() == []


def test_interrupted(lab, page):
    "In a step, in a validation, while paused, and twice: the cell returns with a note, and fit() goes on."
    longer = "nap.update(after_batch=300)"
    notebook = opened(lab, page, "interrupted", "nap.update(after_batch=0.1, after_validate_batch=0.3)", FIT, "gan.fit()",
                      longer, TOLD)  # fmt: skip
    notebook.run(1)
    at = [0]

    def ended(index: int) -> None:
        notebook.wait_done(index, 30)
        expect(notebook.output(index)).to_contain_text(re.compile(r"interrupted (?:at|inside) step \d+ .*learn\.fit\(\) goes on"))
        at.append(int(re.search(r"interrupted (?:at|inside) step (\d+)", notebook.output(index).inner_text())[1]))
        assert at[-1] >= at[-2] and notebook.errors() == []
        notebook.wait_idle()

    for index, state in (2, "running"), (3, "validating"):
        notebook.run(index, wait=None)
        expect(Shown(page, notebook.output(index)).state).to_have_text(state, timeout=60_000)
        notebook.stop()
        ended(index)
    notebook.run(3, wait=None)
    shown = Shown(page, notebook.output(3))
    shown.runs()
    shown.press("Pause", "pause", shows="Resume")
    notebook.stop()
    ended(3)
    notebook.run(4)
    notebook.run(3, wait=None)
    shown.runs()
    notebook.stop()
    page.wait_for_timeout(1000)
    notebook.stop()
    ended(3)
    notebook.run(1)
    notebook.run(3, wait=None)
    shown.runs()
    shown.press("Stop", "stop", after="step")
    expect(shown.area).to_contain_text("stopped at step", timeout=30_000)
    notebook.wait_idle()
    rows, state, step, *_ = told(notebook, 5)
    assert [row[0] for row in panel_rows(rows)] == ["pause", "stop"] and state == "stopped" and step > at[-1]
