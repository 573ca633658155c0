"The built site (`make docs`) as its reader meets it: what is typed into its search field is found."

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import expect

SITE = Path(__file__).parents[2] / "build" / "docs" / "site"

pytestmark = pytest.mark.browser


class Silent(SimpleHTTPRequestHandler):
    "Serves files and says nothing."

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    if not (SITE / "searchindex.js").is_file():
        pytest.fail("there is no site with a search index: make docs")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=SITE)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def search(page, site, words):
    "The pages that are found, best first."
    page.goto(f"{site}/index.html")
    page.locator(".sidebar-search").fill(words)
    page.locator(".sidebar-search").press("Enter")
    expect(page.locator(".search-summary")).to_contain_text("Search finished", timeout=30_000)
    return page.locator("#search-results ul.search li > a").evaluate_all("found => found.map(a => a.pathname.slice(1))")


@pytest.mark.parametrize("words, place", [
    ("CancelBatch", "nbs/20_callback.html"), ("EMA", "reference/callbacks.average.html"),
    ("sharded checkpoint", "nbs/66a_converter.html"), ("thousands of devices", "explain/scale.html")])  # fmt: skip
def test_a_word_leads_to_its_page(site, page, words, place):
    assert place in search(page, site, words)[:20]


def test_nothing_is_found_for_a_word_that_is_nowhere(site, page):
    page.goto(f"{site}/search.html?q=zyxwvutsrq")
    expect(page.locator(".search-summary")).to_contain_text("did not match any documents", timeout=30_000)
    assert page.locator("#search-results ul.search li").count() == 0
