"""A browser, the servers that it talks to, and what the tests of the pages ask of both."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

from playwright.sync_api import Error, expect, sync_playwright

from bespoke_server import Server

BINARY = os.environ["BESPOKE_BINARY"]
MODEL_FOLDER = pathlib.Path(os.environ["BESPOKE_MODEL_FOLDER"])
ROOT = pathlib.Path(__file__).resolve().parents[4]
MODEL = "smollm2-135m"
KEY = "browser-key-71c4e0a95d2b"

# Longer than anything takes that does not hang, in milliseconds.
LONG_MS = 60_000

# A program that is there already comes before one that has to be fetched.
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]

started = []
scratch = tempfile.TemporaryDirectory(prefix="bespoke-browser-")

expect.set_options(timeout=LONG_MS)


@functools.cache
def smollm2():
    """SmolLM2, for everybody."""
    return start("--served-model-name", MODEL)


@functools.cache
def with_key():
    """Null mathematics behind a key."""
    keys = pathlib.Path(scratch.name) / "keys"
    keys.write_text(f"tester:{KEY}\n")
    keys.chmod(0o600)
    return start("--backend", "null", "--served-model-name", "null", "--api-key-file", str(keys))


def start(*arguments):
    """A server that is stopped at the end of the run at the latest."""
    server = Server(BINARY, MODEL_FOLDER, *arguments)
    started.append(server)
    return server


@functools.cache
def driver():
    """Playwright, for the whole run."""
    return sync_playwright().start()


@functools.cache
def browser():
    """Chromium: the machine's, or Playwright's own, which is fetched where it is not there."""
    # NOTE: Chromium's sandbox does not work for root, and a container often has no other user.
    options = {"args": ["--no-sandbox"] if os.geteuid() == 0 else []}
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    found = os.environ.get("BESPOKE_CHROMIUM") or found
    if found:
        return driver().chromium.launch(executable_path=found, **options)
    try:
        return driver().chromium.launch(**options)
    except Error:
        command = [sys.executable, "-m", "playwright", "install", "chromium-headless-shell"]
        subprocess.run(command, check=False, timeout=600, stdout=subprocess.DEVNULL)
        return driver().chromium.launch(**options)


def missing_browser():
    """Why there is no browser, or None."""
    try:
        browser()
        return None
    except Error as error:
        reason = error.message.strip().splitlines()[0]
        return f"no Chromium ({reason}); `apt-get install chromium` has one"


def stop_all():
    """Ends browser and servers; what went wrong with a server, as texts."""
    if browser.cache_info().currsize:
        browser().close()
    if driver.cache_info().currsize:
        driver().stop()
    problems = []
    for server in started:
        status = server.stop()
        log = server.log_text()
        if status != 0 or "panicked" in log:
            problems.append(f"{server.url} ended with {status}; it wrote: {log}")
    scratch.cleanup()
    return problems


def wait_until(condition):
    """Waits for what the page does not show."""
    deadline = time.monotonic() + LONG_MS / 1000
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it did not come to be in time")
        time.sleep(0.02)


class PageCase(unittest.TestCase):
    """Cases that have a page of their own, with empty storage. Any error of it fails them."""

    serve = staticmethod(smollm2)
    viewport = {"width": 1280, "height": 800}

    # Messages of the browser about answers that the case is about.
    expected_errors = ()

    def setUp(self):
        self.server = self.serve()
        self.context = browser().new_context(
            viewport=self.viewport, color_scheme="light", reduced_motion="reduce"
        )
        self.addCleanup(self.context.close)
        self.context.set_default_timeout(LONG_MS)
        self.errors = []
        self.page = self.new_page()

    def tearDown(self):
        unexpected = [
            error for error in self.errors
            if not any(expected in error for expected in self.expected_errors)
        ]
        self.assertEqual(unexpected, [])

    def new_page(self):
        """A further tab."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: (
            self.errors.append(message.text) if message.type in ("error", "warning") else None
        ))
        return page

    def open(self, path="/"):
        """Shows a page of the server."""
        self.page.goto(self.server.url + path)
        return self.page

    def open_chat(self):
        """The chat, when it knows its model."""
        page = self.open()
        expect(page.locator("#model")).not_to_be_empty()
        return page

    def send(self, text):
        """Sends a message by keyboard; the answer's element."""
        self.page.locator("#prompt").fill(text)
        self.page.locator("#prompt").press("Enter")
        answer = self.page.locator(".message.assistant").last
        expect(answer).to_be_visible()
        return answer

    def finished(self, answer):
        """Waits for the end of an answer; its text."""
        expect(answer).to_have_attribute("aria-busy", "false")
        return answer.locator(".body").inner_text()

    def set_field(self, **fields):
        """Changes settings, by their names."""
        self.page.locator("#settings-open").click()
        for name, value in fields.items():
            self.page.locator(f"#field-{name}").fill(str(value))
        self.page.keyboard.press("Escape")
        expect(self.page.locator("#settings")).to_be_hidden()
