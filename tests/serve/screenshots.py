"""Take the pictures of docs/guide/page.md of a real server with pebble.

python -m tests.serve.screenshots
"""

import io

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import lapilli
from tests.conftest import REPOSITORY
from tests.serve.browser import ARGS, CHROMIUM, WAIT, ask, draw
from tests.serve.conftest import serving

ASSETS = REPOSITORY / "docs" / "assets"
WIDE, PHONE = (1100, 800), (360, 800)


def opened(
    browser: Browser, url: httpx.URL, size: tuple[int, int] = WIDE, scheme: str = "light"
) -> Page:
    width, height = size
    viewport = {"width": width, "height": height}
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.set_default_timeout(WAIT)
    page.goto(str(url))
    page.get_by_role("button", name="What color is the circle?").wait_for()
    return page


def converse(page: Page) -> None:
    """Ask two questions about an example."""
    page.get_by_role("button", name="What is to the left of the green star?").click()
    page.locator(".facts").nth(0).wait_for()
    ask(page, "How many objects are there?")
    page.locator(".facts").nth(1).wait_for()


def save(page: Page, name: str) -> None:
    """Store what is seen with 128 colours, which a page of few needs."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    few = image.quantize(128, dither=Image.Dither.NONE)
    few.save(ASSETS / f"page-{name}.png", optimize=True)


def take(browser: Browser, url: httpx.URL) -> None:
    for name, size, scheme in (
        ("light", WIDE, "light"),
        ("dark", WIDE, "dark"),
        ("phone", PHONE, "light"),
    ):
        page = opened(browser, url, size, scheme)
        converse(page)
        save(page, name)
    page = opened(browser, url)
    page.get_by_role("button", name="Draw").click()
    for shape, colour, x, y in (
        ("circle", "red", 0.3, 0.3),
        ("star", "blue", 0.7, 0.35),
        ("triangle", "green", 0.5, 0.75),
    ):
        page.get_by_role("radio", name=shape).check()
        page.get_by_role("radio", name=colour).check()
        box = page.get_by_label("Drawing area").bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    save(page, "drawing")
    page = opened(browser, url)
    if page.get_by_role("tab").count():
        page.get_by_role("tab", name="Decisions").click()
        draw(page)
        page.get_by_role("button", name="Ask 20 questions").click()
        page.get_by_role("row").nth(20).wait_for()
        page.locator(".decisions").evaluate("view => view.scrollTo(0, 0)")
        save(page, "decisions")


if __name__ == "__main__":
    with (
        serving(lapilli.load("pebble")) as client,
        sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=[*ARGS]) as browser,
    ):
        take(browser, client.base_url)
