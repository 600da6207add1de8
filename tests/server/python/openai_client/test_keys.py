"""API keys: who may do what, and that nobody sees anybody else's."""

import openai

from openai_client.serving import (
    CANARY, KEYS, NULL_MODEL, SESSION, ServedCase, client_of, with_keys,
)


class KeysTest(ServedCase):
    """A server with two named keys."""

    serve = staticmethod(with_keys)
    model = NULL_MODEL

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.clients = {name: client_of(cls.server, api_key=key) for name, key in KEYS.items()}

    def test_each_key_is_good(self):
        for client in self.clients.values():
            client.completions.create(model=self.model, prompt=[1], max_tokens=1)

    def test_other_keys_are_not(self):
        key = KEYS["alice"]
        keys = ["none", key[:-1], key + "x", key.upper(), "alice", f"alice:{key}", "x" * 4000]
        for wrong in keys:
            with self.subTest(key=wrong[:40]):
                client = client_of(self.server, api_key=wrong)
                error = self.refused(
                    openai.AuthenticationError, lambda: list(client.models.list()),
                    code="invalid_api_key",
                )
                self.assertIn("Bearer", error.response.headers["www-authenticate"])

    def test_no_key_is_refused_on_every_route_of_the_api(self):
        routes = ["/v1/models", "/v1/sessions", "/v1/chat/completions", "/openapi.json",
                  "/dashboard/data"]
        for route in routes:
            with self.subTest(route=route):
                self.assertEqual(self.server.get(route)[0], 401)

    def test_health_needs_no_key(self):
        for route in ("/live", "/ready"):
            self.assertEqual(self.server.get(route)[0], 200)

    def test_sessions_are_the_callers_own(self):
        alice, bob = self.clients["alice"], self.clients["bob"]
        body = {"prompt": f"My secret is {CANARY}.", "interactive_mode": True, "session_id": SESSION,
                "request_output_len": 4}
        alice.post("/chat/interactive", body=body, cast_to=object)
        self.assertIn(SESSION, str(alice.get("/sessions", cast_to=object)))
        self.assertNotIn(SESSION, str(bob.get("/sessions", cast_to=object)))
        path = f"/sessions/{SESSION}"
        self.refused(openai.NotFoundError, lambda: bob.get(path, cast_to=object))
        self.refused(openai.NotFoundError, lambda: bob.delete(path, cast_to=object))
        # An id is free for each key: bob's session of that name begins empty.
        answer = bob.post("/chat/interactive", body={**body, "prompt": "Hi"}, cast_to=object)
        self.assertEqual(answer["history_tokens"], 0)
        headers = {"Authorization": f"Bearer {KEYS['alice']}"}
        metrics = self.server.get("/metrics", headers)[1]
        for secret in (CANARY, SESSION, *KEYS.values()):
            self.assertNotIn(secret, metrics)
        for client in (alice, bob):
            client.delete(path, cast_to=object)

    def test_pages_are_not_shared_between_keys(self):
        prompt = list(range(100, 400))

        def cached(client):
            answer = client.completions.create(model=self.model, prompt=prompt, max_tokens=1)
            return answer.usage.prompt_tokens_details.cached_tokens

        self.assertEqual(cached(self.clients["alice"]), 0)
        self.assertGreater(cached(self.clients["alice"]), 0)
        self.assertEqual(cached(self.clients["bob"]), 0)
