"""Whether the pages can be used with a keyboard, a screen reader, weak eyes, a small screen."""

from playwright.sync_api import expect

from .pages import PageCase

# Controls without a name, doubled ids, images without a text, headings that skip a level, controls
# inside controls, and labels that point nowhere.
STRUCTURE = """() => {
  const problems = [];
  const shown = (element) => element.checkVisibility();
  const nameOf = (element) => element.getAttribute('aria-label')
    || [...(element.labels ?? [])].map((label) => label.innerText).join('')
    || element.innerText?.trim() || element.title;
  for (const element of document.querySelectorAll('button, a, input, textarea, summary')) {
    if (!nameOf(element) && element.type !== 'file') problems.push(`no name: ${element.outerHTML}`);
    if (element.parentElement.closest('button, a')) problems.push(`nested: ${element.outerHTML}`);
  }
  const ids = [...document.querySelectorAll('[id]')].map((element) => element.id);
  for (const id of new Set(ids.filter((id, at) => ids.indexOf(id) !== at))) {
    problems.push(`id twice: ${id}`);
  }
  for (const image of document.querySelectorAll('img:not([alt])')) problems.push(image.outerHTML);
  for (const drawing of document.querySelectorAll('svg')) {
    const isSilent = drawing.getAttribute('aria-hidden') === 'true';
    if (!isSilent && !drawing.getAttribute('aria-label')) problems.push(drawing.outerHTML);
  }
  for (const name of ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for']) {
    for (const element of document.querySelectorAll(`[${name}]`)) {
      const target = element.getAttribute(name);
      if (!document.getElementById(target)) problems.push(`${name} of nothing: ${target}`);
    }
  }
  let level = 0;
  for (const heading of [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].filter(shown)) {
    // A model's own headings are its own.
    if (heading.closest('.text')) continue;
    const next = Number(heading.tagName[1]);
    if (next > level + 1) problems.push(`heading skips from ${level}: ${heading.innerText}`);
    level = next;
  }
  if (document.querySelectorAll('h1').length !== 1) problems.push('not one h1');
  if (document.querySelectorAll('main').length !== 1) problems.push('not one main');
  if (!document.documentElement.lang) problems.push('no language');
  return problems;
}"""

# Texts whose contrast with what is behind them is below 4.5 : 1 (WCAG 2.2, 1.4.3).
CONTRAST = """() => {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], below) =>
    [r, g, b].map((value, at) => value * a + below[at] * (1 - a)).concat(1);
  const behind = (element) => {
    const colours = [];
    for (let at = element; at; at = at.parentElement) {
      colours.push(rgba(getComputedStyle(at).backgroundColor));
      if (colours.at(-1)[3] === 1) break;
    }
    return colours.reduceRight((below, colour) => over(colour, below), [255, 255, 255, 1]);
  };
  const light = ([r, g, b]) => {
    const linear = [r, g, b].map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const problems = [];
  let num_texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isShown = element.checkVisibility({ opacityProperty: true });
    if (!walker.currentNode.data.trim() || !isShown) continue;
    if (element.closest('.unseen, .skip, noscript, script')) continue;
    num_texts += 1;
    const back = behind(element);
    const front = over(rgba(getComputedStyle(element).color), back);
    const [low, high] = [light(front), light(back)].sort((left, right) => left - right);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) problems.push(`${contrast.toFixed(2)}: ${walker.currentNode.data.trim()}`);
  }
  if (num_texts < 5) problems.push(`only ${num_texts} texts seen`);
  return problems;
}"""

WIDTH = "document.scrollingElement.scrollWidth - innerWidth"


