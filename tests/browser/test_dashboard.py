"The dashboard in JupyterLab: live, paused, loaded again, narrow and dark; then still, also in a notebook that is opened again."

import json
import re

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.labpage import LabPage

pytestmark = pytest.mark.browser

MAKE = """
import time, torch
from torch import nn
from trainkit.callback import On
from trainkit.gan.learner import GANLearner
from trainkit.ui.dashboard import dashboard

torch.manual_seed(0)
torch.set_num_threads(1)
def make(seconds):
    generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 256), nn.Tanh(), nn.Unflatten(1, (1, 16, 16)))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))
    return GANLearner(generator, discriminator, torch.rand(320, 1, 16, 16), latent=8, batch_size=32, n_samples=36,
                      seed=1, save_every="none", device="cpu", cbs=[On("after_batch", lambda learn: time.sleep(seconds))])
gan = make(0.03)
""".strip()
FIT, AGAIN = "gan.fit(steps=5000)", "dashboard(gan)"
SHORT = "gan.remove(On)\ngan.fit(steps=200)"
FAIL = "gan.add(On('after_batch', lambda learn: 1 / 0))\ngan.fit(steps=50)"
DEAD = re.compile("model not found|Loading widget|VBox\\(")


def theme(page, name: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text="Settings").click()
    page.locator(".lm-Menu-itemLabel", has_text="Theme").first.hover()
    page.locator(".lm-Menu-itemLabel", has_text=name).first.click()


def fits(area) -> None:
    "Nothing is wider than its place."
    wide = area.evaluate("""e => {
        const room = e.querySelector('.trainkit-live').getBoundingClientRect();
        const scrolls = p => p && p !== e && (getComputedStyle(p).overflowX !== 'visible' || scrolls(p.parentElement));
        const wide = x => x.getBoundingClientRect().right > room.right + 1 && !scrolls(x.parentElement);
        return [...e.querySelectorAll('.trainkit-live, .trainkit-live *')].filter(wide).map(x => x.outerHTML.slice(0, 99)) }""")
    assert wide == []


def saved(notebook: LabPage, path, ready) -> list:
    "Outputs of the cells, once the file has what it should."
    notebook.page.keyboard.press("Control+s")
    for _ in range(50):
        outputs = [cell["outputs"] for cell in json.loads(path.read_text())["cells"]]
        if ready(outputs):
            return outputs
        notebook.page.wait_for_timeout(200)
    pytest.fail(f"not saved: {str(outputs)[:500]}")


def test_live_then_still(lab, page):
    path = lab.folder / "dashboard.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in (MAKE, FIT, AGAIN, SHORT, FAIL)]
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, path)
    notebook = LabPage(page, lab.address("dashboard.ipynb"))
    notebook.run(0)
    notebook.run(1, wait=None)
    area = notebook.output(1)
    live, state = area.locator(".trainkit-live"), area.get_by_role("status").first
    expect(state).to_have_text("running", timeout=60_000)
    expect(live.locator("progress")).to_have_count(2)
    expect(live.locator(".trainkit-pictures img")).to_have_count(2)
    expect(live).to_contain_text(re.compile(r"epoch \d+/500 · step [1-9]\d/5000"))
    height = live.bounding_box()["height"]
    expect(live).to_contain_text(re.compile(r"… \d+ earlier epoch"), timeout=60_000)
    assert live.bounding_box()["height"] == height, "the page jumped"
    fits(area)
    notebook.screenshot("dashboard-1-running")

    live.get_by_role("button", name="Pause", exact=True).click()
    expect(state).to_have_text("paused")
    curves = live.locator("img.trainkit-curves")
    expect(curves).to_have_css("filter", "none")
    theme(page, "JupyterLab Dark")
    expect(curves).to_have_css("filter", re.compile("invert"))  # lines on dark, as the theme wants it
    notebook.screenshot("dashboard-2-paused-dark")
    outputs = saved(notebook, path, lambda outputs: outputs[1])
    assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= outputs[1][0]["data"].keys()

    page.reload()
    page.locator(".jp-Notebook").wait_for(timeout=90_000)
    expect(state).to_have_text("paused", timeout=30_000)
    live.get_by_role("button", name="Resume", exact=True).click()
    expect(state).to_have_text("running")
    page.keyboard.press("Control+b")  # no file browser
    page.set_viewport_size({"width": 390, "height": 1500})
    page.wait_for_timeout(500)
    fits(area)
    notebook.screenshot("dashboard-3-narrow-dark")
    page.set_viewport_size({"width": 1200, "height": 1500})
    theme(page, "JupyterLab Light")
    live.get_by_role("button", name="Stop", exact=True).click()
    expect(area).to_contain_text(re.compile(r"stopped at step \d+ of 5000"), timeout=30_000)
    assert not DEAD.search(area.inner_text())
    notebook.wait_idle()
    notebook.run(2)
    expect(notebook.output(2)).to_contain_text("stopped at step")
    notebook.screenshot("dashboard-4-stopped")

    notebook.run(3, wait=90)
    notebook.run(4)
    still, failed = notebook.output(3), notebook.output(4)
    expect(still).to_contain_text("finished")
    expect(failed.locator(".end.failed")).to_contain_text("ZeroDivisionError")
    failed.scroll_into_view_if_needed()
    notebook.screenshot("dashboard-5-failed")
    outputs = saved(notebook, path, lambda outputs: outputs[4])
    for output in (outputs[2], outputs[3], outputs[4][:2]):
        words, picture = (o["data"].keys() for o in output)
        assert (words, picture) == ({"text/html", "text/plain"}, {"image/png", "text/plain"})
        assert len(json.dumps(output)) < 300_000

    notebook.restart_kernel()
    page.reload()
    expect(still.locator(".end.finished")).to_be_visible(timeout=30_000)
    for shown in (notebook.output(2), still, failed):
        expect(shown.locator("img")).to_be_visible()
        assert not DEAD.search(shown.inner_text())
    still.scroll_into_view_if_needed()
    notebook.screenshot("dashboard-6-reopened")
