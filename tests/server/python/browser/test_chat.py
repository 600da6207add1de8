"""The chat at `/`, used as a person uses it."""

import json
import pathlib
import re

from playwright.sync_api import expect

from .pages import KEY, MODEL, PageCase, scratch, wait_until, with_key

# Keeps every text that the last answer has had.
WATCH = """() => {
  const texts = [];
  window.seenTexts = texts;
  new MutationObserver(() => {
    const answer = [...document.querySelectorAll('.message.assistant')].at(-1);
    const text = answer?.querySelector('.body > .text')?.innerText ?? '';
    if (text && text !== texts.at(-1)) texts.push(text);
  }).observe(document.body, { childList: true, characterData: true, subtree: true });
}"""

STORY = "Write a long story about a tailor who sews a coat for the moon."


class ChatTest(PageCase):
    """Messages and answers."""

    def test_an_answer_grows_and_is_kept(self):
        page = self.open_chat()
        expect(page.locator("#model")).to_have_text(MODEL)
        self.set_field(temperature=0, max_tokens=120)
        page.evaluate(WATCH)
        answer = self.send("What is a needle, and what is it good for?")
        text = self.finished(answer)
        seen = page.evaluate("window.seenTexts")
        self.assertGreater(len(seen), 2)
        self.assertLess(len(seen[0]), len(text))
        for early in seen:
            self.assertTrue(text.startswith(early[:10]), f"{early!r} … {text!r}")
        stats = answer.locator(".stats")
        expect(stats).to_have_text(re.compile(r"tokens/s · first after .* · \d+ tokens"))
        title = "What is a needle, and what is it good for?"
        expect(page.locator("#list .conversation")).to_have_text([title])
        expect(page.locator("#announcements")).to_contain_text(text.split("\n")[0][:20])
        page.reload()
        expect(page.locator("h1")).to_have_text(title)
        expect(page.locator(".message")).to_have_count(2)
        self.assertEqual(page.locator(".message.assistant .body").inner_text(), text)
        expect(page.locator(".stats")).to_be_visible()

    def test_a_second_turn_finds_the_first_in_the_cache(self):
        self.open_chat()
        self.set_field(temperature=0, max_tokens=40)
        self.finished(self.send("Name three fabrics, with one sentence about each of them."))
        answer = self.send("Which of them is the warmest?")
        self.finished(answer)
        expect(answer.locator(".stats")).to_contain_text("prompt tokens cached")

    def test_stop_keeps_what_came(self):
        page = self.open_chat()
        self.set_field(temperature=0, max_tokens=2000)
        answer = self.send(STORY)
        expect(answer.locator(".body > .text")).not_to_be_empty()
        page.locator("#stop").click()
        text = self.finished(answer)
        self.assertTrue(text)
        expect(answer.locator(".note")).to_have_text("Stopped by you.")
        expect(page.locator("#prompt")).to_be_focused()
        expect(page.locator("#send")).to_be_visible()
        page.reload()
        self.assertEqual(page.locator(".message.assistant .body").inner_text(), text)

    def test_escape_stops_too_and_the_server_hears_it(self):
        page = self.open_chat()
        self.set_field(temperature=0, max_tokens=2000)
        before = self.server.metric("bespoke_engine_cancelled_total")
        answer = self.send(STORY)
        expect(answer.locator(".body > .text")).not_to_be_empty()
        page.keyboard.press("Escape")
        self.finished(answer)
        wait_until(lambda: self.server.metric("bespoke_engine_cancelled_total") > before)

    def test_a_reload_amid_an_answer_keeps_what_came(self):
        page = self.open_chat()
        self.set_field(temperature=0, max_tokens=2000)
        body = self.send(STORY).locator(".body > .text")
        expect(body).to_have_text(re.compile(".{40}", re.DOTALL))
        early = body.inner_text()
        page.reload()
        note = page.locator(".message.assistant .note")
        expect(note).to_contain_text(re.compile("broken? off", re.I))
        kept = page.locator(".message.assistant .body").inner_text()
        self.assertTrue(kept.startswith(early[:30]), f"{early!r} … {kept!r}")

    def test_regenerate_and_edit(self):
        page = self.open_chat()
        self.set_field(temperature=0, max_tokens=24)
        first = self.finished(self.send("Say something about silk."))
        page.get_by_role("button", name="Answer again").click()
        answer = page.locator(".message.assistant")
        expect(answer).to_have_count(1)
        # At temperature 0 the same comes again.
        self.assertEqual(self.finished(answer), first)
        page.get_by_role("button", name="Edit and send again").click()
        area = page.get_by_role("textbox", name="Edit the message")
        expect(area).to_be_focused()
        area.fill("Say something about iron and steel.")
        area.press("Enter")
        expect(page.locator(".message.user .body")).to_have_text(
            ["Say something about iron and steel."]
        )
        self.assertNotEqual(self.finished(answer), first)
        expect(answer).to_have_count(1)

    def test_settings_reach_the_request(self):
        page = self.open_chat()
        self.set_field(temperature=0.5, top_p=0.9, top_k=7, min_p=0.05, seed=11, max_tokens=3,
            repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3)
        page.locator("#settings-open").click()
        page.locator("#system").fill("You are a tailor.")
        page.keyboard.press("Escape")
        with page.expect_request("**/v1/chat/completions") as request:
            answer = self.send("Hello")
        self.finished(answer)
        expect(answer.locator(".note")).to_contain_text("Cut off")
        self.assertEqual(request.value.post_data_json, {
            "model": MODEL, "stream": True, "stream_options": {"include_usage": True},
            "messages": [
                {"role": "system", "content": "You are a tailor."},
                {"role": "user", "content": "Hello"},
            ],
            "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": 11,
            "max_tokens": 3, "repetition_penalty": 1.1, "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
        })

    def test_a_json_answer_is_json(self):
        page = self.open_chat()
        self.set_field(temperature=0, max_tokens=200)
        page.locator("#settings-open").click()
        page.locator("#json").check()
        page.keyboard.press("Escape")
        answer = self.send("Describe a coat as a JSON object with its colour and its size.")
        self.finished(answer)
        if answer.locator(".note").count() == 0:
            page.evaluate("(name) => localStorage.getItem(name)", "bespoke.settings")
            stored = page.evaluate("localStorage.getItem(`bespoke.chat.${location.hash.slice(1)}`)")
            content = json.loads(stored)["messages"][1]["content"]
            self.assertIsInstance(json.loads(content), dict)


