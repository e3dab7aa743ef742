"""The page in a real browser: what somebody does with it, and that it asks its own server alone."""

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from lapilli.serve.options import ApiKey
from tests.serve.browser import ARGS, CHROMIUM, WAIT, answers, ask, draw, find_axe, scripted
from tests.serve.conftest import KEY, picture

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    expect = sync_playwright = None
else:
    expect.set_options(timeout=WAIT)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
    pytest.mark.skipif(sync_playwright is None, reason="playwright is not installed"),
]

COLOUR = "What color is the circle?"
PROGRAM = Path(sys.executable).parent / "lapilli"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*ARGS])
        yield browser
        browser.close()


@pytest.fixture
def new_context(browser):
    """Open browsers of their own, which note what their console complains of and what they ask."""
    made = []

    def new(**options):
        options = {"viewport": {"width": 1200, "height": 800}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(WAIT)
        context.complaints, context.asked = [], []
        context.on("console", lambda one: context.complaints.append((one.type, one.text)))
        context.on("weberror", lambda one: context.complaints.append(("error", str(one.error))))
        context.on("request", lambda one: context.asked.append(one.url))
        made.append(context)
        return context

    yield new
    for context in made:
        context.close()


@pytest.fixture
def context(new_context):
    return new_context()


@pytest.fixture
def page(context, client):
    """The page of a server with pebble; at the end nothing has been complained of."""
    yield opened(context, client)
    assert [text for kind, text in context.complaints if kind == "error"] == []
    own = re.compile(re.escape(str(client.base_url).rstrip("/")) + r"/(v1/.*|openapi\.json)?$")
    others = [url for url in context.asked if not url.startswith(("data:", "blob:"))]
    assert [url for url in others if not own.match(url)] == []


def opened(context, client):
    page = context.new_page()
    page.goto(str(client.base_url))
    expect(page.get_by_role("button", name="Model and parameters: pebble")).to_be_visible()
    return page


def new_conversation(page):
    page.get_by_role("button", name="New conversation").click()


def titles(page):
    return page.get_by_role("navigation").locator("li button:first-child")


def sent(page):
    """Return the list that fills with the bodies of what the page asks from now on."""
    bodies = []
    page.on("request", lambda one: bodies.append(one.post_data_json) if one.post_data else None)
    return bodies


class TestPictures:
    def test_a_drawn_red_circle_is_red(self, page):
        draw(page)
        expect(page.get_by_role("img", name="drawing: red circle")).to_be_visible()
        ask(page, COLOUR)
        expect(answers(page)).to_have_text("red")

    def test_a_drawing_by_keyboard_alone(self, page):
        page.get_by_role("button", name="Draw").focus()
        page.keyboard.press("Enter")
        page.get_by_role("radio", name="brush").focus()
        page.keyboard.press("ArrowRight")  # circle
        page.get_by_role("radio", name="red").focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")  # blue
        page.keyboard.press("Tab")
        expect(page.get_by_label("Drawing area")).to_be_focused()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Use the drawing").focus()
        page.keyboard.press("Enter")
        page.get_by_label("Your question").focus()
        page.keyboard.type(COLOUR)
        page.keyboard.press("Enter")
        expect(answers(page)).to_have_text("blue")

    def test_a_line_is_drawn_and_undone(self, page):
        page.get_by_role("button", name="Draw").click()
        box = page.get_by_label("Drawing area").bounding_box()
        page.mouse.move(box["x"] + 30, box["y"] + 30)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, box["y"] + 100, steps=4)
        page.mouse.up()
        colours = """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, 480, 480);
            return new Set(new Uint32Array(data.buffer)).size;
        }"""
        assert page.locator("canvas").evaluate(colours) > 1
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_role("button", name="Use the drawing")).to_be_disabled()
        assert page.locator("canvas").evaluate(colours) == 1

    @pytest.mark.parametrize("way", ["paste", "drop"])
    def test_pasted_and_dropped_pictures(self, page, way):
        data = base64.b64encode(picture("green")).decode()
        page.evaluate(
            """async ([way, data]) => {
                const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], "circle.png", { type: "image/png" }));
                const event = way === "paste"
                    ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
                    : new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
                document.body.dispatchEvent(event);
            }""",
            [way, data],
        )
        expect(page.get_by_role("img", name="circle.png")).to_be_visible()
        ask(page, COLOUR)
        expect(answers(page)).to_have_text("green")

    def test_several_pictures_go_in_their_order(self, page):
        files = [
            {"name": f"{colour}.png", "mimeType": "image/png", "buffer": picture(colour)}
            for colour in ("red", "blue", "green")
        ]
        page.locator("input.file").first.set_input_files(files)
        page.get_by_role("button", name="Remove blue.png").click()
        bodies = sent(page)
        ask(page, COLOUR)
        expect(page.locator(".facts")).to_contain_text("128 of pictures")
        first, second, text = bodies[0]["messages"][0]["content"]
        assert text == {"type": "text", "text": COLOUR}
        for part, colour in ((first, "red"), (second, "green")):
            data = part["image_url"]["url"].partition(",")[2]
            assert base64.b64decode(data) == picture(colour)  # small ones go as they are

    def test_a_photo_is_turned_upright_and_scaled_down(self, page):
        out = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        Image.new("RGB", (2000, 1000), "red").save(out, "JPEG", exif=exif)
        file = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": out.getvalue()}
        page.locator("input.file").first.set_input_files([file])
        shown = page.get_by_role("img", name="photo.jpg")
        expect(shown).to_be_visible()
        assert shown.evaluate("one => [one.naturalWidth, one.naturalHeight]") == [672, 1344]

    def test_the_camera(self, page):
        page.context.grant_permissions(["camera"])
        page.get_by_role("button", name="Photo").click()
        page.get_by_role("button", name="Take the photo").click()
        photo = page.get_by_role("img", name="photo")
        expect(photo).to_be_visible()
        assert photo.evaluate("one => one.naturalWidth") > 100

    def test_what_is_no_picture_is_named(self, page):
        file = {"name": "letter.png", "mimeType": "image/png", "buffer": b"Dear reader"}
        page.locator("input.file").first.set_input_files([file])
        expect(page.get_by_role("alert")).to_contain_text("letter.png is no picture")


