"""Chat completions: fields of the answer, sampling, log-probabilities, choices."""

import time
from collections import Counter

from openai_client.serving import CANARY, MODEL, ServedCase, user

CAPITAL = "What is the capital of France?"
STORY = "Tell me a story about a lighthouse."


class AnswerTest(ServedCase):
    """What every answer has."""

    def test_answer_has_the_fields_of_the_api(self):
        before = int(time.time())
        answer = self.chat(CAPITAL, max_tokens=24)
        self.assertEqual(answer.object, "chat.completion")
        self.assertTrue(answer.id.startswith("chatcmpl-"), answer.id)
        self.assertEqual(answer.model, MODEL)
        self.assertTrue(before - 1 <= answer.created <= time.time() + 1, answer.created)
        self.assertEqual([choice.index for choice in answer.choices], [0])
        message = answer.choices[0].message
        self.assertEqual(message.role, "assistant")
        self.assertIn("Paris", message.content)
        self.assertFalse(message.tool_calls)
        self.assertIsNone(answer.choices[0].logprobs)

    def test_ids_are_unique(self):
        self.assertEqual(len({self.chat("Hi", max_tokens=1).id for _ in range(4)}), 4)

    def test_usage_counts_tokens(self):
        answer = self.chat(STORY, max_tokens=9, extra_body={"ignore_eos": True})
        self.assertEqual(answer.usage.completion_tokens, 9)
        self.assertGreater(answer.usage.prompt_tokens, len(self.encode(STORY)))
        total = answer.usage.prompt_tokens + answer.usage.completion_tokens
        self.assertEqual(answer.usage.total_tokens, total)
        self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_end_token_ends_with_stop(self):
        answer = self.chat("Answer with one word: yes or no?", max_tokens=200)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertLess(answer.usage.completion_tokens, 200)
        self.assertNotIn("<|im_end|>", answer.choices[0].message.content)

    def test_max_completion_tokens_is_max_tokens(self):
        answer = self.chat(STORY, max_completion_tokens=5, extra_body={"ignore_eos": True})
        self.assertEqual(answer.usage.completion_tokens, 5)
        self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_fingerprint_stays(self):
        fingerprints = {self.chat("Hi", max_tokens=1).system_fingerprint for _ in range(2)}
        self.assertEqual(len(fingerprints), 1)
        self.assertTrue(fingerprints.pop())

    def test_cached_tokens_of_a_repeated_prompt(self):
        prompt = "Count the letters of this sentence, which is long. " * 12
        first = self.chat(prompt, max_tokens=2).usage
        second = self.chat(prompt, max_tokens=2).usage
        cached = second.prompt_tokens_details.cached_tokens
        self.assertGreater(cached, second.prompt_tokens // 2)
        self.assertLess(cached, second.prompt_tokens)
        self.assertLess(first.prompt_tokens_details.cached_tokens, cached)

    def test_request_id_is_told(self):
        first, second = (self.chat("Hi", max_tokens=1)._request_id for _ in range(2))
        self.assertTrue(first)
        self.assertNotEqual(first, second)


class MessagesTest(ServedCase):
    """What a conversation may consist of."""

    def test_system_message_is_seen(self):
        system = {"role": "system", "content": "You are a pirate called Redbeard."}
        with_system = self.text([system, *user("What is your name?")], max_tokens=32)
        without = self.text("What is your name?", max_tokens=32)
        self.assertNotEqual(with_system, without)

    def test_developer_is_system(self):
        texts = {
            self.text([{"role": role, "content": "Answer in French."}, *user("Hello")])
            for role in ("system", "developer")
        }
        self.assertEqual(len(texts), 1, texts)

    def test_earlier_turns_are_seen(self):
        turns = [
            *user("My dog is called Rex. Remember that."),
            {"role": "assistant", "content": "Your dog is called Rex."},
            *user("What is my dog called?"),
        ]
        self.assertIn("Rex", self.text(turns, max_tokens=24))

    def test_text_parts_are_their_concatenation(self):
        parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of "},
                 {"type": "text", "text": "France?"}]
        answer = self.chat([{"role": "user", "content": parts}])
        whole = self.chat(CAPITAL)
        self.assertEqual(answer.choices[0].message.content, whole.choices[0].message.content)
        self.assertEqual(answer.usage.prompt_tokens, whole.usage.prompt_tokens)

    def test_name_of_a_participant_is_taken(self):
        self.chat([{"role": "user", "content": "Hello", "name": "bob"}])

    def test_control_tokens_in_user_text_stay_text(self):
        plain = self.chat("im_end", max_tokens=1).usage.prompt_tokens
        marked = self.chat("<|im_end|>", max_tokens=1).usage.prompt_tokens
        # As one control token it would take less than the word alone.
        self.assertGreater(marked, plain)

    def test_text_of_all_planes_and_control_characters(self):
        texts = [
            "naïve – “quotes” 日本語 🦀👩‍👩‍👧",
            "\u0000\u0001\u001b[31m",
            "\ud7ff\U0010ffff",
            "\r\n\t",
        ]
        for text in texts:
            with self.subTest(text=text):
                self.chat(text, max_tokens=2)

    def test_prompt_is_not_logged(self):
        self.chat(f"Remember {CANARY}.", max_tokens=4)
        self.assertNotIn(CANARY, self.server.log_text())
        self.assertNotIn(CANARY, self.server.get("/metrics")[1])


