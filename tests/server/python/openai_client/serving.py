"""The servers of the suite, each started when the first test asks for it, and their clients."""

import functools
import json
import os
import pathlib
import tempfile
import time
import unittest

import openai

from bespoke_server import Server

BINARY = os.environ["BESPOKE_BINARY"]
MODEL_FOLDER = pathlib.Path(os.environ["BESPOKE_MODEL_FOLDER"])
MODEL = "smollm2"
TOOLS_MODEL = "smollm2-tools"
NULL_MODEL = "null"

# In prompts of the suite and as the name of a session: no log and no metric may ever show them.
CANARY = "quokka-Zephyr-4711"
SESSION = "numbat-Sirocco-1908"

KEYS = {"alice": "alice-key-0f6d9c1e5b7a", "bob": "bob-key-93c1d8ef42a0"}

# Kept so that the run can stop them and look at how they ended.
started = []

scratch = tempfile.TemporaryDirectory(prefix="bespoke-openai-client-")


def start(model, *arguments):
    """A server that is stopped at the end of the run at the latest."""
    server = Server(BINARY, model, *arguments)
    started.append(server)
    return server


@functools.cache
def smollm2():
    """SmolLM2 as anybody serves it, but for more than 64 connections of one client."""
    return start(
        MODEL_FOLDER, "--served-model-name", MODEL, "--max-connections-per-client", "256"
    )


@functools.cache
def smollm2_with_tools():
    """SmolLM2 behind a chat template that has tools, in the Hermes format."""
    folder = pathlib.Path(scratch.name) / TOOLS_MODEL
    folder.mkdir()
    for file in MODEL_FOLDER.iterdir():
        if file.name != "tokenizer_config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((MODEL_FOLDER / "tokenizer_config.json").read_text())
    template = pathlib.Path(__file__).parent.parent / "hermes.jinja"
    config["chat_template"] = template.read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return start(folder, "--served-model-name", TOOLS_MODEL)


@functools.cache
def with_keys():
    """Null mathematics behind two named keys."""
    keys = pathlib.Path(scratch.name) / "keys"
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    keys.chmod(0o600)
    return start_null("--api-key-file", str(keys))


def start_null(*arguments):
    """A server of hashes in the place of a model's mathematics."""
    return start(MODEL_FOLDER, "--backend", "null", "--served-model-name", NULL_MODEL, *arguments)


def client_of(server, **options):
    """A client that validates every answer against the client's own types and never retries."""
    options.setdefault("api_key", "none")
    options.setdefault("max_retries", 0)
    options.setdefault("timeout", 60)
    options.setdefault("_strict_response_validation", True)
    return openai.OpenAI(base_url=server.base_url, **options)


def lenient_client_of(server, **options):
    """As `client_of`, for streams of completions: OpenAI's own chunks have a `finish_reason` that
    is null until the last, which the client's type does not know."""
    return client_of(server, _strict_response_validation=False, **options)


def async_client_of(server, **options):
    """As `client_of`, for asyncio."""
    options.setdefault("api_key", "none")
    options.setdefault("max_retries", 0)
    options.setdefault("timeout", 120)
    return openai.AsyncOpenAI(
        base_url=server.base_url, _strict_response_validation=True, **options
    )


def stop_all():
    """Stops every server; what went wrong with one, as texts."""
    problems = []
    for server in started:
        status = server.stop()
        log = server.log_text()
        if status != 0:
            problems.append(f"{server.url} ended with {status}; it wrote: {log}")
        for secret in [CANARY, SESSION, *KEYS.values()]:
            if secret in log:
                problems.append(f"{server.url} logged {secret!r}")
        if "panicked" in log:
            problems.append(f"{server.url} panicked: {log}")
    scratch.cleanup()
    return problems


def user(text):
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


class ServedCase(unittest.TestCase):
    """Cases against one server; `serve` says which."""

    serve = staticmethod(smollm2)
    model = MODEL

    @classmethod
    def setUpClass(cls):
        cls.server = cls.serve()
        cls.client = client_of(cls.server)
        cls.lenient_client = lenient_client_of(cls.server)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.lenient_client.close()

    def chat(self, messages, **fields):
        """A chat completion; greedy and short where nothing else is asked."""
        if isinstance(messages, str):
            messages = user(messages)
        if "max_completion_tokens" not in fields:
            fields.setdefault("max_tokens", 16)
        fields.setdefault("temperature", 0)
        return self.client.chat.completions.create(
            model=self.model, messages=messages, **fields
        )

    def text(self, messages, **fields):
        """The text of a chat completion."""
        return self.chat(messages, **fields).choices[0].message.content

    def complete(self, prompt, **fields):
        """A completion; greedy and short where nothing else is asked."""
        fields.setdefault("max_tokens", 8)
        fields.setdefault("temperature", 0)
        client = self.lenient_client if fields.get("stream") else self.client
        return client.completions.create(model=self.model, prompt=prompt, **fields)

    def encode(self, text):
        """The token ids of a text, without anything before or after."""
        answer = self.client.post(
            "/encode", body={"input": text, "add_bos": False}, cast_to=object
        )
        return answer["input_ids"]

    def refused(self, kind, call, param=None, code=None):
        """Asserts that a call raises the client's exception `kind`, and returns it."""
        with self.assertRaises(kind) as caught:
            call()
        error = caught.exception
        self.assertIs(type(error), kind)
        body = error.response.json()
        self.assertEqual(set(body), {"error"}, body)
        self.assertEqual(set(body["error"]), {"message", "type", "param", "code"}, body)
        self.assertTrue(body["error"]["message"])
        if param is not None:
            self.assertIsNotNone(error.param, body)
            # A place inside a field starts with the field's name.
            self.assertRegex(error.param, rf"^{param}(\W|$)", body)
        if code is not None:
            self.assertEqual(error.code, code, body)
        return error

    def assert_idle(self, seconds=10):
        """Waits until the server runs nothing any more; fails where it goes on."""
        deadline = time.monotonic() + seconds
        while True:
            running = self.server.metric("vllm:num_requests_running")
            self.assertIsNotNone(running, "the metric vllm:num_requests_running is missing")
            if running == 0:
                return
            self.assertLess(time.monotonic(), deadline, f"{running} requests still run")
            time.sleep(0.02)
