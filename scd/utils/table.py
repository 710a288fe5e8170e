"""Tables of text: Markdown for terminals and files."""

from dataclasses import dataclass


@dataclass
class Table:
    """Lines of cells under column heads, with notes below.

    The first `names` columns are names, aligned to the left; the others are numbers, aligned to the
    right.
    """

    heads: list[str]
    lines: list[list[str]]
    names: int
    notes: list[str]

    def markdown(self) -> str:
        """Write the table as Markdown, its columns padded to equal width."""
        columns = list(zip(self.heads, *self.lines, strict=True))
        padded = []
        for number, column in enumerate(columns):
            width = max(map(len, column))
            if number < self.names:
                head, *cells = [cell.ljust(width) for cell in column]
                padded.append([head, "-" * width, *cells])
            else:
                head, *cells = [cell.rjust(width) for cell in column]
                padded.append([head, "-" * (width - 1) + ":", *cells])
        text = ["| " + " | ".join(cells) + " |" for cells in zip(*padded, strict=True)]
        return "\n".join([*text, *(f"\n{note}" for note in self.notes)])
