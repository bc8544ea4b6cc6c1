"""What the tests of the blind review use: a small set of answers, and a real Chromium.

The browser is started headless and driven through its DevTools pipe, with the standard library alone.
"""

import base64
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from data.puzzles import Puzzle, write_puzzles, write_rows
from eval.review.page import KIND
from launch.review import main

LABELS = ["CD8-positive, alpha-beta memory T cell, CD45RO-positive", "B cell", "NK cell", "monocyte", "fibroblast"]
SCRIPT = "</script><script>document.title = 'broken'</script>"
NAMES = ("Quokka-7B", "wombat")
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 600.0
"""Longest wait for Chromium, which is slow on a busy machine."""
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find_chromium() -> str | None:
    """The first Chromium or Chrome on the path."""
    return next((path for path in map(shutil.which, EXECUTABLES) if path), None)


class Browser:
    """One Chromium with one page. `profile` keeps what the page stores; a second Browser on it is the same user, later."""

    def __init__(self, profile: Path, downloads: Path, flags: tuple[str, ...] = ()) -> None:
        executable = find_chromium()
        assert executable is not None
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]

        def pass_pipe() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        words = [
            executable,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-extensions",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            *flags,
            "about:blank",
        ]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=pass_pipe,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict] = []
        """Every event of the page so far, oldest first."""
        self.accept_dialogs = True
        self._session = self.send("Target.attachToTarget", targetId=self._first_page(), flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), eventsEnabled=True)

    def _first_page(self) -> str:
        """Its target, which may come after Chromium's first answer."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for target in self.send("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return target["targetId"]
            time.sleep(0.05)
        raise AssertionError("Chromium opens no page")

    def send(self, method: str, **params: Any) -> dict:
        """Call a DevTools method and wait for its answer."""
        answer = self._ask(method, **params)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _ask(self, method: str, **params: Any) -> dict:
        """The answer as it comes, {"result": ...} or {"error": ...}."""
        self._number = number = self._number + 1
        message = {"id": number, "method": method, "params": params}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(SECONDS)
            if answer.get("id") == number:
                return answer
            self._note(answer)

    def _note(self, event: dict) -> None:
        self.events.append(event)
        if event.get("method") == "Page.javascriptDialogOpening":
            self._number += 1
            answer = {
                "id": self._number,
                "method": "Page.handleJavaScriptDialog",
                "sessionId": self._session,
                "params": {"accept": self.accept_dialogs},
            }
            os.write(self._to, json.dumps(answer).encode() + b"\0")

    def _read(self, seconds: float) -> dict:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            piece = os.read(self._from, 1 << 20)
            assert piece, f"Chromium ended with {self._process.wait()}"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.send("Browser.close")
        self._process.wait(timeout=SECONDS)
        os.close(self._to)
        os.close(self._from)

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a local file at a window size; narrower than 600 it is a phone with a touch screen."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._load(lambda: self.send("Page.navigate", url=file.resolve().as_uri()))

    def reload(self) -> None:
        self._load(lambda: self.send("Page.reload"))

    def _load(self, start: Callable[[], object]) -> None:
        # a mark on the page before it, which may be about:blank and still loading: only the next page is without it
        self._evaluate("window.pageBefore = true")
        start()
        loaded = "!window.pageBefore && location.href !== 'about:blank' && document.readyState === 'complete'"
        # a page that is left while it evaluates answers with an error: look again
        self.wait(lambda: self._evaluate(loaded).get("result", {}).get("result", {}).get("value"), "the page to load")

    def wait(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        """Until the condition holds, looked at again and again."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s for {what}"
            time.sleep(0.02)
            self._evaluate("0")  # takes in what has happened

    def _evaluate(self, expression: str) -> dict:
        return self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self._evaluate(expression)
        assert "error" not in answer, f"{expression}: {answer['error']}"
        done = answer["result"]
        assert "exceptionDetails" not in done, done.get("exceptionDetails")
        return done["result"].get("value")

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent")

    def click(self, selector: str, which: int = 0) -> None:
        """Click the middle of what the selector finds, scrolled into view; fails where something else lies on top of it."""
        place = self.js(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{which}];"
            "e.scrollIntoView({ block: 'center' });"
            "const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;"
            "const top = document.elementFromPoint(x, y);"
            "return { x, y, hit: e.contains(top) || top?.outerHTML.slice(0, 200) }; })()"
        )
        assert place["hit"] is True, f"{selector} is covered by {place['hit']}"
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": place["x"], "y": place["y"], "button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def press(self, key: str) -> None:
        """Press a key as a keyboard would: "Tab", "ArrowLeft", "j", "?"."""
        letter = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **letter)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Insert a text where the focus is."""
        self.send("Input.insertText", text=text)

    def choose_file(self, selector: str, file: Path) -> None:
        """Give a file input its file."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def problems(self) -> list[str]:
        """Exceptions and console errors of the page, and addresses it asked for beside the page itself."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["exception"].get("description", "exception"))
            if method == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                found += [url] if not url.startswith(("file:", "about:", "blob:", "data:")) else []
        return found

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page, from top to end, as .png."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(picture))


def answer(labels: list[str], reasoning: str = "by the markers") -> str:
    return f"<think>{reasoning}</think>\n<answer>{' | '.join(labels)}</answer>"


def swapped(labels: list[str]) -> list[str]:
    """The first two labels exchanged: cells 1 and 2 wrong."""
    return [labels[1], labels[0], *labels[2:]]


def write_answers(folder: Path) -> Path:
    """Six puzzles of 3 and 5 cells, and two models' answers: puzzles.parquet, NAME/predictions.jsonl.

    p0 to p3: Quokka right, wombat swaps cells 1 and 2; p4: the same text twice; p5: wombat cannot be read, and both texts
    hold what a page must not run.
    """
    puzzles = []
    for i in range(6):
        labels = LABELS[: 5 - 2 * (i % 2)]
        cells = [[f"{label[0]}{i}G{k}" * (1 + 20 * (k == 19)) for k in range(20)] for label in labels]
        context = f"The cell is from donor {i} & a <b>female</b>."
        puzzles.append(Puzzle(id=f"p{i}", context=context, cells=cells, candidates=sorted(labels), answer=labels))
    texts = {name: [answer(p.answer, f"by the markers of {p.id}") for p in puzzles] for name in NAMES}
    texts["wombat"][:4] = [answer(swapped(p.answer), f"at a glance at {p.id}") for p in puzzles[:4]]
    texts["Quokka-7B"][5] = answer(puzzles[5].answer, SCRIPT)
    texts["wombat"][5] = f"{SCRIPT} {{{{data}}}} no idea"
    write_puzzles(folder / "puzzles.parquet", puzzles)
    for name, own in texts.items():
        rows = [
            {"id": f"p{i}", "prediction": text, "response_tokens": 90210 + i, "finish_reason": "length"}
            for i, text in enumerate(own)
        ]
        write_rows(folder / name / "predictions.jsonl", rows)
    return folder


def asked(files: Path) -> list:
    """The options that make a page of the two models' answers, less --out."""
    answers = [word for name in NAMES for word in ("--predictions", files / name / "predictions.jsonl")]
    return ["--puzzles", files / "puzzles.parquet", *answers]