class ConversationsTest(PageCase):
    """The side bar."""

    def test_new_select_rename_search_delete(self):
        page = self.open_chat()
        self.set_field(max_tokens=4)
        self.finished(self.send("One about wool"))
        page.keyboard.press("Alt+n")
        expect(page.locator("#welcome")).to_be_visible()
        self.finished(self.send("Two about linen"))
        rows = page.locator("#list .conversation")
        expect(rows).to_have_text(["Two about linen", "One about wool"])
        rows.nth(1).click()
        expect(page.locator(".message.user .body")).to_have_text("One about wool")
        page.get_by_role("button", name="Rename One about wool").click()
        page.get_by_role("textbox", name="New name").fill("Sheep")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("Sheep")
        page.keyboard.press("Alt+k")
        expect(page.locator("#search")).to_be_focused()
        page.keyboard.type("linen")
        expect(rows).to_have_text(["Two about linen"])
        page.keyboard.press("ArrowDown")
        expect(rows.first).to_be_focused()
        page.get_by_role("button", name="Delete Two about linen").click()
        page.locator("#confirm-yes").click()
        expect(page.locator("#list-empty")).to_have_text("Nothing found.")
        page.locator("#search").fill("")
        expect(rows).to_have_text(["Sheep"])
        page.reload()
        expect(rows).to_have_text(["Sheep"])

    def test_an_answer_goes_on_while_another_conversation_is_open(self):
        page = self.open_chat()
        self.set_field(temperature=0, max_tokens=500)
        self.send(STORY)
        page.locator("#new").click()
        expect(page.locator("#list .dot")).to_be_visible()
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#list .dot")).to_have_count(0)
        page.locator("#list .conversation").click()
        expect(page.locator(".stats")).to_contain_text("500 tokens")

    def test_a_second_tab_shows_the_same(self):
        self.open_chat()
        self.set_field(max_tokens=4)
        self.finished(self.send("Shared"))
        other = self.new_page()
        other.goto(self.page.url)
        expect(other.locator(".message")).to_have_count(2)
        self.finished(self.send("More"))
        expect(other.locator(".message")).to_have_count(4)

    def test_export_and_import(self):
        page = self.open_chat()
        self.set_field(max_tokens=4)
        self.finished(self.send("To be exported"))
        page.locator("#settings-open").click()
        with page.expect_download() as download:
            page.locator("#export").click()
        file = pathlib.Path(scratch.name) / "export.json"
        download.value.save_as(file)
        page.locator("#import-file").set_input_files(file)
        expect(page.locator("#transfer-result")).to_have_text("1 conversation imported.")
        file.write_text('{"format": "other"}')
        page.locator("#import-file").set_input_files(file)
        expect(page.locator("#transfer-result")).to_contain_text("no conversations of Bespoke")
        page.keyboard.press("Escape")
        expect(page.locator("#list .conversation")).to_have_text(["To be exported"] * 2)

    def test_hostile_text_stays_text(self):
        hostile = "\n\n".join([
            "<img src=x onerror='window.hacked=1'>", "<script>window.hacked=1</script>",
            "[click](javascript:window.hacked=1)", "[data](data:text/html,<script>1</script>)",
            "`<b>code</b>` **<i>bold</i>** [good](https://example.org/\"onclick=x)",
            "| <b>a</b> | b |\n|-|-|\n| <svg onload=window.hacked=1> | 2 |",
            "```<script>\n</code></pre><script>window.hacked=1</script>\n```",
        ])
        messages = [
            {"role": "user", "content": hostile},
            {"role": "assistant", "content": hostile, "reasoning": hostile, "note": hostile},
        ]
        conversations = [{"title": "<b>title</b>", "updated": 1, "messages": messages}]
        file = pathlib.Path(scratch.name) / "hostile.json"
        file.write_text(json.dumps({
            "format": "bespoke-conversations", "version": 1, "conversations": conversations,
        }))
        page = self.open_chat()
        page.locator("#settings-open").click()
        page.locator("#import-file").set_input_files(file)
        page.keyboard.press("Escape")
        page.locator("#list .conversation").click()
        expect(page.locator("h1")).to_have_text("<b>title</b>")
        expect(page.locator(".message")).to_have_count(2)
        self.assertIsNone(page.evaluate("window.hacked ?? null"))
        links = page.locator("#messages a").evaluate_all("links => links.map((link) => link.href)")
        self.assertEqual(links, ["https://example.org/%22onclick=x"] * 2)
        for tag in ["script", "img", "svg[onload]", "b", "i"]:
            expect(page.locator(f"#messages {tag}")).to_have_count(0)


