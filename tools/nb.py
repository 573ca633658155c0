"""Notebooks as this project keeps them: run, cleaned, checked, turned into README.md and into a web page.

    python tools/nb.py run PATH...       execute in a real kernel, keep the outputs, clean, save
    python tools/nb.py clean PATH...     clean without running
    python tools/nb.py check PATH...|all say what is unclean and where; exit status 1 if anything is
    python tools/nb.py readme [--check]  make README.md from nbs/index.ipynb, or say whether it is up to date
    python tools/nb.py html IN OUT       a web page of an executed notebook, pictures included

A clean notebook holds what a reader sees and nothing that changes by itself: no execution counts, no cell or output
metadata, no widget state or views (their ids are new at every run), no memory addresses, no paths of one machine.
"""
from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}
VIEW = "application/vnd.jupyter.widget-view+json"
CELL_LIMIT, NOTEBOOK_LIMIT = 200_000, 1_500_000  # bytes: of one cell's outputs, of a notebook

Notebook = dict[str, Any]
ADDRESS = re.compile(r"(<.*?)( at 0x[0-9a-fA-F]+)(>)")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLACES = r"/(?:work|tmp|root)(?![\w-])|/(?:home|Users)/\w|/var/folders/|[A-Z]:\\+Users\\"
MACHINE_PATH = re.compile(rf"(?<![\w.~-])(?:{PLACES})[^\s\"'`<>)\]]*")


# --- cleaning ---------------------------------------------------------------------------------------------------------

def joined(text: str | list[str]) -> str:
    "Notebook text, which the format allows to be one string or a list of lines."
    return text if isinstance(text, str) else "".join(text)


def as_on_screen(text: str) -> str:
    "What a terminal shows in the end: a carriage return goes back to the line's start, what follows writes over it."
    def line(written: str) -> str:
        shown = ""
        for part in written.removesuffix("\r").split("\r"):
            shown = part + shown[len(part):]
        return shown
    return "\n".join(map(line, text.split("\n")))


def machine_paths(text: str) -> list[str]:
    "Paths in `text` that exist on one machine only, this project's own place among them."
    own = [str(ROOT)] if len(ROOT.parts) > 2 else []
    found = [m.group() for m in MACHINE_PATH.finditer(text)]
    return found + [p for p in own if p in text and not any(f.startswith(p) for f in found)]


def clean_output(output: Notebook) -> Notebook | None:
    "`output` without what changes by itself, or None when nothing is left to look at."
    output.pop("transient", None)
    if "execution_count" in output:
        output["execution_count"] = None
    if "metadata" in output:
        output["metadata"] = {}
    if output["output_type"] == "stream":
        output["text"] = ADDRESS.sub(r"\1\3", as_on_screen(joined(output["text"])))
        warned_from_here = output["name"] == "stderr" and machine_paths(output["text"])
        return None if warned_from_here or not output["text"] else output
    data = output.get("data", {})
    if data.pop(VIEW, None) is not None and not set(data) - {"text/plain"}:
        return None
    data.pop("application/vnd.google.colaboratory.intrinsic+json", None)
    if "image/png" in data:
        data.pop("image/jpeg", None)  # PIL shows both
    for mime, value in data.items():
        if mime.startswith("text/"):
            data[mime] = ADDRESS.sub(r"\1\3", joined(value))
        elif mime.startswith("image/") and "svg" not in mime:
            data[mime] = joined(value).rstrip()
    return output


def clean_outputs(outputs: list[Notebook]) -> list[Notebook]:
    "The outputs cleaned, pieces of one stream that follow each other made one (a progress line may span them)."
    merged: list[Notebook] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" == last.get("output_type") and output["name"] == last["name"]:
            last["text"] = joined(last["text"]) + joined(output["text"])
        else:
            merged.append(output)
    return [output for output in map(clean_output, merged) if output is not None]


