"""Streams: equal to the whole answer, with usage, ended by whom and how."""

import json

import openai

from openai_client.serving import ServedCase, user

CAPITAL = "What is the capital of France?"
STORY = "Tell me a story about a lighthouse."


class StreamTest(ServedCase):
    """Chat completions as server-sent events."""

    def chunks(self, messages, **fields):
        return list(self.chat(messages, stream=True, **fields))

    @staticmethod
    def texts(chunks):
        texts = {}
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        return texts

    def test_stream_is_the_whole_answer(self):
        chunks = self.chunks(STORY, max_tokens=40)
        self.assertEqual(self.texts(chunks), {0: self.text(STORY, max_tokens=40)})
        self.assertGreater(len(chunks), 10)

    def test_chunks_have_the_fields_of_the_api(self):
        chunks = self.chunks(STORY)
        self.assertEqual(len({chunk.id for chunk in chunks}), 1)
        self.assertEqual({chunk.object for chunk in chunks}, {"chat.completion.chunk"})
        self.assertEqual({chunk.model for chunk in chunks}, {self.model})
        self.assertEqual(len({chunk.created for chunk in chunks}), 1)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
        self.assertEqual(ends[:-1], [None] * (len(ends) - 1))
        self.assertEqual(ends[-1], "length")

    def test_usage_comes_last_where_asked(self):
        chunks = self.chunks(STORY, stream_options={"include_usage": True})
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage, self.chat(STORY).usage.model_copy(
            update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}))
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))

    def test_usage_is_absent_where_not_asked(self):
        self.assertTrue(all(chunk.usage is None for chunk in self.chunks(STORY)))

    def test_choices_are_told_apart(self):
        fields = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 20}
        whole = self.chat(STORY, **fields)
        streamed = self.texts(self.chunks(STORY, **fields))
        self.assertEqual(streamed, {c.index: c.message.content for c in whole.choices})

    def test_logprobs_are_streamed(self):
        fields = {"logprobs": True, "top_logprobs": 2}
        whole = self.chat(STORY, **fields).choices[0].logprobs.content
        streamed = [
            entry
            for chunk in self.chunks(STORY, **fields)
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content or []
        ]
        self.assertEqual(streamed, whole)

    def test_characters_are_never_split(self):
        fields = {"response_format": {"type": "regex", "regex": "(日本|🦀|ß){12}"}}
        fields = {"extra_body": fields, "max_tokens": 120}
        chunks = self.chunks("Hello", **fields)
        for chunk in chunks:
            for choice in chunk.choices:
                self.assertNotIn("\ufffd", choice.delta.content or "")
        self.assertRegex(self.texts(chunks)[0], "^(日本|🦀|ß){12}$")

    def test_closing_a_stream_cancels_the_request(self):
        stream = self.chat(STORY, stream=True, max_tokens=4000, extra_body={"ignore_eos": True})
        for _ in range(3):
            next(stream)
        stream.close()
        self.assert_idle()

    def test_stream_helper_of_the_client(self):
        with self.client.chat.completions.stream(
            model=self.model, messages=user(CAPITAL), max_tokens=100, temperature=0
        ) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion()
        whole = self.text(CAPITAL, max_tokens=100)
        self.assertEqual("".join(deltas), whole)
        self.assertEqual(final.choices[0].message.content, whole)

    def test_bytes_on_the_wire(self):
        body = {"model": self.model, "messages": user("Hi"), "max_tokens": 3, "stream": True}
        with self.client.chat.completions.with_streaming_response.create(**body) as response:
            self.assertEqual(response.status_code, 200)
            kind = response.headers["content-type"]
            self.assertTrue(kind.startswith("text/event-stream"), kind)
            self.assertRegex(response.headers["cache-control"], "no-(cache|store)")
            lines = [line for line in response.iter_lines() if line and line[0] != ":"]
        self.assertEqual(lines[-1], "data: [DONE]")
        for line in lines[:-1]:
            self.assertTrue(line.startswith("data: "), line)
            json.loads(line.removeprefix("data: "))

    def test_errors_before_the_first_token_are_statuses(self):
        self.refused(
            openai.BadRequestError, lambda: self.chat("Hi", stream=True, temperature=9.0),
            param="temperature",
        )

    def test_stream_options_without_a_stream(self):
        self.refused(
            openai.BadRequestError,
            lambda: self.chat("Hi", stream_options={"include_usage": True}),
            param="stream_options",
        )
