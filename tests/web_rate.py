"""Measure the world in the browser, for each format of weights: `python -m tests.web_rate MODEL`.

Nothing else should run on the machine. Exports the model (a checkpoint or a folder) in every
format, opens the sites in turn in headless Chromium, by WASM, and prints a line for each round,
then a table of medians: frames a second as fast as they can be made, the time from key to
picture at ten frames a second, and the times of the parts of a picture, in ms.
"""

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from selenium.webdriver.common.keys import Keys

from scd.utils.table import Table
from scd.web import site
from scd.web.onnx_export import FORMATS
from scd.web.runtime import fetch_runtime
from tests.page import Page, open_browser
from tests.web import choose, serving

ROOT = Path(__file__).parent.parent
PRESSES = 20
FIGURES = ["pictures / s", "key to picture", "encoder", "denoising", "decoding"]


def export(model: Path, folder: Path) -> dict[str, Path]:
    """Write a site for each format; name -> folder."""
    runtime, sites = fetch_runtime(folder), {name: folder / name for name in FORMATS}
    with mock.patch.object(site, "MAX_DOWNLOAD", 2**40):  # in float32 it is not for publication
        for name, out in sites.items():
            site.export_site(model, out, ROOT / "assets" / "starts", name, runtime)
    return sites


def measure(folder: Path, seconds: float) -> list[float]:
    """Hold a key at the highest speed, then press keys at the usual one; give the `FIGURES`."""
    with tempfile.TemporaryDirectory() as downloads, serving(folder) as address:
        driver = open_browser(Path(downloads))
        try:
            page = Page(driver)
            page.open(f"{address}?backend=wasm")
            choose(page, "fps", 60)
            page.press(" ")
            page.hold(Keys.ARROW_UP)
            time.sleep(seconds)
            rate = float(page.text("#rate"))
            parts = page.find("#times .stack").get_attribute("aria-label")
            page.release(Keys.ARROW_UP)
            choose(page, "fps", 10)
            for _ in range(PRESSES):
                page.hold(Keys.ARROW_RIGHT)
                time.sleep(0.33)
                page.release(Keys.ARROW_RIGHT)
                time.sleep(0.28)
            latency = float(page.text("#latency").removesuffix(" ms"))
            (worker,) = (e["message"] for e in driver.get_log("browser") if "scd: " in e["message"])
        finally:
            driver.quit()
    figures = [rate, latency, *map(float, re.findall(r"(\S+) ms", parts))]
    print(worker[worker.index("scd: ") :].rstrip('"'), *figures, sep="; ", flush=True)
    return figures


def main() -> None:
    """Measure all formats in turn, and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="that a key is held")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sites = export(given.model, Path(scratch))
        found: dict[str, list[list[float]]] = {name: [] for name in sites}
        for _ in range(given.rounds):
            for name, folder in sites.items():
                found[name].append(measure(folder, given.seconds))
    rows = []
    for name, rounds in found.items():
        columns = list(zip(*rounds, strict=True))
        medians = [f"{statistics.median(column):.1f}" for column in columns]
        rows.append([name, *medians, f"{min(columns[0]):.1f}–{max(columns[0]):.1f}"])
    note = f"Medians of {given.rounds} rounds, the formats in turn; all but the rates in ms."
    print("\n" + Table(["weights", *FIGURES, "slowest–fastest / s"], rows, 1, [note]).markdown())


if __name__ == "__main__":
    main()
