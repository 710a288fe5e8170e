"""The site by WebGPU, in headless Chromium, whose GPU is here a program on the CPU (SwiftShader).

That is far too slow for the shipped model: a small random one takes its place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="the extra scd[web] is not installed")
pytest.importorskip("onnxruntime", reason="the extra scd[web] is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

from scd.data.video import write_video
from scd.errors import ScdError
from scd.play.starts import STARTS_FILE, load_starts
from scd.play.worlds import Pretrained, Settings
from scd.utils.files import write_json
from scd.web.runtime import PACKAGE, VERSION, fetch_runtime
from scd.web.site import export_site, load_for_web
from tests.page import BEGIN, NEEDS_CHROMIUM, RIGHT, Page, open_browser
from tests.play import pretrained_folder, some_start
from tests.web import choose, pictures_by_onnx, pixels, serving, to_the_beginning

FLAGS = ("enable-unsafe-webgpu", "use-webgpu-adapter=swiftshader")
ADAPTER = """
const done = arguments[0];
navigator.gpu.requestAdapter().then((adapter) => done(adapter !== null), () => done(false));
"""
LEVELS = 1  # of 255, the largest difference of a pixel from onnxruntime in Python
pytestmark = [NEEDS_CHROMIUM, pytest.mark.slow]


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny_autoencoder_path) -> tuple[Path, Pretrained, Path]:
    """A site, its model, and its start clip."""
    root = tmp_path_factory.mktemp("gpu")
    try:
        runtime = fetch_runtime(root)
    except ScdError as error:
        pytest.skip(f"{PACKAGE} {VERSION} is not there: {error}")
    model, starts = pretrained_folder(root / "model", tiny_autoencoder_path), root / "starts"
    start = some_start(frames=BEGIN + 1)
    starts.mkdir()
    write_video(starts / "here.mp4", start.frames, 10, crf=0)
    write_json(starts / STARTS_FILE, [{"name": "here", "actions": list(start.actions)}])
    export_site(model, root / "site", starts, "fp16", runtime)
    return root / "site", load_for_web(model, []), starts


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    driver = open_browser(tmp_path_factory.mktemp("downloads"), *FLAGS)
    yield driver
    driver.quit()


def backend_line(driver: Any) -> str:
    """Read what the worker says that it computes with."""
    return next(e["message"] for e in driver.get_log("browser") if "scd: " in e["message"])


def test_pictures_are_those_of_python(driver, site):
    """With and without guidance, after going back; the cache stays on the GPU."""
    folder, pretrained, starts = site
    page = Page(driver, seconds=120)  # the GPU's programs are compiled, and run, on the CPU
    with serving(folder) as address:
        driver.get(f"{address}manifest.json")  # a secure address, where browsers offer WebGPU
        if not driver.execute_async_script(ADAPTER):
            pytest.skip("this Chromium offers no WebGPU adapter, not even SwiftShader")
        page.open(f"{address}?backend=webgpu")
        line = backend_line(driver)
        assert "scd: webgpu" in line and "cache in gpu-buffer" in line
        found = []
        page.step()
        page.hold(Keys.ARROW_RIGHT)
        for _ in range(3):
            page.step()
            found.append(pixels(page))
        page.release(Keys.ARROW_RIGHT)
        choose(page, "guidance", 2.0)
        to_the_beginning(page)
        page.step()
        guided = pixels(page)
    (start,) = load_starts(starts, 64, 4)
    actions = [0, RIGHT, RIGHT, RIGHT]
    plain = pictures_by_onnx(folder, pretrained, start, Settings(2, 1.0, seed=0), actions)
    other = pictures_by_onnx(folder, pretrained, start, Settings(2, 2.0, seed=0), actions[:1])
    differences = abs(np.stack([*found, guided]).astype(int) - np.concatenate([plain[1:], other]))
    print(f"of 255: {differences.max()} at most from onnxruntime in Python")
    assert differences.max() <= LEVELS
    changes = abs(np.diff(np.concatenate([plain[:2], other]).astype(int), axis=0))
    assert changes.mean(axis=(1, 2, 3)).min() > LEVELS  # the pictures do change


def test_a_program_in_the_place_of_a_gpu_is_not_chosen(driver, site):
    """WASM is faster."""
    page = Page(driver)
    with serving(site[0]) as address:
        page.open(address)
        assert "scd: wasm" in backend_line(driver)
