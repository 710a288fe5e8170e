"""`scd export --web` in headless Chromium, from static files: the shipped model, by WASM.

What the page itself does is tested in test_play_page.py; here, what takes the server's place.
"""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="the extra scd[web] is not installed")
pytest.importorskip("onnxruntime", reason="the extra scd[web] is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

from scd.cli import main
from scd.data.video import VideoFile
from scd.errors import ScdError
from scd.play.starts import load_starts
from scd.play.worlds import ModelWorld, Settings, frame_seed, load_pretrained
from scd.web.onnx_rollout import OnnxRollout
from scd.web.runtime import PACKAGE, VERSION, fetch_runtime
from scd.web.site import FILES
from tests.page import BEGIN, FORWARD, NEEDS_CHROMIUM, PHONE, RIGHT, Page, open_browser

ROOT = Path(__file__).parent.parent
MODEL, STARTS = ROOT / "assets/pretrained/scd_doom", ROOT / "assets/starts"
PICTURES = 10
# Of 255, the largest difference of a pixel between the browser and onnxruntime in Python.
LEVELS = 2
# Of 255, the mean difference between the browser, with weights in float16, and PyTorch.
MEAN_LEVELS = 0.5
pytestmark = NEEDS_CHROMIUM


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static host, as `python -m http.server` is one."""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("site")
    try:
        runtime = fetch_runtime(root)
    except ScdError as error:
        pytest.skip(f"{PACKAGE} {VERSION} is not there: {error}")
    out = ["--out", str(root / "site"), "--starts", str(STARTS)]
    assert main(["export", str(MODEL), "--web", *out, "--runtime", str(runtime)]) == 0
    return root / "site"


@contextmanager
def serving(site: Path) -> Iterator[str]:
    """Serve a site; yield its address, which is in a sub-folder, as GitHub Pages has it."""
    handler = functools.partial(Quiet, directory=site.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/{site.name}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with serving(site) as address:
        yield address


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads) -> Iterator[Any]:
    driver = open_browser(downloads)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, address) -> Iterator[Page]:
    page = Page(driver)
    page.open(address)
    yield page
    messages = [entry["message"] for entry in driver.get_log("browser")]
    assert not [line for line in messages if "Security Policy" in line or "Uncaught" in line]


def pixels(page: Page) -> np.ndarray:
    """Read the picture on the screen, (64, 64, 3)."""
    rgba = page.js(
        """
        const canvas = document.querySelector("#worlds canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return Array.from(data);
        """
    )
    return np.array(rgba, np.uint8).reshape(64, 64, 4)[..., :3]


def to_the_beginning(page: Page) -> None:
    """Go back to where play began, by the timeline: Backspace goes back one second."""
    page.js("document.querySelector('#timeline').focus()")
    page.press(Keys.HOME, Keys.ENTER, Keys.ESCAPE)
    page.wait_for_frame(BEGIN)


def test_ten_pictures_are_those_of_python(page, site):
    """The same seed and keys as on the server."""
    start = load_starts(STARTS, 64, 4)[0]
    page.js("document.querySelector('#seed').select()")
    page.press("5", Keys.ENTER, Keys.ESCAPE)
    page.step()
    to_the_beginning(page)  # commands are obeyed in order: now the seed is 5
    page.step()  # so that this is not the start, where a key ends the pause
    found = [pixels(page)]
    for number in range(1, PICTURES):
        if number == 1:
            page.hold(Keys.ARROW_UP)
        if number == PICTURES // 2:
            page.release(Keys.ARROW_UP)
            page.hold(Keys.ARROW_RIGHT)
        page.step()
        found.append(pixels(page))
    page.release(Keys.ARROW_RIGHT)
    actions = [0] + [FORWARD] * (PICTURES // 2 - 1) + [RIGHT] * (PICTURES - PICTURES // 2)

    pretrained = load_pretrained(MODEL)
    world, settings = ModelWorld(pretrained), Settings(4, 1.0, seed=5)
    views = world.reset(start, settings)
    by_torch = [world.step(a, BEGIN + 1 + i).picture for i, a in enumerate(actions)]
    manifest = json.loads((site / "manifest.json").read_text())
    rollout = OnnxRollout(site / "graphs", pretrained.options.rollout, manifest["levels"])
    generator = torch.Generator()
    latents = np.stack([view.latents.numpy() for view in views])
    rollout.reset(latents, start.actions, generator)
    by_onnx = []
    for i, action in enumerate(actions):
        generator.manual_seed(frame_seed(5, BEGIN + 1 + i))
        by_onnx.append(rollout.picture(rollout.step(action)))
    ours, same, server = (np.stack(p).astype(int) for p in (found, by_onnx, by_torch))
    print(
        f"of 255: {abs(ours - same).max()} at most from onnxruntime in Python; from PyTorch "
        f"{abs(ours - server).mean():.3f} on average, {abs(ours - server).max()} at most"
    )
    assert abs(ours - same).max() <= LEVELS
    assert abs(ours - server).mean() < MEAN_LEVELS
    assert abs(server[0] - server[-1]).mean() > 10 * MEAN_LEVELS  # the pictures do change


def test_keys_rate_and_latency(page):
    page.hold(Keys.ARROW_UP)
    page.wait(lambda: set(page.actions(2)) == {FORWARD}, "walking")
    page.wait_for_text("#rate", r"^\d+\.\d$")
    page.release(Keys.ARROW_UP)
    latency = page.wait_for_text("#latency", r"^\d+(?= ms$)")
    print(f"pictures a second: {page.text('#rate')}, key to picture: {latency} ms")
    label = page.find("#times .stack").get_attribute("aria-label")
    assert label.startswith("encoder ")
    page.press(" ")
    page.wait(lambda: page.paused, "the pause")


def test_rewind_branch_and_record(page, downloads):
    page.step()
    page.press("r")
    page.wait(lambda: page.find("#record").get_attribute("aria-pressed") == "true", "recording")
    for _ in range(3):
        page.step()
    there = page.picture()
    page.press("r")
    page.wait_for_text("#status", r"Saved lamps-24-27\.webm")
    path = page.wait(lambda: next(downloads.glob("*.webm"), None), "the file")
    video = VideoFile(path)
    assert len(video) == 4 and video.frames(np.arange(4)).shape == (4, 256, 256, 3)
    to_the_beginning(page)
    page.step()
    again = page.frame
    for _ in range(3):
        page.step()
    # From the same noise, after the past has been encoded anew.
    assert again == BEGIN + 1 and page.picture() == there
    page.find("#branches button").click()
    page.wait_for_frame(BEGIN + 4)


def test_phone(page):
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        wide = page.js("return document.documentElement.scrollWidth")
        assert wide == PHONE["width"]
        assert not page.find("#beside").is_displayed()  # there is one world, and no real Doom
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_offline_once_loaded(driver, address):
    """Threads from the service worker's headers; without the network the page still begins."""
    page = Page(driver)
    page.open(address)
    assert page.js("return crossOriginIsolated")
    asked = page.js("return performance.getEntriesByType('resource').map(({name}) => name)")
    assert asked and all(name.startswith(address) for name in asked)
    driver.get("about:blank")
    driver.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
    try:
        page.open(address)
        page.step()
    finally:
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions | {"offline": False})


def test_says_what_an_old_browser_lacks(driver, address):
    hide = "delete window.Worker"
    hidden = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hide})
    try:
        driver.get(address)
        page = Page(driver)
        page.wait_for_text("#notice-title", "This browser cannot show the world")
        assert "workers" in page.text("#notice-text")
        assert not page.find("#notice-button").is_displayed()
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", hidden)


def test_a_damaged_graph_is_refused(driver, address, site):
    """A file that is not the manifest's, before any service worker keeps it."""
    shutil.copytree(site, damaged := site.parent / "damaged", copy_function=shutil.copy)
    graph = damaged / "graphs" / "picture.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    page = Page(driver)
    driver.get(address.replace("/site/", "/damaged/"))
    page.wait_for_text("#notice-text", r"graphs/picture\.onnx: not the file of this site")


def test_files_of_the_page_name_no_other_address():
    for path in FILES.rglob("*"):
        if path.is_file():
            assert "http" not in path.read_text().replace("https, or localhost", ""), path
