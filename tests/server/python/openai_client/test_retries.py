"""Overload, drain, retries, time-outs, cancellation."""

import threading
import time
import unittest

import openai

from openai_client.serving import (
    MODEL, NULL_MODEL, ServedCase, client_of, lenient_client_of, start_null, user,
)

ENDLESS = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}


def counting_client(server, **options):
    """A client, and the times at which it sent its requests."""
    times = []
    hooks = {"request": [lambda _: times.append(time.monotonic())]}
    http_client = openai.DefaultHttpxClient(event_hooks=hooks)
    return client_of(server, http_client=http_client, **options), times


class TimeoutTest(ServedCase):
    """The client gives up, and the server with it."""

    def test_a_timeout_cancels_the_request(self):
        client = client_of(self.server, timeout=0.5)
        with self.assertRaises(openai.APITimeoutError):
            client.chat.completions.create(model=MODEL, messages=user("Hi"), **ENDLESS)
        self.assert_idle()

    def test_a_timeout_of_one_request(self):
        with self.assertRaises(openai.APITimeoutError):
            self.chat("Hi", timeout=0.5, **ENDLESS)
        self.assert_idle()
        self.assertTrue(self.text("Hi"))

    def test_a_closed_client_cancels_its_requests(self):
        client = client_of(self.server)
        stream = client.chat.completions.create(
            model=MODEL, messages=user("Hi"), stream=True, **ENDLESS
        )
        next(stream)
        client.close()
        del stream
        self.assert_idle()

    def test_bad_requests_are_not_retried(self):
        client, times = counting_client(self.server, max_retries=5)
        with self.assertRaises(openai.BadRequestError):
            client.chat.completions.create(model=MODEL, messages=user("Hi"), temperature=9)
        self.assertEqual(len(times), 1)


class OverloadTest(unittest.TestCase):
    """One request runs, one waits, and the next is sent away."""

    @classmethod
    def setUpClass(cls):
        cls.server = start_null("--max-sequences", "1", "--max-waiting", "1")
        cls.client = lenient_client_of(cls.server)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.stop()

    def setUp(self):
        self.endless = threading.Event()
        self.streams = [self.open_stream() for _ in range(1)]
        next(self.streams[0])
        self.waiting = threading.Thread(target=self.wait_in_the_queue)
        self.waiting.start()
        deadline = time.monotonic() + 10
        while self.server.metric("vllm:num_requests_waiting") != 1:
            self.assertLess(time.monotonic(), deadline, "nothing waits")
            time.sleep(0.01)

    def tearDown(self):
        self.free()

    def open_stream(self):
        return self.client.completions.create(
            model=NULL_MODEL, prompt=[5, 6, 7], stream=True, **ENDLESS
        )

    def wait_in_the_queue(self):
        self.client.completions.create(model=NULL_MODEL, prompt=[1, 2, 3], max_tokens=1)

    def free(self):
        for stream in self.streams:
            stream.close()
        self.waiting.join()

    def test_overload_is_a_rate_limit_error(self):
        with self.assertRaises(openai.RateLimitError) as caught:
            self.client.completions.create(model=NULL_MODEL, prompt=[1], max_tokens=1)
        error = caught.exception
        self.assertEqual(error.status_code, 429)
        seconds = int(error.response.headers["retry-after"])
        self.assertTrue(1 <= seconds <= 30, seconds)
        self.assertEqual(set(error.response.json()["error"]), {"message", "type", "param", "code"})

    def test_a_retry_waits_as_long_as_told_and_succeeds(self):
        client, times = counting_client(self.server, max_retries=4)
        timer = threading.Timer(0.3, self.free)
        timer.start()
        answer = client.completions.create(model=NULL_MODEL, prompt=[1], max_tokens=1)
        timer.join()
        self.assertEqual(answer.usage.completion_tokens, 1)
        self.assertGreaterEqual(len(times), 2)
        self.assertGreaterEqual(times[1] - times[0], 1.0)

    def test_overload_of_a_stream_is_a_status_too(self):
        with self.assertRaises(openai.RateLimitError):
            self.open_stream()


class DrainTest(unittest.TestCase):
    """A server that ends finishes what it has and takes nothing new."""

    def test_drain(self):
        server = start_null("--drain-timeout", "30")
        client = lenient_client_of(server)
        stream = client.completions.create(
            model=NULL_MODEL, prompt=[5, 6, 7], stream=True, max_tokens=3000,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )
        next(stream)
        server.drain()
        deadline = time.monotonic() + 10
        while True:
            try:
                client.completions.create(model=NULL_MODEL, prompt=[1], max_tokens=1)
            except openai.InternalServerError as error:
                refusal = error
                break
            self.assertLess(time.monotonic(), deadline, "a server that drains takes requests")
        self.assertEqual(refusal.status_code, 503)
        self.assertGreaterEqual(int(refusal.response.headers["retry-after"]), 1)
        self.assertEqual(server.get("/ready")[0], 503)
        self.assertEqual(server.get("/live")[0], 200)
        chunks = list(stream)
        self.assertEqual(chunks[-1].usage.completion_tokens, 3000)
        self.assertEqual(server.stop(), 0)

    def test_what_does_not_fit_the_drain_ends_with_an_error(self):
        server = start_null("--drain-timeout", "1")
        client = lenient_client_of(server)
        stream = client.completions.create(
            model=NULL_MODEL, prompt=[5, 6, 7], stream=True, max_tokens=8000,
            extra_body={"ignore_eos": True}, n=8,
        )
        next(stream)
        server.drain()
        try:
            finished = [c.finish_reason for chunk in stream for c in chunk.choices]
        except openai.APIError as error:
            self.assertTrue(error.message)
        else:
            # It was fast enough after all: then every choice has its end.
            self.assertEqual(len([reason for reason in finished if reason]), 8)
        self.assertEqual(server.stop(), 0)
