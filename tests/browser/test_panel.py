"The panel as one uses it: pressed, dragged, typed into while a cell trains; in the dark; and on a phone."

import json
import re
import urllib.request

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.labpage import LabPage

pytestmark = pytest.mark.browser

MAKE = """
import time, torch
from torch import nn
from trainkit.callback import Callback
from trainkit.gan.learner import GANLearner
from trainkit.ui.panel import Panel

class Slow(Callback):
    "Steps of 20 ms, and a panel that is brought up to date five times a second."
    order, due = 95, 0.0
    def after_batch(self, learn):
        time.sleep(0.02)
        if time.monotonic() < self.due: return
        self.due = time.monotonic() + 0.2
        for panel in shown: panel.refresh()
    def cleanup_fit(self, learn):
        for panel in shown: panel.refresh()
    before_pause = after_pause = after_command = cleanup_fit

torch.manual_seed(0)
torch.set_num_threads(1)
generator = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
opt = {"name": "adam", "lr": 2e-3, "betas": (0.5, 0.99), "schedule": "cosine"}
gan = GANLearner(generator, discriminator, torch.rand(512, 1, 8, 8) * 2 - 1, latent=8, opt=opt, batch_size=32, seed=1,
                 run="runs/NAME", front="none", device="cpu", cbs=[Slow()])
shown = [Panel(gan), Panel(gan)]
gan.fit(steps=10)
""".strip()
SHOW = "shown[0].widget"
AGAIN = "shown[1]  # follows by itself"
FIT = "gan.fit(steps=3000, schedule='stretch')"
STATE = "[(c.player, c.values, c.held) for c in gan.controls() if c.name == 'lr']"
JOURNAL = "print(len(gan.journal), gan.step, gan.state)\ngan.journal"

WIDE = """panel => [panel, ...panel.querySelectorAll("*")].filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1
    && ["auto", "scroll"].includes(getComputedStyle(e).overflowX)).map(e => e.className)"""  # what scrolls sideways


HIGHLIT = re.compile("mod-primary")


class Shown:
    "A panel in a cell's output."

    def __init__(self, notebook: LabPage, index: int):
        self.notebook, self.area = notebook, notebook.output(index).locator(".tk-panel")

    def press(self, text: str) -> None:
        self.area.get_by_role("button", name=text, exact=True).click()

    def row(self, player: str, name: str):
        section = self.area.locator(".tk-section", has=self.notebook.page.get_by_text(player, exact=True))
        return section.locator(".widget-hbox", has=self.notebook.page.get_by_label(name, exact=True))

    def says(self, text, timeout: float = 10_000) -> None:
        expect(self.area.get_by_role("status")).to_contain_text(text, timeout=timeout)

    def drag(self, row, places: list[float], wait: float = 40) -> None:
        "Over a slider, as shares of its width; the button stays down."
        row.scroll_into_view_if_needed()
        mouse, box = self.notebook.page.mouse, row.locator(".slider-container:visible .noUi-base").bounding_box()
        handle = row.locator(".slider-container:visible .noUi-handle").bounding_box()
        mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
        mouse.down()
        for share in places:
            mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2, steps=4)
            self.notebook.page.wait_for_timeout(wait)


def handle_at(row) -> float:
    box, handle = (row.locator(f".slider-container:visible {part}").bounding_box() for part in (".noUi-base", ".noUi-handle"))
    return (handle["x"] + handle["width"] / 2 - box["x"]) / box["width"]


@pytest.fixture
def notebook(lab, page, request):
    name = request.node.name.replace("_", "-")
    cells = [nbformat.v4.new_code_cell(source) for source in (MAKE.replace("NAME", name), SHOW, FIT, STATE, JOURNAL, AGAIN)]
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, lab.folder / f"{name}.ipynb")
    notebook = LabPage(page, lab.address(f"{name}.ipynb"))
    notebook.run(0)
    notebook.run(1)
    return notebook


