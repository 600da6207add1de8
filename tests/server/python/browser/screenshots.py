"""Takes the pictures of the pages that the README shows, of a server at work."""

import itertools
import json
import threading
import time
import urllib.request

from playwright.sync_api import expect

from .pages import MODEL, ROOT, browser, smollm2

FOLDER = ROOT / "engine/src/server/page/screenshots"

# Conversations of the side bar, the last one in view: what is asked, and the longest answer.
ASKED = [
    ("How do bees make honey?", 40),
    ("How do I brew a good cup of tea?", 40),
    ("What is the capital of France, and what is it known for?", 40),
    ("What are three benefits of walking every day?", 260),
]

# A small model repeats itself without a penalty, and one seed is luckier than another.
SETTINGS = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.12, "seed": 2}

# Load behind the dashboard: requests at once, and for how many seconds.
STREAMS = 6
SECONDS = 100


def take():
    """Writes `chat.png` and `dashboard.png`."""
    FOLDER.mkdir(exist_ok=True)
    server = smollm2()
    context = browser().new_context(
        viewport={"width": 1280, "height": 800}, device_scale_factor=1.5,
        color_scheme="light", reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text(MODEL)
    for text, max_tokens in ASKED:
        page.keyboard.press("Alt+s")
        for name, value in {**SETTINGS, "max_tokens": max_tokens}.items():
            page.locator(f"#field-{name}").fill(str(value))
        page.keyboard.press("Escape")
        page.keyboard.press("Alt+n")
        page.locator("#prompt").fill(text)
        page.locator("#prompt").press("Enter")
        expect(page.locator(".message.assistant .stats")).to_be_visible()
    page.locator("#scroll").evaluate("element => element.scrollTop = 0")
    page.mouse.move(1200, 500)
    page.screenshot(path=FOLDER / "chat.png")
    dashboard(page, server)


def dashboard(page, server):
    """The dashboard while several streams come and go."""
    end = time.monotonic() + SECONDS
    workers = [threading.Thread(target=load, args=(server, at, end)) for at in range(STREAMS)]
    page.set_viewport_size({"width": 1280, "height": 1500})
    page.goto(server.url + "/dashboard")
    for worker in workers:
        worker.start()
    # The chart of two minutes is full enough.
    page.wait_for_timeout((SECONDS - 8) * 1000)
    page.screenshot(path=FOLDER / "dashboard.png")
    for worker in workers:
        worker.join()


def load(server, worker, end):
    """Asks one question after another, with a pause that differs from worker to worker."""
    for turn in itertools.count():
        if time.monotonic() > end:
            return
        question, _ = ASKED[(worker + turn) % len(ASKED)]
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": question}],
            "max_tokens": 60 + 40 * ((worker * 7 + turn * 3) % 6), "temperature": 0.7,
        }
        request = urllib.request.Request(
            server.base_url + "/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            response.read()
        time.sleep(0.3 + 0.4 * worker)
