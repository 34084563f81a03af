"""A page in Chromium, of an allowed and of another origin, with OpenAI's client: CORS."""

from __future__ import annotations

import os
import shutil
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

QUERY = urlencode(
    {"url": os.environ["OPENAI_BASE_URL"], "key": os.environ["OPENAI_API_KEY"], "model": os.environ["MODEL"]}
)
ALLOWED = os.environ["PAGE_URL"]  # on 127.0.0.1, whose other name is another origin
CHROMIUM = shutil.which("chromium")
assert CHROMIUM is not None, "chromium is not installed: scripts/install_debian_packages.sh --browser"

with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = browser.new_page()

    page.goto(f"{ALLOWED}?{QUERY}")
    page.locator("li.end, li.failed").wait_for()
    answers = {item.get_attribute("class"): item.inner_text() for item in page.locator("li").all()}
    print("allowed origin:", answers)
    assert answers["answer"] == answers["stream"] == "47 + 38 = 85."
    assert answers["response"] == "3, 4, 5, 6, 7, 8, 9."
    assert answers["request-id"] != "hidden"
    assert "temperature" in answers["error"]

    page.goto(f"{ALLOWED.replace('127.0.0.1', 'localhost')}?{QUERY}")
    page.locator("li.end, li.failed").wait_for()
    print("another origin:", page.locator("li").all_inner_texts())
    assert page.locator("li").count() == page.locator("li.failed").count() == 1
    browser.close()
