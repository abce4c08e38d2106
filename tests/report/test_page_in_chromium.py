"""The page in a real browser: filters, a phone, dark, print, and that it asks nobody for anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.report.page.build import page_of
from tests.report.browser import Browser, browser, missing
from tests.report.documents import check, document, everything, failed

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all tests."""
    with browser() as shown:
        yield shown


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Browser:
    """A run with one of everything, on an ordinary screen."""
    return show(chromium, tmp_path, everything())


def show(chromium: Browser, folder: Path, run: dict[str, Any], fragment: str = "") -> Browser:
    """A run's page, opened from disk."""
    place = folder / "index.html"
    place.write_text(page_of(run), encoding="utf-8")
    chromium.size(1280, 900)
    chromium.media()
    chromium.log("performance")
    chromium.log("browser")
    chromium.open(place, fragment)
    return chromium


def shown(page: Browser) -> list[str]:
    """The checks that are to be seen."""
    script = (
        "return [...document.querySelectorAll('details.check')].filter(c => c.offsetParent)"
        ".map(c => c.querySelector('.id').textContent)"
    )
    found: list[str] = page.run(script)
    return found


def put(page: Browser, field: str, value: str) -> None:
    """Enter something in a filter, as a user does."""
    page.run(
        "const f = document.getElementById(arguments[0]); f.value = arguments[1];"
        "f.dispatchEvent(new Event('input', {bubbles: true}))",
        field,
        value,
    )


ALL = ["WAY-02", "WAY-03", "WAY-01", "LEAK-01", "FAST-01", "SKIP-04"]


def test_checks_are_filtered_by_verdict_group_node_and_text(page: Browser) -> None:
    assert shown(page) == ALL
    press = "document.querySelector(`[data-filter=verdict][data-value=${arguments[0]}]`).click()"
    page.run(press, "failed")
    assert shown(page) == ["WAY-02", "WAY-03"]
    page.run(press, "skipped")
    assert shown(page) == ["WAY-02", "WAY-03", "SKIP-04"]
    page.run("document.getElementById('show-all').click()")
    assert page.until("return document.getElementById('shown').value === '6 checks'")
    page.run(press, "leaked")
    assert shown(page) == ["LEAK-01"]
    page.run(press, "leaked")
    page.run(press, "slow")
    assert shown(page) == ["FAST-01"]
    page.run(press, "slow")
    put(page, "group", "FAST")
    assert shown(page) == ["FAST-01"]
    put(page, "group", "")
    put(page, "node", "worker3")
    assert shown(page) == [row for row in ALL if row != "SKIP-04"]
    put(page, "node", "")
    put(page, "search", "lost 0 GOT")
    assert shown(page) == ["WAY-02", "WAY-03"]
    assert page.run("return document.getElementById('shown').value") == "2 of 6 checks"
    put(page, "search", "nothing is like this")
    assert shown(page) == []
    assert page.run("return document.getElementById('none').offsetParent !== null")


def test_a_link_opens_its_check_whatever_is_filtered(chromium: Browser, tmp_path: Path) -> None:
    page = show(chromium, tmp_path, everything(), "#check-1")
    assert page.until("return document.getElementById('check-1').open")
    put(page, "search", "WAY-03")
    page.run("location.hash = '#check-5'")
    assert page.until("const c = document.getElementById('check-5'); return c.open && !c.hidden")


