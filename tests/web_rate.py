"""Measure an exported site in headless Chromium: `python -m tests.web_rate SITE [SECONDS]`.

Nothing else should run on the machine. Prints pictures per second as fast as they can be made, the
median time from key to picture at ten pictures a second, and the times of the parts.
"""

import sys
import tempfile
import time
from pathlib import Path

from selenium.webdriver.common.keys import Keys

from tests.page import Page, open_browser
from tests.test_web_page import serving

PRESSES = 20


def measure(site: Path, seconds: float) -> None:
    """Open the site, hold a key at the highest speed, then press keys at the usual one."""
    with tempfile.TemporaryDirectory() as downloads, serving(site) as address:
        driver = open_browser(Path(downloads))
        try:
            page = Page(driver)
            page.open(address)
            set_fps(page, 60)
            page.press(" ")
            page.hold(Keys.ARROW_UP)
            time.sleep(seconds)
            rate = page.text("#rate")
            parts = page.find("#times .stack").get_attribute("aria-label")
            page.release(Keys.ARROW_UP)
            set_fps(page, 10)
            for _ in range(PRESSES):
                page.hold(Keys.ARROW_RIGHT)
                time.sleep(0.33)
                page.release(Keys.ARROW_RIGHT)
                time.sleep(0.28)
            latency = f"{page.text('#latency')} ({page.text('#latency95')})"
            threads = [e["message"] for e in driver.get_log("browser") if "scd:" in e["message"]]
        finally:
            driver.quit()
    print(f"{rate} pictures a second; key to picture {latency}; {parts}; {threads[-1]}")


def set_fps(page: Page, fps: int) -> None:
    """Move the slider of the frames per second."""
    page.js(
        "const s = document.querySelector('#fps'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        fps,
    )


if __name__ == "__main__":
    measure(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 20)
