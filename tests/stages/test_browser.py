"""Pages of runs in a real browser: what a hand, a key, a small screen and a dark room make of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.stages.project import Project, command

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
LEAST_CONTRAST = 4.5
# The contrast of every text with what lies under it, by WCAG 2.
CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const under = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if ((channels(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *:not(script):not(.tag)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(under(element))].sort();
    found.push([element.tagName + "." + element.className, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no driver: pip install 'flux2-lora[browser]'")
    path = next(filter(None, map(shutil.which, NAMES)), str(MAC) if MAC.is_file() else None)
    if path is None:
        pytest.skip("no browser: install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report and a comparison of two runs."""
    project = finished.copy(tmp_path_factory.mktemp("pages") / "project")
    project.make("encode-text", "train", "preview", sets=("run.name='dog'", "train.rank=2"))
    places = ["--store", str(project.store), "--runs", str(project.root / "runs"), "--json"]
    made = {
        "report": command("report", "cat", "--config", str(project.config), *places),
        "compare": command("compare", "cat", "dog", *places),
    }
    return {name: Path(ran.result["path"]) for name, ran in made.items()}


@pytest.fixture
def opened(browser: Browser, pages: dict[str, Path]) -> Iterator[Callable[..., Page]]:
    """Open a page; fail when it complained or asked for anything but itself."""
    said: list[str] = []
    contexts = []

    def see(name: str, width: int = 1280, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not _own(request.url, pages[name]) else None)
        page.goto(pages[name].as_uri())
        return page

    yield see
    for context in contexts:
        context.close()
    assert said == []


def _own(url: str, path: Path) -> bool:
    return url.startswith("data:") or url.partition("#")[0] == path.as_uri()


def step(page: Page) -> str:
    return page.locator(".control output").inner_text()


def shown(page: Page) -> str | None:
    """The step whose picture the view shows, found by the picture itself."""
    script = """() => [...document.querySelectorAll(".strip .film")[0].querySelectorAll("button")]
        .find((each) => each.querySelector("img").src === document.querySelector(".after").src).dataset.step"""
    return page.evaluate(script)


@pytest.mark.parametrize("name", ["report", "compare"])
def test_slider_and_arrow_keys_move_through_the_steps(opened: Callable[..., Page], name: str) -> None:
    page = opened(name)
    assert (step(page), shown(page)) == ("4", "4")
    page.keyboard.press("ArrowLeft")
    assert (step(page), shown(page)) == ("2", "2")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert (step(page), shown(page)) == ("0", "0")
    page.locator("#step").focus()
    page.keyboard.press("End")
    assert (step(page), shown(page)) == ("4", "4")
    page.locator(".film button").nth(1).click()
    assert (step(page), shown(page)) == ("2", "2")
    assert page.locator(".film").first.locator("[aria-current]").inner_text().strip() == "2"


def test_divider_follows_the_hand_and_the_keys(opened: Callable[..., Page]) -> None:
    page = opened("report")
    box = page.locator(".view").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 100)
    page.mouse.up()
    cut = "() => parseFloat(getComputedStyle(document.querySelector('.after')).clipPath.match(/([\\d.]+)%/)[1])"
    assert page.evaluate(cut) == pytest.approx(25, abs=1)
    page.keyboard.press("End")
    assert page.evaluate(cut) == 100
    assert step(page) == "4"
    # Step 0 beside itself would say nothing.
    page.locator(".film button").first.click()
    assert page.locator(".handle").first.is_hidden()


def test_play_goes_from_the_first_step_and_can_be_paused(opened: Callable[..., Page]) -> None:
    page = opened("report")
    play = page.locator(".play")
    play.click()
    assert (play.inner_text(), step(page)) == ("Pause", "0")
    page.locator(".control output", has_text="2").wait_for()
    play.click()
    assert play.inner_text() == "Play"


@pytest.mark.parametrize("name", ["report", "compare"])
def test_numbers_are_read_off_all_curves_at_once(
    opened: Callable[..., Page], pages: dict[str, Path], name: str
) -> None:
    page = opened(name)
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 1, box["y"] + 50)
    said = page.locator(".panel output").all_inner_texts()
    assert len(said) == 5
    assert all(each.startswith("step 1: ") for each in said)
    if name == "report":
        line = msgspec.json.decode((pages[name].parent / "metrics.jsonl").read_bytes().splitlines()[0])
        assert said[0].startswith(f"step 1: {line['loss']:.5g}, smoothed ")
    page.mouse.move(0, 0)
    assert set(page.locator(".panel output").all_inner_texts()) == {""}
    plot.focus()
    page.keyboard.press("End")
    assert page.locator(".panel output").first.inner_text().startswith("step 4: ")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".panel output").first.inner_text().startswith("step 3: ")
    assert step(page) == "4"


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_the_screen(opened: Callable[..., Page], name: str, width: int) -> None:
    page = opened(name, width, has_touch=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(opened: Callable[..., Page], name: str, scheme: str) -> None:
    page = opened(name, color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert [each for each in contrasts if each[1] < LEAST_CONTRAST] == []


def test_every_control_has_a_name(opened: Callable[..., Page]) -> None:
    page = opened("report")
    nameless = """() => [...document.querySelectorAll("input, button, [tabindex], a")].filter((each) =>
        !(each.getAttribute("aria-label") || each.textContent.trim() || (each.labels && each.labels.length)))
        .map((each) => each.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_page_moves_nothing_by_itself_where_motion_is_unwelcome(opened: Callable[..., Page]) -> None:
    behavior = "getComputedStyle(document.documentElement).scrollBehavior"
    assert opened("report").evaluate(behavior) == "smooth"
    assert opened("report", reduced_motion="reduce").evaluate(behavior) == "auto"


def test_paper_shows_every_step(opened: Callable[..., Page]) -> None:
    page = opened("report", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 33, 38)"
    assert page.locator(".view").first.is_hidden()
    assert page.locator(".control").is_hidden()
    assert [each.is_visible() for each in page.locator(".film img").all()] == [True] * 3


def test_page_without_its_script_shows_every_step(opened: Callable[..., Page]) -> None:
    page = opened("report", java_script_enabled=False)
    assert page.locator(".view").first.is_hidden()
    assert page.locator(".control").is_hidden()
    assert [each.is_visible() for each in page.locator(".film img").all()] == [True] * 3


def test_policy_holds_even_where_something_came_through(browser: Browser, pages: dict[str, Path]) -> None:
    reached: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        evil = (
            f'<script>document.title = "owned"; fetch("{address}/a")</script><img src="{address}/b" onerror="1">'
            f'<link rel="stylesheet" href="{address}/c"><iframe src="{address}/d"></iframe>'
        )
        path = pages["report"].with_name("evil.html")
        path.write_text(pages["report"].read_text().replace("<main>", f"<main>{evil}"))
        page = browser.new_page()
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        # The server does answer: to ask it from outside the page is a request.
        page.goto(f"{address}/hello")
        assert page.title() != "owned"
        server.shutdown()
        page.close()
    assert [each for each in reached if each != "/favicon.ico"] == ["/hello"]
