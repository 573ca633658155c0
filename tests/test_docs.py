"""The pages: their code runs, their links lead somewhere, and what a notebook becomes."""
from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
THEIRS = re.compile(r"^```\{code-block\} python\n(.*?)^```$", re.M | re.S)
README = ROOT / "README.md"
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]

def tool(name):
    "A program of tools/ as a module."
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / f"tools/{name}.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


docs = tool("docs")


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


def test_readme_runs(tmp_path):
    "The blocks of README.md as the cells of one session, as a newcomer would paste them."
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) == 4
    session = "from IPython.core.interactiveshell import InteractiveShell\nshell = InteractiveShell.instance()\n"
    session += f"for block in {blocks!r}:\n    shell.run_cell(block, store_history=True).raise_error()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "profile")}
    done = subprocess.run([sys.executable, "-c", session], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "runs/lower-rate/history.jsonl").is_file()
    ast.parse((tmp_path / "again.py").read_text(encoding="utf-8"))


def test_pages_with_code():
    assert {"callback", "player", "knob", "optimizer", "from-fastai", "from-lightning", "from-keras", "from-torchgan",
            "commands", "exact-resume", "index", "share"} <= {page.stem for page in WITH_CODE}  # fmt: skip


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


def test_ten_lines():
    "README's first two programs are as short as it says, and end with a fit; what they rest on is said in them."
    for heading in ("## Ten lines to a GAN", "## Ten lines to a classifier"):
        code = BLOCK.search(README.read_text(encoding="utf-8").split(heading + "\n")[1])[1]
        named = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
        given = {node.id for node in named if isinstance(node.ctx, ast.Store)} | {*re.findall(r"import (.+)", code)}
        known = {name for names in given for name in re.split(r",\s*", names)}
        assert {node.id for node in named} <= known, "used, and from nowhere"
        assert len([line for line in code.splitlines() if line.strip()]) <= 10
        assert any(line.startswith(("gan.fit(", "learn.fit(")) for line in code.splitlines())


