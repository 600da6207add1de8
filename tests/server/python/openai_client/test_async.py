"""The asynchronous client: many streams at once, and cancelled tasks."""

import asyncio

from openai_client.serving import ServedCase, async_client_of, user

NUM_STREAMS = 64
PROMPTS = [f"Tell me something about the number {number}." for number in range(8)]


class AsyncTest(ServedCase):
    """Whoever shares the batch, the answer is the same."""

    async def streamed(self, client, prompt):
        text = ""
        stream = await client.chat.completions.create(
            model=self.model, messages=user(prompt), max_tokens=16, temperature=0, stream=True
        )
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
        return text

    def test_streams_at_once_are_what_they_are_alone(self):
        async def all_streams():
            async with async_client_of(self.server) as client:
                prompts = [PROMPTS[idx % len(PROMPTS)] for idx in range(NUM_STREAMS)]
                return await asyncio.gather(*(self.streamed(client, p) for p in prompts))

        alone = [self.text(prompt) for prompt in PROMPTS]
        together = asyncio.run(all_streams())
        self.assertEqual(together, alone * (NUM_STREAMS // len(PROMPTS)))
        self.assert_idle()

    def test_requests_at_once_are_what_they_are_alone(self):
        async def all_requests():
            async with async_client_of(self.server) as client:
                answers = await asyncio.gather(*(
                    client.chat.completions.create(
                        model=self.model, messages=user(prompt), max_tokens=16, temperature=0
                    )
                    for prompt in PROMPTS
                ))
                return [answer.choices[0].message.content for answer in answers]

        self.assertEqual(asyncio.run(all_requests()), [self.text(prompt) for prompt in PROMPTS])

    def test_a_cancelled_task_cancels_its_request(self):
        async def cancel():
            async with async_client_of(self.server) as client:
                task = asyncio.ensure_future(client.chat.completions.create(
                    model=self.model, messages=user("Hi"), max_tokens=8000,
                    extra_body={"ignore_eos": True},
                ))
                while not self.server.metric("vllm:num_requests_running"):
                    await asyncio.sleep(0.02)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task

        asyncio.run(cancel())
        self.assert_idle()
