"""The page is one file, whole, and shows text as text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from halfstep.diagnosis.page import Card, Page, figure, note, paragraph, table, write_whole
from halfstep.diagnosis.plots import binades, loss_by_scale
from halfstep.diagnosis.statistics import count_exponents, reach


def test_text_is_escaped_everywhere():
    page = Page(kicker="<k>", title="<t>")
    page.cards([Card(label="<l>", figure="<f>", detail="<d>")])
    page.verdict("<h>", ["<s>"])
    page.section("<z>", paragraph("<p>"), note("<n>"), table(("<a>",), [("<b>",)]))
    page.footer(["<e>"])
    body = page.html().partition("<body>")[2]
    for letter in "ktlfdhszpnabe":
        assert f"&lt;{letter}&gt;" in body


def test_backticks_are_code():
    assert paragraph("say `x < y` so") == "<p>say <code>x &lt; y</code> so</p>"


def test_nothing_is_loaded_from_elsewhere():
    page = Page(kicker="", title="a page")
    seen = count_exponents(torch.randn(100))
    page.section("one", figure(binades(seen, reach(torch.float16), scale=8), "one"))
    document = page.html()
    # plotly.js itself names addresses of map tiles in its code; our markup loads none
    markup = re.sub(r"<script>.*?</script>", "", document, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", markup)
    assert document.count('id="one"') == 1


def test_binades_colour_what_is_lost():
    seen = count_exponents(torch.tensor([2.0**-30, 2.0**-24 * 1.5, 2.0**-20, 1.5]))
    plot = binades(seen, reach(torch.float16), scale=8)
    bars, shifted = plot.data
    shares = dict(zip(bars.x, bars.y, strict=True))
    assert shares[-31] == shares[-24] == shares[-21] == shares[0] == 25.0
    colours = dict(zip(bars.x, bars.marker.color, strict=True))
    assert len({colours[-31], colours[-24], colours[0]}) == 3
    assert list(shifted.x) == [x + 8 for x in bars.x]


def test_loss_falls_with_the_scale():
    generator = torch.Generator().manual_seed(0)
    seen = count_exponents(torch.randn(1000, generator=generator) * 1e-8)
    (curve,) = loss_by_scale({"x": seen}, reach(torch.float16), chosen=16).data
    assert curve.y[0] > 90
    assert curve.y[-1] < 1
    assert list(curve.y) == sorted(curve.y, reverse=True)


def test_written_whole_or_not_at_all(tmp_path: Path):
    file = tmp_path / "new" / "page.html"
    write_whole(file, "first")
    assert file.read_text() == "first"
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]
