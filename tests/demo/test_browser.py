"""The page in a real browser, as visitors meet it: by mouse, by keyboard alone, on a phone. Chromium is found on the PATH."""

import re
import shutil
import time

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from iomm_hf.demo import app, model


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; Debian's is `apt install chromium`"),
]
DRAWING = re.compile(r"^\s*Drawing\b")  # as the progress begins; "the drawing half" is in a text
PATIENCE = 60_000  # ms: a busy machine draws slowly


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens the page in a window of a size; in the end nothing may have gone wrong in it, nor left for another host."""
    pages: list[Page] = []
    troubles: list[str] = []
    hosts: set[str] = set()

    def open_page(width: int = 1200, height: int = 900, **options) -> Page:
        page = chromium.new_context(viewport={"width": width, "height": height}, **options).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(address)
        expect(page.get_by_role("button", name="Draw", exact=True)).to_be_visible()
        pages.append(page)
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_page
    for page in pages:
        page.context.close()
    assert not troubles
    assert {host for host in hosts if host} == {address.split("/")[2]}


def tab(page: Page, name: str):
    page.get_by_role("tab", name=name).click()


def picture(page: Page, label: str):
    return page.locator(".block:visible", has=page.get_by_text(label, exact=True)).locator("img")


def shot(page: Page, folder, name: str):
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    assert (folder / f"{name}.png").stat().st_size > 10_000


def test_draw_with_a_gallery_that_grows(visit, tmp_path):
    page = visit()
    thumbnails = page.locator(".drawn .gallery-item")
    expect(thumbnails).to_have_count(8)
    page.get_by_role("button", name="a red circle", exact=True).click()
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(picture(page, "Picture")).to_be_visible()
    expect(thumbnails).to_have_count(9)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").first.click()
    assert download.value.suggested_filename.endswith(".png")
    shot(page, tmp_path, "draw")


def test_edit_shows_before_and_after(visit, tmp_path):
    page = visit()
    tab(page, "Edit")
    page.locator(".gallery-item:visible").nth(1).click()
    page.get_by_label("What to change").fill("make it red")
    page.get_by_role("button", name="Change it").click()
    expect(page.locator(".compared")).to_be_visible()
    expect(page.locator(".compared img").first).to_be_visible()
    shot(page, tmp_path, "edit")


def test_ask(visit, tmp_path):
    page = visit()
    tab(page, "Ask")
    expect(picture(page, "Picture")).to_be_visible()
    page.get_by_role("button", name="Ask", exact=True).click()
    *_, answer = model.answer(app.example_pictures()[2], "Describe the image.")
    assert re.fullmatch("an? .+", answer)
    expect(page.locator(".answer textarea")).to_have_value(answer)
    shot(page, tmp_path, "ask")


def test_the_mask_slider_by_keyboard_and_what_the_generator_makes_of_it(visit, tmp_path):
    page = visit()
    tab(page, "How it learns")
    counted = page.locator(".counted:visible").first
    expect(counted).to_have_text("6 of 16 patches hidden")
    slider = page.get_by_role("slider", name=re.compile("Share to hide"))
    slider.focus()
    for _ in range(5):
        slider.press("ArrowRight")
    expect(counted).not_to_have_text("6 of 16 patches hidden")
    for _ in range(5):
        slider.press("ArrowLeft")
    expect(counted).to_have_text("6 of 16 patches hidden")
    before = page.locator(".sheet img").get_attribute("src")
    page.get_by_role("button", name="Let it draw").click()
    expect(page.locator(".sheet img")).not_to_have_attribute("src", before)
    shot(page, tmp_path, "learn")


def test_a_file_that_is_no_picture_is_refused_at_once(visit, tmp_path):
    page = visit()
    (tmp_path / "holiday.png").write_text("no picture")
    tab(page, "Ask")
    page.get_by_role("button", name="Remove Image").locator("visible=true").click()
    page.locator(".block:visible input[type=file]").first.set_input_files(tmp_path / "holiday.png")
    expect(page.get_by_text("That picture cannot be used")).to_be_visible()
    expect(picture(page, "Picture")).to_have_count(0)


def test_a_phone(visit, tmp_path):
    page = visit(390, 844, has_touch=True, is_mobile=True)
    for name in ("Edit", "Ask", "How it learns", "Draw"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    page.get_by_role("button", name="Draw", exact=True).tap()
    expect(picture(page, "Picture")).to_be_visible()
    shot(page, tmp_path, "phone")


def test_keyboard_alone(visit):
    page = visit()
    expect(page.get_by_label("What to draw")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("two green stars")
    page.keyboard.press("Enter")
    expect(picture(page, "Picture")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_focused()
    edit_tab = page.get_by_role("tab", name="Edit")
    for _ in range(12):  # back over the prompt to the tabs
        page.keyboard.press("Shift+Tab")
        if edit_tab.evaluate("tab => tab === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_label("What to change")).to_be_visible()


@pytest.fixture
def slowly():
    """The model takes a tenth of a second longer for a step: long enough to be stopped on any machine."""
    hook = model._pipeline.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    yield
    hook.remove()


def test_stop(visit, slowly):
    page = visit()
    thumbnails = page.locator(".drawn .gallery-item")
    page.get_by_role("button", name="Settings").locator("visible=true").click()
    for label, value in (("Steps", "50"), ("Size, px", "128")):
        number = page.get_by_role("spinbutton", name=re.compile(label)).locator("visible=true")
        number.fill(value)
        number.press("Tab")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text(DRAWING)).to_be_visible()
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    expect(page.get_by_text(DRAWING)).to_have_count(0)
    page.wait_for_timeout(500)
    expect(thumbnails).to_have_count(8)


@pytest.fixture
def slow_answers():
    """A hundred tokens, each a tenth of a second."""
    mllm = model._pipeline.text_encoder.mllm
    calls: list[float] = []

    def wait(*_):
        calls.append(time.monotonic())
        time.sleep(0.1)

    hook = mllm.register_forward_pre_hook(wait)
    mllm.generation_config.min_new_tokens = 100
    yield calls
    hook.remove()
    mllm.generation_config.min_new_tokens = None


def test_stop_an_answer_by_keyboard(visit, slow_answers, tmp_path):
    page = visit()
    tab(page, "Ask")
    expect(picture(page, "Picture")).to_be_visible()
    page.get_by_label("Question").focus()
    page.keyboard.press("Enter")
    said = page.locator(".answer textarea")
    expect(said).not_to_have_value("")  # its beginning, long before its end
    shot(page, tmp_path, "asking")
    page.get_by_label("Question").focus()
    for name in ("Ask", "Stop"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name=name, exact=True).locator("visible=true")).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_timeout(1000)
    stopped, left = len(slow_answers), said.input_value()
    page.wait_for_timeout(1000)
    assert len(slow_answers) == stopped < 100 and said.input_value() == left
    slow_answers.clear()
    mllm = model._pipeline.text_encoder.mllm
    mllm.generation_config.min_new_tokens = None
    page.get_by_role("button", name="Ask", exact=True).click()  # and the next question is answered
    expect(said).to_have_value(model._pipeline.describe(app.example_pictures()[2]))