def call(*words: object) -> str:
    """Standard output of launch/review.py, in this process."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*words: object) -> str:
    """The one sentence with which launch/review.py refuses."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.exc_info
    return done.stderr


def made(files: Path, *more: object) -> tuple[Path, dict]:
    """(page, key) of the two models' answers."""
    call(*asked(files), "--out", files / "review.html", *more)
    return files / "review.html", json.loads((files / "review.key.json").read_text())


def page_data(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def review(
    key: dict, reviewer: str, said: dict[int, str], errors: dict[int, dict] | None = None, comment: str = ""
) -> dict:
    """An export. said: {case: "first", "tie" or "second"}; errors: {case: {model: {place: [types]}}}."""
    answers = {}
    for case in key["cases"]:
        n = case["case"]
        side = {case["left"]: "left", case["right"]: "right"}
        verdict = {"first": side[key["models"][0]], "second": side[key["models"][1]], "tie": "tie"}.get(said.get(n, ""))
        marks = {side[model]: places for model, places in (errors or {}).get(n, {}).items()}
        if verdict or marks:
            answers[str(n)] = {"verdict": verdict, "errors": {"left": {}, "right": {}} | marks, "comment": comment}
    return {"kind": KIND, "page": key["page"], "reviewer": reviewer, "answers": answers, "file": f"{reviewer}.json"}
