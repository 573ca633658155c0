"""The site, from the notebooks as they are stored: nothing is executed.

    python tools/docs.py build [--out DIR]   lay out build/docs/pages, build build/docs/site with Sphinx, check its links
    python tools/docs.py links               say which links of the notebooks and pages lead nowhere

Every page keeps its place relative to the others, so that a link that works in the repository works in the site.
A warning of Sphinx's, a link or an anchor that leads nowhere is an error.
"""
from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FLOORS = {  # the first two digits of a notebook's name -> its floor
    "ground": (range(0, 10), "Ground", "What everything stands on: settings, histories, runs, commands."),
    "parts": (range(10, 20), "Parts", "Data, devices, metrics, schedules, optimizers."),
    "core": (range(20, 30), "Core", "Callbacks, players, checkpoints, the loop, the learner, and the ways to steer it."),
    "callbacks": (range(30, 40), "Callbacks", "What shapes a step, and what watches over it."),
    "gan": (range(40, 49), "GAN", "Losses, penalties, networks, metrics, learners, and a doctor."),
    "views": (range(49, 60), "Views", "What shows a run: bars, curves, samples, the control panel."),
    "kits": (range(60, 85), "Kits", "What a field needs beyond the core: images, speech, series; and several processes."),
    "scripts": (range(85, 100), "Command line", "The same from a terminal."),
}
LINK = re.compile(r"(?<!\\)(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()\s*([^()\s]+)((?:\s+\"[^\"]*\")?\))")
Cell = dict[str, Any]


def source(cell: Cell) -> str:
    "A cell's text."
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def repository_pages() -> dict[Path, Path]:
    "What becomes a page: its place in the repository -> its place in the site's source."
    notebooks = map(relative, sorted((ROOT / "nbs").rglob("*.ipynb")))
    pages = {p: p for p in notebooks if not {".ipynb_checkpoints", "runs"} & {*p.parts}}
    pages |= {p: p for p in map(relative, sorted((ROOT / "benchmarks/results").glob("*.md")))}
    pages |= {p: p.with_suffix(".md") for p in map(relative, sorted((ROOT / "examples").glob("*.py")))}
    pages |= {p: p.relative_to("docs") for p in map(relative, sorted(DOCS.rglob("*.md")))}
    pages |= {Path(name): Path(name) for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    pages.pop(Path("nbs/index.ipynb"))  # README.md, as which it is read
    return pages


def relative(path: Path) -> Path:
    "A path from the repository's root."
    return path.relative_to(ROOT)


# --- links --------------------------------------------------------------------------------------------------------------

def follow(target: str, at: Path) -> Path | None:
    "Where in the repository a link on page `at` leads; None for another site or the same page. ValueError: nowhere."
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    place = Path(os.path.normpath(at.parent / unquote(parts.path)))
    if not (ROOT / place).exists():
        raise ValueError(f"{at}: the link {target} leads nowhere: there is no {place}")
    return place


def linking() -> list[Path]:
    "What has links: the pages, and README.md."
    return [*repository_pages(), Path("README.md")]


def dead_links(pages: Iterable[Path]) -> list[str]:
    "What is wrong with the links of pages of the repository, one line each."
    wrong: list[str] = []
    for at in pages:
        for text in texts(at):
            for _, target, _ in LINK.findall(re.sub(r"`[^`\n]+`", "``", text)):
                try:
                    follow(target, at)
                except ValueError as error:
                    wrong.append(str(error))
    return wrong


def texts(at: Path) -> list[str]:
    "The prose of a page of the repository."
    if at.suffix == ".ipynb":
        cells = json.loads((ROOT / at).read_text(encoding="utf-8"))["cells"]
        return [source(cell) for cell in cells if cell["cell_type"] == "markdown"]
    return [(ROOT / at).read_text(encoding="utf-8")] if at.suffix == ".md" else []


def relink(text: str, at: Path, pages: dict[Path, Path]) -> str:
    "`text` of page `at` with its links as the site needs them; a file that is no page is named, not linked."
    here = pages[at].parent

    def one(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        place = follow(target, at)
        if place is None:
            return found.group()
        anchor = f"#{urlsplit(target).fragment}" if urlsplit(target).fragment else ""
        if place == Path("benchmarks/results"):
            place = Path("docs/benchmarks.md")
        if place in {Path("nbs/index.ipynb"), Path("README.md")}:
            place = Path("docs/index.md")
        if place in pages:
            return f"{before}{os.path.relpath(pages[place], here)}{anchor}{after}"
        if before.startswith("!"):
            return f"{before}{os.path.relpath(place, here)}{after}"
        return before.removesuffix("](").removeprefix("[")

    return with_links(text, one)


def with_links(text: str, one: Callable[[re.Match[str]], str]) -> str:
    "Every link of `text` that doesn't stand in code, changed by `one`. A link's own words may be in backticks."
    code = [m.span() for m in re.finditer(r"^(```|~~~).*?^\1\s*$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", text, flags=re.S | re.M)]
    return LINK.sub(lambda m: m.group() if any(a < m.start() < b for a, b in code) else one(m), text)


# --- notebooks ----------------------------------------------------------------------------------------------------------

def directives(cell: Cell) -> set[str]:
    "The directives of a code cell: {'export'}, {'hide'} …"
    return {line[2:].split()[0].rstrip(":") for line in source(cell).splitlines() if line.startswith("#|") and line[2:].split()}


def only_imports(code: str) -> bool:
    "Is there nothing but imports?"
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body)


def definitions(code: str, module: str) -> Iterator[tuple[str, str]]:
    "What an exported cell defines for others: (kind, full name), methods behind their class."
    for node in ast.parse(code).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        constants = [t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]+", t.id)]
        yield from (("data", f"{module}.{name}") for name in constants)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield "function", f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield "class", f"{module}.{node.name}"
            names = dict.fromkeys(f.name for f in node.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)))
            yield from (("method", f"{module}.{node.name}.{name}") for name in names if not name.startswith("_"))


