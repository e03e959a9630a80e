"""The page in a real browser: every plot has its data and the console is clean."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser
PLOTS = (
    "curve-error",
    "curve-loss",
    "final-error",
    "binades",
    "loss-by-scale",
    "swallowed",
    "digits",
    "step-time",
    "bytes",
)


def test_every_plot_is_drawn_and_nothing_complains(browser, small_demo):
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(small_demo.page.as_uri())
    for name in PLOTS:
        page.wait_for_selector(f"#{name} .main-svg", timeout=20_000)
        points = page.evaluate(
            f"document.getElementById('{name}').data.reduce((n, t) => n + t.x.length, 0)"
        )
        assert points > 0, f"{name} has no data"
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.inner_text("h1")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1100, "the page is wider than the window"


def test_it_fits_a_telephone(browser, small_demo):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(small_demo.page.as_uri())
    page.wait_for_selector("#bytes .main-svg", timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
