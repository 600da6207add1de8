"""Errors: each status is the client's exception for it, and names the field."""

import http.client
import json
import socket
import urllib.parse

import openai

from openai_client.serving import CANARY, ServedCase, user

LONG = "word " * 9000
IMAGE = {"url": "https://example.com/cat.png"}

# Fields of a chat completion that must be refused, by the field that the error names.
REFUSED = {
    "messages": [
        {"messages": []},
        {"messages": None},
        {"messages": "Hello"},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "robot", "content": "Hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE}]}]},
        {"messages": [{"role": "user", "content": "Hi", "mood": "glad"}]},
        {"messages": user("Hi") * 2049},
    ],
    "model": [{"model": None}, {"model": 7}],
    "max_tokens": [{"max_tokens": v} for v in (0, -1, 1.5, "8", 2**63, True)],
    "max_completion_tokens": [{"max_completion_tokens": v} for v in (0, -1)],
    "temperature": [{"temperature": v} for v in (-0.1, 2.1, "hot", [])],
    "top_p": [{"top_p": v} for v in (-0.1, 1.1, "x")],
    "n": [{"n": v} for v in (0, -1, 9, 2**31, 1.5, "2")],
    "seed": [{"seed": v} for v in (1.5, "x", 2**65)],
    "top_logprobs": [{"logprobs": True, "top_logprobs": v} for v in (-1, 21, 1.5)]
    + [{"top_logprobs": 2}, {"logprobs": False, "top_logprobs": 2}],
    "logit_bias": [{"logit_bias": v} for v in (
        {"49152": 1}, {"-1": 1}, {"x": 1}, {"5": 101}, {"5": -101}, {"5": "x"}, [5],
        {str(i): 1 for i in range(1025)},
    )],
    "presence_penalty": [{"presence_penalty": v} for v in (-2.1, 2.1)],
    "frequency_penalty": [{"frequency_penalty": v} for v in (-2.1, 2.1)],
    "stop": [{"stop": v} for v in (7, {"a": 1}, ["a", 7])],
    "stream": [{"stream": "yes"}],
    "store": [{"store": True}],
    "top_k": [{"top_k": v} for v in (-2, 1.5, "x")],
    "min_p": [{"min_p": v} for v in (-0.1, 1.1)],
    "repetition_penalty": [{"repetition_penalty": v} for v in (0, -1, "x")],
    "min_tokens": [{"min_tokens": v} for v in (-1, 1.5)],
    "stop_token_ids": [{"stop_token_ids": v} for v in ([49152], [-1], ["a"], 5)],
    "chat_template_kwargs": [{"chat_template_kwargs": v} for v in (
        7, {"messages": []}, {"tokenize": True}, {"add_generation_prompt": False},
    )],
    # What a text model cannot do, and what nobody knows.
    "audio": [{"audio": {"voice": "ash", "format": "wav"}}],
    "modalities": [{"modalities": ["text", "audio"]}],
    "functions": [{"functions": [{"name": "f"}]}],
    "prediction": [{"prediction": {"type": "content", "content": "x"}}],
    "web_search_options": [{"web_search_options": {}}],
    "temprature": [{"temprature": 1}],
}


