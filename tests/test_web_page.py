"""`scd export --web` in headless Chromium, from static files, by WASM.

What the page itself does is tested in test_play_page.py; here, what takes the server's place.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="the extra scd[web] is not installed")
pytest.importorskip("onnxruntime", reason="the extra scd[web] is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

from scd.cli import main
from scd.data.video import VideoFile
from scd.errors import ScdError
from scd.play.starts import load_starts
from scd.play.worlds import ModelWorld, Settings, load_pretrained
from scd.web.runtime import PACKAGE, VERSION, fetch_runtime
from scd.web.site import FILES
from tests.page import (
    BEGIN,
    FORWARD,
    NEEDS_CHROMIUM,
    NONE,
    PHONE,
    RIGHT,
    Page,
    on_a_phone,
    open_browser,
    steer_by_gamepad,
    touching,
)
from tests.play import pretrained_folder
from tests.web import Quiet, choose, pictures_by_onnx, pixels, serving, to_the_beginning

ROOT = Path(__file__).parent.parent
SHIPPED, STARTS = ROOT / "assets/pretrained/scd_doom", ROOT / "assets/starts"
OVERRIDES = ["rollout.temperature=0.7", "rollout.steps=4"]
PICTURES = 10
# Of 255, the largest difference of a pixel between the browser and onnxruntime in Python.
LEVELS = 2
# Of 255, the mean difference between the browser, with weights in float16, and PyTorch.
MEAN_LEVELS = 0.5
ELSEWHERE = "world.test"  # a name of this host that no browser trusts without https
pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> Path:
    try:
        return fetch_runtime(tmp_path_factory.mktemp("runtime"))
    except ScdError as error:
        pytest.skip(f"{PACKAGE} {VERSION} is not there: {error}")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_autoencoder_path) -> Path:
    return pretrained_folder(tmp_path_factory.mktemp("pretrained") / "tiny", tiny_autoencoder_path)


@pytest.fixture(scope="module")
def site(model, runtime, tmp_path_factory) -> Path:
    return export(model, tmp_path_factory.mktemp("site") / "site", runtime)


def export(model: Path, site: Path, runtime: Path) -> Path:
    out = ["--out", str(site), "--starts", str(STARTS), "--runtime", str(runtime)]
    assert main(["export", str(model), "--web", *out, *OVERRIDES]) == 0
    return site


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with serving(site) as address:
        yield address


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads) -> Iterator[Any]:
    driver = open_browser(downloads, f"host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1")
    yield driver
    driver.quit()


def kept_in(page: Page) -> list[str]:
    """Names of what the service worker of this site keeps."""
    return page.js("return caches.keys()")


def limit_storage(driver, address: str, room: int) -> None:
    """Let the host at an address keep so many bytes in the browser."""
    driver.execute_cdp_cmd("Storage.overrideQuotaForOrigin", {"origin": address, "quotaSize": room})


@pytest.fixture
def page(driver, address) -> Iterator[Page]:
    page = Page(driver)
    page.open(address)
    yield page
    messages = [entry["message"] for entry in driver.get_log("browser")]
    assert not [line for line in messages if "Security Policy" in line or "Uncaught" in line]


def test_ten_pictures_are_those_of_python(page, site, model):
    compare_ten_pictures(page, site, model)


@pytest.mark.slow
def test_ten_pictures_of_the_shipped_model(driver, runtime, tmp_path):
    site, page = export(SHIPPED, tmp_path / "site", runtime), Page(driver)
    with serving(site) as address:
        page.open(address)
        compare_ten_pictures(page, site, SHIPPED)


def compare_ten_pictures(page: Page, site: Path, model: Path) -> None:
    """With the same seed and keys as on the server."""
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

    pretrained, settings = load_pretrained(model, OVERRIDES), Settings(4, 1.0, seed=5)
    world = ModelWorld(pretrained)
    world.reset(start, settings)
    by_torch = [world.step(a, BEGIN + 1 + i).picture for i, a in enumerate(actions)]
    by_onnx = pictures_by_onnx(site, pretrained, start, settings, actions)
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
    print(f"frames a second: {page.text('#rate')}, key to picture: {latency} ms")
    label = page.find("#times .stack").get_attribute("aria-label")
    assert label.startswith("encoder ")
    page.press(" ")
    page.wait(lambda: page.paused, "the pause")


def test_rewind_branches_and_record(page, downloads):
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
    page.press("b")
    page.wait(lambda: page.all("#branches .kept"), "the kept branch")
    to_the_beginning(page)
    page.step()
    page.hold(Keys.ARROW_RIGHT)
    page.step()
    page.release(Keys.ARROW_RIGHT)
    other = page.picture()
    to_the_beginning(page)
    for _ in range(4):
        page.step()
    # From the same noise, after the past has been encoded anew.
    assert page.frame == BEGIN + 4 and page.picture() == there
    page.find("#branches button:not(.kept)").click()
    page.wait_for_frame(BEGIN + 2)
    page.wait(lambda: page.picture() == other, "the picture of the branch")
    page.find("#branches .kept").click()
    page.wait_for_frame(BEGIN + 4)
    page.wait(lambda: page.picture() == there, "the picture of the kept branch")


def test_guidance_slider(page, site, model):
    """With guidance, and with fewer steps, the picture is that of Python as well."""
    page.step()
    plain = pixels(page)
    choose(page, "guidance", 2.0)
    choose(page, "steps", 2)
    page.wait_for_text("output[for=guidance]", r"^2\.0$")
    to_the_beginning(page)
    page.step()
    found = pixels(page)
    start, settings = load_starts(STARTS, 64, 4)[0], Settings(2, 2.0, seed=0)
    (expected,) = pictures_by_onnx(site, load_pretrained(model, OVERRIDES), start, settings, [0])
    assert abs(found.astype(int) - expected).max() <= LEVELS
    assert abs(found.astype(int) - plain).mean() > MEAN_LEVELS


def test_gamepad(page):
    steer_by_gamepad(page)


def test_phone_and_touch(page):
    with on_a_phone(page):
        wide = page.js("return document.documentElement.scrollWidth")
        assert wide == PHONE["width"]
        assert not page.find("#beside").is_displayed()  # there is one world, and no real Doom
        with touching(page, "[data-move=forward]"):
            page.wait(lambda: set(page.actions(2)) == {FORWARD}, "walking")
        page.wait(lambda: set(page.actions(2)) == {NONE}, "standing")


@pytest.mark.slow
def test_offline_once_loaded(driver, site):
    """Threads by the service worker's headers; the host gone, the page still begins and plays."""
    page = Page(driver)
    with serving(site) as address:
        limit_storage(driver, address, 1 << 30)  # so much, on whatever disk the tests run
        page.open(address)
        assert page.js("return crossOriginIsolated")
        asked = page.js("return performance.getEntriesByType('resource').map(({name}) => name)")
        assert asked and all(name.startswith(address) for name in asked)
    with pytest.raises(URLError):
        urlopen(address)
    driver.get("about:blank")
    page.open(address)
    page.step()
    page.all("#starts button")[-1].click()
    page.wait(lambda: page.frame == BEGIN and not page.all("#branches button"), "another start")
    page.step()


