"""Reports as a person sees them.

Run: python -m pytest -m slow tests/reporting/test_report_in_browser.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fsdp.cli.main import main
from lora_fsdp.reporting import write_comparison, write_report
from tests.support.browser import CHROMIUM, Browser, axe_core, open_browser
from tests.support.reported import HOSTILE_TEXTS, made_up_run

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.slow,
]

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
UNFOLD = "document.querySelectorAll('details').forEach(e => { e.open = true; })"
SCREEN = 800
# What can be reached by the keyboard, and what of it shows that it has been.
TO_REACH = "document.querySelectorAll('a, summary, [tabindex=\"0\"]').length"
REACHED = """
(() => {
  const e = document.activeElement;
  if (e === document.body || e === document.documentElement) return null;
  const style = getComputedStyle(e);
  return [e.localName + "#" + [...document.querySelectorAll("*")].indexOf(e),
          style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0];
})()
"""
BOLD_SYSTEMS = """
[...document.querySelector("table").querySelectorAll("tbody tr")]
  .filter(row => getComputedStyle(row.querySelector("th")).fontWeight >= 600)
  .map(row => row.querySelector("th").textContent)
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
    losing = made_up_run(root / "losing", held_out=200, skill=-3.0)
    nine = [f"a rather long label {n}" for n in range(9)]
    hostile = made_up_run(
        root / ("long" * 50),
        labels=("<b>bold</b>", "שלילי", "w" * 300),
        texts=HOSTILE_TEXTS,
        skill=1.0,
    )
    return {
        "plain": write_report(plain),
        "losing": write_report(losing),
        "nine labels": write_report(made_up_run(root / "nine", labels=nine, held_out=200)),
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
    browser.evaluate(UNFOLD)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
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


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["plain", "losing", "hostile", "comparison"])
def test_axe_finds_nothing(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    axe = axe_core()
    if axe is None:
        pytest.skip("axe-core is not installed (the Makefile installs axe-playwright-python)")
    browser.open(pages[name], width=400, dark=dark)
    browser.evaluate(UNFOLD)
    assert browser.violations(axe) == []


def test_axe_would_find_something(browser: Browser, tmp_path: Path) -> None:
    axe = axe_core()
    if axe is None:
        pytest.skip("axe-core is not installed (the Makefile installs axe-playwright-python)")
    page = tmp_path / "faint.html"
    page.write_text('<title>x</title><main style="color:#ccc"><h1>faint</h1><img src=""></main>')
    browser.open(page, width=400)
    found = [line.split(":")[0] for line in browser.violations(axe)]
    assert {"color-contrast", "image-alt", "html-has-lang"} <= set(found)


@pytest.mark.parametrize("width", [400, 1280])
def test_a_report_is_shorter_than_six_screens(
    browser: Browser, pages: dict[str, Path], width: int
) -> None:
    browser.open(pages["plain"], width=width)
    assert browser.evaluate("document.documentElement.scrollHeight") < 6 * SCREEN
    shown = browser.evaluate("[...document.querySelectorAll('h2')].every(e => e.checkVisibility())")
    assert shown
    browser.evaluate(UNFOLD)
    assert browser.evaluate("document.documentElement.scrollHeight") > 6 * SCREEN


def test_the_winner_is_bold_and_nothing_else(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["plain"], width=1280)
    assert browser.evaluate(BOLD_SYSTEMS) == ["tuned model"]
    browser.open(pages["losing"], width=1280)
    [winner] = browser.evaluate(BOLD_SYSTEMS)
    assert winner != "tuned model"
    browser.open(pages["hostile"], width=1280)
    assert "Not proven" in browser.evaluate("document.querySelector('h1').textContent")
    assert browser.evaluate(BOLD_SYSTEMS) == []


def test_a_wide_matrix_scrolls_by_itself_and_with_the_keyboard(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["nine labels"], width=400)
    matrix = "document.querySelector('.scroll:has(table.matrix)')"
    assert browser.evaluate(f"{matrix}.scrollWidth > {matrix}.clientWidth + 100")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    browser.evaluate(f"{matrix}.focus()")
    browser.press("ArrowRight")
    moved = f"new Promise(done => setTimeout(() => done({matrix}.scrollLeft), 50))"
    assert any(browser.evaluate(moved) > 0 for _ in range(60))
    # The names of the rows stay in sight.
    assert browser.evaluate(f"{matrix}.querySelector('tbody th').getBoundingClientRect().left") >= 0


def test_everything_is_reached_by_the_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["plain"], width=1280)
    browser.evaluate(UNFOLD)
    seen = []
    browser.press("Tab")
    while (reached := browser.evaluate(REACHED)) is not None and reached[0] not in dict(seen):
        seen.append(reached)
        browser.press("Tab")
    assert len(seen) == browser.evaluate(TO_REACH) > 30
    assert [name for name, is_shown in seen if not is_shown] == []


def test_a_folded_section_opens_by_enter_and_by_its_link(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["plain"], width=1280)
    shown = "document.querySelector('#fsdp').checkVisibility()"
    assert browser.evaluate(shown) is False
    browser.evaluate("document.querySelector('details:has(#fsdp) > summary').focus()")
    browser.press("Enter")
    assert browser.evaluate(shown) is True
    words = browser.evaluate("document.querySelector('#fsdp').innerText")
    assert "sharded by FSDP2" in words
    assert "False" not in words
    assert browser.evaluate("document.querySelector('#speed').checkVisibility()") is False
    browser.evaluate("document.querySelector('nav a[href=\"#speed\"]').click()")
    assert browser.evaluate("document.querySelector('#speed').checkVisibility()") is True


def test_a_report_is_printed_as_pdf(
    pages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(pages["plain"].parent), "--pdf"]) == 0
    pdf = pages["plain"].with_suffix(".pdf")
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {pdf}"
    contents = pdf.read_bytes()
    assert contents.startswith(b"%PDF-")
    assert contents.rstrip().endswith(b"%%EOF")
    # Unfolded: many more words than the screens' worth that is open.
    assert contents.count(b"/Type /Page\n") >= 4