class ErrorsTest(ServedCase):
    """One case a kind of error; the table above has the fields."""

    def post(self, path="/chat/completions", **fields):
        body = {"model": self.model, "messages": user("Hi"), "max_tokens": 1, **fields}
        if "max_completion_tokens" in fields:
            del body["max_tokens"]
        return self.client.post(path, body=body, cast_to=object)

    def raw(self, method, path, body=None, **headers):
        """Status, headers and parsed body of a request of any bytes."""
        connection = http.client.HTTPConnection(
            urllib.parse.urlsplit(self.server.url).netloc, timeout=30
        )
        try:
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())
        finally:
            connection.close()

    def test_fields_are_refused_by_name(self):
        for param, cases in REFUSED.items():
            for fields in cases:
                with self.subTest(**{key: str(value)[:60] for key, value in fields.items()}):
                    self.refused(openai.BadRequestError, lambda: self.post(**fields), param=param)

    def test_missing_fields_are_named(self):
        for param in ("messages", "model"):
            body = {"model": self.model, "messages": user("Hi")}
            del body[param]
            with self.subTest(param=param):
                self.refused(
                    openai.BadRequestError,
                    lambda: self.client.post("/chat/completions", body=body, cast_to=object),
                    param=param,
                )

    def test_unknown_fields_are_named_in_the_message(self):
        error = self.refused(
            openai.BadRequestError, lambda: self.chat("Hi", extra_body={"colour": "red"}),
            param="colour",
        )
        self.assertIn("colour", error.message)

    def test_the_message_says_the_value(self):
        error = self.refused(openai.BadRequestError, lambda: self.post(temperature=7.25))
        self.assertIn("7.25", error.message)

    def test_an_unknown_model_is_not_found(self):
        self.refused(
            openai.NotFoundError, lambda: self.post(model="gpt-9"),
            param="model", code="model_not_found",
        )

    def test_a_prompt_longer_than_the_context(self):
        self.refused(
            openai.BadRequestError, lambda: self.chat(LONG), code="context_length_exceeded",
            param="messages",
        )

    def test_a_template_that_refuses_is_a_bad_request(self):
        # Either it renders or it says why not; it is never the server's fault.
        turns = [{"role": "assistant", "content": "I begin."}, *user("Hi")]
        try:
            self.chat(turns)
        except openai.BadRequestError:
            pass

    def test_an_unknown_path_is_not_found(self):
        self.refused(openai.NotFoundError, lambda: self.client.get("/nothing", cast_to=object))
        self.refused(openai.NotFoundError, lambda: self.post("/chat/completions/"))

    def test_a_wrong_method_is_told(self):
        status, headers, body = self.raw("GET", "/v1/chat/completions")
        self.assertEqual(status, 405)
        self.assertIn("POST", headers["allow"])
        self.assertIn("error", body)

    def test_bodies_that_are_no_request(self):
        chat = json.dumps({"model": self.model, "messages": user("Hi")})
        bodies = {
            "nothing": b"",
            "no JSON": b"hello",
            "an array": b"[]",
            "half of it": chat[:-5].encode(),
            "more than one": (chat + chat).encode(),
            "invalid UTF-8": chat.replace("Hi", "H\x80").encode("latin-1"),
            "half a surrogate pair": chat.replace("Hi", "\\ud800").encode(),
            "not a number": (chat[:-1] + ', "temperature": NaN}').encode(),
            "a key twice": (chat[:-1] + ', "n": 1, "n": 2}').encode(),
            "too deep": b"[" * 100_000,
            "too deep a field": f'{chat[:-1]}, "metadata": {"[" * 200}{"]" * 200}}}'.encode(),
        }
        for name, body in bodies.items():
            with self.subTest(body=name):
                status, _, answer = self.raw(
                    "POST", "/v1/chat/completions", body, content_type="application/json"
                )
                self.assertEqual(status, 400, answer)
                self.assertEqual(answer["error"]["type"], "invalid_request_error")

    def test_errors_do_not_repeat_what_was_asked(self):
        # Messages name fields and values of settings, not the texts of a conversation.
        body = json.dumps({"model": self.model, "messages": user(CANARY)})[:-1]
        _, _, answer = self.raw(
            "POST", "/v1/chat/completions", body.encode(), content_type="application/json"
        )
        self.assertNotIn(CANARY, json.dumps(answer))

    def test_a_body_that_is_too_large(self):
        address = urllib.parse.urlsplit(self.server.url)
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {3 << 20}\r\n\r\n"
            # It is refused by its length, before it is sent.
            connection.sendall(head.encode())
            answer = connection.recv(65536).decode()
        self.assertTrue(answer.startswith("HTTP/1.1 413 "), answer)
        self.assertIn("request_too_large", answer)

    def test_another_content_type(self):
        body = json.dumps({"model": self.model, "messages": user("Hi")}).encode()
        status, _, answer = self.raw("POST", "/v1/chat/completions", body, content_type="text/html")
        self.assertIn(status, (400, 415), answer)
        self.assertIn("error", answer)

    def test_the_server_goes_on(self):
        self.assertTrue(self.text("Hello"))
