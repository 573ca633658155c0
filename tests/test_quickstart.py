"The quickstart, whole, in a real kernel: what it promises, in numbers; and its script twin, to the last bit."

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from tutorials import shortened

from trainkit.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/01_quickstart.ipynb", ROOT / "examples/quickstart.py"


def text_of(nb: nbformat.NotebookNode) -> str:
    "Everything the notebook printed or showed as text."
    outputs = [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in outputs)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    state, _ = Checkpoints(run / "checkpoints").load("last")
    return {f"{player}.{module}.{name}": value for player, part in state["players"].items()
            for module, weights in part["modules"].items() for name, value in weights.items()}  # fmt: skip


def test_what_the_quickstart_promises(tmp_path):
    nb = shortened(NOTEBOOK, {}, tmp_path, timeout=900)
    said = text_of(nb)
    assert re.search(r"interrupted at step \d+ .*learn\.fit\(\) goes on", said)
    assert "the same pictures before: False" in said and "the same pictures after:  True" in said
    assert float(re.search(r"held-out real digits: ([\d.]+)%", said)[1]) > 96
    assert float(re.search(r"digit asked for: +([\d.]+)%", said)[1]) > 85
    real, fake, noise = map(float, re.search(r"real digits ([\d.]+), our fakes ([\d.]+), noise ([\d.]+)", said).groups())
    assert 8.5 < real <= 10 and fake > 8 and noise < 3
    pictures = [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 8
    views = [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs
             if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]  # fmt: skip
    assert not views, "a widget is left behind that a reader of the saved notebook can't see"
    assert (tmp_path / "runs/digits/history.jsonl").exists() and (tmp_path / "runs/digits/curves.png").exists()


def test_twenty_lines_of_user_code():
    nb = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    first_fit = next(i for i, source in enumerate(code) if "gan.fit(" in source)
    lines = [line for source in code[: first_fit + 1] for line in source.splitlines()]
    lines = [line for line in lines if line.strip() and not line.startswith(("import ", "from ", "#"))]
    assert len(lines) <= 20, len(lines)


@pytest.mark.parametrize("epochs", [2])
def test_the_script_ends_in_the_same_weights(epochs, tmp_path):
    "The notebook is interrupted and continued, sampled from and saved; the script runs straight through."
    (tmp_path / "notebook").mkdir()
    shortened(NOTEBOOK, {"epochs=20": f"epochs={epochs}", "Timer(10": "Timer(1.5"}, tmp_path / "notebook", 900, once=False)
    subprocess.run([sys.executable, SCRIPT, "--epochs", str(epochs), "--run", tmp_path / "script"], check=True, cwd=tmp_path,
                   capture_output=True)  # fmt: skip
    ours, theirs = final_weights(tmp_path / "notebook/runs/digits"), final_weights(tmp_path / "script")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
