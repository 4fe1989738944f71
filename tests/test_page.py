"""page.py: the attention page, seen and used in a browser (Debian's chromium and chromium-driver)."""

import json
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Browser:
    """A headless browser, driven through the WebDriver protocol at `url`."""

    def __init__(self, url, profile):
        self.url = url
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        made = self.post("", capabilities={"alwaysMatch": wanted})
        self.url += f"/{made['sessionId']}"

    def send(self, method, path, body=None):
        request = urllib.request.Request(self.url + path, body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def post(self, path, **body):
        return self.send("POST", path, json.dumps(body).encode())

    def run(self, script):
        """What a script returns in the page."""
        return self.post("/execute/sync", script=script, args=[])

    def cdp(self, command, **parameters):
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    with start_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@contextmanager
def start_browser(profile):
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in driver.stdout:
            if "on port" in line and "started successfully" in line:
                port = int(line.rstrip(".\n").split()[-1])
                break
        browser = Browser(f"http://127.0.0.1:{port}/session", profile)
        try:
            yield browser
        finally:
            browser.send("DELETE", "")
    finally:
        driver.kill()
        driver.wait()
