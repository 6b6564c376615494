"""The built pages in a real browser: `make docs` builds them and runs this.

Every page is opened at the width of a phone and of a desk, in light and in dark. It must raise no
error in the console, show all of its formulas and images, not scroll sideways, and link only to
what is there.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium or google-chrome is installed"
)
WIDTHS = {"phone": (390, 844), "desk": (1280, 900)}

# Chromium reads from descriptor 3 and writes to 4, which may be taken: there by way of 10 and up.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

# Formulas are typeset after the page has loaded, and pictures are loaded when scrolled to.
READY = """
(async () => {
  for (const image of document.images) image.loading = "eager";
  await Promise.all([...document.images].map((image) => image.decode().catch(() => null)));
  if (window.MathJax) await MathJax.startup.promise;
  await document.fonts.ready;
})()
"""
FACTS = """
({
  formulas: [...document.querySelectorAll(".math")]
    .filter((item) => !item.querySelector("mjx-container svg"))
    .map((item) => item.textContent),
  wrong: [...document.querySelectorAll("[data-mml-node=merror], mjx-merror")]
    .map((item) => item.textContent),
  images: [...document.images].filter((image) => !image.naturalWidth).map((image) => image.src),
  links: [...document.links].map((link) => link.href),
  anchors: [...document.querySelectorAll("[id]")].map((item) => item.id),
})
"""
# What sticks out, and the innermost of its elements, unless they scroll inside of a parent.
OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  const wide = [...document.body.querySelectorAll("*")].filter((item) => {
    if (item.getBoundingClientRect().right <= width + 1) return false;
    for (let up = item.parentElement; up; up = up.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return false;
    return true;
  });
  return ["page", ...wide.slice(-3).map((item) => item.outerHTML.slice(0, 120))];
})()
"""
COLOURS = """
["backgroundColor", "color"].map((name) => {
  const [r, g, b] = getComputedStyle(document.body)[name].match(/[\\d.]+/g).map(Number);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
})
"""


class Browser:
    """One tab of a headless Chromium, spoken to through pipes in the DevTools protocol."""

    def __init__(self, profile):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",  # it opens our own pages, and cannot have a sandbox where root runs it
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.out, self.incoming = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self.count, self.rest, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _receive(self):
        while b"\0" not in self.rest:
            data = os.read(self.incoming.fileno(), 1 << 20)
            if not data:
                raise RuntimeError("the browser has gone")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        """Return the result of a command; events that come first are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method):
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression):
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path):
        """Open a page and wait until it is drawn; return what its console had to complain of."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("Page.loadEventFired")
        self.evaluate(READY)
        return [text for text in map(_complaint, self.events) if text]

    def show(self, width, height, scheme):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=30)
        self.out.close()
        self.incoming.close()


def _complaint(event):
    parameters = event.get("params", {})
    if event.get("method") == "Runtime.exceptionThrown":
        return json.dumps(parameters["exceptionDetails"])
    if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
        return f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}"
    if event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in (
        "error",
        "warning",
    ):
        return json.dumps(parameters["args"])
    return None


def pytest_generate_tests(metafunc):
    if "page" in metafunc.fixturenames:
        site = Path(metafunc.config.getoption("--site"))
        pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
        assert "index.html" in pages, f"no documentation was built in {site}"
        metafunc.parametrize("page", pages)


@pytest.fixture(scope="module")
def site(request):
    return Path(request.config.getoption("--site")).resolve()


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def seen():
    """Links and anchors of the pages that were opened."""
    return {}


def test_page(browser, site, seen, page):
    browser.show(*WIDTHS["phone"], "light")
    complaints = browser.open(site / page)
    facts = browser.evaluate(FACTS)
    seen[page] = facts
    assert not complaints
    assert not facts["formulas"], "these formulas are not typeset"
    assert not facts["wrong"], "MathJax does not understand these"
    assert not facts["images"], "these images are not shown"
    for name, size in WIDTHS.items():
        for scheme in ("light", "dark"):
            browser.show(*size, scheme)
            assert not browser.evaluate(OVERFLOW), f"scrolls sideways ({name}, {scheme})"
            background, text = browser.evaluate(COLOURS)
            assert (
                (background < 0.3 < 0.6 < text)
                if scheme == "dark"
                else (text < 0.4 < 0.8 < background)
            )


def test_links_lead_somewhere(site, seen):
    if not seen:
        pytest.skip("no page was opened in this run")
    broken = []
    for page, facts in seen.items():
        for link in facts["links"]:
            url = urllib.parse.urlsplit(link)
            if url.scheme != "file":
                continue
            path = Path(urllib.parse.unquote(url.path))
            fragment = urllib.parse.unquote(url.fragment)
            name = path.relative_to(site).as_posix() if path.is_relative_to(site) else None
            if not path.is_file():
                broken.append(f"{page} -> {link}")
            elif fragment and name in seen and fragment not in seen[name]["anchors"]:
                broken.append(f"{page} -> {link}: no such place on that page")
    assert not broken


def test_formulas_are_there(site, seen):
    """The check of formulas would pass on pages that had lost them."""
    assert (site / "math.html").read_text(encoding="utf-8").count('class="math') > 50
    assert "cdn." not in (site / "math.html").read_text(encoding="utf-8")