def anchors(code: str, module: str, known: set[str]) -> Cell | None:
    "A cell that is not seen, and makes what the next one defines something that is found and linked to."
    new = [(kind, name) for kind, name in definitions(code, module) if name not in known]
    known |= {name for _, name in new}
    text = "\n\n".join(f"```{{py:{kind}}} {name}\n:no-typesetting:\n```" for kind, name in new)
    return {"cell_type": "markdown", "metadata": {}, "source": text} if new else None


def module_of(cells: list[Cell]) -> str:
    "The module that a notebook exports, or an empty string."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(source(c) for c in cells if c["cell_type"] == "code"), re.M)
    return f"trainkit.{found[1]}" if found else ""


def page_of(notebook: dict[str, Any], at: Path, pages: dict[Path, Path]) -> dict[str, Any]:
    "A notebook as it is read: without hidden cells and directives, its definitions marked, its links those of the site."
    module, known, cells = module_of(notebook["cells"]), set[str](), list[Cell]()
    for n, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            cells += code_cells(cell, module, known)
        elif source(cell).strip():
            text = relink(source(cell), at, pages)
            cells.append({"cell_type": cell["cell_type"], "metadata": {}, "source": text})
            if n == 0 and has_names(module):
                more = f"[its names, with their arguments](/{reference_place(module)})"
                cells.append({"cell_type": "markdown", "metadata": {}, "source": f"{{.module-line}}\nModule `{module}`: {more}"})
    language = {"name": "python", "pygments_lexer": "ipython3"}
    return {"cells": cells, "metadata": {"language_info": language}, "nbformat": 4, "nbformat_minor": 4}