@pytest.mark.slow
def test_an_incomplete_update_leaves_what_is_kept(driver, site):
    shutil.copytree(site, copy := site.parent / "updated", copy_function=shutil.copy)
    page = Page(driver)
    with serving(copy) as address:
        limit_storage(driver, address, 1 << 30)
        page.open(address)
        before = page.js("return caches.keys()")
        text = (copy / "sw.js").read_text()
        version = re.search(r'const VERSION = "(.+?)"', text).group(1)
        (copy / "sw.js").write_text(text.replace(version, "of an update"))
        (copy / "manifest.json").unlink()
        state = driver.execute_async_script(
            """
            const done = arguments[0];
            navigator.serviceWorker.ready.then(async (registration) => {
              registration.onupdatefound = () => {
                const worker = registration.installing, ends = ["redundant", "activated"];
                worker.onstatechange = () => ends.includes(worker.state) && done(worker.state);
              };
              registration.update();
            });
            """
        )
        assert state == "redundant" and set(before) <= set(page.js("return caches.keys()"))
    driver.get("about:blank")
    page.open(address)  # offline
    page.step()


def test_an_update_reaches_who_was_here_before(driver, site):
    """Although the browser may keep all files for an hour by itself."""

    class Kept(Quiet):
        def end_headers(self):
            self.send_header("Cache-Control", "max-age=3600")
            super().end_headers()

    shutil.copytree(site, copy := site.parent / "kept", copy_function=shutil.copy)
    page = Page(driver)
    with serving(copy, Kept) as address:
        limit_storage(driver, address, 1 << 30)
        page.open(address)
        graph, manifest, worker = (
            copy / name for name in ("graphs/picture.onnx", "manifest.json", "sw.js")
        )
        graph.write_bytes(graph.read_bytes() + b"\xa2\x06\0")  # an unknown field, of no bytes
        about = json.loads(manifest.read_text())
        old, about["version"] = about["version"], "anew"
        data = graph.read_bytes()
        about["files"]["graphs/picture.onnx"] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        manifest.write_text(json.dumps(about))
        worker.write_text(worker.read_text().replace(old, "anew"))
        # Whoever left before the graph was kept gets the new one, which does not fit; after loading
        # the page again, all of the new version.
        driver.execute_async_script(
            """
            const done = arguments[0];
            (async () => {
              const [kept] = await caches.keys(), cache = await caches.open(kept);
              await cache.delete("graphs/picture.onnx");
              done();
            })();
            """
        )
        driver.get(address)
        page.wait_for_text("#notice-text", "not the file of this site; reload the page")
        page.wait(lambda: len(kept_in(page)) == 2, "the update")
        page.open(address)
        page.step()
        page.wait(lambda: len(kept_in(page)) == 1, "what is kept")