def test_commands_of_the_readme_are_there():
    "Every `trainkit …` and `make …` that README names is one."
    from trainkit.cli import app
    blocks = re.findall(r"^```sh\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line.partition("  #")[0].split() for block in blocks for line in block.splitlines()]
    known, targets = app().commands, (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [line for line in lines if line[0] == "trainkit"]
    assert {line[1] for line in commands} >= {"runs", "show", "run", "export", "new", "control"}
    for _, name, *rest in commands:
        there = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= there, name
    made = [line[1] for line in lines if line[0] == "make"]
    assert made and all(re.search(rf"^{name}:", targets, re.M) for name in made)


def test_the_loop_is_drawn_as_it_is():
    from trainkit.callback import FIT, PREDICT, TEST, Cancel, loop_picture
    page = (ROOT / "docs/events.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^```text\n(.*?)\n```$", page, re.M | re.S)
    assert drawn == [loop_picture(), loop_picture(scope=TEST), loop_picture(scope=PREDICT)]
    boxes = tool("loop")
    assert boxes.DRAWN.read_text(encoding="utf-8") == boxes.drawing(), "python tools/loop.py draws it again"
    told = re.findall(r"<text[^>]*>([^<]+)</text>", boxes.drawing())
    assert [text for text in told if text != "always"] == [text.removeprefix("· ") for _, text in FIT.rows()]
    public = [kind for kind in Cancel.__subclasses__() if kind.__module__ == "trainkit.callback"]
    assert {f"trainkit.callback.{kind.__name__}" for kind in public} == {*re.findall(r"`~(\S+)`", page)}


def test_what_a_learner_is_said_to_have_it_has():
    "Prose is not run, so names in it are looked for: `learn.this`, `gan.that()`."
    from torch import nn, zeros

    from trainkit.gan.learner import GANLearner
    gan = GANLearner(nn.Linear(2, 3), nn.Linear(3, 1), zeros(8, 3), latent=2, front="none")
    assert hasattr(gan, "sample") and not hasattr(gan, "knobs")
    for page in [README, *(page for page in PAGES if page.stem != "from-fastai")]:  # whose learner has names of its own
        text = re.sub(r"trainkit\.\S+|\S+/\S+", "", page.read_text(encoding="utf-8"))
        said = {*re.findall(r"\b(?:learn|gan)\.([a-z_]+)", THEIRS.sub("", text))}
        assert not [name for name in said if not hasattr(gan, name)], page.name


def test_nothing_says_to_install_what_somebody_else_has_called_so():
    "Another package has the name on the index: this one is installed from a clone."
    files = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")]
    for folder in ("docs", "nbs", "trainkit", "examples", "tools", "benchmarks"):
        files += [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in {".md", ".ipynb", ".py", ".txt"}]
    said = re.compile(r"""pip3? install\s+(?:-\S+\s+)*[\\"'`]*trainkit\b""")
    assert said.search('pip install -U "trainkit[notebook]"') and said.search("pip install trainkit") and len(files) > 200
    assert [path.name for path in files if said.search(path.read_text(encoding="utf-8"))] == []


def tables_in(path):
    "Rows of each table of a page, by its head."
    blocks = re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.M)
    return [(lines[0], lines[2:]) for lines in map(str.splitlines, blocks)]


def test_what_is_said_of_scale_was_computed():
    "Each row of the page stands in the table that the program has written; so does what is assumed."
    written: dict[str, list[str]] = {}
    for head, rows in tables_in(ROOT / "benchmarks/results/scale.md"):
        written.setdefault(head, []).extend(rows)
    told = tables_in(ROOT / "docs/explain/scale.md")
    assert len(told) == 3 and all(rows for _, rows in told)
    assert [row for head, rows in told for row in rows if row not in written[head]] == []
    page, results = ((ROOT / at).read_text() for at in ("docs/explain/scale.md", "benchmarks/results/scale.md"))
    assert "once in 50,000 hours" in page and "once in 50,000 hours" in results


# --- links --------------------------------------------------------------------------------------------------------------

def test_every_link_leads_somewhere():
    assert docs.dead_links(docs.linking()) == []
    here = [target for text in docs.texts(Path("README.md")) for _, target, _ in docs.LINK.findall(text)]
    assert len(here) > 50 and "nbs/26_loop.ipynb" in here


def test_what_a_notebook_is_about_is_told_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    first = {"cell_type": "markdown", "source": "# Title\n\n> About this,\n> and that\n\n> no more"}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [first]}))
    assert docs.title_of(Path("a.ipynb")) == ("Title", "About this, and that")


def test_every_module_has_a_floor():
    modules = [p for p in docs.repository_pages() if p.parent == Path("nbs")]
    assert len(modules) > 100
    assert {docs.floor_of(p) for p in modules} == set(docs.FLOORS)


def test_a_dead_link_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("[one](b.md), [two](https://example.org), [three](#here), `[no](link)`, [four](a.md)")
    assert docs.dead_links([Path("a.md")]) == ["a.md: the link b.md leads nowhere: there is no b.md"]


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
    assert "Module `trainkit.part.thing`: [its names, with their arguments](/reference/part.thing.md)" in text
    assert re.findall(r"\{py:(\w+)\} (\S+)", text) == [
        ("data", "trainkit.part.thing.KINDS"), ("class", "trainkit.part.thing.Thing"),
        ("method", "trainkit.part.thing.Thing.turn"),
        ("function", "trainkit.part.thing.make")]  # fmt: skip
    code = [c for c in page["cells"] if c["cell_type"] == "code"]
    assert [c["metadata"]["tags"] for c in code] == [["export"], ["export"], ["hide-input"]]
    assert [o["data"] for o in code[-1]["outputs"]] == [{"text/plain": "2"}]  # a widget needs a kernel


TAKING = '''
def make(
    path: str | Path,  # where it goes, as <name>
    *rest: int,  # numbers
    most: int = 2,  # of them | at most
    by: "Thing" = None,
) -> list[int]:  # all
    "Takes `a|b` and $5 *now*."


class Maker(Base):
    "Makes."

    def __init__(self, size: int):  # in bytes
        self.size = size  # no argument's

    @property
    def large(self) -> bool: return self.size > 3

    def both(self, x: int, y: int): ...  # not one argument's

    def _own(self): ...
'''


