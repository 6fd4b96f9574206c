"""Chromium without a window, driven over two pipes by its DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
PATIENCE = 120
"""Seconds for an answer."""

DRAWN = """new Promise((done) => {
  const look = () => document.documentElement.dataset.drawn ? requestAnimationFrame(() => setTimeout(done)) : setTimeout(look, 20);
  requestAnimationFrame(() => requestAnimationFrame(look));
})"""
"""Two frames, in which a page hears of its new width and colours, and until its figures are drawn."""


class Chromium:
    """One page of a Chromium of its own. ``requests`` and ``messages`` are what it asked for and said since it was opened."""

    def __init__(self, home: Path) -> None:
        program = shutil.which("chromium")
        assert program, (
            "Chromium is not installed, and the page cannot be looked at. On Debian: apt-get install -y chromium"
        )
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads at 3 and writes at 4: no pipe's end may stand there before the shell puts it there.
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        os.close(theirs_in)
        os.close(theirs_out)
        self.log = home / "chromium.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "bash",
                    "-c",
                    f'exec "$0" "$@" 3<&{given[0]} 4>&{given[1]}',
                    program,
                    *FLAGS,
                    f"--user-data-dir={home / 'chromium'}",
                ],
                pass_fds=given,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for end in given:
            os.close(end)
        self.reader, self.writer = ours_in, ours_out
        self.answers = selectors.DefaultSelector()  # select() refuses descriptors from 1,024 on
        self.answers.register(self.reader, selectors.EVENT_READ)
        self.rest = b""
        self.asked = 0
        self.session: str | None = None
        self.loaded = False
        self.requests: list[str] = []
        self.messages: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.session = None
        try:
            self.ask("Browser.close")
        finally:
            self.answers.close()
            os.close(self.reader)
            os.close(self.writer)
            self.process.wait(PATIENCE)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.asked:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            ready = self.answers.select(max(end - time.monotonic(), 0))
            part = os.read(self.reader, 1 << 20) if ready else b""
            assert part, f"Chromium does not answer. It said: {self.log.read_text(errors='replace')[-2000:]}"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, event: str | None, said: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.messages.append(
                f"{said['type']}: {' '.join(str(a.get('value', a.get('description'))) for a in said['args'])}"
            )
        elif event == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.messages.append(
                f"exception: {details.get('exception', {}).get('description', details['text'])}"
            )
        elif event == "Log.entryAdded":
            self.messages.append(f"{said['entry']['level']}: {said['entry']['text']}")
        elif event == "Page.loadEventFired":
            self.loaded = True

    def open(self, file: Path, width: int, *, dark: bool = False) -> None:
        """Open a file in a window of this width, and wait until its figures are drawn."""
        self.requests.clear()
        self.messages.clear()
        self._size(width, dark)
        self.loaded = False
        self.ask("Page.navigate", url=file.as_uri())
        while not self.loaded:
            self._next()
        self.value(DRAWN)

    def show(self, width: int, *, dark: bool = False) -> None:
        """Show the open page in a window of another width or in the other colours, and wait until its figures are drawn."""
        self._size(width, dark)
        # The page hears of its new size after the answer to the request, in a frame of its own.
        scheme = "dark" if dark else "light"
        self.value(
            "new Promise((done) => { const look = () => "
            f'matchMedia("(width: {width}px) and (prefers-color-scheme: {scheme})").matches ? done() : setTimeout(look, 20); look(); }})'
        )
        self.value(DRAWN)

    def _size(self, width: int, dark: bool) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def value(self, expression: str) -> Any:
        """What a JavaScript expression (or the promise it is) gives."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, file: Path, *, height: float | None = None, scale: float = 1) -> None:
        """Write the whole page, or its first ``height`` pixels, as PNG, as it is looked at when a page is changed."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": scale}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
