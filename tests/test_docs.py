"""The site: every link leads somewhere, nothing is loaded from elsewhere, and a browser shows, finds and darkens it without complaint."""
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
PAGES = ["index", "nbs/index", "nbs/07_pruning", "nbs/cluster/laptop_to_cluster", "nbs/tutorials/2_second_order", "nbs/tutorials/glossary", "nbs/baselines/07_registry",
         "api/search", "commands", "reports/index", "reports/gallery", "reports/demo-smollm2-135m/report", "slides/2_second_order"]  # one of each kind


class Links(HTMLParser):
    "What a page refers to and what can be referred to in it."

    def __init__(self, page: Path):
        super().__init__()
        self.names, self.links, self.loads = set(), [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site as `make docs` builds it; warnings are errors."
    directory = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Links]:
    return {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}  # whose links are those of the domain


def test_everything_has_a_page(site):
    "README and changelog, every notebook, report and module, the shelf, the gallery, the command line, and slides of each tutorial."
    expected = {"index", "CHANGELOG", "commands", "reports/index", "reports/gallery"}
    expected |= {path.relative_to(ROOT).with_suffix("").as_posix() for path in [*(ROOT / "nbs").rglob("[!.]*.ipynb"), *(ROOT / "reports").glob("*/report.html")] if ".ipynb_checkpoints" not in path.parts}
    expected |= {f"api/{'.'.join(path.relative_to(ROOT / 'evoprune_nb').with_suffix('').parts)}" for path in (ROOT / "evoprune_nb").rglob("[!_]*.py")}
    expected |= {f"slides/{path.stem}" for path in (ROOT / "nbs/tutorials").glob("[1-9]_*.ipynb")}
    assert expected == {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")} - {"404"}


def test_no_link_is_broken(site, pages):
    "Files and the places in them exist."
    broken = []
    for page, found in pages.items():
        for link in found.links + found.loads:
            parts = urlsplit(link)
            if parts.scheme or link == "#":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file() and (not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].names)
            broken += [] if there else [f"{page.relative_to(site)}: {link}"]
    assert not broken, "\n".join(broken[:40])


def test_nothing_is_loaded_from_elsewhere(pages):
    "Scripts, styles, fonts and pictures come along, or lie in the page."
    assert {load for found in pages.values() for load in found.loads if re.match(r"(https?:)?//", load)} == set()


def test_formulas_are_formulas(site):
    "All of them are MathML: no dollar sign or backslash bracket is left over, and none could not be converted."
    for path in site.rglob("*.html"):
        text = re.sub(r"(?s)<(script|style|pre|code)\b.*?</\1>", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"\\\(|\\\[|\$[^$\n<]{1,80}\\[a-z]+", text), path.name
    assert (site / "nbs/07_pruning.html").read_text().count("<math") > 5


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "no chromium found; `make test` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(browser, address: str, complaints: list, **how) -> Page:
    "A page, opened from disk; what the browser complains of, and what it would load from elsewhere, is noted."
    page = browser.new_page(**how)
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(address)
    return page


CONTRAST = """() => {
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const text = light(getComputedStyle(document.querySelector('article p, section p') || document.body).color), paper = light(getComputedStyle(document.body).backgroundColor);
  return [(Math.max(text, paper) + .05) / (Math.min(text, paper) + .05), paper];
}"""


@pytest.mark.parametrize("name", PAGES)
def test_readable_on_a_phone_and_in_the_dark(browser, site, name):
    "At 400 pixels nothing sticks out; in the dark, text is light on dark paper; the console is silent."
    complaints = []
    page = opened(browser, f"file://{site}/{name}.html", complaints, viewport={"width": 400, "height": 800}, color_scheme="dark")
    width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
    contrast, paper = page.evaluate(CONTRAST)
    page.close()
    assert complaints == [] and width <= 400 and contrast > 7 and paper < 0.1, (complaints, width, contrast, paper)


@pytest.mark.parametrize("name", ["nbs/tutorials/2_second_order", "slides/2_second_order"])
def test_the_ellipse_is_dragged(browser, site, name):
    "The blue point takes the cosine along, and the black one the weights; both is said below."
    complaints = []
    page = opened(browser, f"file://{site}/{name}.html", complaints, viewport={"width": 1250, "height": 720})
    points, said = page.locator("svg[viewBox='-3 -3 6 6'] circle"), page.locator("output")
    assert points.count() == 3 and "-0.65: error 1.00" in said.inner_text()

    def drag(point: int, right: int, down: int) -> str:
        points.nth(point).scroll_into_view_if_needed()
        box = points.nth(point).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + right, y + down, steps=4)
        page.mouse.up()
        return said.inner_text()

    tilted = drag(1, 0, 30)  # red, blue, black
    assert "error 1.00" in tilted and "-0.65" not in tilted
    moved = drag(2, -30, 0)
    assert moved.split(":")[0] == tilted.split(":")[0] and "error 1.00" not in moved
    page.close()
    assert complaints == []


def test_search_finds(browser, site):
    "From disk, without a server: a word of a docstring and a word of a lesson."
    complaints = []
    page = opened(browser, f"file://{site}/index.html", complaints, viewport={"width": 1400, "height": 900})
    for words, address in (("optimal brain surgeon", "glossary.html"), ("paired_difference", "api/selection.html")):
        page.locator("input.md-search__input").fill(words)
        page.locator("input.md-search__input").press("End")
        page.wait_for_selector(f'.md-search-result a[href*="{address}"]', timeout=60_000)
    page.close()
    assert complaints == []


def test_slides_turn(browser, site):
    "The arrow key shows the next slide, which fills the screen."
    complaints = []
    page = opened(browser, f"file://{site}/slides/2_second_order.html", complaints, viewport={"width": 1280, "height": 720})
    tops = lambda: page.evaluate("[...document.querySelectorAll('section')].map(slide => Math.round(slide.getBoundingClientRect().top))")
    assert tops()[0] == 0 and len(tops()) > 8
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    assert tops()[1] == 0 and page.evaluate("Math.max(...[...document.querySelectorAll('section')].map(slide => slide.offsetHeight))") <= 720
    page.close()
    assert complaints == []
