"""/dashboard and /docs in a browser, against a running service of `builtin:tiny` under load: what the page promises.

Run by hand, with `pip install playwright==1.65.2` and a Chromium: `buddymoe serve deployments/tiny-cpu.yaml`, then
`python tests/clients/page_playwright.py [URL] [FOLDER] [PATH/TO/chromium]`. Pictures, and what assistive technology
is told, are written to the folder.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

MODEL = "builtin:tiny"


def main(url: str = "http://127.0.0.1:8000", folder: str = "page", browser: str = "/usr/bin/chromium") -> None:
    """Say what each step came to; raise where it is not what it must be."""
    out, over = Path(folder), threading.Event()
    out.mkdir(parents=True, exist_ok=True)
    streams = [threading.Thread(target=load, args=(url, over), daemon=True) for _ in range(3)]
    for stream in streams:
        stream.start()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        print(f"chromium {chromium.version}")
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                wrong: list[str] = []
                page = context.new_page()
                listen(page, wrong)
                page.goto(f"{url}/dashboard")
                updates(page)
                if (scheme, width) == ("light", 1280):
                    ask(page)
                    keyboard(page)
                    (out / "dashboard.aria.yaml").write_text(told(page))
                fits(page, width)
                page.screenshot(path=out / f"dashboard-{scheme}-{width}.png", full_page=True)
                page.goto(f"{url}/docs")
                page.wait_for_selector("main details")
                page.locator("main details").first.click()
                fits(page, width)
                page.screenshot(path=out / f"docs-{scheme}-{width}.png")
                assert not wrong, wrong
                print(f"{scheme}, {width} px: two updates in 3 s, no sideways scroll, nothing on the console")
                context.close()
        chromium.close()
    over.set()


def load(url: str, over: threading.Event) -> None:
    """Answers without end."""
    body = json.dumps({"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 64, "ignore_eos": True}).encode()
    while not over.is_set():
        asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(asked, timeout=60).read()


def listen(page: Page, wrong: list[str]) -> None:
    """Note whatever the page, its network or its policy complains about."""
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda asked: wrong.append(asked.url) if "events" not in asked.url else None)


def updates(page: Page) -> None:
    """Two changes of what is counted within 3 s of the first."""
    cards = page.locator("#cards")
    page.wait_for_selector("#cards dd")  # what evaluates text later is against the page's policy
    seen, until = {cards.inner_text()}, time.monotonic() + 3
    while len(seen) < 3 and time.monotonic() < until:
        page.wait_for_timeout(100)
        seen.add(cards.inner_text())
    assert len(seen) >= 3, f"the page said {len(seen) - 1} new things in 3 s"
    assert page.locator("#state").inner_text() == "live", page.locator("#state").inner_text()


def ask(page: Page) -> None:
    """A question, whose answer says what it cost."""
    page.get_by_label("Message").fill("What is 347 + 85?")
    page.get_by_label("Mode").select_option("bounded")
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("article.answer p:has-text('expected rise')", timeout=60_000)
    answer = page.locator("article.answer")
    print("asked:", " / ".join(answer.inner_text().split("\n")))
    touched = int(answer.inner_text().split(" tokens touched by stand-ins")[0].split(" ")[-1])
    marks = answer.locator("mark").all_inner_texts()
    print("marked:", marks)
    assert len(marks) <= touched and (marks or not touched), "the end is a token too, and is not shown"


def keyboard(page: Page) -> None:
    """An expert is told of by arrow keys alone."""
    page.locator("canvas.map").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    said = page.locator("#cell").inner_text()
    print("by keys:", said)
    assert said.startswith("Layer 1, expert 1: "), said


def told(page: Page) -> str:
    """What assistive technology is told, which names every part."""
    snapshot: Any = page.locator("body").aria_snapshot()
    for name in ("Headline", "Experts", "Answers by kind", "Workers and bytes", "Ask it", "Conversation", "Message"):
        assert f'"{name}' in snapshot or f": {name}" in snapshot, f"{name} is not in:\n{snapshot}"
    images = [line for line in snapshot.splitlines() if "- img" in line]
    assert images and all('"' in line for line in images), images
    return str(snapshot)


def fits(page: Page, width: int) -> None:
    """Nothing is wider than the window."""
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, f"the page is {wide} px wide, must be at most {width}"


if __name__ == "__main__":
    main(*sys.argv[1:])
