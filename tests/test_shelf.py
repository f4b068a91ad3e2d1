"""The pages of all reports show what is there, failures too, and nothing in a report can run in them."""
import json
import re

import pytest

from evoprune_nb.paper.shelf import find_reports, write_gallery, write_index

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"


@pytest.fixture
def reports(tmp_path):
    "One whole report with an unfriendly name, one that failed, one that is damaged, and what is no report."
    files = {f"a {'&'}<b>": {"results.json": {"title": ATTACK, "sentences": [ATTACK], "parameters": {ATTACK: ATTACK}, "finished": "2026-11-26 20:00 UTC"}, "report.html": ""},
             "failed": {"failed.json": {"error": f"ValueError: {ATTACK}", "parameters": {"seed": 3}}, "results.json": {"title": "of before"}},
             "damaged": {"results.json": None}, "cells": {}}
    for name, contents in files.items():
        (tmp_path / name / "figures").mkdir(parents=True)
        for file, content in contents.items():
            (tmp_path / name / file).write_text("{" if content is None else json.dumps(content))
    for ending in ("png", "svg"):
        (tmp_path / f"a {'&'}<b>" / "figures" / f"x'.{ending}").write_bytes(b"")
    return tmp_path


def test_the_index_shows_every_report(reports):
    "Failures first, with their error, also where an older report is whole; a damaged one says so; other directories are left out."
    rows = find_reports(reports)
    assert [row["name"] for row in rows] == ["damaged", "failed", "a &<b>"] and "is damaged" in rows[0]["error"] and rows[1]["title"] == "of before"
    page = write_index(reports).read_text()
    assert "3 reports, 2 failed" in page and page.count('class="entry failed"') == 2 and "seed 3" in page


def test_pages_are_inactive_and_offline(reports):
    "Text of reports is escaped; the one script is this package's; every address is relative and names a file that is there."
    from html import unescape
    from urllib.parse import unquote

    for page in (write_index(reports).read_text(), write_gallery(reports).read_text()):
        assert page.count("<script>") == 1 and "alert(1)</script>" not in page and not re.search(r"<[^>]*\son\w+=", page.partition("<script>")[0])
        addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert addresses and all(not re.match(r"\w+:", address) and (reports / unquote(unescape(address))).exists() or address == "gallery.html" for address in addresses)


def test_the_filter_is_a_working_script(reports, tmp_path):
    "In a browser, words that are typed hide the rows that lack one of them."
    import shutil
    from playwright.sync_api import sync_playwright

    page_file = write_index(reports)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(page_file.as_uri())
        visible = lambda: page.locator(".entry:visible").count()
        assert visible() == 3
        page.locator("input").fill("of before")
        assert visible() == 1 and page.locator("#shown").inner_text() == "1 shown"
        page.locator("input").fill("")
        assert visible() == 3
        browser.close()
