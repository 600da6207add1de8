"""Stop strings and stop tokens, whole and streamed."""

import openai

from openai_client.serving import ServedCase

STORY = "Tell me a story about a lighthouse."


class StopTest(ServedCase):
    """The text ends before the stop, wherever tokens end."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        choice = cls.chat(cls, STORY, max_tokens=32, logprobs=True).choices[0]
        cls.whole = choice.message.content
        cls.tokens = [entry.token for entry in choice.logprobs.content]

    def stopped(self, stop, before):
        """Asserts that the answer, whole and streamed, is the text `before` the stop."""
        choice = self.chat(STORY, max_tokens=32, stop=stop).choices[0]
        self.assertEqual(choice.message.content, before)
        self.assertEqual(choice.finish_reason, "stop")
        chunks = list(self.chat(STORY, max_tokens=32, stop=stop, stream=True))
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(streamed, before)
        self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")

    def test_a_string_stops(self):
        word = self.whole.split()[5]
        self.stopped(word, self.whole[: self.whole.index(word)])

    def test_the_first_of_a_list_stops(self):
        words = self.whole.split()
        stops = ["never to be seen", words[9], words[4], "nor this"]
        first = min(self.whole.index(word) for word in (words[4], words[9]))
        self.stopped(stops, self.whole[:first])

    def test_a_stop_across_tokens(self):
        seam = next(i for i in range(4, 30) if len(self.tokens[i]) > 1 < len(self.tokens[i + 1]))
        stop = self.tokens[seam][-1] + self.tokens[seam + 1][:2]
        self.stopped(stop, self.whole[: self.whole.index(stop)])

    def test_a_stop_of_many_tokens(self):
        start = len("".join(self.tokens[:6])) + 1
        stop = self.whole[start : start + 30]
        self.stopped(stop, self.whole[: self.whole.index(stop)])

    def test_a_stop_that_never_comes(self):
        choice = self.chat(STORY, max_tokens=32, stop="\u2603 never").choices[0]
        self.assertEqual(choice.message.content, self.whole)
        self.assertEqual(choice.finish_reason, "length")

    def test_half_a_stop_at_the_end_is_shown(self):
        stop = self.whole[-3:] + "\u2603"
        chunks = self.chat(STORY, max_tokens=32, stop=stop, stream=True)
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(streamed, self.whole)

    def test_stop_tokens(self):
        token_id = self.encode(self.tokens[3])[0]
        fields = {"max_tokens": 32, "extra_body": {"stop_token_ids": [token_id]}}
        choice = self.chat(STORY, **fields).choices[0]
        before = "".join(self.tokens[: self.tokens.index(self.tokens[3])])
        self.assertEqual(choice.message.content, before)
        self.assertEqual(choice.finish_reason, "stop")

    def test_what_cannot_be_a_stop(self):
        for stop in ([str(i) for i in range(5)], "", [""], ["a" * 257]):
            with self.subTest(stop=stop):
                self.refused(
                    openai.BadRequestError, lambda: self.chat("Hi", stop=stop), param="stop"
                )
