"""The lab's page in a real browser: every panel has its data, nothing overlaps or complains."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfstep.study.lab.catalogue import EXPERIMENTS
from halfstep.study.lab.dot_length import dot_length
from halfstep.study.lab.page import build_page
from halfstep.study.lab.promotion import promotion
from halfstep.study.lab.swamping import swamping

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def results():
    """Every experiment, short: too short to reproduce what is published."""
    short = {
        "swamping": lambda: swamping(0, lengths=(16, 64, 256)),
        "dot-length": lambda: dot_length(0, lengths=(16, 64, 256), growth=(16, 256)),
        "promotion": lambda: promotion(0, rows=4, intervals=(128, 4096)),
    }
    return [short.get(name, lambda run=run: run(0))() for name, run in EXPERIMENTS.items()]


@pytest.fixture(scope="module")
def written(results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lab") / "lab.html"
    path.write_text(build_page(results, ["a line of the footer"]), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1100, 400])
def test_every_panel_is_drawn_and_nothing_complains(browser, results, written: Path, width: int):
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(written.as_uri())
    for result in results:
        for panel in result.panels:
            page.wait_for_selector(f"#{panel.name} .main-svg", timeout=20_000)
            points = page.evaluate(
                f"document.getElementById('{panel.name}').data.reduce((n, t) => n + t.x.length, 0)"
            )
            assert points > 0, f"{panel.name} has no data"
            assert not overlapping(page, panel.name), f"{panel.name}: legend over the plot"
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def overlapping(page, name: str) -> bool:
    """Whether the legend lies over the curves, or hangs over the top of its figure."""
    return page.evaluate(
        """name => {
            const figure = document.getElementById(name);
            const legend = figure.querySelector('.legend .bg');
            if (!legend) return false;
            const box = legend.getBoundingClientRect();
            const plot = figure.querySelector('.nsewdrag').getBoundingClientRect();
            return box.bottom > plot.top + 1 || box.top < figure.getBoundingClientRect().top - 1;
        }""",
        name,
    )


def test_the_page_says_what_the_results_say(browser, results, written: Path):
    page = browser.new_page()
    page.goto(written.as_uri())
    text = page.inner_text("main")
    for result in results:
        assert result.title in text
        assert all(finding.claim in text for finding in result.findings)
        kept = sum(finding.reproduced for finding in result.findings)
        assert f"{kept} of {len(result.findings)}" in text
