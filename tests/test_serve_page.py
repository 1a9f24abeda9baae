"""The page in headless Chromium: what a person does with keyboard, pointer and a small screen."""

import shutil
import threading

import pytest
from test_serve import address, engine, models, rankings  # noqa: F401
from test_text_tokenizer import learnt  # noqa: F401

from tinylm.serve import engine as engines
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
    current(tab)
    yield tab
    tab.close()
    assert not wrong and asked == {address.removeprefix("http://")}


def current(page):
    """Wait until what is shown is of the text as it stands."""
    page.wait_for_selector("body:not(:has([aria-busy]))")


def test_pieces_change_as_one_types_and_markup_stays_text(page):
    page.fill("#text", "the boat")
    current(page)
    before = page.locator("#pieces span").count()
    page.locator("#text").press_sequentially(" <b>x</b><script>alert(1)</script>")
    current(page)
    assert page.locator("#pieces span").count() > before + 8
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
        page.wait_for_selector("#habits:has-text('(induction)')")


def test_a_view_is_opened_by_its_address(page):
    page.evaluate("location.hash = 'layers'")
    page.wait_for_selector("#depths td")
    page.evaluate("location.hash = 'nothing'")
    page.wait_for_selector("#pieces span")


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


def test_an_answer_is_stopped_or_left_on_its_way_and_the_next_talk_is_sound(
        page, engine, monkeypatch):  # noqa: F811
    turn, ask, seen, gate = engines.Batch.turn, engine.ask, [], threading.Event()

    def halting(batch):
        if any(request.made for request in batch.live):  # an answer that has begun waits here
            gate.wait(60)
        turn(batch)

    monkeypatch.setattr(engines.Batch, "turn", halting)
    monkeypatch.setattr(engine, "ask", lambda request: (seen.append(request), ask(request)))
    page.click("#tab-chat")
    page.select_option("#model", "base")
    page.fill("#temperature", "0")  # no draw ends the answer with its first token
    for button in ("#stop", "#fresh"):
        page.fill("#said", "the boat")
        page.press("#said", "Enter")
        page.wait_for_selector("#stop:not([disabled])")
        while not (seen and seen[-1].made):
            page.wait_for_timeout(50)
        page.click(button)
        page.wait_for_selector("#stop[disabled]")
        kept = page.inner_text("#talks")
        while not seen[-1].cancelled:
            page.wait_for_timeout(50)
        gate.set()
        page.wait_for_timeout(500)
        assert page.inner_text("#talks") == kept and seen.pop().made < 30
        gate.clear()
    assert page.locator(".turn").count() == 0
    monkeypatch.setattr(engines.Batch, "turn", turn)
    page.fill("#said", "again")
    page.press("#said", "Enter")
    page.wait_for_selector(".turn >> nth=1")
    page.wait_for_selector("#stop[disabled]")
    assert page.is_hidden("#fault")


def test_a_long_text_is_said_to_be_read_in_part_and_where_an_answer_settles_is_shown(page):
    page.fill("#text", "the boat " * 60)
    page.click("#tab-layers")
    page.wait_for_selector("#cut:has-text('the last 47 of')")
    settled = page.locator("#depths tr:last-child td:last-child").inner_text()
    assert settled == "embedding" or settled.startswith("layer ")
    page.fill("#text", "the boat")
    page.wait_for_selector("#cut:text-is('')", state="attached")


def test_merges_are_of_the_words_as_they_stand(page):
    page.fill("#text", "boat boat")
    current(page)
    last = page.locator("#merges details div:last-child").all_inner_texts()
    page.locator("#merges summary").first.click()
    assert not page.locator("#merges div").first.inner_text().startswith("·") and len(last) == 2


def test_a_person_s_order_of_answers_is_kept(page, rankings):  # noqa: F811
    page.click("#tab-rank")
    page.wait_for_selector("#kept:has-text('by-hand.jsonl')")
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
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#heat td >> nth=2")
    until(page, "Tab", "document.activeElement.dataset.at === '2,2'")
    page.keyboard.press("ArrowLeft")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert "reads" in label
    page.keyboard.press("Enter")
    reader = label.split(" reads ")[0]
    page.wait_for_selector(f"#sum:has-text('“{reader}” reads')")
    until(page, "Shift+Tab", "document.activeElement.id === 'tab-attention'")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    until(page, "Tab", "document.activeElement.id === 'said'")
    page.keyboard.type("the boat")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn >> nth=1")
    page.wait_for_selector("#stop[disabled]")


def until(page, key, there):
    """Press a key until the focus is there."""
    for _ in range(80):
        if page.evaluate(there):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not lead to {there}")


def test_a_narrow_screen_is_not_scrolled_sideways_and_dark_is_dark(page):
    page.set_viewport_size({"width": 320, "height": 640})
    for name in ("tokens", "next", "attention", "layers", "law", "chat", "rank"):
        page.click(f"#tab-{name}")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, name
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