class TestConversation:
    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            (COLOUR, "red"),
            ("What is to the left of the green star?", "a blue square"),
            ("How many objects are there?", "4"),
        ],
    )
    def test_the_examples(self, page, question, answer):
        page.get_by_role("button", name=question).click()
        expect(answers(page)).to_have_text(answer)

    def test_facts_of_model_and_answer(self, page):
        page.get_by_role("button", name=COLOUR).click()
        facts = page.locator(".facts")
        expect(facts).to_contain_text(re.compile(r"\d+ tokens read \(64 of pictures"))
        expect(facts).to_contain_text(re.compile(r"2 written · first after \d+ ms · \S+ tokens/s"))
        page.get_by_role("button", name="Model and parameters").click()
        expect(page.locator(".model")).to_contain_text("llama, 5 layers of width 256")
        expect(page.locator(".model")).to_contain_text("8.9 million")

    def test_a_second_question_follows_the_first(self, page):
        draw(page, "square", "blue")
        ask(page, "What color is the square?")
        expect(answers(page)).to_have_text(["blue"])
        ask(page, "Is there a circle?")
        expect(answers(page)).to_have_text(["blue", "no"])

    def test_regenerate_and_edit(self, page):
        draw(page)
        ask(page, COLOUR)
        expect(answers(page)).to_have_text(["red"])
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator(".facts")).to_contain_text("kept")
        expect(answers(page)).to_have_text(["red"])
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Your question").first.fill("What shape is it?")
        page.get_by_role("button", name="Ask again").click()
        expect(answers(page)).to_have_text(["circle"])
        expect(page.locator(".said")).to_have_text(["What shape is it?"])

    def test_parameters_are_sent_and_kept(self, page):
        page.get_by_role("button", name="Model and parameters").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Most tokens").fill("1")
        page.get_by_label("Instructions before").fill("Be brief.")
        page.get_by_role("button", name="Done").click()
        page.reload()
        bodies = sent(page)
        page.get_by_role("button", name="How many objects are there?").click()
        expect(page.locator(".facts")).to_contain_text("1 written")
        assert {"temperature", "max_tokens"} <= bodies[0].keys()
        assert not {"top_p", "top_k", "seed", "system"} & bodies[0].keys()
        assert bodies[0]["temperature"] == 0
        assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}

    def test_an_option_out_of_bounds_is_explained(self, context, client):
        page = opened(context, client)
        page.get_by_role("button", name="Model and parameters").click()
        page.get_by_label("Temperature").fill("-1")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name=COLOUR).click()
        expect(page.get_by_role("alert")).to_contain_text("temperature")
        page.get_by_role("button", name="Model and parameters").click()
        page.get_by_role("button", name="Defaults").click()
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Try again").click()
        expect(answers(page)).to_have_text("red")

    def test_export(self, page):
        page.get_by_role("button", name=COLOUR).click()
        expect(answers(page)).to_have_text("red")
        with page.expect_download() as found:
            page.get_by_role("button", name="Markdown").click()
        text = Path(found.value.path()).read_text("utf-8")
        assert re.search(r"## You\n\n!\[a red circle\]\(data:image/png;base64,\S+\)\n\nWhat", text)
        assert text.endswith("## Answer\n\nred\n")
        with page.expect_download() as found:
            page.get_by_role("button", name="JSON").click()
        messages = json.loads(Path(found.value.path()).read_text("utf-8"))["messages"]
        assert [one["role"] for one in messages] == ["user", "assistant"]
        assert messages[0]["content"][0]["type"] == "image_url"


