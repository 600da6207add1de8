"""The older completions API, the token routes, models, embeddings."""

import openai

from openai_client.serving import MODEL, ServedCase

PROMPT = "Once upon a time, there was a"


class CompletionsTest(ServedCase):
    """Text goes on as it is, without a chat template."""

    def test_answer_has_the_fields_of_the_api(self):
        answer = self.complete(PROMPT)
        self.assertEqual(answer.object, "text_completion")
        self.assertTrue(answer.id.startswith("cmpl-"), answer.id)
        self.assertEqual(answer.model, MODEL)
        self.assertEqual(answer.usage.prompt_tokens, len(self.encode(PROMPT)))
        self.assertTrue(answer.choices[0].text)

    def test_16_tokens_are_the_default(self):
        answer = self.client.completions.create(
            model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True}
        )
        self.assertEqual(answer.usage.completion_tokens, 16)
        self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_token_ids_are_a_prompt(self):
        by_ids = self.complete(self.encode(PROMPT)).choices[0].text
        self.assertEqual(by_ids, self.complete(PROMPT).choices[0].text)

    def test_prompts_are_answered_in_their_order(self):
        prompts = [PROMPT, "The capital of France is", "1, 2, 3, 4,"]
        alone = [self.complete(prompt).choices[0].text for prompt in prompts]
        answer = self.complete(prompts)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        self.assertEqual([choice.text for choice in answer.choices], alone)
        answer = self.complete([self.encode(prompt) for prompt in prompts])
        self.assertEqual([choice.text for choice in answer.choices], alone)

    def test_n_choices_of_each_prompt(self):
        answer = self.complete([PROMPT, "1, 2, 3,"], n=2)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
        texts = [choice.text for choice in answer.choices]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(texts[2], texts[3])
        self.assertNotEqual(texts[0], texts[2])

    def test_best_of_gives_the_likeliest(self):
        answer = self.complete(PROMPT, best_of=4, temperature=1.0, seed=1)
        self.assertEqual(len(answer.choices), 1)
        self.refused(
            openai.BadRequestError, lambda: self.complete(PROMPT, best_of=1, n=2), param="best_of"
        )

    def test_echo_gives_the_prompt_too(self):
        plain = self.complete(PROMPT).choices[0].text
        self.assertEqual(self.complete(PROMPT, echo=True).choices[0].text, PROMPT + plain)

    def test_logprobs_of_the_older_kind(self):
        choice = self.complete(PROMPT, logprobs=3).choices[0]
        logprobs = choice.logprobs
        self.assertEqual("".join(logprobs.tokens), choice.text)
        self.assertEqual(len(logprobs.token_logprobs), len(logprobs.tokens))
        self.assertEqual(logprobs.text_offset[0], 0)
        for idx, rivals in enumerate(logprobs.top_logprobs):
            self.assertLessEqual(len(rivals), 4)
            self.assertIn(logprobs.tokens[idx], rivals)
            self.assertEqual(choice.text.index(logprobs.tokens[idx], logprobs.text_offset[idx]),
                             logprobs.text_offset[idx])

    def test_stream_is_the_whole_answer(self):
        chunks = list(self.complete(PROMPT, stream=True, max_tokens=24))
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        self.assertEqual(text, self.complete(PROMPT, max_tokens=24).choices[0].text)
        self.assertEqual(chunks[-1].choices[0].finish_reason, "length")

    def test_stream_of_several_prompts(self):
        prompts, texts = [PROMPT, "1, 2, 3, 4,"], {0: "", 1: ""}
        for chunk in self.complete(prompts, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        self.assertEqual(list(texts.values()), [self.complete(p).choices[0].text for p in prompts])

    def test_stop(self):
        whole = self.complete(PROMPT, max_tokens=24).choices[0].text
        word = whole.split()[3]
        choice = self.complete(PROMPT, max_tokens=24, stop=word).choices[0]
        self.assertEqual(choice.text, whole[: whole.index(word)])
        self.assertEqual(choice.finish_reason, "stop")

    def test_what_cannot_be_completed(self):
        cases = {
            "prompt": [{"prompt": []}, {"prompt": [[]]}, {"prompt": [49152]}, {"prompt": [-1]},
                       {"prompt": [["a"]]}, {"prompt": {"text": "a"}}],
            "suffix": [{"suffix": "the end"}],
            "logprobs": [{"logprobs": -1}, {"logprobs": 1000}],
            "max_tokens": [{"max_tokens": -1}],
            "best_of": [{"best_of": 100}],
        }
        for param, bodies in cases.items():
            for fields in bodies:
                with self.subTest(**fields):
                    body = {"model": MODEL, "prompt": "Hi", **fields}
                    self.refused(
                        openai.BadRequestError,
                        lambda: self.client.post("/completions", body=body, cast_to=object),
                        param=param,
                    )


class RoutesTest(ServedCase):
    """The other routes that the client or a script uses."""

    def test_models_are_listed(self):
        models = list(self.client.models.list())
        self.assertEqual([model.id for model in models], [MODEL])
        self.assertEqual(models[0].object, "model")
        self.assertTrue(models[0].owned_by)

    def test_a_model_is_retrieved(self):
        self.assertEqual(self.client.models.retrieve(MODEL).id, MODEL)

    def test_an_unknown_model_is_not_found(self):
        self.refused(
            openai.NotFoundError, lambda: self.client.models.retrieve("gpt-9"),
            code="model_not_found",
        )

    def test_embeddings_are_not_supported(self):
        with self.assertRaises(openai.APIStatusError) as caught:
            self.client.embeddings.create(model=MODEL, input="Hi", encoding_format="float")
        self.assertIn(caught.exception.status_code, (400, 501))
        self.assertIn("not supported", caught.exception.message)

    def test_encode_and_decode_are_inverse(self):
        for text in ("Hello, world", "naïve 日本語 🦀", " two  spaces\n"):
            ids = self.encode(text)
            answer = self.client.post("/decode", body={"ids": ids}, cast_to=object)
            self.assertEqual(answer["text"], text)
