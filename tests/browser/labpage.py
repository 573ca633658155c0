"What a person does in JupyterLab, in words."

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Page, expect, sync_playwright


class LabPage:
    "One open notebook."

    def __init__(self, page: Page, address: str):
        self.page = page
        page.goto(address)
        page.locator(".jp-Notebook").wait_for(timeout=90_000)
        page.add_locator_handler(page.locator(".jp-Dialog-header", has_text="Select Kernel"),
                                 lambda: page.locator(".jp-Dialog button.jp-mod-accept").click())  # fmt: skip
        self.wait_idle(90)

    @property
    def cells(self):
        "Code cells, in order."
        return self.page.locator(".jp-Notebook .jp-CodeCell")

    def wait_idle(self, seconds: float = 60) -> None:
        "Until the kernel has nothing to do."
        self.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=1000 * seconds)

    def run(self, index: int, wait: float | None = 60) -> None:
        "Run a code cell with Ctrl-Enter; wait so many seconds for its end, or not at all."
        cell = self.cells.nth(index)
        fresh = cell.locator(".jp-InputPrompt").inner_text().strip() in ("[ ]:", "")
        for _ in range(3):
            cell.locator(".cm-content").click()
            self.page.keyboard.press("Control+Enter")
            if not fresh or self._started(cell):
                break
        if wait is not None:
            expect(cell.locator(".jp-InputPrompt")).not_to_contain_text("*", timeout=1000 * wait)
            expect(cell.locator(".jp-InputPrompt")).to_contain_text("[", timeout=1000 * wait)

    def _started(self, cell) -> bool:
        "Has a cell that never ran begun to? (A key pressed while the page settles is sometimes lost.)"
        try:
            expect(cell.locator(".jp-InputPrompt")).to_contain_text(re.compile(r"\[[*\d]"), timeout=5000)
        except AssertionError:
            return False
        return True

    def wait_done(self, index: int, seconds: float = 120) -> None:
        "Until a code cell has its number."
        expect(self.cells.nth(index).locator(".jp-InputPrompt")).not_to_contain_text("*", timeout=1000 * seconds)

    def stop(self) -> None:
        "The stop button of the toolbar."
        self.page.locator('.jp-NotebookPanel-toolbar [data-jp-item-name="interrupt"] jp-button').click()

    def restart_kernel(self) -> None:
        "The restart button of the toolbar, and yes."
        self.page.locator('.jp-NotebookPanel-toolbar [data-jp-item-name="restart"] jp-button').click()
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        self.page.wait_for_timeout(1000)
        self.wait_idle()

    def output(self, index: int):
        "The output area of a code cell."
        return self.cells.nth(index).locator(".jp-OutputArea").first

    def errors(self) -> list[str]:
        "Texts of error outputs."
        kinds = "error", "stderr"
        wanted = ", ".join(f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in kinds)
        return self.page.locator(wanted).all_inner_texts()

    def screenshot(self, name: str) -> None:
        "A picture of the page, kept where SCREENSHOTS says."
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@contextmanager
def opened(books: Mapping[str, Sequence[str]], size: Any) -> Iterator[tuple[Any, LabPage]]:
    "A JupyterLab of its own with some notebooks, each given by its cells, and the page of the first."
    from tests.browser.conftest import CHROMIUM, FLAGS, serving  # pytest imports it, too, by another name

    with tempfile.TemporaryDirectory() as home, serving(Path(home)) as lab, sync_playwright() as playwright:
        for name, cells in books.items():
            nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
            nb.cells = [nbformat.v4.new_code_cell(source) for source in cells]
            nbformat.write(nb, lab.folder / name)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport=size, device_scale_factor=1).new_page()
        page.set_default_timeout(300_000)
        notebook = LabPage(page, lab.address(next(iter(books))))
        page.keyboard.press("Control+b")  # the list of files needs room
        yield lab, notebook
        browser.close()