class TestHistory:
    def test_a_reload_keeps_everything(self, page):
        page.get_by_role("button", name=COLOUR).click()
        expect(answers(page)).to_have_text("red")
        page.reload()
        expect(answers(page)).to_have_text("red")
        expect(page.get_by_role("log").get_by_role("img", name="a red circle")).to_be_visible()
        new_conversation(page)
        expect(answers(page)).to_have_count(0)
        titles(page).click()
        expect(answers(page)).to_have_text("red")

    def test_deleted(self, page):
        page.get_by_role("button", name=COLOUR).click()
        expect(answers(page)).to_have_text("red")
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name=f"Delete {COLOUR}").click()
        expect(titles(page)).to_have_count(0)
        page.reload()
        expect(answers(page)).to_have_count(0)

    def test_two_tabs_at_once(self, page, context, client):
        other = opened(context, client)
        for one, colour in ((page, "red"), (other, "blue")):
            draw(one, "circle", colour)
        for one in (page, other):
            ask(one, COLOUR)
        expect(answers(page)).to_have_text("red")
        expect(answers(other)).to_have_text("blue")
        for one in (page, other):
            expect(titles(one)).to_have_count(2)

    def test_two_tabs_in_one_conversation_lose_nothing(self, page, context, client):
        page.get_by_role("button", name=COLOUR).click()
        expect(answers(page)).to_have_text("red")
        other = opened(context, client)
        titles(other).click()
        ask(other, "What shape is it?")
        expect(answers(other)).to_have_text(["red", "circle"])
        expect(answers(page)).to_have_text(["red", "circle"])  # nothing of its own is lost by it
        ask(page, "Is there a square?")
        expect(answers(page)).to_have_text(["red", "circle", "no"])

    def test_tabs_that_answer_at_the_same_time_part(self, context):
        with scripted() as script:
            pages = [context.new_page() for _ in range(2)]
            for one in pages:
                one.goto(script.url)
            ask(pages[0], "first")
            script.say("one")
            script.end()
            expect(answers(pages[0])).to_have_text(["one"])
            titles(pages[1]).click()
            for one in pages:
                ask(one, f"from {pages.index(one)}")
            script.say("same", "same")
            script.say(*2 * [{"choices": [{"delta": {}, "finish_reason": "stop"}]}])
            script.say("[DONE]", "[DONE]")
            for at, one in enumerate(pages):
                expect(one.get_by_role("button", name="Stop")).to_have_count(0)
                expect(one.locator(".said")).to_have_text(["first", f"from {at}"])
                expect(titles(one)).to_have_count(2)

    def test_the_oldest_make_room(self, page):
        page.evaluate(
            """() => {
                const message = { id: "m", role: "user", text: "x".repeat(900_000), pictures: [] };
                for (let at = 0; at < 5; at++) {
                    const one = { id: `old${at}`, revision: "r", updated: at, messages: [message] };
                    localStorage.setItem(`lapilli:conversation:old${at}`, JSON.stringify(one));
                }
                for (let size = 1_000_000, at = 0; size > 100; at++) {
                    try { localStorage.setItem(`filler${at}`, "y".repeat(size)); }
                    catch { size /= 2; }
                }
            }"""
        )
        page.get_by_role("button", name="How many objects are there?").click()
        expect(answers(page)).to_have_text("4")
        kept = page.evaluate("Object.keys(localStorage)")
        assert "lapilli:conversation:old4" in kept
        assert "lapilli:conversation:old0" not in kept
        page.reload()
        expect(answers(page)).to_have_text("4")


