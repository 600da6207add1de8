"""Interactive sessions, as LMDeploy has them, and the routes that manage them."""

import openai

from openai_client.serving import ServedCase


class SessionsTest(ServedCase):
    """The server keeps the conversation."""

    def say(self, prompt, **fields):
        body = {"prompt": prompt, "temperature": 0, "request_output_len": 24, **fields}
        return self.client.post("/chat/interactive", body=body, cast_to=object)

    def session(self, session_id):
        return self.client.get(f"/sessions/{session_id}", cast_to=object)

    def test_a_session_remembers(self):
        first = self.say("My dog is called Rex. What is my dog called?", session_id="dog",
                         interactive_mode=True)
        self.assertEqual(first["history_tokens"], 0)
        self.assertEqual(str(first["session_id"]), "dog")
        second = self.say("What is my dog called?", session_id="dog", interactive_mode=True)
        self.assertIn("Rex", second["text"])
        self.assertGreaterEqual(second["history_tokens"], first["input_tokens"] + first["tokens"])
        self.client.delete("/sessions/dog", cast_to=object)

    def test_a_session_is_the_conversation_written_out(self):
        # A question whose answer even a small model in 4 bits comes to the end of.
        questions = ["What is the capital of France?", "What is it famous for?"]
        one = self.say(questions[0], session_id="written", interactive_mode=True,
                       request_output_len=200)
        two = self.say(questions[1], session_id="written", interactive_mode=True)
        turns = [
            {"role": "user", "content": questions[0]},
            {"role": "assistant", "content": one["text"]},
            {"role": "user", "content": questions[1]},
        ]
        self.assertEqual(one["finish_reason"], "stop")
        self.assertEqual(two["text"], self.text(turns, max_tokens=24))
        self.client.delete("/sessions/written", cast_to=object)

    def test_without_interactive_mode_nothing_is_kept(self):
        answer = self.say("Hello")
        self.assertEqual(answer["history_tokens"], 0)
        self.refused(openai.NotFoundError, lambda: self.session(answer["session_id"]))

    def test_ids_of_the_server_cannot_be_guessed(self):
        ids = {str(self.say("Hi", interactive_mode=True, request_output_len=1)["session_id"])
               for _ in range(3)}
        self.assertEqual(len(ids), 3)
        for session_id in ids:
            self.assertGreaterEqual(len(session_id), 22, "128 bits")
            self.client.delete(f"/sessions/{session_id}", cast_to=object)

    def test_rewind_and_branch(self):
        self.say("Hello", session_id="trunk", interactive_mode=True)
        length = self.session("trunk")["num_tokens"]
        self.say("And again", session_id="trunk", interactive_mode=True)
        self.assertGreater(self.session("trunk")["num_tokens"], length)
        branch = {"to": "twig", "num_tokens": length}
        self.client.post("/sessions/trunk/branch", body=branch, cast_to=object)
        self.assertEqual(self.session("twig")["num_tokens"], length)
        self.client.post("/sessions/trunk/rewind", body={"num_tokens": length}, cast_to=object)
        self.assertEqual(self.session("trunk")["num_tokens"], length)
        answers = [
            self.say("Go on", session_id=name, interactive_mode=True)["text"]
            for name in ("trunk", "twig")
        ]
        self.assertEqual(*answers)
        for name in ("trunk", "twig"):
            self.client.delete(f"/sessions/{name}", cast_to=object)
            self.refused(openai.NotFoundError, lambda: self.session(name))

    def test_a_busy_session_is_a_conflict(self):
        body = {"prompt": "Hi", "session_id": "busy", "interactive_mode": True, "stream": True,
                "request_output_len": 4000, "ignore_eos": True}
        with self.client._client.stream(
            "POST", self.server.base_url + "/chat/interactive", json=body
        ) as stream:
            # NOTE: an iterator that nobody holds would close the stream.
            lines = stream.iter_lines()
            next(lines)
            self.refused(
                openai.ConflictError,
                lambda: self.say("Hi", session_id="busy", interactive_mode=True),
            )
        self.assert_idle()
        self.client.delete("/sessions/busy", cast_to=object)
