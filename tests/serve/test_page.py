"""The page in a real browser: what somebody does with it, and that nothing else is asked."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lapilli.serve.options import ApiKey
from tests.conftest import REPOSITORY
from tests.serve.conftest import KEY, picture

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
AXE = REPOSITORY / "web" / "node_modules" / "axe-core" / "axe.min.js"
WAIT = 60_000  # ms: machines are busy
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
ARGS = (
    *QUIET,
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*ARGS])
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A browser of its own, whose console must stay empty and which asks one server alone."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    context.complaints = []
    context.asked = []
    context.on(
        "console", lambda one: context.complaints.append(one.text) if one.type == "error" else None
    )
    context.on("weberror", lambda one: context.complaints.append(str(one.error)))
    context.on("request", lambda one: context.asked.append(one.url))
    yield context
    context.close()


@pytest.fixture
def page(context, client):
    page = opened(context, client)
    yield page
    assert context.complaints == []
    own = re.compile(re.escape(str(client.base_url).rstrip("/")) + r"/(v1/.*|openapi\.json)?$")
    assert [
        url
        for url in context.asked
        if not own.match(url) and not url.startswith(("data:", "blob:"))
    ] == []


def opened(context, client):
    page = context.new_page()
    page.goto(str(client.base_url))
    expect(page.get_by_role("button", name="Model and parameters: pebble")).to_be_visible()
    return page


def draw(page, shape="circle", colour="red"):
    """Draw one shape in the middle, as with a mouse."""
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("radio", name=shape).check()
    page.get_by_role("radio", name=colour).check()
    page.get_by_label("Drawing area").click()
    page.get_by_role("button", name="Use the drawing").click()


def ask(page, question):
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Send").click()


def answers(page):
    return page.get_by_role("article", name="Answer").locator(".markdown")


def test_a_drawn_red_circle_is_red(page):
    draw(page)
    expect(page.get_by_role("img", name="drawing: red circle")).to_be_visible()
    ask(page, "What color is the circle?")
    expect(answers(page)).to_have_text("red")
    expect(page.locator(".facts")).to_contain_text("64 of pictures")
    expect(page.locator(".facts")).to_contain_text("first after")
