"The quickstart as its reader meets it: run, stopped with the stop button, continued, and restored after a kernel restart."

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.labpage import LabPage

QUICKSTART = Path(__file__).parents[2] / "nbs/tutorials/01_quickstart.ipynb"
PRESS = "import _thread, threading; threading.Timer(10, _thread.interrupt_main).start()"
MAKE, FIT, STATE, LOOK, GO_ON, SAVE = "def make_gan", "gan.fit(epochs=", "gan.state,", "def show", "gan.fit()", "gan.save("

pytestmark = pytest.mark.browser


def shortened(steps: int) -> tuple[dict, dict[str, int]]:
    "The notebook with a short fit and nobody but the test to stop it; and the places of its code cells."
    nb = json.loads(QUICKSTART.read_text())
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        assert PRESS in source or FIT not in source
        source = source.replace(PRESS, "")
        cell["source"] = re.sub(r"gan\.fit\(epochs=\d+\)", f"gan.fit(steps={steps})", source)
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    code = ["".join(cell["source"]) for cell in nb["cells"] if cell["cell_type"] == "code"]
    wanted = {"make": MAKE, "fit": f"gan.fit(steps={steps})", "state": STATE, "look": LOOK, "go on": GO_ON, "save": SAVE}
    places = {name: next(i for i, source in enumerate(code) if text in source) for name, text in wanted.items()}
    back = {"cell_type": "code", "id": "back", "metadata": {}, "outputs": [], "execution_count": None,
            "source": "print(gan.restore('last'))\nshow(gan.sample_fixed(20))"}  # fmt: skip
    nb["cells"].append(back)
    return nb, places | {"back": len(code)}


def test_run_stop_go_on_restart_restore(lab, page):
    nb, at = shortened(steps=150)
    (lab.folder / "quickstart.ipynb").write_text(json.dumps(nb))
    notebook = LabPage(page, lab.address("quickstart.ipynb"))
    notebook.run(0)
    notebook.run(at["make"])

    notebook.run(at["fit"], wait=None)  # watched: bars, curves and samples appear while the cell runs
    live = notebook.output(at["fit"])
    expect(live.locator("progress").first).to_be_visible(timeout=60_000)
    expect(live.locator("img").first).to_be_visible(timeout=60_000)
    expect(live).to_contain_text(re.compile(r"[1-9]\d/150"), timeout=120_000)
    notebook.screenshot("1-training")

    notebook.stop()
    notebook.wait_done(at["fit"], 60)
    assert notebook.errors() == []
    expect(live).to_contain_text(re.compile(r"interrupted at step \d+ .*learn\.fit\(\) goes on"))
    assert live.locator("progress").count() == 0, "a bar is left behind"
    stopped = int(re.search(r"interrupted at step (\d+)", live.inner_text())[1])
    assert 10 <= stopped < 150

    notebook.run(at["state"])
    expect(notebook.output(at["state"])).to_contain_text(f"step {stopped}, ")
    notebook.run(at["look"])
    expect(notebook.output(at["look"]).locator("img")).to_be_visible()
    notebook.screenshot("2-stopped")

    notebook.run(at["go on"], wait=180)
    expect(notebook.output(at["go on"])).to_contain_text(re.compile(r"finished.*step 150"))
    notebook.screenshot("3-finished")
    notebook.run(at["save"])
    expect(notebook.output(at["save"])).to_contain_text("the end of the quickstart")

    notebook.restart_kernel()
    notebook.run(0)
    notebook.run(at["make"])
    expect(notebook.output(at["make"])).to_contain_text("step 0")
    notebook.run(at["look"])
    notebook.run(at["back"])
    expect(notebook.output(at["back"])).to_contain_text("step 150")
    expect(notebook.output(at["back"]).locator("img")).to_be_visible()
    assert notebook.errors() == []
    notebook.screenshot("4-restored")
