"""How records are printed: a table for a reader, JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["AsJson", "cell", "make_console", "print_json", "print_record", "print_records"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def make_console() -> Console:
    """The terminal, or 160 columns: piped to a file, a table should not be folded at 80."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_json(value: object) -> None:
    """The value on standard output; NaN and infinity are errors, as JSON has none."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_record(record: Mapping[str, Any], *, as_json: bool) -> None:
    """One record: a line for each of its values."""
    if as_json:
        print_json(_plain(record))
        return
    table = Table(show_header=False, box=None)
    for key, value in record.items():
        table.add_row(key, cell(value))
    make_console().print(table)


def print_records(
    records: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool
) -> None:
    """Many records: a line for each, with the columns asked for; JSON has them whole."""
    if as_json:
        print_json([_plain(record) for record in records])
        return
    table = Table(*columns, box=None, header_style="bold")
    for record in records:
        table.add_row(*(cell(record[column]) for column in columns))
    make_console().print(table)


def cell(value: object) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    return str(value)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON has it: null for a limit that does not exist."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in record.items()
    }
