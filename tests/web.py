"""Shared by the tests of sites: a static host, pictures on the screen, and Python's pictures."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from selenium.webdriver.common.keys import Keys

from scd.play.starts import Start
from scd.play.worlds import Pretrained, Settings, frame_seed
from scd.web.onnx_rollout import OnnxRollout
from scd.web.site import start_latents
from tests.page import BEGIN, Page


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static host, as `python -m http.server` is one."""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def serving(site: Path, kind: type[Quiet] = Quiet) -> Iterator[str]:
    """Serve a site; yield its address, which is in a sub-folder, as GitHub Pages has it."""
    handler = functools.partial(kind, directory=site.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/{site.name}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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


def choose(page: Page, slider: str, value: float) -> None:
    """Move a slider of the panel."""
    page.js(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('input'))",
        slider,
        value,
    )


def to_the_beginning(page: Page) -> None:
    """Go back to where play began, by the timeline: Backspace goes back one second."""
    page.js("document.querySelector('#timeline').focus()")
    page.press(Keys.HOME, Keys.ENTER, Keys.ESCAPE)
    page.wait_for_frame(BEGIN)


def pictures_by_onnx(
    site: Path, pretrained: Pretrained, start: Start, settings: Settings, actions: Sequence[int]
) -> np.ndarray:
    """Generate what the page shows by onnxruntime in Python: (F, H, W, 3) uint8."""
    levels = json.loads((site / "manifest.json").read_text())["levels"]
    options = replace(
        pretrained.options.rollout,
        steps=settings.steps,
        guidance="context",
        guidance_scale=settings.guidance_scale,
    )
    rollout = OnnxRollout(site / "graphs", options, levels)
    generator, first = torch.Generator(), len(start.actions)
    rollout.reset(start_latents(pretrained, start), start.actions, generator)
    pictures = []
    for i, action in enumerate(actions):
        generator.manual_seed(frame_seed(settings.seed, first + i))
        pictures.append(rollout.picture(rollout.step(action)))
    return np.stack(pictures)