class FailureTest(PageCase):
    """What the page says when something is wrong."""

    expected_errors = ("ERR_INTERNET_DISCONNECTED", "status of 400", "status of 429", "ERR_FAILED")

    def test_offline_is_said_and_mended(self):
        page = self.open_chat()
        self.set_field(max_tokens=4)
        self.context.set_offline(True)
        expect(page.locator("#notice")).to_contain_text("offline")
        answer = self.send("Is anybody there?")
        self.finished(answer)
        expect(answer.locator(".note")).to_contain_text("cannot be reached")
        self.context.set_offline(False)
        expect(page.locator("#notice")).to_be_hidden()
        page.get_by_role("button", name="Answer again").click()
        expect(answer.locator(".stats")).to_contain_text("token")

    def test_a_refusal_is_said(self):
        self.open_chat()
        self.set_field(max_tokens=4)
        answer = self.send("word " * 20_000)
        self.finished(answer)
        expect(answer.locator(".note")).to_contain_text("context")

    def test_a_busy_server_says_when_to_come_again(self):
        page = self.open_chat()
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            status=429, headers={"Retry-After": "7"}, json={"error": {"message": "full"}},
        ))
        answer = self.send("Hello")
        self.finished(answer)
        expect(answer.locator(".note")).to_have_text("The server is busy. Try again in 7 s.")

    def test_a_stream_that_breaks_off_is_no_whole_answer(self):
        page = self.open_chat()
        delta = json.dumps({"choices": [{"index": 0, "delta": {"content": "half an"}}]})
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {delta}\n\n",
        ))
        answer = self.send("Hello")
        self.assertEqual(self.finished(answer), "half an")
        expect(answer.locator(".note")).to_contain_text("before the answer was complete")

    def test_an_error_within_a_stream_is_said(self):
        page = self.open_chat()
        error = json.dumps({"error": {"message": "the engine died: of cold", "code": None}})
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {error}\n\n",
        ))
        answer = self.send("Hello")
        self.finished(answer)
        expect(answer.locator(".note")).to_have_text("the engine died: of cold")


class KeyTest(PageCase):
    """A server that asks for a key."""

    serve = staticmethod(with_key)
    expected_errors = ("status of 401",)

    def test_a_key_is_asked_for_and_kept_for_the_tab_alone(self):
        page = self.open()
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        page.get_by_label("Key", exact=True).fill("not the key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-problem")).to_contain_text("no spaces")
        page.get_by_label("Key", exact=True).fill("wrong-key-wrong-key")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_contain_text("key")
        expect(dialog).to_be_visible()
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("null")
        expect(dialog).to_be_hidden()
        self.set_field(max_tokens=8)
        self.finished(self.send("Hello"))
        expect(page.locator(".stats")).to_contain_text("token")
        self.assertNotIn(KEY, page.evaluate("JSON.stringify({ ...localStorage })"))
        page.reload()
        expect(page.locator("#model")).to_have_text("null")
        page.goto(self.server.url + "/dashboard")
        expect(page.locator("#state")).to_have_text("running")
