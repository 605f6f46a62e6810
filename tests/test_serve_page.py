"""The page in a real browser: colours, figures, tree, escaped text, keyboard, a phone's width."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("openai", reason="the openai client is not installed; the test extra has it")

from serve_cases import CYCLE, cycle_decoder, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def running():
    with serving(cycle_decoder(), rows=2) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
    )
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, running):
    """The page at a phone's width, in dark mode. Nothing but the server may be asked."""
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme="dark", reduced_motion="reduce"
    )
    tab = context.new_page()
    tab.problems = []
    tab.on("console", lambda line: line.type == "error" and tab.problems.append(line.text))
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on(
        "request",
        lambda sent: sent.url.startswith((running.url, "data:")) or tab.problems.append(sent.url),
    )
    tab.goto(running.url)
    tab.get_by_text("tiny").wait_for()
    yield tab
    assert tab.problems == []
    context.close()


def ask(tab, text: str) -> None:
    """Types a message, sends it by keyboard, and waits until the answers are whole."""
    tab.focus("#prompt")
    tab.keyboard.type(text)
    tab.keyboard.press("Enter")
    tab.locator("#send:enabled").wait_for(timeout=120_000)


def test_an_answer_is_coloured_and_counted(page):
    page.fill("#limit", "30")
    page.select_option("#draft", "both")
    ask(page, "Hi!")
    texts = page.locator("article.assistant .answer").all_inner_texts()
    assert len(texts) == 2 and texts[0] == texts[1] != ""
    assert "The same text" in page.inner_text("#log")
    plain, drafted = page.locator("article.assistant").all()
    assert plain.locator("span.drafted").count() == 0 < drafted.locator("span.drafted").count()
    speeds = [float(card.locator("dd").nth(1).inner_text()) for card in (plain, drafted)]
    assert speeds[0] == 1.0 < speeds[1]
    assert page.locator("#tree svg g").count() == 5
    label = page.get_attribute("#tree", "aria-label")
    assert re.fullmatch(r"4 drafted tokens, [0-2] of them accepted", label)


def test_the_key_is_asked_for_where_it_is_needed(page, browser, running, tmp_path):
    assert page.locator("#key").is_hidden()
    (tmp_path / "keys").write_text(KEY)
    decoder = running.worker._decoder
    with serving(decoder, rows=2, api_key_file=str(tmp_path / "keys")) as guarded:
        tab = browser.new_page()
        tab.goto(guarded.url)
        tab.get_by_text("needs an API key").wait_for()
        tab.fill("#key", KEY)
        tab.keyboard.press("Tab")
        tab.get_by_text("tiny").wait_for()
        tab.fill("#limit", "5")
        ask(tab, "Hi!")
        assert tab.locator("article.assistant").count() == 1
        tab.close()


def test_nothing_is_wider_than_a_phone(page):
    page.fill("#limit", "60")
    ask(page, "x" * 60)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour))) < 80  # dark


def test_text_is_escaped(page):
    """What users and models write never becomes HTML."""
    ask(page, "<img src=x onerror=document.title='bad'>")
    assert page.title() == "beagle_jax" and page.locator("#log img").count() == 0
    assert "<img" in page.locator("article.user .answer").inner_text()


HTML = "<img src=x onerror=document.title='bad'>"


def stream_of(*events: dict) -> dict:
    """A response of the server, for `route.fulfill`."""
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return {"body": "".join(lines), "content_type": "text/event-stream"}


def test_what_the_model_writes_is_escaped_in_text_and_tree(page):
    extension = {
        "spans": [[HTML, True], [f"</div>{HTML}", False]],
        "accepted": [1],
        "tokens": 2,
        "tree": {"tokens": [HTML, "</text>" + HTML], "parents": [0, 0], "accepted": [True, True]},
    }
    done = {"body": stream_of({"choices": [{"beagle": extension}]})["body"] + "data: [DONE]\n\n"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**done))
    ask(page, "Hi!")
    assert page.inner_text("article.assistant .answer") == f"{HTML}</div>{HTML}"
    assert page.title() == "beagle_jax" and page.locator("main img").count() == 0
    assert page.locator("#tree text").first.text_content() == "<img␣src=x␣…"


def test_a_stream_that_breaks_off_is_no_answer(page):
    broken = stream_of(
        {"choices": [{"beagle": {"spans": [["A", False]], "accepted": [], "tokens": 1}}]}
    )
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**broken))
    ask(page, "Hi!")
    assert page.inner_text("#log .wrong") == "the stream broke off"
    page.unroute("**/v1/chat/completions")
    error = stream_of({"error": {"message": "decoding failed"}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**error))
    ask(page, "Hi!")
    assert page.locator("#log .wrong").last.inner_text() == "decoding failed"


def test_escape_stops_an_answer_and_the_chat_goes_on(page, running):
    page.fill("#limit", "150")
    page.focus("#prompt")
    page.keyboard.type("Hi!")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.locator("#send:enabled").wait_for(timeout=60_000)
    assert "Stopped." in page.inner_text("#log")
    page.fill("#limit", "5")
    ask(page, "Hi!")
    assert page.locator("article.assistant").count() >= 1
    page.click("#clear")
    assert page.inner_text("#log") == ""


def test_all_controls_are_reached_by_keyboard(page):
    page.focus("#prompt")
    reached = []
    for _ in range(7):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert reached[:2] == ["prompt", "send"]
    assert {"clear", "draft", "temperature", "limit", "tree"} <= set(reached)


def test_the_page_is_one_file_that_asks_no_other_host(running):
    """Without a browser."""
    answer = running.raw.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2 and "unsafe" not in policy
    text = Path(__file__).parent.parent.joinpath("beagle_jax/serving/page.html").read_text("utf-8")
    assert answer.text == text
    assert re.findall(r"https?://[^\"'\s]+", text) == ["http://www.w3.org/2000/svg"]
    assert "innerHTML" not in text and not re.search(r"\bon\w+=\"", text)


def test_cycle_ends_as_it_begins():
    """The other tests rest on it."""
    assert CYCLE.endswith("!") and len(set(CYCLE.encode())) == len(CYCLE.encode())
