"""Record the animation that README.md shows: the quickstart's GAN, trained and steered in a real JupyterLab.

    python tools/record.py [FILE]      default: nbs/images/quickstart.webp; the frames go to build/record/

A fit begins; it is paused, sent back to its first checkpoint, given a lower learning rate by a slider, and let go on. A picture
is taken every half second, and shown for an eighth of one. While only training goes on, as many pictures are left out as it takes
to be done in the time that is wanted. Nothing is drawn that was not on the screen, except for the pointer, which a browser
without a screen doesn't have.
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import argparse
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image, ImageChops
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.browser.labpage import opened  # noqa: E402
from tests.browser.test_live import Shown  # noqa: E402

QUICKSTART = ROOT / "nbs/tutorials/01_quickstart.ipynb"
FIT = "gan.fit(epochs=20)"
SIZE = {"width": 940, "height": 900}
EVERY, SHOWN = 0.5, 0.125  # seconds between two pictures, and for which one is shown
SECONDS = 600  # the fit is left alone for so long at most, before and after it is steered
POINTER = """() => {
  const pointer = document.createElement('div')
  pointer.style = 'position: fixed; z-index: 100000; pointer-events: none; left: -50px; top: 0'
  pointer.innerHTML = `<svg width="22" height="28" viewBox="0 0 22 28"><path d="M2 2 L2 22 L7 17 L11 26 L15 24 L11 16 L18 16 Z"
    fill="#111" stroke="#fff" stroke-width="1.6"/></svg>`
  document.body.append(pointer)
  const follow = e => { pointer.style.left = `${e.clientX - 2}px`; pointer.style.top = `${e.clientY - 2}px` }
  document.addEventListener('mousemove', follow, true)
}"""


class Film:
    "Takes pictures of a part of the page."

    def __init__(self, page: Any, area: dict[str, float], folder: Path):
        self.page, self.area, self.folder, self.taken = page, area, folder, 0
        self.next, self.steered, self.at = time.monotonic(), False, (area["width"] / 2, area["height"])

    def roll(self, seconds: float) -> None:
        "Let so much time go by."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.page.wait_for_timeout(1000 * max(0.01, min(self.next, end) - time.monotonic()))
            if time.monotonic() >= self.next:
                kind = "hand" if self.steered else "run"
                self.page.screenshot(path=self.folder / f"{self.taken:04d}-{kind}.png", clip=self.area)
                self.taken, self.next = self.taken + 1, max(self.next, time.monotonic() - EVERY) + EVERY

    def until(self, holds: Any, seconds: float) -> None:
        "Let time go by until something holds."
        end = time.monotonic() + seconds
        while not holds() and time.monotonic() < end:
            self.roll(EVERY)

    def move(self, x: float, y: float, seconds: float = 1.0) -> None:
        "The pointer goes somewhere, at a pace at which one can follow."
        x0, y0 = self.at
        for i in range(1, 7):
            self.page.mouse.move(x0 + (x - x0) * i / 6, y0 + (y - y0) * i / 6)
            self.roll(seconds / 6)
        self.at = (x, y)

    def click(self, what: Any) -> None:
        "Go to an element, and press it."
        box = what.bounding_box()
        self.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.down()
        self.roll(0.3)
        self.page.mouse.up()


def steps_of(shown: Shown) -> int:
    "The step that the panel shows."
    text = shown.area.inner_text()
    return int(text.split("step ")[1].split("/")[0].split()[0]) if "step " in text else 0


def lower(film: Film, row: Any) -> None:
    "Drag a slider to the left."
    box = row.locator(".slider-container:visible .noUi-handle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    film.move(x, y)
    film.page.mouse.down()
    film.move(x - 16, y, 2.5)
    film.page.mouse.up()


def first_of(choice: Any) -> int:
    "The place of the oldest checkpoint in the list of those that one can go to."
    labels = choice.locator("option").all_inner_texts()
    steps = {int(label.split()[0]): i for i, label in enumerate(labels) if label.split()[0].isdecimal()}
    return steps[min(steps)]


def play(film: Film, shown: Shown, pace: float) -> None:
    "What is seen, from the first step on."
    film.until(lambda: steps_of(shown) > 210 * pace, SECONDS)
    film.steered = True
    film.click(shown.button("Pause"))
    film.until(lambda: shown.state.inner_text() == "paused", 20)
    film.roll(1)
    saved = shown.area.get_by_label("go to", exact=True)
    box = saved.bounding_box()
    film.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    saved.select_option(index=first_of(saved))  # the list itself is the system's, which no picture shows
    film.roll(1)
    film.click(shown.button("Restore"))
    film.until(lambda: steps_of(shown) < 200 * pace, 20)
    film.roll(1.5)
    lower(film, shown.row("discriminator", "learning rate"))
    film.roll(1)
    film.click(shown.button("Resume"))
    film.roll(1)
    film.move(film.area["width"], film.area["height"])
    film.steered = False
    film.until(lambda: steps_of(shown) > 300 * pace, SECONDS)


def record(folder: Path, pace: float) -> None:
    "All pictures, into a folder."
    cells = [cell.source for cell in nbformat.read(QUICKSTART, 4).cells if cell.cell_type == "code"]
    assert "def make_gan" in cells[1], "the quickstart's second cell makes the GAN"
    with opened({"quickstart.ipynb": ["\n".join(cells[:2]), FIT]}, SIZE) as (_, notebook):
        page = notebook.page
        notebook.run(0, wait=300)
        notebook.cells.nth(0).locator(".jp-InputPrompt").click()
        page.keyboard.press("d")  # what it made stays, and the cell that trains moves up, where nothing scrolls
        page.keyboard.press("d")
        expect(notebook.cells).to_have_count(1)
        page.evaluate(POINTER)
        notebook.run(0, wait=None)
        shown = Shown(page, notebook.output(0))
        shown.runs()
        box = notebook.cells.nth(0).bounding_box()
        assert box is not None
        area = {"x": box["x"] + 8, "y": box["y"], "width": 840, "height": 640}
        play(Film(page, area, folder), shown, pace)
        shown.button("Stop").click()
        expect(shown.area).to_contain_text("stopped at step", timeout=30_000)


def chosen(paths: list[Path], seconds: float) -> list[Path]:
    "Of the pictures of a fit that is left alone, as many as have room beside those on which somebody is at work."
    runs = [path for path in paths if path.stem.endswith("run")]
    room = max(2, round(seconds / SHOWN) - (len(paths) - len(runs)))
    kept = {runs[round(i * (len(runs) - 1) / (room - 1))] for i in range(room)}
    return [path for path in paths if path in kept or path not in runs]


def assembled(folder: Path, into: Path, seconds: float, width: int, quality: int) -> None:
    "One animation; equal pictures become one that is shown for longer."
    frames: list[Image.Image] = []
    times: list[int] = []
    for path in chosen(sorted(folder.glob("*.png")), seconds):
        frame = Image.open(path).convert("RGB")
        frame = frame.resize((width, round(frame.height * width / frame.width)), Image.Resampling.LANCZOS)
        if frames and ImageChops.difference(frames[-1], frame).getbbox() is None:
            times[-1] += round(1000 * SHOWN)
        else:
            frames.append(frame)
            times.append(round(1000 * SHOWN))
    times[-1] += 2000
    out = io.BytesIO()
    if into.suffix == ".webp":
        frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, quality=quality, method=6,
                       minimize_size=True)  # fmt: skip
    else:
        few = [frame.quantize(128, dither=Image.Dither.NONE) for frame in frames]
        few[0].save(out, into.suffix[1:].upper(), save_all=True, append_images=few[1:], duration=times, loop=0)
    into.write_bytes(out.getvalue())
    print(f"{into.name}: {len(frames)} frames of {frames[0].size}, {sum(times) / 1000:.1f} s, {len(out.getvalue()) // 1000} kB")


def main() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "nbs/images/quickstart.webp", help=".webp or .gif")
    parser.add_argument("--pace", type=float, default=1.0, help="smaller on a slow machine: all comes after fewer steps")
    parser.add_argument("--seconds", type=float, default=16.0, help="how long it takes, about")
    parser.add_argument("--width", type=int, default=840, help="pixels")
    parser.add_argument("--quality", type=int, default=70, help="of a .webp, up to 100")
    parser.add_argument("--again", action="store_true", help="assemble the pictures that are there")
    asked, folder = parser.parse_args(), ROOT / "build/record"
    if not asked.again:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record(folder, asked.pace)
    assembled(folder, asked.file, asked.seconds, asked.width, asked.quality)


if __name__ == "__main__":
    main()
