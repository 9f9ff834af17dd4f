"""Colours that can be read: every pair of text and ground in the site's CSS, in the widgets, in the
pages' stored HTML and in the bake's report has a contrast of 4.5 (WCAG 2 AA), light and dark."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from icl_distill.app import report
from icl_distill.app.monitor import _COLOURS, monitor_html, paper
from icl_distill.app.widgets import _SHADE, _box
from icl_distill.app.launched import Launched

root = Path(__file__).resolve().parent.parent
LEAST = 4.5
LIGHT, DARK = ("#343a40", "#ffffff"), ("#ffffff", "#222222")  # text and ground: cosmo, darkly
VOID = {"img", "br", "hr", "input", "meta", "link", "col"}
CSS = (root / "nbs" / "styles.css").read_text()


def rgb(colour: str) -> tuple[float, ...]:  # 0 to 1
    named = {"white": "#ffffff", "black": "#000000"}.get(colour, colour)
    digits = named.removeprefix("#")
    assert re.fullmatch(r"[0-9a-fA-F]{3}|[0-9a-fA-F]{6}", digits), f"{colour} is not #rgb"
    if len(digits) == 3:
        digits = "".join(2 * d for d in digits)
    return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))


def inverted(colour: tuple[float, ...]) -> tuple[float, ...]:
    "What CSS makes of it with `invert(0.87) hue-rotate(180deg)`."
    r, g, b = (0.87 - 0.74 * x for x in colour)
    rotated = (
        -0.574 * r + 1.43 * g + 0.144 * b,
        0.426 * r + 0.43 * g + 0.144 * b,
        0.426 * r + 1.43 * g - 0.856 * b,
    )
    return tuple(min(1.0, max(0.0, x)) for x in rotated)


def luminance(colour: tuple[float, ...]) -> float:
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast(rgb("#000"), rgb("#fff")) == pytest.approx(21)
    assert contrast(rgb("#777"), rgb("white")) == pytest.approx(4.48, abs=0.01)
    assert inverted(rgb("#ffffff")) == pytest.approx((0.13, 0.13, 0.13), abs=0.001)


def declarations(style: str) -> dict[str, str]:
    pairs = (part.split(":", 1) for part in style.split(";") if ":" in part)
    return {name.strip(): value.strip() for name, value in pairs}


class Texts(HTMLParser):
    "The texts of some HTML with (colour, ground, whether it lies on paper)."

    def __init__(self, colour: str, ground: str):
        super().__init__()
        self.stack, self.found = [("", colour, ground, False)], []

    def handle_starttag(self, tag, attributes):
        if tag in VOID:
            return
        given = dict(attributes)
        said = declarations(given.get("style") or "")
        _, colour, ground, on_paper = self.stack[-1]
        ground = said.get("background", said.get("background-color", ground))
        ground = self.stack[-1][2] if ground in ("none", "transparent") else ground
        on_paper = on_paper or "paper" in (given.get("class") or "").split()
        self.stack.append((tag, said.get("color", colour), ground, on_paper))

    def handle_endtag(self, tag):
        while len(self.stack) > 1 and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if data.strip():
            self.found.append((data.strip()[:30], *self.stack[-1][1:]))


def pale(html: str) -> list:
    "Texts that are hard to read, on a light page or a dark one."
    out = []
    for theme in (LIGHT, DARK):
        parser = Texts(*theme)
        parser.feed(html)
        for text, colour, ground, on_paper in parser.found:
            pair = rgb(colour), rgb(ground)
            if theme == DARK and on_paper:
                pair = inverted(pair[0]), inverted(pair[1])
            if (ratio := contrast(*pair)) < LEAST:
                out.append((text, colour, ground, "dark" if theme == DARK else "light", ratio))
    return out


@pytest.mark.parametrize(
    "html",
    [
        "<p style='color:#B00000'>on dark</p>",
        "<p style='background:#D9D9D9'>on dark</p>",
        paper("<b style='color:#E69F00'>orange</b>"),
        paper("<div style='background:#7FC4EA'><i style='color:#777'>grey</i></div>"),
    ],
)
def test_a_pale_text_is_found(html):
    assert pale(html)


def test_widgets_can_be_read():
    pages = [monitor_html(Launched(root / "results" / "quickstart" / "distill"))]
    pages += [paper(f"<b style='color:{colour}'>state</b>") for colour in _COLOURS.values()]
    pages += [paper(_box("3", "word", "next", shade)) for shade in _SHADE]
    pages.append(paper("<p style='color:#B00000'>an error</p>"))
    assert [found for page in pages for found in pale(page)] == []


@pytest.mark.parametrize("nb", sorted((root / "nbs").rglob("*.ipynb")), ids=lambda f: f.stem)
def test_pages_html_can_be_read(nb):
    for cell in json.loads(nb.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert pale(re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)) == []


def rules(css: str):
    "(selector, declarations) of each rule."
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
        yield selector.strip(), declarations(body)


def test_css_can_be_read():
    checked = 0
    for selector, said in rules(CSS):
        if "color" not in said:
            continue
        only_dark, only_light = "body.quarto-dark" in selector, "body:not(" in selector
        for theme, left_out in ((LIGHT, only_dark), (DARK, only_light)):
            ground = said.get("background", theme[1])
            checked += not left_out
            assert left_out or contrast(rgb(said["color"]), rgb(ground)) >= LEAST, selector
    assert checked
    quarto = (root / "_quarto.yml").read_text()
    bar = dict(re.findall(r'^    (background|foreground): "(#\w+)"$', quarto, re.MULTILINE))
    assert contrast(rgb(bar["foreground"]), rgb(bar["background"])) >= LEAST


def test_the_filter_of_dark_pages_is_the_one_computed_here():
    assert "invert(0.87) hue-rotate(180deg)" in CSS


def test_report_can_be_read():
    schemes = [
        dict(re.findall(r"--(\w+): (#\w+)", part)) for part in report.STYLE.split("@media")[:2]
    ]
    for scheme in schemes:
        for text in ("ink", "won", "lost"):
            for ground in ("paper", "soft"):
                assert contrast(rgb(scheme[text]), rgb(scheme[ground])) >= LEAST, (text, ground)