def clean(nb: Notebook) -> Notebook:
    "A cleaned copy of `nb`; cleaning it again changes nothing."
    nb = json.loads(json.dumps(nb))
    nb["metadata"] = {"kernelspec": dict(KERNELSPEC)}
    nb["nbformat"], nb["nbformat_minor"] = 4, max(5, nb.get("nbformat_minor", 0))
    for i, cell in enumerate(nb["cells"]):
        cell["source"] = joined(cell["source"])
        cell.setdefault("id", hashlib.sha256(f"{i} {cell['source']}".encode()).hexdigest()[:8])
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = clean_outputs(cell.get("outputs", []))
    return nb


def as_json(nb: Notebook) -> str:
    "The text of a notebook file: sorted, indented by one, text in lines, a newline at the end."
    return nbformat.writes(nbformat.from_dict(nb), version=nbformat.NO_CONVERT) + "\n"


def write_if_new(path: Path, text: str) -> bool:
    "Writes `text` unless the file holds just that; whether it did."
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


# --- running ----------------------------------------------------------------------------------------------------------

def directives(cell: Notebook) -> dict[str, str]:
    "A code cell's leading `#| name: value` lines."
    found: dict[str, str] = {}
    for line in joined(cell["source"]).splitlines() if cell["cell_type"] == "code" else []:
        if not line.startswith("#|"):
            break
        name, _, value = line[2:].strip().partition(" ")
        found[name.rstrip(":")] = value.strip()
    return found


def skipped(cell: Notebook) -> bool:
    "Whether a run leaves the cell out, its outputs as they are: `#| eval: false`, or `#| cuda` where there is none."
    found = directives(cell)
    if found.get("eval") == "false":
        return True
    return "cuda" in found and not os.path.exists("/dev/nvidia0")


def execute(nb: Notebook, folder: Path, timeout: float | None = 900, on_message: Callable | None = None,
            on_cell: Callable | None = None) -> Notebook:
    "Runs `nb` in a kernel of this Python with `folder` as working directory; returns it with outputs, not yet cleaned."
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    interrupted = False

    class Client(NotebookClient):
        @asynccontextmanager
        async def async_setup_kernel(self, **kwargs: Any) -> AsyncIterator[None]:
            "nbclient's own handlers stop the kernel under a run that goes on; here the run ends, then the kernel."
            def stop() -> None:
                nonlocal interrupted
                interrupted = True
                running.cancel()
            async with super().async_setup_kernel(**kwargs):
                running = cast(asyncio.Task, asyncio.current_task())
                with suppress(RuntimeError, NotImplementedError):  # not the main thread, or Windows
                    for sign in signal.SIGINT, signal.SIGTERM:
                        asyncio.get_running_loop().add_signal_handler(sign, stop)
                yield

        async def async_execute_cell(self, cell: Notebook, cell_index: int, **kwargs: Any) -> Notebook:
            if skipped(cell):
                return cell
            if on_cell and cell["cell_type"] == "code":
                on_cell(cell_index, cell)
            return await super().async_execute_cell(cell, cell_index, **kwargs)

        def process_message(self, msg: Notebook, cell: Notebook, cell_index: int) -> Notebook | None:
            if on_message:
                on_message(msg)
            return super().process_message(msg, cell, cell_index)

    os.environ.update(IN_TEST="1", JUPYTER_PREFER_ENV_PATH="1")  # no export from within; the kernel of this environment
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the Makefile: enough for a quiet machine, bearable on a busy one
    nb = nbformat.reads(json.dumps(nb), as_version=4)
    client = Client(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                    extra_arguments=["--IPKernelApp.log_level=ERROR"])
    try:
        return client.execute()
    except (asyncio.CancelledError, DeadKernelError):
        if interrupted:
            raise KeyboardInterrupt from None
        raise


# --- checking ---------------------------------------------------------------------------------------------------------

def _texts(cell: Notebook) -> Iterator[tuple[str, str]]:
    yield "source", joined(cell["source"])
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            yield f"output ({output['name']})", joined(output["text"])
        for mime, value in output.get("data", {}).items():
            if not (mime.startswith("image/") and "svg" not in mime):
                yield f"output ({mime})", json.dumps(value) if isinstance(value, dict) else joined(value)