class AccessTest(PageCase):
    """Both pages, in both themes."""

    def check(self, page, what):
        """Structure and contrast, light and dark."""
        self.assertEqual(page.evaluate(STRUCTURE), [], what)
        for scheme in ["light", "dark"]:
            page.emulate_media(color_scheme=scheme)
            expect(page.locator("html")).to_have_attribute("data-theme", scheme)
            self.assertEqual(page.evaluate(CONTRAST), [], f"{what}, {scheme}")

    def test_structure_and_contrast(self):
        page = self.open_chat()
        self.check(page, "welcome")
        self.set_field(max_tokens=4)
        self.finished(self.send("Show me **every** part"))
        self.check(page, "conversation")
        page.locator("#settings-open").click()
        expect(page.locator("#sessions-note")).not_to_contain_text("Asking")
        self.check(page, "settings")
        page.locator("#field-temperature").fill("9")
        expect(page.locator("#settings-problem")).to_contain_text("between 0 and 2")
        self.check(page, "settings with a problem")
        page.keyboard.press("Escape")
        page.goto(self.server.url + "/dashboard")
        expect(page.locator("#kernels tr").first).to_be_visible()
        self.check(page, "dashboard")

    def test_the_theme_can_be_chosen_and_stays(self):
        page = self.open_chat()
        page.get_by_role("button", name="Dark theme").click()
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        page.goto(self.server.url + "/dashboard")
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        page.get_by_role("button", name="Light theme").click()
        page.emulate_media(color_scheme="dark")
        expect(page.locator("html")).to_have_attribute("data-theme", "light")

    def test_everything_is_reached_by_keyboard_and_seen(self):
        page = self.open_chat()
        self.set_field(max_tokens=4)
        self.finished(self.send("Hello"))
        page.reload()
        expect(page.locator(".message")).to_have_count(2)
        page.evaluate("document.activeElement.blur()")
        seen = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate("""() => {
              const element = document.activeElement;
              if (element === document.body) return ['body', false, ''];
              const { outlineStyle, outlineWidth } = getComputedStyle(element);
              const frame = getComputedStyle(element.closest('form') ?? element).borderColor;
              const name = element.getAttribute('aria-label') || element.id || element.innerText;
              return [name, outlineStyle !== 'none' && outlineWidth !== '0px', frame];
            }""")
            name, is_outlined, _ = focused
            # The frame around the message field shows its focus.
            if name not in ("prompt", "scroll", "body"):
                self.assertTrue(is_outlined, f"focus on {name!r} is not seen")
            seen.add(name)
        for name in ["new", "Search conversations", "settings-open", "prompt", "Copy the answer",
                "Answer again",
                "Edit and send again", "Rename Hello", "Delete Hello"]:
            self.assertIn(name, seen)

    def test_dialogs_take_and_give_back_the_focus(self):
        page = self.open_chat()
        page.locator("#settings-open").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
        self.assertTrue(page.evaluate("document.activeElement.closest('dialog') !== null"))
        page.keyboard.press("Escape")
        expect(page.locator("#settings-open")).to_be_focused()
        page.keyboard.press("Alt+s")
        expect(page.get_by_role("dialog", name="Settings")).to_be_visible()

    def test_motion_is_reduced(self):
        page = self.open_chat()
        self.set_field(max_tokens=200, temperature=0)
        answer = self.send("Write a long story.")
        moving = page.evaluate("document.getAnimations().length")
        self.assertEqual(moving, 0)
        page.keyboard.press("Escape")
        self.finished(answer)


class SmallScreenTest(PageCase):
    """A telephone."""

    viewport = {"width": 360, "height": 640}

    def test_the_list_opens_over_the_page(self):
        page = self.open_chat()
        self.assertLessEqual(page.evaluate(WIDTH), 0)
        expect(page.locator("#new")).to_be_hidden()
        page.get_by_role("button", name="Conversations", exact=True).click()
        expect(page.locator("#new")).to_be_focused()
        self.assertTrue(page.evaluate("document.querySelector('main').inert"))
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar-open")).to_be_focused()
        self.assertFalse(page.evaluate("document.querySelector('main').inert"))

    def test_nothing_is_wider_than_the_screen(self):
        page = self.open_chat()
        answer = self.send("A" * 300)
        page.keyboard.press("Escape")
        self.finished(answer)
        self.assertLessEqual(page.evaluate(WIDTH), 0)
        page.goto(self.server.url + "/dashboard")
        expect(page.locator("#state")).to_have_text("running")
        self.assertLessEqual(page.evaluate(WIDTH), 0)