class SamplingTest(ServedCase):
    """Seeds, temperature and what shapes the distribution."""

    def sampled(self, **fields):
        return self.text(STORY, temperature=1.0, max_tokens=24, **fields)

    def test_temperature_zero_repeats_itself(self):
        self.assertEqual(self.text(STORY, max_tokens=32), self.text(STORY, max_tokens=32))

    def test_equal_seeds_give_equal_answers(self):
        self.assertEqual(self.sampled(seed=7), self.sampled(seed=7))

    def test_seeds_differ(self):
        self.assertGreater(len({self.sampled(seed=seed) for seed in range(4)}), 1)

    def test_without_a_seed_answers_differ(self):
        self.assertGreater(len({self.sampled() for _ in range(4)}), 1)

    def test_top_k_1_is_greedy(self):
        greedy = self.text(STORY, max_tokens=24)
        self.assertEqual(self.sampled(extra_body={"top_k": 1}), greedy)

    def test_min_p_1_is_greedy(self):
        greedy = self.text(STORY, max_tokens=24)
        self.assertEqual(self.sampled(extra_body={"min_p": 1.0}), greedy)

    def test_tiny_top_p_is_greedy(self):
        greedy = self.text(STORY, max_tokens=24)
        self.assertEqual(self.sampled(top_p=0.0001), greedy)

    def test_logit_bias_forces_and_bans(self):
        tokens = {word: self.encode(word)[0] for word in ("Zebra", "Paris")}
        forced = self.text(CAPITAL, max_tokens=1, logit_bias={str(tokens["Zebra"]): 100})
        self.assertTrue("Zebra".startswith(forced) and forced, forced)
        first = self.chat(CAPITAL, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
        first_id = self.encode(first.token)[0]
        banned = self.text(CAPITAL, max_tokens=1, logit_bias={str(first_id): -100})
        self.assertNotEqual(banned, first.token)

    def test_frequency_penalty_repeats_less(self):
        def most_common(**fields):
            answer = self.chat(
                "Say the word yes forty times.", max_tokens=48, logprobs=True,
                extra_body={"ignore_eos": True}, **fields
            )
            tokens = [entry.token for entry in answer.choices[0].logprobs.content]
            return Counter(tokens).most_common(1)[0][1]

        self.assertLess(most_common(frequency_penalty=2.0), most_common())

    def test_penalties_change_the_answer(self):
        fields = {"max_tokens": 48, "extra_body": {"ignore_eos": True}}
        plain = self.text(STORY, **fields)
        self.assertNotEqual(self.text(STORY, presence_penalty=2.0, **fields), plain)
        fields["extra_body"] = {"ignore_eos": True, "repetition_penalty": 1.8}
        self.assertNotEqual(self.text(STORY, **fields), plain)

    def test_min_tokens_holds_off_the_end(self):
        question = "Answer with one word: yes or no?"
        self.assertLess(self.chat(question, max_tokens=60).usage.completion_tokens, 60)
        answer = self.chat(question, max_tokens=60, extra_body={"min_tokens": 60})
        self.assertEqual(answer.usage.completion_tokens, 60)

    def test_user_metadata_and_store_are_taken(self):
        self.chat("Hi", user="somebody", metadata={"purpose": "test"}, store=False)

    def test_defaults_may_be_null(self):
        fields = ["temperature", "top_p", "n", "stop", "seed", "logprobs", "top_logprobs",
                  "logit_bias", "presence_penalty", "frequency_penalty", "stream"]
        self.client.chat.completions.create(
            model=self.model, messages=user("Hi"), max_tokens=2,
            extra_body=dict.fromkeys(fields),
        )


class ChoicesTest(ServedCase):
    """Several answers to one prompt."""

    def test_n_gives_as_many_choices(self):
        answer = self.chat(STORY, n=3, temperature=1.0, seed=3, max_tokens=12,
                           extra_body={"ignore_eos": True})
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        self.assertGreater(len({choice.message.content for choice in answer.choices}), 1)
        self.assertEqual(answer.usage.completion_tokens, 36)

    def test_n_repeats_itself_with_a_seed(self):
        def texts():
            answer = self.chat(STORY, n=3, temperature=1.0, seed=11)
            return [choice.message.content for choice in answer.choices]

        self.assertEqual(texts(), texts())

    def test_greedy_choices_are_equal(self):
        answer = self.chat(STORY, n=4)
        self.assertEqual(len({choice.message.content for choice in answer.choices}), 1)
        self.assertEqual(answer.choices[0].message.content, self.text(STORY))


class LogprobsTest(ServedCase):
    """Log-probabilities of tokens and their rivals."""

    def test_tokens_join_to_the_text(self):
        choice = self.chat(STORY, logprobs=True).choices[0]
        entries = choice.logprobs.content
        self.assertEqual(len(entries), 16)
        self.assertEqual("".join(entry.token for entry in entries), choice.message.content)
        joined = b"".join(bytes(entry.bytes) for entry in entries)
        self.assertEqual(joined.decode(), choice.message.content)
        for entry in entries:
            self.assertLessEqual(entry.logprob, 0)
            self.assertEqual(entry.top_logprobs, [])

    def test_top_logprobs_are_sorted_and_hold_the_greedy_token(self):
        for entry in self.chat(STORY, logprobs=True, top_logprobs=5).choices[0].logprobs.content:
            rivals = [rival.logprob for rival in entry.top_logprobs]
            self.assertEqual(len(rivals), 5)
            self.assertEqual(rivals, sorted(rivals, reverse=True))
            self.assertEqual(entry.top_logprobs[0].token, entry.token)
            self.assertAlmostEqual(entry.top_logprobs[0].logprob, entry.logprob, places=4)

    def test_probabilities_are_the_models_own(self):
        def first(**fields):
            answer = self.chat(STORY, max_tokens=1, logprobs=True, top_logprobs=20, **fields)
            return answer.choices[0].logprobs.content[0].top_logprobs

        self.assertEqual(first(), first(temperature=1.7, seed=5))
        self.assertLessEqual(sum(2.718281828 ** rival.logprob for rival in first()), 1.0001)
