"""A probe report: a folder with `index.html`, its figures as PNG, and `probe.json`."""

import html
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from scd.utils.files import write_atomically, write_json
from scd.utils.table import Table

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --quiet: #5c5c5c; --line: #d6d6d6; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --quiet: #a3a3a3; --line: #444; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p.how, footer, p.note { color: var(--quiet); font-size: .9rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; padding: 6px; box-sizing: border-box;
      margin: .4rem 0; }
table { border-collapse: collapse; font-size: .88rem; margin: .8rem 0; }
.wide { overflow-x: auto; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th.name, td.name { text-align: left; }
"""


@dataclass(frozen=True)
class Section:
    """One probe's result: a finding, how it was measured, figures, a table and numbers."""

    key: str  # in the JSON
    title: str
    finding: str  # a few sentences, made from the numbers
    how: str
    figures: dict[str, Figure] = field(default_factory=dict)  # file stem -> figure
    table: Table | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


class Report:
    """A report in a folder, rewritten with every section so that a later failure loses nothing.

    Args:
        about: model, clips, settings and environment, for `probe.json`.
        planned: the number of sections of the finished report.
    """

    def __init__(self, folder: Path, title: str, about: dict[str, Any], planned: int):
        self.folder = folder
        self.title = title
        self.about = about
        self.planned = planned
        self.sections: list[Section] = []

    def add(self, section: Section, seconds: float) -> None:
        """Add a section that took so many seconds, and write the report."""
        self.sections.append(section)
        for stem, figure in section.figures.items():
            write_atomically(self.folder / f"{stem}.png", partial(figure.savefig, dpi=130))
            plt.close(figure)
        self.about[section.key] = {
            "finding": section.finding,
            "seconds": seconds,
            **section.numbers,
        }
        write_json(self.folder / "probe.json", rounded(self.about))
        page = _page(self.title, self.about["summary"], self.sections, self.planned)
        index = self.folder / "index.html"
        write_atomically(index, lambda aside: aside.write_text(page, encoding="utf-8"))


def rounded(value: Any) -> Any:
    """Round numbers to six digits, convert tensors to lists, and what is no number to null."""
    if isinstance(value, Tensor):
        return rounded(value.tolist())
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _page(title: str, summary: str, sections: list[Section], planned: int) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    body.append(f"<p class=how>{html.escape(summary)}</p>")
    if len(sections) < planned:
        body.append(f"<p>Unfinished: {len(sections)} of {planned} sections.</p>")
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body.append(f"<p>{html.escape(section.finding)}</p>")
        for stem in section.figures:
            body.append(f'<img src="{stem}.png" alt="{html.escape(section.title)}">')
        if section.table is not None:
            body.append(_table(section.table))
        body.append(f"<p class=how>{_code(html.escape(section.how))}</p>")
    body.append("<footer>All numbers: <a href=probe.json>probe.json</a></footer>")
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title>"
    head += '<meta name=viewport content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html>\n<html lang=en>\n<head>{head}<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=name' if i < table.names else ''}>{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            + "</tr>"
        )

    lines = "\n".join(row(line, "td") for line in table.lines)
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    return f"<div class=wide><table>\n{row(table.heads, 'th')}\n{lines}\n</table></div>{notes}"


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