def _cell_problems(cell: Notebook) -> Iterator[str]:
    if "id" not in cell:
        yield "no cell id"
    if cell.get("metadata"):
        yield f"cell metadata: {', '.join(sorted(cell['metadata']))}"
    if cell.get("execution_count") is not None:
        yield f"execution count {cell['execution_count']}"
    outputs = cell.get("outputs", [])
    for output in outputs:
        if output.get("execution_count") is not None:
            yield f"execution count {output['execution_count']} of an output"
        if output["output_type"] == "error":
            yield f"error output: {output['ename']}: {output['evalue'][:100]}"
        if VIEW in output.get("data", {}):
            yield "widget view"
    if (size := len(json.dumps(outputs))) > CELL_LIMIT:
        yield f"outputs of {size / 1000:,.0f} kB; at most {CELL_LIMIT / 1000:,.0f} kB"
    for where, text in _texts(cell):
        yield from (f"machine path in the {where}: {path}" for path in machine_paths(text))


def problems(raw: str) -> list[tuple[str, str]]:
    "All that is unclean in a notebook's text, as (cell or `notebook`, what)."
    nb = json.loads(raw)
    found = [("notebook", "widget state")] if "widgets" in nb["metadata"] else []
    if "jupytext" in nb["metadata"]:
        found.append(("notebook", "jupytext metadata"))
    if nb["metadata"].get("kernelspec") != KERNELSPEC:
        found.append(("notebook", f"kernelspec is {nb['metadata'].get('kernelspec')}, not {KERNELSPEC}"))
    if (size := len(raw.encode())) > NOTEBOOK_LIMIT:
        found.append(("notebook", f"{size / 1e6:.1f} MB; at most {NOTEBOOK_LIMIT / 1e6:.1f} MB"))
    ids = [cell.get("id") for cell in nb["cells"]]
    found += [("notebook", f"cell id {i} is used twice") for i in sorted({i for i in ids if i and ids.count(i) > 1})]
    for i, cell in enumerate(nb["cells"]):
        found += [(f"cell {i} ({cell.get('id', 'no id')})", what) for what in _cell_problems(cell)]
    if not found and json.loads(as_json(clean(nb))) != json.loads(as_json(nb)):
        found.append(("notebook", "would be changed by: python tools/nb.py clean"))
    return found


# --- README.md and web pages ------------------------------------------------------------------------------------------

def for_readers(nb: Notebook) -> Notebook:
    "`nb` without hidden and exported cells and without directive lines."
    nb = clean(nb)
    hidden = {"hide", "export", "exporti", "exports", "default_exp"}
    nb["cells"] = [cell for cell in nb["cells"] if not hidden & set(directives(cell))]
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] = re.sub(r"\A(#\|.*\n?)+", "", cell["source"]).lstrip("\n")
            for output in cell["outputs"]:
                if "text" in output:
                    output["text"] = ANSI.sub("", output["text"])
    nb["cells"] = [cell for cell in nb["cells"] if cell["source"].strip()]
    nb["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}  # for the code's colours
    return nb


def _seen_from_root(markdown: str, folder: Path) -> str:
    "Links and pictures beside the notebook, as they are called from the top of the project."
    def target(m: re.Match[str]) -> str:
        path = m[2].partition("#")[0]
        moved = os.path.relpath(folder / path, ROOT) + m[2][len(path):] if path and (folder / path).exists() else m[2]
        return m[1] + moved + m[3]
    markdown = re.sub(r"(\]\()([^)\s:]+)(\))", target, markdown)
    return re.sub(r"""(src=["'])([^"':]+)(["'])""", target, markdown)


def make_readme(index: Path) -> dict[str, bytes]:
    "README.md and its pictures, by path: what `index` says, as markdown."
    from nbconvert import MarkdownExporter

    nb = for_readers(json.loads(index.read_text(encoding="utf-8")))
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _seen_from_root(cell["source"], index.parent)
    resources = {"output_files_dir": "README_files", "unique_key": "index"}
    text, resources = MarkdownExporter().from_notebook_node(nbformat.from_dict(nb), resources)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"
    note = f"<!-- made from {index.relative_to(ROOT).as_posix()} by tools/nb.py readme: edit the notebook -->\n"
    pictures = {name: data for name, data in resources.get("outputs", {}).items()}
    return {"README.md": (note + text).encode(), **pictures}


def readme(check: bool) -> list[str]:
    "Writes README.md, or says what of it is not up to date."
    index = NBS / "index.ipynb"
    if not index.exists():
        return [f"{index.relative_to(ROOT)} does not exist"]
    files = make_readme(index)
    known = {f"README_files/{p.name}" for p in (ROOT / "README_files").glob("*")} | {"README.md"}
    stale = sorted(name for name, data in files.items()
                   if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data)
    left_over = sorted(known - set(files))
    if check:
        return [f"{name} differs from nbs/index.ipynb" for name in stale] + [f"{n} is left over" for n in left_over]
    for name in stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(files[name])
    for name in left_over:
        (ROOT / name).unlink(missing_ok=True)
    print(f"README.md: {', '.join(stale + left_over) or 'nothing'} changed")
    return []


def make_html(nb: Notebook, title: str) -> str:
    "A web page of `nb` that needs no other file and, formulas apart, no network."
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True, require_js_url="", jquery_url="", mermaid_js_url="")
    return exporter.from_notebook_node(nbformat.from_dict(for_readers(nb)), {"metadata": {"name": title}})[0]


