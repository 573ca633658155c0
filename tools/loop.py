"""Draw the loop: nbs/images/loop.svg, from the scopes that trainkit/callback.py says it is made of.

    python tools/loop.py
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from trainkit.callback import FIT, Scope  # noqa: E402

DRAWN = ROOT / "nbs/images/loop.svg"
LINE, STEP, WIDTH = 22, 26, 460  # pixels: a line's height, a box's inset, the whole
SHADES = ("#ffffff", "#eef3fb", "#dfe9f7", "#cfdef3")  # of boxes, the deeper the darker
BLUE = "#2f6db5"
STYLE = """
text {font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #1b2733}
.when {font: 600 13px system-ui, sans-serif; fill: #0b3d78}
.does {font: 13px system-ui, sans-serif; fill: #fff}
.note {font: 11px system-ui, sans-serif; fill: #5b6875}
"""
TIP = f"""<marker id="tip" markerWidth="6" markerHeight="6" refX="3" refY="3" orient="auto">
<path d="M0 0 L6 3 L0 6 z" fill="{BLUE}"/></marker>"""


def height(scope: Scope) -> int:
    "Of its box: a title, the events around it, and what is inside."
    return 4 * LINE + 12 + sum(height(item) + 10 if isinstance(item, Scope) else LINE for item in scope.inside)


def line(text: str, x: int, y: int) -> str:
    "An event, or what the loop does by itself."
    if text.startswith("· "):
        wide = 8 * len(text) + 6
        return (f'<rect x="{x - 2}" y="{y - 15}" width="{wide}" height="19" rx="9" fill="{BLUE}"/>'
                f'<text class="does" x="{x + 8}" y="{y - 1}">{escape(text[2:])}</text>')  # fmt: skip
    always = f'<text class="note" x="{x + 8 * len(text) + 12}" y="{y}">always</text>' if text.startswith("cleanup_") else ""
    return f'<text x="{x}" y="{y}">{escape(text)}</text>{always}'


def again(scope: Scope, x: int, y: int) -> str:
    "An arrow from the end of what repeats to its beginning: the whole box, or what is between its first and last events."
    around = 0 if scope.name in ("epoch", "batch", "turn") else LINE
    top, bottom = y + 38 + around, y + height(scope) - 18 - 2 * around
    way = f"M{x + 7} {bottom} h-4 a10 10 0 0 1 -10 -10 V{top + 10} a10 10 0 0 1 10 -10 h2"
    return f'<path d="{way}" fill="none" stroke="{BLUE}" stroke-width="2" marker-end="url(#tip)"/>'


def box(scope: Scope, x: int, y: int, depth: int = 0) -> Iterator[str]:
    "A scope and all that is in it."
    tall, left = height(scope), x + 22
    yield (f'<rect x="{x}" y="{y}" width="{WIDTH - 2 * x}" height="{tall}" rx="9" fill="{SHADES[min(depth, 3)]}" '
           f'stroke="#8fa9c9"/><text class="when" x="{left - 8}" y="{y + 20}">{escape(scope.when)}</text>')  # fmt: skip
    if "each" in scope.when or "while" in scope.when:
        yield again(scope, x, y)
    y += 20 + LINE
    yield line(f"before_{scope.name}", left, y)
    for item in scope.inside:
        if isinstance(item, Scope):
            yield from box(item, x + STEP, y + 10, depth + 1)
            y += height(item) + 10
        else:
            y += LINE
            yield line(item, left, y)
    yield line(f"after_{scope.name}", left, y + LINE) + line(f"cleanup_{scope.name}", left, y + 2 * LINE)


def drawing(scope: Scope = FIT) -> str:
    "The loop as a picture: a box for each scope, with its events in the order in which they come."
    tall = height(scope) + 12
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" role="img">\n'
            f"<title>The training loop and its events</title><style>{STYLE}</style><defs>{TIP}</defs>\n"
            + "\n".join(box(scope, 6, 6)) + "\n</svg>\n")  # fmt: skip


if __name__ == "__main__":
    DRAWN.write_text(drawing(), encoding="utf-8")
    print(f"{DRAWN.relative_to(ROOT)}: written")
