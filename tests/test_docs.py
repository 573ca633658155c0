"""The pages: their code runs, their links lead somewhere, and what a notebook becomes."""
from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
THEIRS = re.compile(r"^```\{code-block\} python\n(.*?)^```$", re.M | re.S)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]

spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools/docs.py")
docs = importlib.util.module_from_spec(spec)
sys.modules["docs_tool"] = docs
spec.loader.exec_module(docs)


# --- the code on the pages ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    "One page is one session: its blocks run in order, in an empty folder, and what they assert holds."
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict = {"__name__": "__main__"}
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(1))
        code = compile("\n" * line + found[1], str(page), "exec")  # so that an error says where on the page
        exec(code, names)


def test_pages_with_code():
    assert {"callback", "player", "knob", "optimizer", "from-fastai", "from-lightning", "from-keras", "from-torchgan",
            "commands", "exact-resume", "index"} <= {page.stem for page in WITH_CODE}  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem.startswith("from-")], ids=lambda page: page.stem)
def test_others_code_is_python(page):
    "Other toolkits aren't there to run it, but it is at least Python."
    blocks = THEIRS.findall(page.read_text(encoding="utf-8"))
    assert len(blocks) == 1
    ast.parse(blocks[0])


def test_five_lines():
    "The callback that is promised in five lines has no more of them."
    first = BLOCK.search((ROOT / "docs/howto/callback.md").read_text(encoding="utf-8"))[1]
    body = first[first.index("class "):].strip().splitlines()
    assert len(body) <= 5


def test_the_loop_is_drawn_as_it_is():
    from trainkit.callback import PREDICT, TEST, Cancel, loop_picture
    page = (ROOT / "docs/events.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^```text\n(.*?)\n```$", page, re.M | re.S)
    assert drawn == [loop_picture(), loop_picture(scope=TEST), loop_picture(scope=PREDICT)]
    public = [kind for kind in Cancel.__subclasses__() if kind.__module__ == "trainkit.callback"]
    assert {f"trainkit.callback.{kind.__name__}" for kind in public} == {*re.findall(r"`~(\S+)`", page)}


# --- links --------------------------------------------------------------------------------------------------------------

def test_every_link_leads_somewhere():
    assert docs.dead_links(docs.repository_pages()) == []


def test_every_module_has_a_floor():
    modules = [p for p in docs.repository_pages() if p.parent == Path("nbs")]
    assert len(modules) > 100
    assert {docs.floor_of(p) for p in modules} == set(docs.FLOORS)


def test_a_dead_link_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("[one](b.md), [two](https://example.org), [three](#here), `[no](link)`, [four](a.md)")
    assert docs.dead_links({Path("a.md"): Path("a.md")}) == ["a.md: the link b.md leads nowhere: there is no b.md"]


def test_relink():
    pages = {"docs/x.md": "x.md", "nbs/20_callback.ipynb": "nbs/20_callback.ipynb", "examples/digits.py": "examples/digits.md",
             "docs/benchmarks.md": "benchmarks.md"}  # fmt: skip
    pages = {Path(at): Path(place) for at, place in pages.items()}

    def moved(text):
        return docs.relink(text, Path("docs/x.md"), pages)
    assert moved("[a](../nbs/20_callback.ipynb#cancelling)") == "[a](nbs/20_callback.ipynb#cancelling)"
    assert moved("[`a`](../examples/digits.py)") == "[`a`](examples/digits.md)"
    assert moved("[all](../benchmarks/results)") == "[all](benchmarks.md)"
    assert moved("![a](../nbs/images/live_dark.png)") == "![a](nbs/images/live_dark.png)"
    assert moved("the [license](../LICENSE)") == "the license"  # no page: named, not linked
    assert moved("`[a](../nope.md)` [b](https://example.org/x) [c](#d)") == "`[a](../nope.md)` [b](https://example.org/x) [c](#d)"
    with pytest.raises(ValueError, match="leads nowhere"):
        moved("[a](../nope.md)")


def test_links_of_the_built_pages(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top-of">x</h1><a href="b.html#there">1</a><a href="#top-of">2</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<a href="a.html#nowhere">3</a><a href="https://example.org/">4</a>')
    assert docs.dead_in_site(tmp_path) == [
        "a.html: b.html#there: no such anchor", "a.html: c.png leads nowhere",
        "b.html: a.html#nowhere: no such anchor"]  # fmt: skip


# --- notebooks ----------------------------------------------------------------------------------------------------------

def cell(kind, text, **more):
    of_code = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text, **of_code, **more}


NOTEBOOK = {"cells": [
    cell("markdown", "# Title\n> About"),
    cell("code", "#| default_exp part.thing"),
    cell("code", "#| export\nimport torch\nfrom torch import nn"),
    cell("code", "#| hide\nsecret = 1"),
    cell("code", "#| export\nKINDS: int = 3\n_OWN = 2\n\n\nclass Thing:\n    def turn(self): ...\n    def _own(self): ..."),
    cell("code", "#| export\ndef make(): ...\n\n\ndef _inner(): ..."),
    cell("code", "#| hide_input\n1 + 1", outputs=[
        {"output_type": "execute_result", "metadata": {}, "execution_count": None, "data": {"text/plain": "2"}},
        {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {}}}]),
]}  # fmt: skip


def test_page_of_a_notebook():
    page = docs.page_of(NOTEBOOK, Path("nbs/00_x.ipynb"), {Path("nbs/00_x.ipynb"): Path("nbs/00_x.ipynb")})
    text = "\n".join(map(docs.source, page["cells"]))
    assert "#|" not in text and "secret" not in text and "import torch" not in text
    assert "Module `trainkit.part.thing`" in text
    assert re.findall(r"\{py:(\w+)\} (\S+)", text) == [
        ("data", "trainkit.part.thing.KINDS"), ("class", "trainkit.part.thing.Thing"),
        ("method", "trainkit.part.thing.Thing.turn"),
        ("function", "trainkit.part.thing.make")]  # fmt: skip
    code = [c for c in page["cells"] if c["cell_type"] == "code"]
    assert [c["metadata"]["tags"] for c in code] == [["export"], ["export"], ["hide-input"]]
    assert [o["data"] for o in code[-1]["outputs"]] == [{"text/plain": "2"}]  # a widget needs a kernel


def test_what_a_notebook_keeps_is_shown():
    "Every code cell of a real notebook that isn't hidden is on its page, with its outputs."
    at = Path("nbs/20_callback.ipynb")
    notebook = json.loads((ROOT / at).read_text(encoding="utf-8"))
    page = docs.page_of(notebook, at, docs.repository_pages())
    shown = {docs.source(c) for c in page["cells"] if c["cell_type"] == "code"}
    outputs = sum(len(c["outputs"]) for c in page["cells"] if c["cell_type"] == "code")
    assert any("class Callback:" in s for s in shown) and any("loop_picture(" in s for s in shown)
    hidden = [c for c in notebook["cells"] if c["cell_type"] == "code" and "hide" in docs.directives(c)]
    assert hidden and not any(docs.source(c).split("\n", 1)[1] in shown for c in hidden)
    assert outputs == sum(len(c.get("outputs", [])) for c in notebook["cells"] if c["cell_type"] == "code" and c not in hidden)
