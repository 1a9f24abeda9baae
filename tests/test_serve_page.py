"""The page in headless Chromium: what a person does with keyboard, pointer and a small screen."""

import shutil

import pytest
from test_serve import address, engine, models, rankings  # noqa: F401
from test_text_tokenizer import learnt  # noqa: F401

from tinylm.text import preferences

play = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


@pytest.fixture(scope="module")
def browser():
    with play.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, address):  # noqa: F811
    """A fresh page; at its end it has said nothing wrong and asked nobody else."""
    tab, wrong, asked = browser.new_page(viewport={"width": 900, "height": 800}), [], set()
    tab.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
    tab.on("pageerror", lambda fault: wrong.append(str(fault)))
    tab.on("request", lambda request: asked.add(request.url.split("/")[2]))
    tab.set_default_timeout(60_000)
    tab.goto(address + "/")
    tab.wait_for_selector("#pieces span")
    yield tab
    tab.close()
    assert not wrong and asked == {address.removeprefix("http://")}


def test_pieces_change_as_one_types_and_markup_stays_text(page):
    page.fill("#text", "the boat")
    page.wait_for_selector("#pieces span:text-is('the')")
    before = page.locator("#pieces span").count()
    page.locator("#text").press_sequentially(" <b>x</b><script>alert(1)</script>")
    page.wait_for_selector(f"#pieces span >> nth={before + 8}")
    assert page.locator("#pieces b, #pieces script").count() == 0


def test_a_hovered_cell_says_its_weight_and_a_clicked_one_is_worked_out(page):
    page.fill("#text", "the boat went under the river")
    page.click("#tab-attention")
    page.wait_for_selector("#heat td")
    page.hover("#heat tr:nth-child(4) td:nth-child(2)")
    page.wait_for_selector("#weight:has-text('a weight of 0.')")
    page.click("#heat tr:nth-child(4) td:nth-child(2)")
    page.wait_for_selector("#sum:has-text('q·k')")
    assert page.locator("#worked tr").count() == 4
    for head in (0, 1):
        page.select_option("#head", index=head)
        page.wait_for_selector(f"#sum:has-text('head {head + 1}')")


def test_layers_and_next_words_follow_the_text(page):
    page.fill("#text", "the boat")
    page.click("#tab-layers")
    page.wait_for_selector("#depths tr >> nth=2")
    assert page.locator("#depths tr").count() > 2  # the heads, the first id, the text's tokens
    assert page.locator("#depths tr:last-child b").count() >= 1
    page.click("#tab-next")
    page.wait_for_selector("#following li >> nth=9")
    before = page.input_value("#text")
    page.click("#following li:first-child button")
    assert page.input_value("#text").startswith(before) and page.input_value("#text") != before


def test_two_models_answer_side_by_side_and_can_be_stopped(page):
    page.click("#tab-chat")
    page.select_option("#model", "chat")
    page.select_option("#beside", "base")
    page.fill("#said", "the boat")
    page.press("#said", "Enter")
    page.wait_for_selector(".turn >> nth=3")
    page.wait_for_selector("#stop[disabled]")
    assert page.locator(".talk").count() == 2 and page.locator(".turn").count() == 4
    page.click("#fresh")
    assert page.locator(".talk").count() == 0
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that never comes
    page.fill("#said", "again")
    page.press("#said", "Enter")
    page.click("#stop")
    page.wait_for_selector("#stop[disabled]")
    assert page.is_hidden("#fault")


def test_a_person_s_order_of_answers_is_kept(page, rankings):  # noqa: F811
    page.click("#tab-rank")
    page.select_option("#model", index=1)
    page.fill("#prompt", "the boat")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#ranked li >> nth=1")
    second = page.inner_text("#ranked li:nth-child(2) span")
    page.focus("#ranked li:nth-child(2) button:text-is('up')")
    page.keyboard.press("Enter")
    page.click("#keep")
    page.wait_for_selector("#kept:has-text('kept in')")
    last = preferences.read_jsonl(rankings)[-1]
    assert last.messages == (("user", "the boat"),) and len(last.responses) >= 2
    assert " ".join(last.responses[0].split()) == " ".join(second.split())


def test_the_keyboard_alone_reaches_every_view(page):
    page.focus("#tab-tokens")
    for name in ("next", "attention", "layers", "law", "chat", "rank", "tokens"):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"#{name}:visible")
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"
    page.click("#tab-attention")
    page.focus("#heat td[tabindex='0'] >> nth=2")
    page.keyboard.press("ArrowLeft")
    assert "reads" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    page.wait_for_selector("#sum:has-text('q·k')")


def test_a_narrow_screen_is_not_scrolled_sideways_and_dark_is_dark(page):
    page.set_viewport_size({"width": 320, "height": 640})
    for name in ("tokens", "next", "attention", "layers", "law", "chat", "rank"):
        page.click(f"#tab-{name}")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, name
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
