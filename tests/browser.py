"""A real browser for the tests that look at pages."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)


def executable() -> str | None:
    """The browser to start; None lets Playwright take the one it has installed itself."""
    if chosen := os.environ.get("DELTADOCK_TEST_BROWSER"):
        return chosen
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


def install() -> None:
    """See to it that there is a browser: Debian's where root may install it, else Playwright's."""
    with sync_playwright() as playwright:
        if Path(executable() or playwright.chromium.executable_path).is_file():
            return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "--yes", "chromium"]):
            command = ["apt-get", "-qq", *words]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    else:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium that does nothing of its own accord."""
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else list(FLAGS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=flags)
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    install()