def code_cells(cell: Cell, module: str, known: set[str]) -> list[Cell]:
    "A code cell without its directives, and before it the anchors of what it exports; nothing if it is hidden."
    said = directives(cell)
    code = "\n".join(line for line in source(cell).splitlines() if not line.startswith("#|")).strip("\n")
    exported = bool(said & {"export", "exports", "exporti"})
    if said & {"hide", "default_exp"} or not code.strip() or (exported and only_imports(code)):
        return []
    outputs = [o for o in map(seen, cell.get("outputs", [])) if o]
    tags = ["export"] * exported + ["hide-input"] * ("hide_input" in said)
    page = {"cell_type": "code", "metadata": {"tags": tags}, "execution_count": None, "source": code, "outputs": outputs}
    before = anchors(code, module, known) if exported and module else None
    return [before, page] if before else [page]


def seen(output: dict[str, Any]) -> dict[str, Any] | None:
    "An output as a page can show it; None for a widget, which needs a kernel."
    data = {kind: what for kind, what in output.get("data", {}).items() if not kind.startswith("application/")}
    if "data" in output:
        return output | {"data": data} if data else None
    return output


# --- the reference ------------------------------------------------------------------------------------------------------

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Argument:
    "What a function takes, as its source says."
    name: str
    kind: str = ""  # its type
    default: str = ""
    meaning: str = ""  # the comment behind it


def comments(code: str) -> dict[int, str]:
    "Line -> the comment in it that stands behind code, and isn't for a tool."
    tokens = [t for t in tokenize.generate_tokens(StringIO(code).readline) if t.type == tokenize.COMMENT]
    said = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.line[: t.start[1]].strip()}
    return {line: text for line, text in said.items() if not re.match(r"(fmt|noqa|type)\b", text)}


def arguments(node: Function, said: dict[int, str]) -> list[Argument]:
    "The arguments of a function, docments included: the comment on a line belongs to an argument that is alone there."
    a, found = node.args, list[Argument]()
    plain, stars = [*a.posonlyargs, *a.args], {id(a.vararg): "*", id(a.kwarg): "**"}
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(a.defaults)), *a.defaults]
    pairs = [*zip(plain, defaults), (a.vararg, None), *zip(a.kwonlyargs, a.kw_defaults), (a.kwarg, None)]
    lines = [arg.lineno for arg, _ in pairs if arg is not None]
    method = bool(plain) and plain[0].arg in {"self", "cls"}
    for arg, default in pairs:
        if arg is None or (method and arg is plain[0]):
            continue
        kind = ast.unparse(arg.annotation) if arg.annotation else ""
        kind = kind.strip("'") if isinstance(arg.annotation, ast.Constant) else kind
        end = (default or arg).end_lineno or arg.lineno
        alone = lines.count(arg.lineno) == (1 if arg.lineno != node.lineno else 1 + (plain[:1] != [arg] and method))
        meaning = said.get(end, "") if alone else ""
        found.append(Argument(stars.get(id(arg), "") + arg.arg, kind, ast.unparse(default) if default else "", meaning))
    return found


def in_table(text: str) -> str:
    "Markdown as a cell of a table holds it."
    return text.replace("|", "\\|")


def code_in_table(text: str) -> str:
    return in_table(f"`{text}`") if text else ""


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    "A table of Markdown without the columns that are empty; nothing if there are no rows."
    full = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [f"| {' | '.join(row[i] for i in full)} |" for row in (head, len(head) * ["---"], *rows)]
    return [*lines, ""] if rows else []


def argument_table(found: list[Argument]) -> list[str]:
    "Arguments as a table; nothing if there are none."
    rows = [[*map(code_in_table, (a.name, a.kind, a.default)), in_table(prose(a.meaning))] for a in found]
    return table(["argument", "type", "default", "meaning"], rows)


