"""Runs the quickstart notebook and shows in the terminal what it shows: its text, and its progress as it moves.

Leaves report/quickstart.ipynb, the executed notebook, and report/quickstart.html, the same with curves and samples to
be opened in a browser.
"""
from __future__ import annotations

import argparse
import html
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nb as notebooks

ROOT = notebooks.ROOT
QUICKSTART = ROOT / "nbs" / "tutorials" / "01_quickstart.ipynb"


def plain(data: dict[str, Any]) -> str:
    "One line of text that stands for an output, or nothing: progress bars come as HTML, widgets and figures as names."
    text = notebooks.joined(data.get("text/plain", ""))
    if "text/html" in data:
        markup = re.sub(r"<(style|script).*?</\1>", " ", notebooks.joined(data["text/html"]), flags=re.S | re.I)
        text = html.unescape(re.sub(r"<[^>]+>", " ", markup))
    elif re.match(r"<|\w+\(children=|\w+\(value=b", text) or any(mime.startswith("image/") for mime in data):
        return ""
    return " ".join(notebooks.ANSI.sub("", text).split())


class Screen:
    "Prints lines as they come and progress at most every `every` seconds; on a terminal progress stays on one line."

    def __init__(self, every: float | None = None) -> None:
        self.live = sys.stdout.isatty()
        self.every = every or (0.25 if self.live else 3.0)
        self.width = shutil.get_terminal_size((120, 24)).columns - 1
        self.start = time.perf_counter()
        self.shown_at, self.shown, self.waiting = 0.0, "", ""
        self.partial = ""  # of a stream: a line that has not ended
        self.hidden = False  # whether the cell that runs is one nobody reads

    def line(self, text: str) -> None:
        "A line that stays."
        self.settle()
        print(text.rstrip(), flush=True)

    def progress(self, text: str) -> None:
        "Text that replaces the progress before it."
        if text and text != self.shown:
            self.waiting = text
            if time.perf_counter() - self.shown_at >= self.every:
                self._show()

    def settle(self) -> None:
        "Shows progress that waits, so that the last state is seen."
        if self.waiting:
            self._show()
        if self.live and self.shown:
            print(flush=True)
        self.shown = ""

    def _show(self) -> None:
        text = f"    {self.waiting}"[:self.width]
        print(f"\r{text:{self.width}}" if self.live else text, end="" if self.live else "\n", flush=True)
        self.shown, self.waiting, self.shown_at = self.waiting, "", time.perf_counter()

    def stream(self, text: str) -> None:
        "What a cell prints; a line that is written over again and again is progress."
        *lines, self.partial = (self.partial + text).split("\n")
        for line in lines:
            if self.shown and "\r" in line:
                self.progress(notebooks.as_on_screen(line).strip())
                self.settle()
            else:
                self.line("    " + notebooks.as_on_screen(line))
        if "\r" in self.partial:
            self.partial = "\r" + self.partial.rstrip("\r").rpartition("\r")[2]
            self.progress(self.partial.strip())

    def cell(self, index: int, cell: dict[str, Any]) -> None:
        "The start of a cell: the first line of it that does something."
        self.settle()
        self.hidden = "hide" in notebooks.directives(cell)
        lines = [s for s in notebooks.joined(cell["source"]).splitlines()
                 if s.strip() and not s.startswith(("#", "import ", "from "))]
        if lines and not self.hidden:
            self.line(f"[{time.perf_counter() - self.start:5.1f} s] {lines[0][:100]}")

    def message(self, msg: dict[str, Any]) -> None:
        "One message of the kernel."
        content = msg["content"]
        if self.hidden:
            return
        if msg["msg_type"] == "stream":
            self.stream(content["text"])
        elif msg["msg_type"] == "execute_result":
            if text := plain(content["data"]):
                self.line(f"    {text}"[:self.width])
        elif msg["msg_type"] in ("display_data", "update_display_data"):
            self.progress(plain(content["data"]))
        elif msg["msg_type"] == "comm_msg":
            state = content.get("data", {}).get("state", {})
            if isinstance(value := state.get("value", state.get("description")), str):
                self.progress(plain({"text/html": value}))


def run(notebook: Path, report: Path, screen: Screen) -> int:
    "Executes `notebook` in `report`, showing it on `screen`; the exit status."
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    if not notebook.exists():
        print(f"{notebook} does not exist", file=sys.stderr)
        return 1
    name = notebook.stem.lstrip("0123456789_")
    report.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(report / "runs", ignore_errors=True)  # each demonstration begins anew
    try:
        done = notebooks.execute(notebooks.read(notebook), report, None, screen.message, screen.cell)
    except (CellExecutionError, DeadKernelError) as e:
        screen.settle()
        print(f"\n{notebook.name} failed:\n{e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        screen.settle()
        print("\ninterrupted", file=sys.stderr)
        return 130
    screen.settle()
    executed = notebooks.clean(done)
    notebooks.write_if_new(report / f"{name}.ipynb", notebooks.as_json(executed))
    notebooks.write_if_new(report / f"{name}.html", notebooks.make_html(executed, name))
    seen = report.relative_to(Path.cwd()) if report.is_relative_to(Path.cwd()) else report
    print(f"\nDone in {time.perf_counter() - screen.start:.0f} s.\n"
          f"  {seen / name}.html   the run with its curves and samples: open it in a browser\n"
          f"  {seen / name}.ipynb  the executed notebook\n"
          "To run it live, with a stop button and moving curves:  make lab")
    return 0


def main() -> int:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--report", type=Path, default=ROOT / "report", help="folder of what is left behind")
    args = parser.parse_args()
    return run(args.notebook.resolve(), args.report.resolve(), Screen())


if __name__ == "__main__":
    sys.exit(main())
