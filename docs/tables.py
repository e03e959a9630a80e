"""Writes the tables of README.md and docs/ from the catalogues: `make docs`.

With ``--check`` nothing is written and the status is 1 if a page is not current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfstep.cli.catalogues import format_record, recipe_record
from halfstep.cli.printing import cell
from halfstep.format import BlockFormat, Unit, block_formats, formats, units
from halfstep.recipe import recipes
from halfstep.recipe.catalogue import SYNONYMS

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The columns of the records as a table."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(record[column]) for column in columns] for record in records]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def block_format_record(it: BlockFormat) -> dict[str, Any]:
    """What there is to say about a block format, as plain values."""
    sizes = (str(size or "all") for size in (it.rows, it.columns))
    return {
        "name": it.name,
        "element": it.element.name,
        "block": "tensor" if it.rows == 0 else "x".join(sizes),
        "scale": it.scale.name + (", over FP32" if it.has_tensor_scale else ""),
        "rule": it.rule.value,
        "bits per element": it.bits_per_element,
        "source": it.source,
    }


def unit_records(unit: Unit) -> list[dict[str, Any]]:
    """What there is to say about each way through a matrix unit, as plain values."""
    return [
        {
            "name": unit.name,
            "architecture": unit.architecture,
            "operands": " ".join(path.operands),
            "block": path.block,
            "kept": path.fraction_bits,
            "result": f"{path.result}, {path.result_bits}",
            "least": path.lowest_exponent,
            "verified": path.verified,
            "evidence": path.evidence,
        }
        for path in unit.datapaths
    ]


def tables() -> dict[str, str]:
    """Every table that a page may name."""
    format_records = [format_record(it) for it in formats().values()]
    recipe_records = [recipe_record(it) for it in recipes().values()]
    synonyms = [{"written": written, "means": name} for written, name in SYNONYMS.items()]
    fields = ("name", "operands", "store", "accumulate", "master", "optimizer")
    return {
        "formats": markdown(
            format_records,
            ("name", "bits", "exponent", "mantissa", "max", "smallest normal", "smallest", "eps"),
        ),
        "format-behaviour": markdown(
            format_records, ("name", "kind", "inf", "nan", "overflow", "source")
        ),
        "block-formats": markdown(
            [block_format_record(it) for it in block_formats().values()],
            ("name", "element", "block", "scale", "rule", "bits per element", "source"),
        ),
        "units": markdown(
            [record for unit in units().values() for record in unit_records(unit)],
            (
                *("name", "architecture", "operands", "block", "kept", "result", "least"),
                *("verified", "evidence"),
            ),
        ),
        "recipes": markdown(recipe_records, (*fields, "scaling", "policy")),
        "recipe-summaries": markdown(recipe_records, ("name", "summary")),
        "recipe-sources": markdown(recipe_records, ("name", "summary", "source")),
        "recipe-synonyms": markdown(synonyms, ("written", "means")),
    }


def filled(page: str) -> str:
    """The page with each marked table as the catalogue has it now."""
    current = tables()
    return MARKED.sub(lambda found: f"{found[1]}{current[found[2]]}{found[3]}", page)


def main() -> int:
    """0, or with ``--check`` 1 where a page is stale."""
    stale: list[Path] = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page = path.read_text()
        if filled(page) != page:
            stale.append(path)
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run `make docs`")
        return int(bool(stale))
    for path in stale:
        path.write_text(filled(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
