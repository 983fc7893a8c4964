"""The style of an estimate's tables."""

from __future__ import annotations

from rich import box
from rich.table import Table


def table_of(*headings: str) -> Table:
    """An empty table whose first column names what the others count."""
    table = Table(box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table
