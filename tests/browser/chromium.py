"""A real Chromium, driven through its DevTools protocol over a pair of pipes: the standard library is all it takes."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Return the path of a Chromium, or None; the variable ``CHROMIUM`` names another."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One headless browser with one page.

    Args:
        program: path of the browser.
        downloads: folder that downloads go to.
        size: width and height of the window in pixels.
    """

    def __init__(self, program: str, downloads: Path, size: tuple[int, int] = (1366, 860)) -> None:
        self.errors: list[str] = []  # of the console, exceptions, and files that could not be loaded
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads file 3 and writes file 4; ends above them cannot be overwritten while they are put there.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        words = [
            program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
            f"--user-data-dir={self._profile.name}", f"--window-size={size[0]},{size[1]}", "about:blank",
        ]  # fmt: skip
        nowhere = os.open(os.devnull, os.O_RDWR)
        self._pid = os.posix_spawn(
            program,
            words,
            dict(os.environ),
            file_actions=[(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
            + [(os.POSIX_SPAWN_DUP2, nowhere, stream) for stream in (0, 1, 2)],
            setpgroup=0,
        )
        for end in (theirs_in, theirs_out, *ends, nowhere):
            os.close(end)
        self._in, self._out = ours_in, ours_out
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.set_downloads(downloads)

    def close(self) -> None:
        """End the browser and all its processes."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, path: Path) -> None:
        """Show a file, and wait until it is loaded."""
        self._loaded = False
        self._call("Page.navigate", url=path.as_uri())
        self._until(lambda: self._loaded)

    def set_downloads(self, folder: Path) -> None:
        """Send downloads to a folder."""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def wait_for_file(self, path: Path, seconds: float = 20.0) -> None:
        """Wait until a download is there; Chromium renames it when it is complete."""
        end = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > end:
                raise AssertionError(
                    f"no {path.name} after {seconds} s, but {sorted(p.name for p in path.parent.iterdir())}"
                )
            time.sleep(0.05)

    def reload(self) -> None:
        """Load the page again."""
        self._loaded = False
        self._call("Page.reload")
        self._until(lambda: self._loaded)

    def run(self, script: str) -> Any:
        """Return the value of an expression, which may be a promise."""
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"]["exception"].get("description", answer))
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise AssertionError(f"still false after {seconds} s: {script}")
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press and let go of keys: one character each, or names such as ``ArrowDown``."""
        for key in keys:
            code = {"text": key} if len(key) == 1 else {"code": key}
            if key == "Enter":
                code = {"text": "\r", "code": key}
            self._call("Input.dispatchKeyEvent", type="keyDown", key=key, **code)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector: str) -> None:
        """Click in the middle of the first element that fits."""
        x, y = self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into an input of type file."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def resize(self, width: int, height: int) -> None:
        """Change the size of the page."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, scheme: str = "light", kind: str = "") -> None:
        """Ask for light or dark colors, and for ``print`` or the screen."""
        self._call(
            "Emulation.setEmulatedMedia", media=kind, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def screenshot(self, path: Path) -> None:
        """Save what is in view as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def pdf(self, path: Path) -> None:
        """Save the page as it would be printed."""
        path.write_bytes(base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._out, content) :]
        found: list[dict[str, Any]] = []

        def answered() -> bool:
            found.extend(m for m in self._messages if m.get("id") == self._number)
            return bool(found)

        self._until(answered)
        if "error" in found[0]:
            raise AssertionError(f"{method}: {found[0]['error']}")
        return found[0]["result"]

    def _until(self, done: Any, seconds: float = 60.0) -> None:
        """Take in messages until something is the case."""
        end = time.monotonic() + seconds
        self._messages: list[dict[str, Any]] = []
        while not done():
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"Chromium said nothing for {seconds} s")
            content = os.read(self._in, 1 << 20)
            if not content:
                raise AssertionError("Chromium ended")
            *whole, self._rest = (self._rest + content).split(b"\0")
            self._messages = [json.loads(message) for message in whole]
            for message in self._messages:
                self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, content = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(content["exceptionDetails"].get("exception", {}).get("description", str(content)))
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.errors.append(str(content["args"]))
        elif method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{content['entry']['text']} {content['entry'].get('url', '')}")