class TestStream:
    def test_an_answer_comes_piece_by_piece(self, context):
        page = context.new_page()
        with scripted() as script:
            page.goto(script.url)
            ask(page, "Speak")
            expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
            script.say("**One** ")
            expect(answers(page).locator("strong")).to_have_text("One")
            script.say("two")
            expect(answers(page)).to_have_text("One two")
            script.end()
            expect(page.get_by_role("button", name="Send")).to_be_visible()
            expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")

    def test_stop_keeps_what_was_said_and_tells_the_server(self, context):
        page = context.new_page()
        with scripted() as script:
            page.goto(script.url)
            ask(page, "Speak")
            script.say("A beginning")
            expect(answers(page)).to_have_text("A beginning")
            page.get_by_role("button", name="Stop").click()
            expect(page.get_by_text("Stopped.")).to_be_visible()
            for _ in range(100):
                script.say("more")
                if script.gone.wait(0.1):
                    break
            assert script.gone.is_set()
            expect(answers(page)).to_have_text("A beginning")
            page.reload()
            expect(answers(page)).to_have_text("A beginning")

    def test_a_connection_that_breaks_says_so(self, context):
        page = context.new_page()
        with scripted() as script:
            page.goto(script.url)
            ask(page, "Speak")
            script.say("Half", None)
            expect(page.get_by_role("alert")).to_contain_text("in the middle of the answer")
            expect(answers(page)).to_have_text("Half")
            page.get_by_role("button", name="Try again").click()
            script.say("Whole")
            script.end()
            expect(answers(page)).to_have_text("Whole")

    def test_an_error_in_the_middle_is_shown_with_its_cause(self, context):
        page = context.new_page()
        with scripted() as script:
            page.goto(script.url)
            ask(page, "Speak")
            script.say("Half", {"error": {"message": "the model failed: no memory"}}, None)
            expect(page.get_by_role("alert")).to_contain_text("the model failed: no memory")

    def test_what_a_model_writes_cannot_act(self, context):
        page = context.new_page()
        with scripted() as script:
            page.goto(script.url)
            ask(page, "Speak")
            script.say(
                "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\n\n",
                "[link](javascript:window.hacked=1) ![](http://elsewhere.example/spy.png)\n\n",
                "<form action='http://elsewhere.example'><button>Send money</button></form>\n\n",
                "<p style='position:fixed;inset:0' id='app'>over</p>\n\n[good](https://good.example)",
            )
            script.end()
            expect(page.get_by_role("link", name="good")).to_have_attribute(
                "rel", "noopener noreferrer nofollow"
            )
            assert page.evaluate("window.hacked") is None
            html = answers(page).inner_html()
            assert not re.search("<img|<form|<button|javascript|style=|id=|onerror", html)
            assert not [url for url in context.asked if "elsewhere" in url]


class TestServer:
    def test_a_key_is_asked_for_and_kept_in_the_tab(self, context, serve):
        guarded = serve(keys=(ApiKey(key=KEY),))
        page = context.new_page()
        page.goto(str(guarded.base_url))
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("button", name=COLOUR).click()
        expect(answers(page)).to_have_text("red")
        page.reload()
        expect(page.get_by_role("button", name="Model and parameters: pebble")).to_be_visible()
        assert page.evaluate("Object.values(localStorage).join()").find(KEY) == -1

    def test_a_server_that_is_restarted_in_the_middle(self, context):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with program(port) as server:
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}")
            page.get_by_role("button", name="How many objects are there?").click()
            expect(answers(page)).to_have_text(["4"])
            server.send_signal(signal.SIGSTOP)  # it takes the question and does not answer
            ask(page, "Is there a circle?")
            expect(page.get_by_text("Reading…")).to_be_visible()
            server.kill()
            expect(page.get_by_role("alert")).to_be_visible()
            expect(page.get_by_text("No connection to the server")).to_be_visible()
        with program(port):
            expect(page.get_by_text("No connection to the server")).to_have_count(0)
            page.get_by_role("button", name="Try again").click()
            expect(answers(page)).to_have_text(["4", "yes"])


