"""The play server's page in headless Chromium: what a player does, and what the page then shows.

One server, one place and one browser tab for all tests, so that they share one session; each test
begins at the first start, paused. The model is tiny and random: its pictures change, no more.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from scd.cli import main
from scd.data.lists import ClipEntry, write_list
from scd.data.video import VideoFile
from scd.options import load_options
from scd.play.server import STATIC, Address, listen
from scd.play.starts import make_starts
from tests.faults.runs import start_processes
from tests.play import own_data, pretrained_folder

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.page import (
    BEGIN,
    FORWARD,
    NEEDS_CHROMIUM,
    NONE,
    PHONE,
    RIGHT,
    SECONDS,
    Page,
    on_a_phone,
    open_browser,
    steer_by_gamepad,
    touching,
)

ROOT = Path(__file__).parent.parent
pytestmark = NEEDS_CHROMIUM
ADDRESS = r"http://127\.0\.0\.1:(\d+)/\S*"  # with a token, if there is one
# Every socket of the page, so that a test can cut it.
SPY = """
window.sockets = [];
window.WebSocket = class extends WebSocket {
  constructor(...given) { super(...given); sockets.push(this); }
};
"""


def play(*arguments: str) -> None:
    """What a server runs. It was imported before this module, by its fork server."""
    sys.exit(main(["play", *arguments]))


class Server:
    """`scd play` as a process of its own; started again, it has the same address.

    What it prints lies in `folder`.
    """

    def __init__(self, folder: Path, model: Path, *more: str):
        self._folder = folder
        self._arguments = ["--sessions", "1", "--model", str(model), *more]
        self._port = 0
        self.start()

    def start(self) -> None:
        arguments = [*self._arguments, "--port", str(self._port)]
        (self._process,) = start_processes(self._folder, 1, play, arguments)

    @cached_property
    def url(self) -> str:
        """The address that the server prints once it is ready."""
        output = self._folder / "output-0.txt"
        while not (output.exists() and (url := re.search(ADDRESS, output.read_text()))):
            assert self._process.is_alive(), output.read_text()
            time.sleep(0.05)
        self._port = int(url[1])
        return url[0]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It hangs: its connections stay open, and nothing comes."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_autoencoder_path) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("pretrained")
    kinds = ("scd", "causal_dit")
    model, dense = (pretrained_folder(root / kind, tiny_autoencoder_path, kind) for kind in kinds)
    starts = ["--starts", str(ROOT / "assets/starts")]  # wherever the fork server began
    server = Server(root, model, "--baseline", str(dense), *starts, "--token", "a+b &c")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads, server) -> Iterator[Any]:
    """A browser; it starts while the server does."""
    driver = open_browser(downloads)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SPY})
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, server) -> Iterator[Page]:
    page = Page(driver)
    page.open(server.url)
    yield page
    # Nothing inline or foreign was refused, and no script has failed.
    messages = [entry["message"] for entry in driver.get_log("browser")]
    assert not [line for line in messages if re.search("Security Policy|Uncaught", line)]


def test_held_keys_walk(page):
    assert page.find("#invitation").is_displayed()
    pictures = {page.picture()}
    page.hold(Keys.ARROW_UP)
    page.wait(lambda: pictures.add(page.picture()) or len(pictures) > 4, "other pictures")
    assert set(page.actions(4)) == {FORWARD}
    assert page.find("[data-move=forward]").get_attribute("class") == "lit"
    assert not page.find("#invitation").is_displayed()
    page.hold("d")  # with forward: a curve, frame by frame
    page.wait(lambda: RIGHT in page.actions(1), "a turn")
    curve = page.actions(10)
    assert set(curve) == {FORWARD, RIGHT}
    assert 3 <= curve.count(RIGHT) <= 7
    page.release(Keys.ARROW_UP)
    page.wait(lambda: set(page.actions(4)) == {RIGHT}, "turning alone")
    page.release("d")
    page.wait(lambda: set(page.actions(2)) == {NONE}, "standing")
    assert not page.all("#pad .lit")
    page.hold("w")  # and let go of in another window
    page.wait(lambda: set(page.actions(2)) == {FORWARD}, "walking")
    page.js("dispatchEvent(new Event('blur'))")
    page.wait(lambda: set(page.actions(2)) == {NONE}, "standing")


def test_figures(page):
    page.hold("w")
    page.wait_for_text("#rate", r"^\d+\.\d$")
    page.release("w")
    assert int(page.wait_for_text("#latency", r"^\d+(?= ms$)")) > 0
    page.wait_for_text("#latency95", r"p95 \d+")
    row = page.wait(lambda: page.all("#times [data-world=model] .stack"), "times of the parts")[0]
    label = row.get_attribute("aria-label")
    times = re.fullmatch(r"encoder (\S+) ms, denoising (\S+) ms, decoding (\S+) ms", label)
    assert times and all(float(ms) > 0 for ms in times.groups())


def test_pictures_follow_the_keys(page):
    """Paused: frames come one by one, another action makes another picture, the same the same."""
    pictures = []
    for key in (Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_LEFT):
        page.step()  # so that this is not the start, where a key ends the pause
        page.hold(key)
        page.step()
        pictures.append(page.picture())
        page.release(key)
        page.press(Keys.BACKSPACE)
        page.wait_for_frame(BEGIN)
    left, forward, left_again = pictures
    assert left != forward
    assert left == left_again


def test_rewind_and_branches(page):
    for _ in range(2):
        page.step()
    here = page.picture()
    page.find("#branch").click()
    page.wait(lambda: page.all("#branches .kept"), "the kept branch")
    for _ in range(3):
        page.step()
    there = page.picture()
    assert there != here
    # Frame 25 of the strip: it begins at 23 and has room for 64.
    strip = page.find("#timeline")
    width = strip.rect["width"]
    x = round(2.5 / 64 * width - width / 2)
    ActionChains(page.driver).move_to_element_with_offset(strip, x, 0).perform()
    assert page.find("#preview").is_displayed()
    assert page.text("#preview figcaption") == "frame 25"
    ActionChains(page.driver).click().perform()
    page.wait_for_frame(25)
    page.wait(lambda: page.picture() == here, "the earlier picture")
    page.find("#branches button:not(.kept)").click()
    page.wait_for_frame(28)
    page.wait(lambda: page.picture() == there, "the picture of the branch")
    # By keyboard alone.
    page.js("document.querySelector('#timeline').focus()")
    page.press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ENTER)
    page.wait_for_frame(24)


def test_record(page, downloads):
    page.step()
    page.press("r")
    page.wait(lambda: page.find("#record").get_attribute("aria-pressed") == "true", "recording")
    for _ in range(4):
        page.step()
    page.press("r")
    page.wait_for_text("#status", r"Saved .*\.mp4")
    path = page.wait(lambda: next(downloads.glob("*.mp4"), None), "the file")
    video = VideoFile(path)
    assert len(video) == 5
    assert video.frames(np.arange(5)).shape == (5, 256, 256, 3)


def test_names_of_recordings_in_any_script(page):
    name = page.driver.execute_async_script(
        """
        const [done, fetched] = [arguments[0], window.fetch];
        const named = "attachment; filename*=UTF-8''%E6%B9%96-0-5.mp4";
        window.fetch = async () => new Response("", {headers: {"Content-Disposition": named}});
        import("/static/server.js")
          .then(({ recordVideo }) => recordVideo("id", {}))
          .then(({ name }) => done(name), (error) => done(String(error)))
          .finally(() => { window.fetch = fetched; });
        """
    )
    assert name == "湖-0-5.mp4"


def test_record_and_leave(page, downloads):
    """Nothing that was recorded is lost, or slips in, without a word."""
    page.step()
    page.press("r")
    for _ in range(2):
        page.step()
    page.press(Keys.BACKSPACE)
    page.wait_for_text("#status", "what you went back over is not in it")
    page.wait_for_frame(BEGIN)
    page.step()
    before = set(downloads.glob("*.mp4"))
    page.find("#branches button").click()
    page.wait_for_text("#status", r"Saved .*\.mp4")
    page.wait_for_frame(BEGIN + 3)
    (path,) = page.wait(lambda: set(downloads.glob("*.mp4")) - before, "the file")
    assert len(VideoFile(path)) == 2  # frames 23 and 24 of the line that was left
    page.press("r")
    page.find("#starts button").click()
    page.wait_for_text("#status", "without a file: another start was chosen")


def test_side_by_side(page):
    """The models, and real Doom where it is installed, under the same keys."""
    titles = ["tiny_scd", "tiny_causal_dit"] + ["Real Doom"] * bool(find_spec("vizdoom"))
    places = range(len(titles))
    page.press("v")
    page.wait(lambda: len(page.all("#worlds figure")) == len(titles), "all worlds")
    page.wait(lambda: page.frame == BEGIN and page.picture(0) == page.picture(1), "their start")
    page.step()  # so that this is not the start, where a key ends the pause
    begin = [page.picture(place) for place in places]
    page.hold(Keys.ARROW_LEFT)
    page.step()
    page.release(Keys.ARROW_LEFT)
    then = [page.picture(place) for place in places]
    assert not set(begin) & set(then) and len(set(then)) == len(titles)
    captions = page.all("#worlds figcaption")
    assert [caption.text for caption in captions] == titles
    assert captions[1].get_attribute("title").startswith("CausalDiT, 0.")
    page.press("v")
    page.wait(lambda: len(page.all("#worlds figure")) == 1, "one world")


def test_settings_stay_with_the_session(page, server):
    page.js("document.querySelector('#steps').focus()")
    before = int(page.text("output[for=steps]"))
    page.press(Keys.ARROW_RIGHT)
    page.wait_for_text("output[for=steps]", f"^{before + 1}$")
    page.js("document.querySelector('#seed').select()")
    page.press("77", Keys.ENTER)
    page.press(Keys.ESCAPE)
    page.step()
    page.driver.get(server.url)
    page.wait_for_frame(BEGIN + 1)
    assert page.text("output[for=steps]") == str(before + 1)
    assert page.find("#seed").get_attribute("value") == "77"
    page.js("document.querySelector('#steps').focus()")
    page.press(Keys.ARROW_LEFT)
    page.wait_for_text("output[for=steps]", f"^{before}$")


def test_gamepad(page):
    steer_by_gamepad(page)


def test_tab_reaches_everything(page):
    wanted = {"pause", "rewind", "step", "branch", "record", "timeline", "steps", "guidance"}
    wanted |= {"fps", "seed", "dice", "smooth", "help", "stage", "start", "world"}
    reached = set()
    for _ in range(40):
        page.press(Keys.TAB)
        names, outline, canvas = page.js(
            """
            const e = document.activeElement, style = (e) => getComputedStyle(e).outlineStyle;
            const canvas = e.querySelector("canvas");
            return [[e.id, ...Object.keys(e.dataset)], style(e), canvas ? style(canvas) : "none"];
            """
        )
        if "phase" in names:  # the page's body, between the last and the first
            continue
        reached |= set(names)
        assert {outline, canvas} != {"none"}, f"{names}: one cannot see that it has the focus"
    assert wanted <= reached
    assert page.paused and page.frame == BEGIN


def test_keys_are_explained(page):
    page.press("?")
    assert page.find("#keys").is_displayed()
    page.press(Keys.ARROW_UP)  # is not for the world now
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("#keys").is_displayed(), "the world again")
    assert page.paused and page.frame == BEGIN


def test_hidden_page_pauses(page):
    hide = """
    Object.defineProperty(document, "hidden", {value: arguments[0], configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
    """
    page.press(" ")
    page.wait(lambda: not page.paused, "play")
    page.js(hide, True)
    page.wait(lambda: page.paused, "the pause")
    page.js(hide, False)
    page.wait(lambda: not page.paused, "play again")
    page.press(" ")
    page.wait(lambda: page.paused, "the player's pause")
    page.js(hide, True)
    page.js(hide, False)
    page.step()  # whatever was asked for before has happened by then
    assert page.paused


def test_a_key_that_repeats_acts_once(page):
    repeated = "{key: arguments[0], repeat: true, bubbles: true}"
    for key in (" ", ".", "r"):
        page.js(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {repeated}))", key)
    page.step()
    assert page.paused and page.frame == BEGIN + 1
    assert page.find("#record").get_attribute("aria-pressed") == "false"


def test_starts_have_pictures(page):
    """Which the server gives to those with a token alone."""
    widths = "return [...document.querySelectorAll('#starts img')].map((i) => i.naturalWidth)"
    page.wait(lambda: set(page.js(widths)) == {64}, "pictures of 64 pixels")


def test_phone(page):
    with on_a_phone(page):
        wide, shown = page.js("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide == shown == PHONE["width"]
        below = page.js("return document.querySelector('#bar').getBoundingClientRect().bottom")
        assert below <= PHONE["height"], "the pad and the buttons need scrolling"
        button = page.find("[data-move=forward]").rect
        assert min(button["width"], button["height"]) >= 44
        with touching(page, "[data-move=forward]"):
            page.wait(lambda: set(page.actions(3)) == {FORWARD}, "walking")
        page.wait(lambda: set(page.actions(3)) == {NONE}, "standing")


@pytest.mark.parametrize("size", [(1180, 820), (844, 390)])
def test_other_touch_screens(page, size):
    """A tablet, and a phone held sideways: all that plays is there, and large enough."""
    width, height = size
    with on_a_phone(page, width=width, height=height):
        assert page.js("return document.documentElement.scrollWidth") == width
        for button in page.all("#pad button:not([hidden])"):
            box = button.rect
            assert min(box["width"], box["height"]) >= 44
            assert box["y"] + box["height"] <= height
        left, forward = (page.find(f"[data-move={name}]").rect for name in ("left", "forward"))
        assert left["x"] < forward["x"]
        stage, picture = (page.find(what).rect for what in ("#stage", "#worlds canvas"))
        assert picture["y"] + picture["height"] <= stage["y"] + stage["height"] + 1, "cut off"


def test_a_server_that_hangs(page, server):
    page.step()
    with server.frozen():
        page.wait_for_text("#notice-title", "The server does not answer")
        assert page.find("#notice").is_displayed()
        page.press("b")  # nothing is promised that cannot be done
        assert "Kept" not in page.text("#status")
    page.wait(lambda: not page.find("#notice").is_displayed(), "the server again")
    assert not page.all("#branches button")
    page.step()


def test_cut_connection_goes_on(page):
    for _ in range(3):
        page.step()
    picture = page.picture()
    page.js("sockets.at(-1).close()")
    page.wait_for_text("#status", "Connected again: going on where you were")
    assert not page.find("#notice").is_displayed()
    assert page.frame == BEGIN + 3
    assert page.picture() == picture
    page.step()


def test_another_page_and_busy(page, server):
    """Somebody else takes the session over, gives it back, and then has the only place."""
    session = page.js("return sessionStorage.getItem('scd session')")
    address = server.url.replace("http", "ws").replace("/?", "/ws?") + f"&session={session}"
    with connect(address) as other:
        page.wait_for_text("#notice-title", "another page")
        page.find("#notice-button").click()
        page.wait(lambda: not page.find("#notice").is_displayed(), "the session")
        with pytest.raises(ConnectionClosed, match="4409"):
            while True:
                other.recv(SECONDS)
    page.step()
    page.js("sessionStorage.clear()")
    page.driver.get("about:blank")
    with connect(address) as other:
        assert json.loads(other.recv(SECONDS))["resumed"]
        page.driver.get(server.url)
        page.wait_for_text("#notice-title", "The only place is taken")
        page.wait_for_text("#notice-text", "You are next")
        with server.frozen():
            page.wait_for_text("#notice-title", "The server does not answer")
        page.wait_for_text("#notice-title", "The only place is taken")
        other.send("no message")  # ends the session at once
        page.wait(lambda: not page.find("#notice").is_displayed(), "a place")
    page.wait_for_frame(BEGIN)


def test_killed_server_comes_back(page, server):
    there = "return document.querySelector('#starts [aria-pressed=true]')?.dataset.start"
    button = page.all("#starts button")[2]
    chosen = button.get_attribute("data-start")
    button.click()
    page.wait(lambda: page.js(there) == chosen, "another start")
    page.step()
    server.kill()
    page.wait_for_text("#notice-title", "cannot be reached")
    assert page.find("#notice").is_displayed()
    server.start()
    page.wait(lambda: not page.find("#notice").is_displayed(), "the server again")
    page.wait_for_frame(BEGIN)
    page.wait(lambda: page.js(there) == chosen, "the same start as before")
    page.step()


@pytest.fixture
def own_server(tmp_path, tiny_autoencoder_path) -> Iterator[Server]:
    """A model of other actions, none of which stands for no key, that begins in clips of noise."""
    names = ["left", "right", "move_forward", "back", "jump", "use item"]
    folder = pretrained_folder(tmp_path / "own", tiny_autoencoder_path, actions=names)
    own_data(tmp_path, clips=2, frames=BEGIN + 1, actions=len(names))
    options = load_options(folder / "options.yml", [f"data.root={tmp_path}"])
    make_starts(options, tmp_path / "starts", {"one": 0, "two": 1}, frames=BEGIN + 1)
    server = Server(tmp_path, folder, "--starts", str(tmp_path / "starts"))
    yield server
    server.kill()


def test_other_actions_than_dooms(driver, own_server):
    page = Page(driver)
    page.open(own_server.url)
    assert [b.get_attribute("data-world") for b in page.all("#beside button")] == [
        "model",
        "baseline",
    ]
    assert "Doom" not in page.js("return document.body.innerText")
    assert [b.get_attribute("data-move") for b in page.all("#pad button") if b.is_displayed()] == [
        *("left", "forward", "right", "back"),
    ]
    assert [b.text for b in page.all("#others button")] == ["jump Q", "use item E"]
    for keys, action in ((Keys.ARROW_DOWN, 3), ("w", 2), ("q", 4), ("e", 5), ("a", 0)):
        page.hold(keys)
        page.wait(lambda action=action: set(page.actions(3)) == {action}, f"action {action}")
        page.release(keys)
    assert not page.paused
    page.wait(lambda: len({page.frame, time.sleep(0.5), page.frame} - {None}) == 1, "a still world")
    frame = page.frame
    button = page.all("#others button")[1]
    ActionChains(driver).click_and_hold(button).perform()
    page.wait(lambda: set(page.actions(3)) == {5}, "the button's action")
    assert button.get_attribute("class") == "lit"
    ActionChains(driver).release().perform()
    assert page.frame > frame
    page.press("?")
    assert "other actions" in page.find("#keys").text and "walk back" in page.find("#keys").text


@pytest.fixture
def keys_server(tmp_path, tiny_autoencoder_path) -> Iterator[Server]:
    """A model whose actions are keys, several of which can be held at once."""
    names = ["turn left", "turn right", "forward", "jump"]
    folder = pretrained_folder(
        tmp_path / "keys", tiny_autoencoder_path, actions=names, condition="action_vector"
    )
    video = np.zeros((BEGIN + 1, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "clip.npz", video=video, actions=np.zeros((BEGIN + 1, 4)))
    write_list(tmp_path / "val.json", [ClipEntry("clip.npz")])
    options = load_options(folder / "options.yml", [f"data.root={tmp_path}"])
    make_starts(options, tmp_path / "starts", {"one": 0}, frames=BEGIN + 1)
    server = Server(tmp_path, folder, "--starts", str(tmp_path / "starts"))
    yield server
    server.kill()


def test_keys_that_are_held_together(driver, keys_server):
    """Each is a bit of the action, and no frame takes them by turns; nothing held is an action."""
    page = Page(driver)
    page.open(keys_server.url)
    held = 0
    for key, bit in (("w", 4), ("a", 1), ("q", 8)):
        page.hold(key)
        held += bit
        page.wait(lambda held=held: set(page.actions(3)) == {held}, f"action {held}")
    assert len(page.all("button.lit")) == 3
    page.release("w", "a", "q")
    page.wait(lambda: set(page.actions(3)) == {0}, "no key")
    assert not page.paused


@pytest.fixture(scope="module")
def closing_server() -> Iterator[str]:
    """It closes every connection, with the code that the page's address has as token."""

    async def close(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close(int(socket.query_params["token"]), "a reason")

    listening = listen(Address(port=0))
    app = Starlette(
        routes=[
            Route("/", lambda _: FileResponse(STATIC / "index.html")),
            WebSocketRoute("/ws", close),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    ("code", "title", "button"),
    [
        (4401, "A token is missing", None),
        (4408, "Closed, as nobody played", "Play again"),
        (4500, "The server ended this session", "Play again"),
        (4503, "Very busy", None),
    ],
)
def test_says_why_it_ended(driver, closing_server, code, title, button):
    page = Page(driver)
    driver.get(f"{closing_server}?token={code}")
    page.wait_for_text("#notice-title", title)
    shown = page.find("#notice-button")
    assert (shown.text if shown.is_displayed() else None) == button
    if code == 4500:
        assert "a reason" in page.text("#notice-text")
