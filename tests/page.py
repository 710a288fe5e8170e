"""Shared by the tests of pages: a headless Chromium, and a page in it as a player sees it."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
NEEDS_CHROMIUM = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)
NONE, LEFT, RIGHT, FORWARD = range(4)
BEGIN = 23  # the last frame of a start clip, where play begins
SECONDS = 30  # that anything may take on a busy machine
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


def open_browser(downloads: Path, *flags: str, cookies: bool = True) -> Any:
    """Start the browser, with further flags; it saves downloads to a folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", *flags):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1440,900")
    prefs = {"download.default_directory": str(downloads)}
    if not cookies:
        prefs["profile.default_content_setting_values.cookies"] = 2  # blocked
    options.add_experimental_option("prefs", prefs)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(SECONDS)
    return driver


class Page:
    """The page in a browser, as a player sees it.

    Args:
        seconds: that anything may take.
    """

    def __init__(self, driver: Any, seconds: float = SECONDS):
        self.driver = driver
        self.seconds = seconds

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        try:
            return WebDriverWait(self.driver, self.seconds, 0.05).until(lambda _: condition())
        except TimeoutException:
            seen = self.js("return [document.body.className, document.body.innerText]")
            pytest.fail(f"waited {self.seconds} s for: {what}; frame {self.frame}, {seen}")

    def wait_for_text(self, selector: str, pattern: str) -> str:
        what = f"{selector} says {pattern}"
        return self.wait(lambda: re.search(pattern, self.text(selector)), what).group()

    @property
    def frame(self) -> int | None:
        frame = self.js("return document.querySelector('#worlds').dataset.frame")
        return None if frame is None else int(frame)

    @property
    def paused(self) -> bool:
        return self.js("return document.body.classList.contains('paused')")

    def picture(self, place: int = 0) -> str:
        script = "return document.querySelectorAll('#worlds canvas')[arguments[0]].toDataURL()"
        return self.js(script, place)

    def wait_for_frame(self, frame: int) -> None:
        self.wait(lambda: self.frame == frame, f"frame {frame}")

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def hold(self, key: str) -> None:
        ActionChains(self.driver).key_down(key).perform()

    def release(self, *keys: str) -> None:
        chain = ActionChains(self.driver)
        for key in keys:
            chain.key_up(key)
        chain.perform()

    def step(self) -> None:
        frame = self.frame
        assert frame is not None
        self.press(".")
        self.wait_for_frame(frame + 1)

    def actions(self, count: int) -> list[int]:
        """Those that the next pictures on the screen came from."""
        return self.driver.execute_async_script(
            """
            const [count, done] = arguments;
            const box = document.querySelector("#worlds"), seen = [];
            const observer = new MutationObserver(() => {
              seen.push(Number(box.dataset.action));
              if (seen.length === count) { observer.disconnect(); done(seen); }
            });
            observer.observe(box, {attributes: true, attributeFilter: ["data-frame"]});
            """,
            count,
        )

    def open(self, url: str) -> None:
        """Load it and be at the first start, paused."""
        self.driver.get(url)
        self.wait(lambda: self.frame is not None, "a first picture")
        if not self.paused:
            self.press(" ")
            self.wait(lambda: self.paused, "the pause")
        self.find("#starts button").click()
        self.wait(
            lambda: self.frame == BEGIN and not self.all("#branches button"), "the first start"
        )


@contextmanager
def on_a_phone(page: Page, **screen: int) -> Iterator[None]:
    """Give the page a phone's screen and touch."""
    send = page.driver.execute_cdp_cmd
    send("Emulation.setDeviceMetricsOverride", PHONE | screen)
    send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        yield
    finally:
        send("Emulation.clearDeviceMetricsOverride", {})
        send("Emulation.setTouchEmulationEnabled", {"enabled": False})


@contextmanager
def touching(page: Page, selector: str) -> Iterator[None]:
    """Keep a finger on a button."""
    button = page.find(selector).rect
    point = {"x": button["x"] + 20, "y": button["y"] + 20}
    touch = {"type": "touchStart", "touchPoints": [point]}
    page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    yield
    lift = {"type": "touchEnd", "touchPoints": []}
    page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", lift)


def steer_by_gamepad(page: Page) -> None:
    """Walk by a gamepad's stick, turn by its buttons, and pause; its keys decide the pictures."""
    page.js("""
    window.gamepad = {
      connected: true, axes: [0, 0, 0, 0], buttons: [...Array(16)].map(() => ({pressed: false})),
    };
    navigator.getGamepads = () => [gamepad];
    dispatchEvent(new Event("gamepadconnected"));
    gamepad.axes[1] = -1;
    """)
    page.wait(lambda: set(page.actions(3)) == {FORWARD}, "walking")
    page.js("gamepad.axes[1] = 0; gamepad.buttons[14].pressed = true")
    page.wait(lambda: set(page.actions(3)) == {LEFT}, "turning")
    page.js("gamepad.buttons[14].pressed = false; gamepad.buttons[9].pressed = true")
    page.wait(lambda: page.paused, "the pause")
    page.js("gamepad.connected = false")
