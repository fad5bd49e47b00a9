"""A page in headless Chromium, driven over its debugging pipe: what it shows, what its console says, what a pointer does."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

# The browser reads from 3 and writes to 4; neither may be overwritten before it is copied. (`preexec_fn` would fork a process
# in which JAX has threads.)
_AS_PIPE = """
import fcntl, os, sys
one, other = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(one, 3)
os.dup2(other, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium():
    """The program, or a skip with the reason."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here; Debian's package is chromium")
    return found


class Page:
    """A page of a browser; coordinates are relative to the window."""

    def __init__(self, read, write, seconds):
        self._read, self._write, self._seconds = read, write, seconds
        self._rest, self._count, self._session = b"", 0, {}
        self.problems, self.requests = [], []

    def call(self, method, **params):
        """The result of a method of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def attach(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self):
        end = time.monotonic() + self._seconds
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], max(0, end - time.monotonic()))[0], "Chromium does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.problems.append([part.get("value", part.get("description")) for part in params["args"]])
        elif method == "Log.entryAdded":
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:200])

    def open(self, path, *, width=1280, height=900, dark=False, phone=False):
        """Load a file, in a window of a size, and wait until it says that it is ready (`html[data-ready]`)."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + self._seconds
        while not self.run("document.documentElement?.dataset.ready !== undefined"):
            assert time.monotonic() < end, ("the page is not ready", self.problems)
            time.sleep(0.05)

    def run(self, expression):
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def place(self, selector, across=0.5, down=0.5):
        """Where an element is, after it is scrolled into view."""
        return self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
            f"const b = e.getBoundingClientRect(); return [b.left + {across} * b.width, b.top + {down} * b.height]; }})()"
        )

    def hover(self, selector, across=0.5, down=0.5):
        """Move the pointer to an element."""
        x, y = self.place(selector, across, down)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        """Press and release the pointer on an element."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """Press a key, by its name."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9}.get(key, 0)
            )

    def text(self, selector):
        """What an element says."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def picture(self, path, *, whole=False):
        """A screenshot, as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def chromium(profile, *, seconds=60):
    """A page of a new browser, whose files lie in `profile`."""
    program = find_chromium()
    into, commands = os.pipe()
    answers, out = os.pipe()
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]

    process = subprocess.Popen(
        [sys.executable, "-c", _AS_PIPE, str(into), str(out), program, *flags, "--remote-debugging-pipe"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(into, out),
        env={**os.environ, "HOME": str(profile)},
    )
    os.close(into)
    os.close(out)
    try:
        page = Page(answers, commands, seconds)
        page.attach()
        yield page
    finally:
        process.terminate()
        process.wait(30)
        os.close(commands)
        os.close(answers)
