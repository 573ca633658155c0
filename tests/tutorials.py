"What the tests of tutorials share: a notebook made shorter and run in a kernel of its own, what it says and shows, and counts."

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

from trainkit.learner import Learner


def shortened(path: Path, shorter: Mapping[str, str], folder: Path, timeout: int = 300, once: bool = True,
              around: tuple[str, str] | None = None) -> nbformat.NotebookNode:  # fmt: skip
    "The notebook, run in a folder with replacements in its code, each of which finds one place, or any number; with a cell more."
    nb = nbformat.read(path, as_version=4)
    for old, new in shorter.items():
        assert (found := sum(old in cell.source for cell in nb.cells)) and (found == 1 or not once), old
        for cell in nb.cells:
            cell.source = cell.source.replace(old, new)
    if around:
        first, last = map(nbformat.v4.new_code_cell, around)
        nb.cells = [first, *nb.cells, last]
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRAINKIT_WHERE", raising=False)  # a kernel of its own knows where it is
        where = {"metadata": {"path": str(folder)}}
        return nbclient.NotebookClient(nb, timeout=timeout, kernel_name="python3", resources=where).execute(cwd=str(folder))


def text_of(nb: nbformat.NotebookNode) -> str:
    "What a notebook printed."
    return "".join(o.text for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")


def outputs(nb: nbformat.NotebookNode, kind: str) -> list[str]:
    "What it showed, of one media type."
    found = [o.get("data", {}).get(kind) for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    return ["".join(data) for data in found if data]


def said_by(script: Path, *args: str, cwd: Path) -> str:
    "What a script printed; a failure is an error."
    return subprocess.run([sys.executable, script, *args], check=True, cwd=cwd, capture_output=True, text=True).stdout


def moved(learn: Learner, steps: int) -> float:
    "The share of all players' weights that some steps change; they stay finite."
    weights = [p for player in learn.players for p in player.parameters()]
    before = [p.detach().clone() for p in weights]
    learn.fit(steps=steps)
    assert all(p.isfinite().all() for p in weights)
    return sum(not torch.equal(p, b) for p, b in zip(weights, before)) / len(weights)


def cpu_minutes(nb: nbformat.NotebookNode) -> float:
    "What it took, as it says at its end."
    return float(re.search(r"^this notebook has taken ([\d.]+) CPU minutes$", text_of(nb), re.MULTILINE)[1])


MARK = "# counts as: "


def counted_cells(nb: nbformat.NotebookNode) -> dict[str, str]:
    "The code that a notebook counts beside another library's, by part; formatted as that is, so that lines are comparable."
    cells = {c.source.splitlines()[0].removeprefix(MARK): c.source for c in nb.cells if c.source.startswith(MARK)}
    ruff = shutil.which("ruff") or Path(__file__).parents[1] / ".venv/bin/ruff"
    for source in cells.values():
        command = [ruff, "format", "--isolated", "--line-length", "88", "--stdin-filename", "cell.py", "-"]
        done = subprocess.run(command, input=source + "\n", capture_output=True, text=True, check=True)
        assert done.stdout.strip() == source.strip()
    return cells


def lines_of(code: str) -> int:
    "Those that hold code; strings over several lines and lines of comments between brackets don't occur."
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in code.splitlines())


def table_of_lines(nb: nbformat.NotebookNode) -> dict[str, list[int]]:
    "Part -> lines and tokens here, lines and tokens there, as printed; our lines and all sums are counted anew."
    found = re.findall(r"^([a-z]+) +(\d+) +(\d+) +(\d+) +(\d+)$", text_of(nb), re.MULTILINE)
    table, cells = {part: [*map(int, numbers)] for part, *numbers in found}, counted_cells(nb)
    parts = {part: row for part, row in table.items() if part != "together"}
    assert {part for part, row in parts.items() if row[0]} == {*cells}
    assert all(row[0] == lines_of(cells.get(part, "")) <= row[1] for part, row in parts.items())
    assert table["together"] == [sum(column) for column in zip(*parts.values())]
    return table


def pictures(nb: nbformat.NotebookNode) -> int:
    return len(outputs(nb, "image/png"))