# --- the command ------------------------------------------------------------------------------------------------------

def read(path: Path) -> Notebook:
    "A notebook as plain dicts and lists."
    return json.loads(path.read_text(encoding="utf-8"))


def all_notebooks() -> list[Path]:
    "Every notebook of the project."
    found = [p for folder in (NBS, ROOT / "examples") for p in folder.rglob("*.ipynb")]
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def run(paths: list[Path], timeout: float) -> int:
    "Executes, cleans and saves; a notebook that fails is left as it was."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    failed = 0
    for path in paths:
        start = time.perf_counter()
        try:
            done = execute(read(path), path.resolve().parent, timeout)
        except KeyboardInterrupt:
            print(f"{path}: interrupted", file=sys.stderr)
            return 130
        except (CellExecutionError, CellTimeoutError) as e:
            failed += 1
            print(f"{path}: failed after {time.perf_counter() - start:.0f} s\n{e}", file=sys.stderr)
            continue
        write_if_new(path, as_json(clean(done)))
        print(f"{path}: {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def check(paths: list[Path]) -> int:
    "Lists what is unclean."
    count = 0
    for path in paths:
        try:
            found = problems(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as e:
            found = [("notebook", f"can't be read: {type(e).__name__}: {e}")]
        for where, what in found:
            print(f"{path}: {where}: {what}")
        count += bool(found)
    print(f"{len(paths)} notebooks, {count} unclean" + (": python tools/nb.py clean mends most" if count else ""))
    return 1 if count else 0


def main(argv: list[str] | None = None) -> int:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in "run", "clean", "check":
        command = commands.add_parser(name)
        command.add_argument("paths", nargs="+", type=Path)
        if name == "run":
            command.add_argument("--timeout", type=float, default=900, help="seconds for one cell")
    commands.add_parser("readme").add_argument("--check", action="store_true")
    html = commands.add_parser("html")
    html.add_argument("notebook", type=Path)
    html.add_argument("page", type=Path)
    args = parser.parse_args(argv)
    if args.command == "readme":
        found = readme(args.check)
        print("\n".join([*found, "make it with: python tools/nb.py readme"]) if found else "README.md is up to date")
        return 1 if found else 0
    if args.command == "html":
        write_if_new(args.page, make_html(read(args.notebook), args.notebook.stem))
        return 0
    paths = [p for given in args.paths for p in (all_notebooks() if given == Path("all") else [given])]
    if args.command == "run":
        return run(paths, args.timeout)
    if args.command == "check":
        return check(paths)
    for path in paths:
        if write_if_new(path, as_json(clean(read(path)))):
            print(f"{path}: cleaned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
