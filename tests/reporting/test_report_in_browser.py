"""Reports as a person sees them. Run: python -m pytest tests/reporting/test_report_in_browser.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fsdp.reporting import write_comparison, write_report
from tests.support.browser import CHROMIUM, Browser, open_browser
from tests.support.reported import HOSTILE_TEXTS, made_up_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Text whose contrast with what is behind it is below WCAG's 4.5 to 1.
TOO_FAINT = """
(() => {
  const parse = color => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = color => {
    const [r, g, b] = color.map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || element.localName === "style") continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(element.outerHTML.slice(0, 120));
  }
  return faint;
})()
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll("body *")]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !e.closest("svg"))
  .map(e => parseFloat(getComputedStyle(e).fontSize)))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, many_labels_run: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    plain = made_up_run(root / "plain", held_out=80)
    hostile = made_up_run(
        root / ("long" * 50),
        labels=("<b>bold</b>", "שלילי", "w" * 300),
        texts=HOSTILE_TEXTS,
        skill=1.0,
    )
    return {
        "plain": write_report(plain),
        "hostile": write_report(hostile),
        "many labels": write_report(many_labels_run),
        "comparison": write_comparison([plain, hostile, many_labels_run], root / "comparison.html"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("name", ["plain", "hostile", "many labels", "comparison"])
def test_a_page_fits_and_can_be_read(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []
    assert browser.requests == [pages[name].as_uri()]
    assert browser.evaluate("document.title") != "broken"
    assert browser.evaluate(TOO_FAINT) == []
    assert browser.evaluate(SMALLEST_TEXT) >= 11
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 24, 28)") == dark


def test_verdict_and_scores_are_on_the_first_screen_of_a_phone(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["plain"], width=375)
    bottom = browser.evaluate("document.querySelector('table').getBoundingClientRect().bottom")
    assert bottom < 667


def test_pictures_and_tables_have_names(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["plain"], width=1280)
    assert browser.evaluate("document.querySelectorAll('figure svg').length") == 5
    unnamed = "[...document.querySelectorAll('[role]')].filter(e => !e.ariaLabel).length"
    assert browser.evaluate(unnamed) == 0
    assert browser.evaluate("document.querySelectorAll('h1').length") == 1
    bare = "[...document.querySelectorAll('th')].filter(e => !e.scope).length"
    assert browser.evaluate(bare) == 0


def test_print_is_light_and_shows_what_is_folded(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["many labels"], width=700, dark=True)
    shown = "document.querySelector('details li, details td').checkVisibility()"
    assert browser.evaluate(shown) is False
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == "rgb(255, 255, 255)"
        assert browser.evaluate(shown) is True
        assert browser.evaluate("document.documentElement.scrollWidth") <= 700
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
