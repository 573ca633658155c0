"A real JupyterLab on the loopback, and a real browser looking at it."

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

FRONT = os.environ.get("FRONT", "jupyterlab")  # or "notebook": the package that serves the pages
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}


@dataclass
class Lab:
    "A running server: its folder of notebooks, address and token."

    folder: Path
    url: str
    token: str

    def address(self, notebook: str) -> str:
        "In a workspace of its own, so that no notebook of another test is open beside it."
        if FRONT == "notebook":
            return f"{self.url}/notebooks/{notebook}?token={self.token}"
        return f"{self.url}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}?reset&token={self.token}"


def _answers(lab: Lab) -> bool:
    try:
        with urllib.request.urlopen(f"{lab.url}/api/status?token={lab.token}", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


@contextmanager
def serving(home: Path):
    "A server, with everything it writes in that folder."
    settings = home / "settings"
    for name, values in SETTINGS.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lab = Lab(home / "notebooks", f"http://127.0.0.1:{port}", secrets.token_hex(8))
    lab.folder.mkdir()
    root = Path(__file__).parents[2]
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
           "PYTHONPATH": str(root), "JUPYTER_PLATFORM_DIRS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    env.pop("TRAINKIT_WHERE", None)
    command = [sys.executable, "-m", FRONT, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               f"--IdentityProvider.token={lab.token}", f"--ServerApp.root_dir={lab.folder}"]  # fmt: skip
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    try:
        deadline = time.monotonic() + 90
        while not _answers(lab):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{FRONT} did not start:\n" + (home / "server.log").read_text()[-3000:])
            time.sleep(0.2)
        yield lab
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    if not Path(CHROMIUM).exists():
        pytest.fail(f"the browser tests need {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 1500})
    page = context.new_page()
    yield page
    for dialog in page.locator(".jp-Dialog").all_inner_texts():
        print("a dialog was open:", dialog)
    context.close()