def test_commands_are_copied_whole(page: Browser) -> None:
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.run("document.querySelectorAll('#check-2 li .copy').forEach(b => b.click())")
    assert page.until("return window.copied")
    command = page.run("return window.copied")
    assert command.startswith("testbed exec --name lab-1 worker1/client -- python3 -c 'import socket\nprint(1)\n")
    assert command.endswith("print(1)\n' 'x y'")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_scrolls_no_wider_than_it_is(page: Browser, width: int) -> None:
    page.size(width, 800, phone=True)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide, inner = page.run("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide == inner == width
    drawn = page.run(
        "return [...document.querySelectorAll('#places svg')].filter(s => s.getClientRects().length).length"
    )
    assert drawn == 1, "the drawing for wide screens or the other one"


def colours(page: Browser) -> list[list[float]]:
    """Paper and ink, as red, green and blue."""
    script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    return [[float(x) for x in text[4:-1].split(",")[:3]] for text in page.run(script)]


def test_dark_where_the_reader_wants_it_dark(page: Browser) -> None:
    paper, ink = colours(page)
    assert min(paper) > 200
    assert max(ink) < 80
    page.media(scheme="dark")
    paper, ink = colours(page)
    assert max(paper) < 60
    assert min(ink) > 180


def test_in_print_what_failed_is_open_and_buttons_are_gone(page: Browser, tmp_path: Path) -> None:
    page.run("document.querySelectorAll('details.check').forEach(d => d.open = false)")
    page.run(
        "window.seen = []; addEventListener('beforeprint', () => { window.seen = "
        "[...document.querySelectorAll('details.check')].filter(c => c.open).map(c => c.dataset.verdict) })"
    )
    page.printed(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert page.run("return window.seen") == ["failed", "failed"]
    page.media("print")
    hidden = (
        "return [...document.querySelectorAll('.filters, .copy, nav')].filter(e => e.getClientRects().length).length"
    )
    assert page.run(hidden) == 0


def requests(page: Browser) -> list[str]:
    """What the browser has asked for since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def test_it_asks_nobody_for_anything_and_runs_nothing_of_strangers(chromium: Browser, tmp_path: Path) -> None:
    evil = "</script><script>window.evil = 1</script><img src='http://192.0.2.1/x' onerror='window.evil = 2'>"
    run = document(failed(), check(reason=evil, name=f"X[{evil}]"), name=evil, problems=[evil])
    page = show(chromium, tmp_path, run)
    assert shown(page) == ["WAY-02", "WAY-01"], "its own script runs"
    assert page.run("return window.evil ?? null") is None
    assert page.run("return document.images.length") == 0
    assert requests(page) == [(tmp_path / "index.html").as_uri()]
    assert [entry["message"] for entry in page.log("browser")] == []


def test_the_policy_stops_what_would_get_in_all_the_same(chromium: Browser, tmp_path: Path) -> None:
    """The fence behind the escaping: markup put into the page by force does nothing."""
    page = show(chromium, tmp_path, everything())
    page.run(
        'document.body.insertAdjacentHTML(\'beforeend\', \'<img src="http://192.0.2.1/x" onerror="window.evil = 1">'
        '<p id="styled" style="color: rgb(1, 2, 3)">\');'
        "const s = document.createElement('script'); s.textContent = 'window.evil = 2'; document.body.append(s)"
    )
    assert page.until("return document.images.length")
    assert page.run("return window.evil ?? null") is None
    assert page.run("return getComputedStyle(document.getElementById('styled')).color") != "rgb(1, 2, 3)"
    refused = page.log("browser")
    assert any("Content Security Policy" in entry["message"] for entry in refused)


def test_without_its_script_everything_can_be_read(chromium: Browser, tmp_path: Path) -> None:
    chromium.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page = show(chromium, tmp_path, everything())
        height = page.devtools("Page.getLayoutMetrics")["cssContentSize"]["height"]
        assert height > 2000
    finally:
        chromium.devtools("Emulation.setScriptExecutionDisabled", value=False)


def test_pictures_for_the_eye(page: Browser, tmp_path: Path) -> None:
    """TESTBED_PICTURES=DIR keeps them."""
    folder = Path(os.environ.get("TESTBED_PICTURES", tmp_path))
    page.picture(folder / "light.png", whole=True)
    page.media(scheme="dark")
    page.picture(folder / "dark.png", whole=True)
    assert (folder / "light.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "light.png").read_bytes() != (folder / "dark.png").read_bytes()
