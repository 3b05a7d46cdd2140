"""A real browser for tests of pages: chromium without a window, told what to do through a pipe."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One page. Keys are pressed as on a keyboard, not as events that a script makes."""

    def __init__(self, profile: Path):
        to_browser, from_browser = os.pipe(), os.pipe()
        command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                   "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        shell = ["bash", "-c", f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}', "bash", *command]
        given = (to_browser[0], from_browser[1])
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=given, **quiet)
        for descriptor in given:
            os.close(descriptor)
        self.to, self.back = os.fdopen(to_browser[1], "wb"), os.fdopen(from_browser[0], "rb")
        self.last, self.buffer, self.session, self.events = 0, b"", None, []
        (page,) = (x for x in self.call("Target.getTargets")["targetInfos"] if x["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Ask, and return the answer; what the browser reports meanwhile goes to `events`."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        self.to.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.to.flush()
        while (answer := self._read()).get("id") != self.last:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.buffer:
            more = os.read(self.back.fileno(), 2**20)
            assert more, "the browser is gone"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int = 1280, height: int = 900) -> None:
        """Open a file and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(x["method"] == "Page.loadEventFired" for x in self.events):
            self.events.append(self._read())

    def run(self, expression: str):
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, value, seconds: float = 10) -> None:
        """Wait until an expression has this value: some events come after the key that caused them."""
        end = time.monotonic() + seconds
        while (found := self.run(expression)) != value:
            assert time.monotonic() < end, f"{expression} is {found!r}, not {value!r}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other; a text is typed."""
        for key in keys:
            if key in KEYS:
                text = {"text": "\r"} if key == "Enter" else {}
                common = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
                self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
                self.call("Input.dispatchKeyEvent", type="keyUp", **common)
                continue
            for letter in key:
                self.call("Input.dispatchKeyEvent", type="keyDown", key=letter, text=letter)
                self.call("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def complaints(self) -> list[str]:
        """Return errors of scripts and what the page's policy refused."""
        logged = [x["params"]["entry"]["text"] for x in self.events if x["method"] == "Log.entryAdded"]
        return logged + [str(x["params"]) for x in self.events if x["method"] == "Runtime.exceptionThrown"]

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for, beside itself and what it holds."""
        asked = [x["params"]["request"]["url"] for x in self.events if x["method"] == "Network.requestWillBeSent"]
        return [url for url in asked[1:] if not url.startswith("data:")]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.to.close()
        self.back.close()
