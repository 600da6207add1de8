"""The dashboard at `/dashboard`."""

import json
import re
import threading
import urllib.request

from playwright.sync_api import expect

from .pages import MODEL, PageCase, wait_until


class Work:
    """Completions one after another, for as long as the block runs."""

    def __init__(self, generate):
        self.generate = generate
        self.num_finished = 0
        self.is_enough = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.is_enough.is_set():
            self.generate(400)
            self.num_finished += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.is_enough.set()
        self.thread.join()


class DashboardTest(PageCase):
    """Its numbers are the server's, and move."""

    viewport = {"width": 1280, "height": 1400}

    def generate(self, max_tokens):
        """A completion without a browser."""
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": max_tokens,
            "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(self.server.url + "/v1/completions",
            json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            response.read()

    def total(self, name):
        """A number of the list of totals."""
        row = self.page.locator("#totals div").filter(has_text=name)
        return int(row.locator("dd").inner_text().replace(",", ""))

    def test_numbers_move_while_the_server_works(self):
        page = self.open("/dashboard")
        expect(page.locator("#state")).to_have_text("running")
        expect(page.locator("#served")).to_contain_text(MODEL)
        expect(page.locator("#pages-legend")).to_contain_text("free")
        tokens = self.total("Output tokens")
        finished = self.total("Requests finished")
        # The page asks once a second; work that ends before it asks would not be seen.
        with Work(self.generate) as work:
            expect(page.locator("#tile-running")).to_have_text(re.compile("[1-9]"))
            expect(page.locator("#tile-tokens")).to_have_text(re.compile("[1-9]"))
            expect(page.locator("#pages rect.active").first).to_be_visible()
        expect(page.locator("#tile-running")).to_have_text("0")
        wait_until(lambda: self.total("Requests finished") == finished + work.num_finished)
        self.assertGreaterEqual(self.total("Output tokens"), tokens + 400 * work.num_finished)
        expect(page.locator("#tile-between")).to_have_text(re.compile("ms|s"))
        expect(page.locator("#latency-first_token .marks")).to_contain_text("median")
        for chart in ["throughput", "batch"]:
            expect(page.locator(f"#{chart} path.line.active")).not_to_have_count(0)

    def test_kernels_are_named_with_their_share_of_the_limit(self):
        self.generate(40)
        page = self.open("/dashboard")
        rows = page.locator("#kernels tr")
        expect(rows.first).to_be_visible()
        names = page.locator("#kernels .op").all_inner_texts()
        self.assertIn("awq_gemm", names)
        self.assertIn("paged_attention", names)
        shares = rows.locator("td:nth-child(3) .value").all_inner_texts()
        total = sum(float(share.rstrip(" %")) for share in shares)
        self.assertAlmostEqual(total, 100, delta=2)
        expect(rows.first.locator("td").last).to_have_text(re.compile(r"\d %.*G(B|OP)/s"))

    def test_drawings_say_what_they_show(self):
        self.generate(10)
        page = self.open("/dashboard")
        expect(page.locator("#pages svg")).to_have_attribute("aria-label",
            re.compile(r"\d+ pages active, \d+ cached, \d+ free"))
        for image in ["#throughput svg", "#batch svg", "#latency-request .columns"]:
            expect(page.locator(image)).to_have_attribute("role", "img")
            expect(page.locator(image)).to_have_attribute("aria-label", re.compile(r"\d"))

    def test_a_chart_tells_the_values_under_the_pointer(self):
        page = self.open("/dashboard")
        expect(page.locator("#tile-tokens")).not_to_have_text("–")
        plot = page.locator("#batch .plot")
        plot.hover(position={"x": 1, "y": 5})
        expect(page.locator("#batch-readout")).to_have_text("nothing yet")
        width = plot.bounding_box()["width"]
        plot.hover(position={"x": width - 1, "y": 5})
        expect(page.locator("#batch-readout")).to_contain_text(re.compile("ago: .*running"))


class GoneTest(PageCase):
    """The server ends."""

    expected_errors = ("ERR_INTERNET_DISCONNECTED",)

    def test_a_server_that_is_gone_is_unreachable_until_it_is_back(self):
        page = self.open("/dashboard")
        expect(page.locator("#state")).to_have_text("running")
        self.context.set_offline(True)
        expect(page.locator("#state")).to_have_text("unreachable")
        expect(page.locator("#notice")).to_contain_text("cannot be reached")
        self.context.set_offline(False)
        expect(page.locator("#state")).to_have_text("running")
        expect(page.locator("#notice")).to_be_hidden()