@contextmanager
def program(port):
    """Run `lapilli serve` as somebody would; yield the process once it takes requests."""
    server = subprocess.Popen([PROGRAM, "serve", "--port", str(port)])
    try:
        for _ in range(1200):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield server
    finally:
        server.kill()
        server.wait()


class TestDecisions:
    def test_twenty_questions_at_once(self, page, client):
        if "/v1/decisions" not in client.get("/openapi.json").json()["paths"]:
            pytest.skip("this server has no route /v1/decisions")
        page.get_by_role("tab", name="Decisions").click()
        draw(page)
        page.get_by_role("button", name="Ask 20 questions").click()
        rows = page.get_by_role("row")
        expect(rows).to_have_count(21)
        found = {
            row.get_by_role("rowheader").inner_text(): float(
                row.get_by_role("progressbar").get_attribute("value")
            )
            for row in rows.all()[1:]
        }
        assert found["Is there a red circle?"] > 0.9
        assert found["Is there a blue circle?"] < 0.1
        page.get_by_label("Most likely first").check()
        shown = [float(one.get_attribute("value")) for one in page.get_by_role("progressbar").all()]
        assert shown == sorted(shown, reverse=True)

    def test_hidden_where_the_server_has_none(self, context):
        page = context.new_page()
        with scripted() as script:
            page.goto(script.url)
            expect(page.get_by_role("button", name="parameters: scripted")).to_be_visible()
            expect(page.get_by_role("tab")).to_have_count(0)


class TestEverybody:
    """What axe finds in the states of the page, in light and dark, wide and narrow."""

    @pytest.fixture(params=["light", "dark", "phone"])
    def look(self, request, new_context, client):
        size = {"width": 360, "height": 720} if request.param == "phone" else None
        scheme = "dark" if request.param == "dark" else "light"
        options = {"viewport": size} if size else {}
        return opened(new_context(color_scheme=scheme, **options), client)

    def test_axe_finds_nothing(self, look):
        axe = find_axe()
        if axe is None:
            pytest.skip(
                "axe is not installed: pip install axe-playwright-python, or cd web; npm ci"
            )
        found = {}

        def check(state):
            look.evaluate(axe.read_text("utf-8"))
            result = look.evaluate("axe.run()")
            found[state] = [
                (one["id"], [node["html"][:120] for node in one["nodes"]])
                for one in result["violations"]
            ]

        check("empty")
        look.get_by_role("button", name=COLOUR).click()
        expect(look.locator(".facts")).to_be_visible()
        check("answered")
        look.get_by_role("button", name="Edit").click()
        check("editing")
        look.get_by_role("button", name="Cancel").click()
        look.get_by_role("button", name="Draw").click()
        look.get_by_label("Drawing area").click()
        check("drawing")
        look.get_by_role("button", name="Use the drawing").click()
        check("with a picture")
        look.get_by_role("button", name="Model and parameters").click()
        check("settings")
        look.get_by_role("button", name="Done").click()
        if look.get_by_role("tab").count():
            look.get_by_role("tab", name="Decisions").click()
            check("decisions")
            look.get_by_role("tab", name="Chat").click()
        menu = look.get_by_role("button", name="Conversations")
        if menu.is_visible():
            menu.click()
            check("history")
            look.get_by_label("Your question").focus()
            expect(look.get_by_role("navigation")).to_be_hidden()
        assert {state: faults for state, faults in found.items() if faults} == {}

    def test_a_phone_scrolls_in_one_direction(self, new_context, client):
        page = opened(new_context(viewport={"width": 360, "height": 640}), client)
        page.get_by_role("button", name=COLOUR).click()
        expect(page.locator(".facts")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for name in ("Conversations", "Model and", "Colours", "Picture", "Draw", "Photo", "Send"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360

    def test_colours_follow_the_system_until_somebody_chooses(self, new_context, client):
        page = opened(new_context(color_scheme="dark"), client)
        colour = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(colour)
        page.get_by_role("button", name="Colours: auto. Change to light").click()
        # The page is drawn again after the click, not within it.
        page.wait_for_function(f"{colour} !== '{dark}'")
        light = page.evaluate(colour)
        page.reload()
        expect(page.get_by_role("button", name="Colours: light. Change to dark")).to_be_visible()
        page.wait_for_function(f"{colour} === '{light}'")