def test_arguments():
    made, maker = ast.parse(TAKING).body
    said = docs.comments(TAKING)
    assert docs.arguments(made, said) == [
        docs.Argument("path", "str | Path", "", "where it goes, as <name>"), docs.Argument("*rest", "int", "", "numbers"),
        docs.Argument("most", "int", "2", "of them | at most"), docs.Argument("by", "Thing", "None")]  # fmt: skip
    assert docs.summary(made) == ["Takes `a|b` and \\$5 \\*now\\*.", ""]
    table = docs.argument_table(docs.arguments(made, said))
    assert table[2] == "| `path` | `str \\| Path` |  | where it goes, as \\<name\\> |" and "of them \\| at most" in table[4]
    text = "\n".join(docs.class_entry(maker, "trainkit.x.Maker", said, {}))
    assert "Class {py:obj}`trainkit.x.Maker`, a `Base`." in text and "Maker(size)" in text
    assert "| `size` | `int` | in bytes |" in text and "| `x` | `int` |\n" in text  # without columns that are empty
    assert "### Maker.large" in text and "### Maker.both" in text and "_own" not in text and "large()" not in text


def test_the_reference_has_every_name():
    "What a module says that it has is what its page has headings for, and its functions' docments are in tables."
    pages = docs.reference_pages([p for p in docs.repository_pages() if p.parent == Path("nbs")])
    for module in ("learner", "ui.movie", "gan.losses", "callbacks.average"):
        file = ROOT / "trainkit" / f"{module.replace('.', '/')}.py"
        told = {*re.findall(r"^## (\w+)$", pages[f"reference/{module}.md"], re.M)}
        defined = {n.name for n in ast.parse(file.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert told == {name for name in defined if not name.startswith("_")}
        fixed = {n for n in ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", file.read_text(), re.M | re.S)[1])} - defined
        assert {*re.findall(rf"^\| {{py:obj}}`~trainkit\.{module}\.(\w+)` \|", pages[f"reference/{module}.md"], re.M)} == fixed
    assert "| `seconds` | `float` | `8.0` | how long it takes |" in pages["reference/ui.movie.md"]
    assert pages["reference/index.md"].count("\n: ") == len(pages) - 1 > 100


def defining(kind):
    "The methods that a class has for others from classes of the package: name -> who defines it, as Python finds them."
    found = {}
    for base in kind.__mro__[1:]:
        for name, value in vars(base).items() if base.__module__.startswith("trainkit.") else ():
            if isinstance(value, (types.FunctionType, property, classmethod, staticmethod)) and not name.startswith("_"):
                found.setdefault(name, []).append(base.__name__)
    return {name: bases for name, bases in found.items() if name not in vars(kind)}


@pytest.mark.parametrize("kind", ["learner.Learner", "gan.learner.GANLearner", "optim.OptimBuilder", "callbacks.average.EMA",
                                  "checkpoint.Checkpoints", "history.History", "player.Player"])  # fmt: skip
def test_what_a_class_has_from_others_is_on_its_page(kind):
    "Every method that Python finds, with a class that defines it; beside them the attributes that classes say they have."
    module, _, name = kind.rpartition(".")
    modules = [p for p in docs.repository_pages() if p.parent == Path("nbs")]
    table = "\n".join(docs.inherited(f"trainkit.{kind}", docs.known_classes(modules)))
    told = dict(re.findall(r"^\| \[`(\w+)(?:\(\))?`\].* \| `(\w+)` \|$", table, re.M))
    made = getattr(importlib.import_module(f"trainkit.{module}"), name)
    others, there = {*re.findall(r"^\| `(\w+)` \|", table, re.M)}, defining(made)
    assert told.keys() <= there.keys() <= told.keys() | others and told
    assert all(owner == there[name][0] for name, owner in told.items())
    assert others <= {name for base in made.__mro__ for name in base.__dict__.get("__annotations__", {})}


def test_a_part_has_no_list_of_its_own():
    modules = [p for p in docs.repository_pages() if p.parent == Path("nbs")]
    known = docs.known_classes(modules)
    assert docs.is_built_on("trainkit.learner.Kept", known) and docs.inherited("trainkit.learner.Kept", known) == []
    page = docs.reference_page(Path("nbs/27_learner.ipynb"), known)
    places = [page.index(head) for head in ("## Learner\n", "## as_players\n", "## What these are made of\n", "## Kept\n")]
    assert places == sorted(places)


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
