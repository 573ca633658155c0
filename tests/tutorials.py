"What the tests of tutorials share: a notebook made shorter and run in a kernel of its own, and what it says and shows."

from collections.abc import Mapping
from pathlib import Path

import nbclient
import nbformat
import pytest


def shortened(path: Path, shorter: Mapping[str, str], folder: Path, timeout: int = 300) -> nbformat.NotebookNode:
    "The notebook, run in a folder with replacements in its code, each of which finds just one place."
    nb = nbformat.read(path, as_version=4)
    for old, new in shorter.items():
        assert sum(old in cell.source for cell in nb.cells) == 1, old
        for cell in nb.cells:
            cell.source = cell.source.replace(old, new)
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRAINKIT_WHERE", raising=False)  # a kernel of its own knows where it is
        where = {"metadata": {"path": str(folder)}}
        return nbclient.NotebookClient(nb, timeout=timeout, kernel_name="python3", resources=where).execute(cwd=str(folder))


def text_of(nb: nbformat.NotebookNode) -> str:
    "What a notebook printed."
    return "".join(o.text for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")


def pictures(nb: nbformat.NotebookNode) -> int:
    return sum("image/png" in o.get("data", {}) for c in nb.cells if c.cell_type == "code" for o in c.outputs)