def test_steered_while_the_cell_runs(notebook, page):
    panel = Shown(notebook, 1)
    expect(panel.area.get_by_role("button", name="Pause")).to_be_disabled()
    notebook.screenshot("panel-1-idle")
    notebook.run(2, wait=None)
    expect(panel.area.get_by_role("button", name="Pause")).to_be_enabled(timeout=20_000)

    lr = panel.row("generator", "learning rate")
    panel.drag(lr, [0.9, 0.2, 0.6, 0.3])
    page.wait_for_timeout(1500)  # held still: nothing moves it away
    assert handle_at(lr) == pytest.approx(0.3, abs=0.02)
    page.mouse.up()
    expect(lr).to_contain_text(re.compile(r"[\d.e-]+ held; applied at step \d+"))
    held = float(lr.get_by_role("textbox").input_value())
    notebook.screenshot("panel-2-dragged")

    field = panel.row("discriminator", "learning rate").get_by_role("textbox")
    field.fill("1e-4x")
    field.press("Enter")
    expect(panel.row("discriminator", "learning rate")).to_contain_text("'1e-4x': type a number >= 0")
    notebook.screenshot("panel-3-refused")
    field.fill("1e-4")
    field.press("Enter")
    expect(panel.row("discriminator", "learning rate")).to_contain_text("0.0001 held; applied at step")
    page.wait_for_timeout(800)
    panel.press("Pause")
    expect(panel.area.get_by_role("button", name="Resume")).to_have_class(HIGHLIT)
    notebook.screenshot("panel-4-paused")
    panel.press("One step")
    panel.says(re.compile(r"Step \d+: step"))
    lr.get_by_role("button", name="back to schedule").click()
    expect(lr).to_contain_text("on its schedule; given back at step")
    panel.press("journal")
    expect(panel.area.locator("tbody tr").first).to_contain_text("back to the schedule")
    notebook.screenshot("panel-5-journal")
    panel.press("timings")
    expect(panel.area.locator(".tk-table").locator("visible=true")).to_contain_text("of 3010")
    notebook.screenshot("panel-6-timings")
    panel.press("Undo")
    panel.says("(undone)")
    panel.press("Save")
    panel.says(re.compile(r"Step \d+: save"))
    panel.press("Stop")
    notebook.wait_done(2)
    panel.says(re.compile(r"Step \d+: stop"))
    notebook.run(3)
    expect(notebook.output(3)).to_contain_text(f"('generator', ({held},), {{'value': {held}}})")
    expect(notebook.output(3)).to_contain_text("('discriminator', (0.0001,), {'value': 0.0001})")
    assert notebook.errors() == []


def test_steered_by_the_keyboard(notebook, page):
    "Keys go on doing what the button says on which they were pressed: it neither vanishes nor changes, and keeps the focus."
    panel = Shown(notebook, 1)
    pause, resume = (panel.area.get_by_role("button", name=name, exact=True) for name in ("Pause", "Resume"))
    notebook.run(2, wait=None)
    expect(pause).to_be_enabled(timeout=20_000)
    pause.focus()
    place = pause.bounding_box()
    page.keyboard.press("Space")
    expect(resume).to_have_class(HIGHLIT)
    expect(pause).to_be_focused()
    panel.says(re.compile(r"Step \d+: pause"))
    held = panel.area.get_by_role("status").inner_text()
    page.keyboard.press("Space")  # once more: it is held already
    page.wait_for_timeout(1000)
    expect(resume).to_have_class(HIGHLIT)
    assert panel.area.get_by_role("status").inner_text() == held and pause.bounding_box() == place
    notebook.screenshot("panel-10-keyboard")
    page.keyboard.press("Tab")
    expect(resume).to_be_focused()
    page.keyboard.press("Enter")
    expect(resume).not_to_have_class(HIGHLIT)
    expect(resume).to_be_focused()
    panel.says(re.compile(r"Step \d+: resume"))
    page.keyboard.press("Space")
    panel.says("the fit is not paused")
    expect(resume).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(resume).to_have_class(HIGHLIT)
    expect(pause).to_be_focused()
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(panel.area.get_by_role("button", name="Stop", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    notebook.wait_done(2)
    expect(resume).to_be_disabled()
    assert notebook.errors() == []


@pytest.fixture
def dark(lab):
    "JupyterLab in its dark theme, while the test lasts."
    address = f"{lab.url}/lab/api/settings/@jupyterlab/apputils-extension:themes?token={lab.token}"

    def put(theme: str) -> None:
        body = json.dumps({"raw": json.dumps({"theme": theme})}).encode()
        urllib.request.urlopen(urllib.request.Request(address, body, method="PUT"), timeout=10).close()

    put("JupyterLab Dark")
    yield
    put("JupyterLab Light")


def test_in_the_dark_on_a_phone(dark, notebook, page):
    "Nothing is cut off or scrolls sideways, texts are readable, and a second panel shows the same."
    expect(page.locator('body[data-jp-theme-light="false"]')).to_have_count(1)
    notebook.screenshot("panel-7-dark")
    page.keyboard.press("Control+b")
    page.set_viewport_size({"width": 390, "height": 844})
    notebook.run(5)
    first, second = Shown(notebook, 1), Shown(notebook, 5)
    field = second.row("generator", "learning rate").get_by_role("textbox")
    field.fill("3e-4")
    field.press("Enter")
    for panel in (first, second):
        panel.area.scroll_into_view_if_needed()
    expect(second.row("generator", "learning rate")).to_contain_text("0.0003 held; applied at step 10")
    second.area.scroll_into_view_if_needed()
    notebook.screenshot("panel-8-narrow")
    height = second.area.bounding_box()["height"]
    for tab in ("journal", "timings", "gallery", "knobs"):
        second.press(tab)
        page.wait_for_timeout(300)
        notebook.screenshot(f"panel-9-narrow-{tab}")
        wide = second.area.evaluate(WIDE)
        if tab == "journal":  # looking at it has changed nothing
            expect(second.area.locator("tbody tr").locator("visible=true")).to_have_count(3)
        assert (wide == [] or tab == "gallery") and second.area.bounding_box()["height"] == height
    beta1 = second.row("generator", "beta1")  # by keyboard
    beta1.get_by_role("textbox").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(beta1).to_contain_text("applied at step 10")
    expect(beta1.get_by_role("textbox")).to_have_value("0.505")
    expect(first.row("generator", "beta1").get_by_role("textbox")).to_have_value("0.505")
    assert notebook.errors() == []
