"""Pages in a real browser: headless Chromium over its own debugging pipe, without a driver."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TIMEOUT_SECONDS = 120
#: axe-core's rules for WCAG 2.1 A and AA, and what axe holds to be good practice.
AXE_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice")
_KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39}


def axe_core() -> str | None:
    """The source of axe-core (https://github.com/dequelabs/axe-core), if a package has it here."""
    # Its own imports want Playwright, which is not needed for the script.
    package = importlib.util.find_spec("axe_playwright_python")
    folders = [] if package is None else package.submodule_search_locations or []
    scripts = (Path(folder, "axe.min.js") for folder in folders)
    return next((one.read_text(encoding="utf-8") for one in scripts if one.is_file()), None)


class Browser:
    """One tab. Protocol: https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, to_browser: int, from_browser: BinaryIO) -> None:
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Load `page` in a window of `width` CSS pixels."""
        self.complaints.clear()
        self.requests: list[str] = []
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=page.absolute().as_uri())
        until = time.monotonic() + TIMEOUT_SECONDS
        while self.evaluate("document.readyState") != "complete":
            if time.monotonic() > until:
                raise TimeoutError(f"{page} did not load")
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page, waited for if it is a promise."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["text"] + expression)
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, as a person at the keyboard does."""
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        if key == "Enter":
            facts["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def violations(self, axe: str) -> list[str]:
        """What axe-core, whose source `axe` is, finds wrong with the page."""
        self.evaluate(f"{axe};0")
        return self.evaluate(
            f"axe.run(document, {{runOnly: {json.dumps(AXE_RULES)}}}).then(r => r.violations.map("
            "v => `${v.id}: ${v.nodes.map(n => n.html.slice(0, 120)).slice(0, 3).join(' ')}`))"
        )

    def picture(self, path: Path, *, height: int | None = None) -> None:
        """Save the whole page, or its first `height` pixels, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"]}
        shot = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip={**clip, "height": height or size["height"]},
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; what the page complains of meanwhile is kept."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._keep(answer)

    def _keep(self, event: dict[str, Any]) -> None:
        name, facts = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.complaints.append(str(facts["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {facts['args']}")
        elif name == "Log.entryAdded":
            self.complaints.append(facts["entry"]["text"])

    def _read(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has gone")
            message += byte
        return json.loads(message)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in the folder `profile`."""
    assert CHROMIUM is not None
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]
    # The browser reads commands from descriptor 3 and writes answers to 4.
    script = f'exec "$@" 3<&{theirs_read} 4>&{theirs_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(theirs_read, theirs_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_read)
    os.close(theirs_write)
    try:
        with os.fdopen(ours_read, "rb") as answers:
            yield Browser(ours_write, answers)
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_SECONDS)
        os.close(ours_write)
