"""A headless Chromium that tests drive through its debugging pipe."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page; `evaluate` runs JavaScript in it."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._unread = b""
        self._session: str | None = None
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.call("Page.navigate", url=path.as_uri())
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, script: str, *, across: float = 0.5, down: float = 0.5) -> None:
        """Click with the mouse into the element that an expression gives."""
        self.evaluate(f"({script}).scrollIntoView()")
        box = self.evaluate(f"({script}).getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + across * box["width"], "y": box["y"] + down * box["height"]}
        for kind in ("mousePressed", "mouseReleased"):
            options = {"type": kind, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", **place, **options)

    def turn_wheel(self, script: str, amount: int, *, across: float, down: float) -> None:
        """Turn the wheel over a place in the element that an expression gives."""
        self.evaluate(f"({script}).scrollIntoView()")
        box = self.evaluate(f"({script}).getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + across * box["width"], "y": box["y"] + down * box["height"]}
        wheel = {"type": "mouseWheel", "deltaX": 0, "deltaY": amount}
        self.call("Input.dispatchMouseEvent", **place, **wheel)

    def write(self, script: str, text: str) -> None:
        """Give the input that an expression gives this text, as typing does."""
        value = json.dumps(text)
        self.evaluate(f"({script}).value = {value}; ({script}).form.dispatchEvent("
                      "new Event('input'))")  # fmt: skip

    def press(self, key: str) -> None:
        """Press and release a key."""
        codes = {"ArrowDown": 40, "ArrowUp": 38, "ArrowRight": 39, "+": 107, "-": 109, "0": 48}
        for kind in ("rawKeyDown", "keyUp"):
            code = codes[key]
            options = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", **options)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            more = os.read(self._answers, 65536)
            assert more, "the browser has ended"
            self._unread += more
        text, self._unread = self._unread.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.problems.append(json.dumps(message["params"]))
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("file:", "about:", "data:")):
                self.problems.append(url)
        return message


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """A page in a browser of its own; both are closed at the end."""
    assert CHROMIUM is not None
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    script = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", CHROMIUM, *arguments, f"--user-data-dir={profile}"],
        pass_fds=(command_read, answer_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Page(command_write, answer_read)
    finally:
        process.terminate()
        process.wait(30)
        os.close(command_write)
        os.close(answer_read)
