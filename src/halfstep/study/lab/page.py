"""The lab's page: of each experiment what was done, the findings beside the published ones, plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from halfstep.diagnosis.page import Card, Page, Tone, figure, note, paragraph, table
from halfstep.study.lab.plots import draw
from halfstep.study.lab.results import Finding, Result
from halfstep.study.lab.writing import interval, number

__all__ = ["build_page"]


def build_page(results: Sequence[Result], machine: Iterable[str]) -> str:
    """The whole HTML document of the results, in their order; ``machine`` are the footer's lines."""
    page = Page(kicker="halfstep lab", title=_title(results))
    page.cards(_card(result) for result in results)
    for result in results:
        bodies = [paragraph(result.setting), paragraph(result.lesson)]
        for panel in result.panels:
            bodies += [f"<h3>{panel.title}</h3>", figure(draw(panel), panel.name)]
        rows = [_row(finding) for finding in result.findings]
        bodies += [
            table(("claim", "published", "here", "allowed", "reproduced", "source"), rows),
            note(f"Where the allowed intervals come from: {_derivations(result.findings)}."),
        ]
        page.section(result.title, *bodies)
    page.footer(machine)
    return page.html()


def _title(results: Sequence[Result]) -> str:
    if len(results) == 1:
        return results[0].title
    return "What rounding does to sums, products and updates"


def _card(result: Result) -> Card:
    kept = sum(finding.reproduced for finding in result.findings)
    return Card(
        label=result.title,
        figure=f"{kept} of {len(result.findings)}",
        detail="published findings reproduced",
        tone=Tone.GOOD if result.reproduced else Tone.BAD,
    )


def _row(finding: Finding) -> tuple[str, ...]:
    return (
        finding.claim,
        finding.published,
        number(finding.ours),
        interval(finding),
        "yes" if finding.reproduced else "no",
        finding.source,
    )


def _derivations(findings: Iterable[Finding]) -> str:
    return "; ".join(dict.fromkeys(finding.derivation for finding in findings))