def prose(text: str) -> str:
    "Words of a comment or a docstring as Markdown takes them: what stands in backticks is code, all else is as it is."
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\`*_<>$\[\]{}])", r"\\\1", part) for part in parts)


def summary(node: Function | ast.ClassDef) -> list[str]:
    "What a definition says of itself."
    text = prose(ast.get_docstring(node) or "")
    return [text, ""] if text else []


def signed(node: Function, said: dict[int, str], name: str = "") -> list[str]:
    "The signature of a function, what it gives back, and what it takes."
    found, gives = arguments(node, said), f" -> {ast.unparse(node.returns)}" if node.returns else ""
    short = ", ".join(a.name if not a.default else f"{a.name}={a.default}" for a in found)
    return ["```{code-block} python", f"{name or node.name}({short}){gives}", "```", ""]


def functions_of(node: ast.ClassDef) -> list[Function]:
    return [f for f in node.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]


def is_property(f: Function) -> bool:
    return any("property" in ast.unparse(d) for d in f.decorator_list)


def fields_of(node: ast.ClassDef, said: dict[int, str]) -> list[Argument]:
    "What its instances have by name, as it is written down in the class."
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    found = [Argument(ast.unparse(f.target), ast.unparse(f.annotation).strip("'"), ast.unparse(f.value) if f.value else "",
                      said.get(f.end_lineno or 0, "")) for f in fields]  # fmt: skip
    return [a for a in found if not a.name.startswith("_")]


def class_entry(node: ast.ClassDef, full: str, said: dict[int, str], known: Mapping[str, Known]) -> list[str]:
    "A class: how it is made, its public methods and what they take, and a line for each that it has from others."
    functions, own = functions_of(node), fields_of(node, said)
    made = next((f for f in functions if f.name == "__init__"), None)
    places = dict(zip(node.bases, known[full].bases)) if full in known else {}
    linked = {b: f"{{py:obj}}`~{at}`" for b, at in places.items() if at in known and not known[at].node.name.startswith("_")}
    bases = ", ".join(linked.get(b, f"`{ast.unparse(b)}`") for b in node.bases)
    lines = [f"## {node.name}", "", f"Class {{py:obj}}`{full}`{f', a {bases}' if bases else ''}.", "", *summary(node)]
    if made is not None:
        lines += [*signed(made, said, node.name), *argument_table(arguments(made, said))]
    elif any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        lines += argument_table(own)
    for f in functions:
        if not f.name.startswith("_"):
            lines += [f"### {node.name}.{f.name}", "", *summary(f)]
            if not is_property(f):
                lines += [*signed(f, said), *argument_table(arguments(f, said))]
    return lines + inherited(full, known)


# --- what a class has from those that it is made of

@dataclass(frozen=True)
class Known:
    "A class of the package."
    module: str
    node: ast.ClassDef
    said: dict[int, str]  # the comments of its cell
    bases: tuple[str, ...]  # full names of those that are the package's own; what others are called


def known_classes(modules: list[Path]) -> dict[str, Known]:
    "Every class of the package by its full name, as the notebooks write it down."
    found, imported = dict[str, Known](), dict[str, str]()  # a name as a module knows it -> where it is from
    for at in modules:
        cells = json.loads((ROOT / at).read_text(encoding="utf-8"))["cells"]
        module = module_of(cells)
        for code in (source(c) for c in cells if c["cell_type"] == "code" and "export" in directives(c)):
            for node in ast.parse(code).body:
                if isinstance(node, ast.ImportFrom):
                    imported |= {f"{module}.{a.asname or a.name}": f"{node.module}.{a.name}" for a in node.names}
                if isinstance(node, ast.ClassDef):
                    bases = tuple(f"{module}.{ast.unparse(b).partition('[')[0]}" for b in node.bases)
                    found[f"{module}.{node.name}"] = Known(module, node, comments(code), bases)

    def traced(name: str) -> str:
        return traced(imported[name]) if name in imported else name
    return {full: replace(one, bases=tuple(map(traced, one.bases))) for full, one in found.items()}


def lineage(full: str, known: Mapping[str, Known]) -> list[str]:
    "The classes of the package that a class is made of, as Python looks names up in them: by classes that do nothing else."
    made: dict[str, type] = {}

    def stand_in(name: str) -> type:
        if name not in made:
            made[name] = type(name, tuple(stand_in(b) for b in known[name].bases if b in known) or (object,), {})
        return made[name]
    return [one.__name__ for one in stand_in(full).__mro__[1:-1]] if full in known else []


def is_built_on(full: str, known: Mapping[str, Known]) -> bool:
    "Is it there for another class of its module?"
    module = known[full].module if full in known else ""
    return any(full in one.bases for one in known.values() if one.module == module)


def names_in(node: ast.ClassDef) -> set[str]:
    "What a class defines: its methods, and what is assigned in it or written down."
    targets = [t for n in node.body for t in (n.targets if isinstance(n, ast.Assign) else [getattr(n, "target", None)])]
    return {f.name for f in functions_of(node)} | {t.id for t in targets if isinstance(t, ast.Name)}


def inherited(full: str, known: Mapping[str, Known]) -> list[str]:
    "What a class has from others of the package, in a table; nothing for one on which its module goes on building."
    rows, owners = dict[str, list[str]](), dict[str, str]()
    mine = names_in(known[full].node) if full in known else set()
    for name in lineage(full, known) if not is_built_on(full, known) else ():
        one = known[name]
        for named in names_in(one.node):
            owners.setdefault(named, one.node.name)
        for f in functions_of(one.node):
            page = f"{reference_place(one.module)}#{one.node.name}{f.name}".lower()
            call = f"`{f.name}`" if is_property(f) else f"`{f.name}()`"
            linked = call if one.node.name.startswith("_") else f"[{call}](/{page})"
            rows.setdefault(f.name, [linked, in_table(" ".join(summary(f)).strip())])
        for a in fields_of(one.node, one.said):
            rows.setdefault(a.name, [f"`{a.name}`", in_table(prose(a.meaning)) or code_in_table(a.kind)])
    listed = [[*row, f"`{owners[name]}`"] for name, row in sorted(rows.items()) if not name.startswith("_") and name not in mine]
    return ["From what it is made of, it has:", "", *table(["name", "what it is", "of"], listed)] if listed else []


# --- a module's page

def constants(code: str, module: str, said: dict[int, str]) -> list[list[str]]:
    "Its constants: name, value, meaning."
    named, rows = {name for kind, name in definitions(code, module) if kind == "data"}, []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = ast.unparse(node.value)
            short = code_in_table(value if len(value) <= 80 else value[:79] + "…")
            meaning = in_table(prose(said.get(node.end_lineno or 0, "")))
            rows += [[f"{{py:obj}}`~{module}.{t.id}`", short, meaning] for t in targets
                     if isinstance(t, ast.Name) and f"{module}.{t.id}" in named]  # fmt: skip
    return rows


def entries(code: str, module: str, known: Mapping[str, Known]) -> Iterator[tuple[int, list[str]]]:
    "Classes (0), functions (1) and what others are made of (2): what the page says of each in a cell."
    public, said = {full for _, full in definitions(code, module)}, comments(code)
    for node in ast.parse(code).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if (full := f"{module}.{node.name}") not in public:
            continue
        if isinstance(node, ast.ClassDef):
            yield 2 * is_built_on(full, known), class_entry(node, full, said, known)
        else:
            yield 1, [f"## {node.name}", "", f"Function {{py:obj}}`{full}`.", "", *summary(node), *signed(node, said),
                      *argument_table(arguments(node, said))]  # fmt: skip


def reference_page(at: Path, known: Mapping[str, Known]) -> str:
    "What a module has for others: signatures, docstrings, the arguments' docments; last what others are made of."
    cells = json.loads((ROOT / at).read_text(encoding="utf-8"))["cells"]
    module, (title, about) = module_of(cells), title_of(at)
    about += "" if about.endswith((".", "!", "?")) else "."
    codes = [source(c) for c in cells if c["cell_type"] == "code" and "export" in directives(c)]
    found = [entry for code in codes for entry in entries(code, module, known)]
    fixed = table(["constant", "value", "meaning"], [row for code in codes for row in constants(code, module, comments(code))])
    classes, functions, parts = ([line for kind, lines in found if kind == wanted for line in lines] for wanted in range(3))
    lines = [f"# {module}", "", f"{about} The notebook [{title}](/{at}) grows it, with reasons and tests.", ""]
    of_parts = ["## What these are made of", "", *parts] if parts else []
    return "\n".join([*lines, *classes, *functions, *(["## Its constants", "", *fixed] if fixed else []), *of_parts])


def has_names(module: str) -> bool:
    "Is it a module that others take names from? A package's `__main__` is for the command line alone."
    return bool(module) and not module.endswith("__main__")


def reference_place(module: str) -> Path:
    "Where a module's page of the reference is, in the site's source."
    return Path("reference", f"{module.removeprefix('trainkit.')}.md")


def reference_pages(modules: list[Path]) -> dict[str, str]:
    "A page for each module, and one that lists them."
    made, lines = dict[str, str](), ["# Reference", "", "Every name that a module has for others, with what it takes.", ""]
    places, known = list[Path](), known_classes(modules)
    for at in modules:
        if has_names(module := module_of(json.loads((ROOT / at).read_text(encoding="utf-8"))["cells"])):
            places.append(reference_place(module))
            made[str(places[-1])] = reference_page(at, known)
            lines += [f"[`{module}`](/{places[-1]})", f": {title_of(at)[1] or '…'}", ""]
    return made | {"reference/index.md": "\n".join(lines) + toctree(places)}


# --- the pages that are made --------------------------------------------------------------------------------------------

def title_of(at: Path) -> tuple[str, str]:
    "A notebook's title and the sentence below it, which may go on over several lines."
    lines = texts(at)[0].splitlines()
    below = itertools.dropwhile(lambda line: not line.startswith(">"), lines)
    about = itertools.takewhile(lambda line: line.startswith(">"), below)
    return lines[0].lstrip("# "), " ".join(line.removeprefix(">").strip() for line in about)


def floor_of(at: Path) -> str:
    "The floor that a module's notebook stands on."
    number = int(at.name[:2])
    found = [name for name, (numbers, _, _) in FLOORS.items() if number in numbers]
    if not found:
        raise ValueError(f"{at}: no floor has the number {number}; tools/docs.py has them")
    return found[0]


def toctree(entries: list[Path], hidden: bool = True) -> str:
    "The part of the navigation below a page."
    lines = "\n".join(f"/{p.with_suffix('')}" for p in entries)
    options = ":hidden:\n:maxdepth: 1" if hidden else ":maxdepth: 1"
    return f"\n```{{toctree}}\n{options}\n\n{lines}\n```\n"


def floor_page(floor: str, notebooks: list[Path]) -> str:
    "A floor's modules, what each is about, and the names that it has for others."
    _, title, about = FLOORS[floor]
    lines = [f"# {title}", "", about, ""]
    for at in notebooks:
        cells = json.loads((ROOT / at).read_text(encoding="utf-8"))["cells"]
        module, (name, line) = module_of(cells), title_of(at)
        code = [source(c) for c in cells if c["cell_type"] == "code" and "export" in directives(c)]
        names = dict.fromkeys(full for c in code for kind, full in definitions(c, module) if kind != "method")
        listed = ", ".join(f"{{py:obj}}`~{full}`" for full in names)
        lines += [f"[{name}](/{at})", f": {line}{'' if line.endswith(('.', '!', '?')) or not line else '.'}", ""]
        lines += [f"  {listed}", ""] if listed else []
    return "\n".join(lines) + toctree(notebooks)


def list_page(title: str, about: str, entries: list[Path]) -> str:
    "Notebooks with a line about each."
    lines = [f"# {title}", "", about, ""]
    for at in entries:
        name, line = title_of(at)
        lines += [f"[{name}](/{at})", f": {line}" if line else ": …", ""]
    return "\n".join(lines) + toctree(entries)


def made_pages(pages: dict[Path, Path]) -> dict[str, str]:
    "The pages that nobody writes: floors, tutorials, scripts, and the tree that holds everything."
    modules = [p for p in pages if p.parent == Path("nbs")]
    tutorials = [p for p in pages if p.parent == Path("nbs/tutorials")]
    made = {f"modules/{floor}.md": floor_page(floor, [p for p in modules if floor_of(p) == floor]) for floor in FLOORS}
    about = "Notebooks from beginning to end, with the pictures they were stored with."
    made["tutorials.md"] = list_page("Tutorials", about, tutorials)
    scripts = [pages[p] for p in pages if p.parts[0] == "examples"]
    made |= reference_pages(modules)
    made["scripts.md"] = "# Tutorials as scripts\n\nThe same work without a notebook.\n" + toctree(scripts, hidden=False)
    return made


# --- building -----------------------------------------------------------------------------------------------------------

def lay_out(into: Path) -> None:
    "Everything that Sphinx reads, in `into`; ValueError names the links that lead nowhere."
    pages = repository_pages()
    if wrong := dead_links(linking()):
        raise ValueError("\n".join(wrong))
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(DOCS, into)
    shutil.copytree(ROOT / "nbs/images", into / "nbs/images")
    for at, place in pages.items():
        write(into / place, staged(at, pages))
    for name, text in made_pages(pages).items():
        write(into / name, text)


def staged(at: Path, pages: dict[Path, Path]) -> str:
    "A page of the repository as Sphinx gets it."
    text = (ROOT / at).read_text(encoding="utf-8")
    if at.suffix == ".ipynb":
        return json.dumps(page_of(json.loads(text), at, pages), ensure_ascii=False)
    if at.suffix == ".py":
        return f"# {at.name}\n\n````{{code-block}} python\n{text}\n````\n"
    return relink(text, at, pages)


def write(path: Path, text: str) -> None:
    "Write a file, its folder first."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class Targets(HTMLParser):
    "What a page links to, and what in it can be linked to."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids = list[str](), {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        "Gather an element's id and where it leads."
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value or "")
            if name in {"href", "src"} and value:
                self.links.append(value)


def dead_in_site(site: Path) -> list[str]:
    "Links and anchors of the built pages that lead nowhere, raw HTML among them."
    parsed = {path: Targets(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for page, targets in parsed.items():
        for link in targets.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            place = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
            if not place.exists():
                wrong.append(f"{page.relative_to(site)}: {link} leads nowhere")
            elif place in parsed and unquote(parts.fragment) not in parsed[place].ids:
                wrong.append(f"{page.relative_to(site)}: {link}: no such anchor")
    return wrong


def build(out: Path) -> int:
    "Build the site; its exit status."
    lay_out(out / "pages")
    shutil.rmtree(out / "site", ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto", "-b", "html"]
    status = subprocess.run([*command, "-d", str(out / "cache"), str(out / "pages"), str(out / "site")]).returncode
    wrong = [] if status else dead_in_site(out / "site")
    print("\n".join(wrong) or (f"the site is {os.path.relpath(out / 'site' / 'index.html')}" if not status else "not built"))
    return status or bool(wrong)


def main() -> int:
    "The command line."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("build", "links"))
    parser.add_argument("--out", type=Path, default=ROOT / "build/docs", help="where to (default: build/docs)")
    asked = parser.parse_args()
    try:
        if asked.what == "build":
            return build(asked.out.resolve())
        wrong = dead_links(linking())
    except ValueError as error:
        wrong = [str(error)]
    print("\n".join(wrong) or "every link leads somewhere")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