@pytest.mark.slow
def test_an_update_waits_for_the_next_visit(driver, site):
    shutil.copytree(site, copy := site.parent / "later", copy_function=shutil.copy)
    page = Page(driver)
    with serving(copy) as address:
        limit_storage(driver, address, 1 << 30)
        page.open(address)
        worker = copy / "sw.js"
        version = re.search(r'const VERSION = "(.+?)"', worker.read_text()).group(1)
        worker.write_text(worker.read_text().replace(version, "anew"))
        driver.get("about:blank")
        page.open(address)  # the old one plays while the new one is fetched
        page.wait(lambda: len(kept_in(page)) == 2, "the update")
        first = driver.current_window_handle
        driver.switch_to.new_window("tab")  # which takes nothing away from it
        driver.get(address)
        page.wait(lambda: page.js("return document.body.dataset.phase") == "open", "another tab")
        assert len(kept_in(page)) == 2
        driver.close()
        driver.switch_to.window(first)
        page.step()
        driver.get("about:blank")
        driver.get(address)
        page.wait(lambda: len(kept_in(page)) == 1, "what is kept")
        assert "anew" in kept_in(page)[0]


def test_a_missing_file_of_another_start(driver, site):
    """Nothing is kept for use offline then, but the page plays."""
    shutil.copytree(site, copy := site.parent / "lacking", copy_function=shutil.copy)
    max((copy / "starts").glob("*.png")).unlink()
    page = Page(driver)
    with serving(copy) as address:
        limit_storage(driver, address, 1 << 30)
        page.open(address)
        page.step()


def test_plays_without_cookies(address, downloads):
    driver = open_browser(downloads, cookies=False)
    try:
        page = Page(driver)
        page.open(address)
        page.step()
    finally:
        driver.quit()


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 5 << 20], ids=["none", "5 MB"])
def test_plays_where_nothing_can_be_kept(driver, site, room):
    """A full disk: the browser refuses to keep files, all of them or the large ones."""
    page = Page(driver)
    with serving(site) as address:
        limit_storage(driver, address, room)
        page.open(address)
        assert page.js("return crossOriginIsolated")
        page.step()


@pytest.mark.parametrize(
    ("hide", "lacks"),
    [
        ("delete window.Worker", "workers"),
        ("delete window.WebAssembly", "WebAssembly, WebAssembly with SIMD"),
        ("WebAssembly.validate = () => false", "WebAssembly with SIMD"),
        ("delete Crypto.prototype.subtle", "hashes (crypto.subtle)"),
        ("delete HTMLScriptElement.prototype.noModule", "JavaScript modules"),
    ],
    ids=["Worker", "WebAssembly", "SIMD", "subtle", "modules"],
)
def test_says_what_an_old_browser_lacks(driver, address, hide, lacks):
    hidden = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hide})
    try:
        driver.get(address)
        page = Page(driver)
        page.wait_for_text("#notice-title", "This browser cannot show the world")
        page.wait_for_text("#notice-text", rf"^It lacks {re.escape(lacks)}\. A newer browser")
        assert page.find("#notice").is_displayed()
        assert not page.find("#notice-button").is_displayed()
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", hidden)


def test_says_that_the_address_must_be_secure(driver, address):
    driver.get(address.replace("127.0.0.1", ELSEWHERE))
    page = Page(driver)
    page.wait_for_text("#notice-text", "open the page by https, or at localhost")
    assert page.find("#notice").is_displayed()


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
            assert "://" not in path.read_text(), path
