"""A chat endpoint on loopback that misbehaves as it is told, the puzzles it is asked, and what launch/distill.py makes of it."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from click.testing import CliRunner

from data.puzzles import Puzzle
from launch.distill import main

KEY = "sk-the-key-that-nobody-may-see"
GENES = {"T cell": "CD3D", "B cell": "MS4A1", "monocyte": "LYZ", "NK cell": "NKG7"}
PROMPT_TOKENS, RESPONSE_TOKENS = 50, 40


def puzzle(number: int) -> Puzzle:
    labels = list(GENES)[number % 2 : number % 2 + 2 + number % 3 // 2]
    return Puzzle(
        id=f"p{number}",
        context=f"Donor {number}.",
        cells=[["ACTB", GENES[label]] for label in labels],
        candidates=sorted(labels),
        answer=labels,
        meta={"tissue": ("blood", "lung")[number % 2], "disease": "normal"},
    )


def right(of: Puzzle) -> str:
    lines = [f"Cell {i} has {GENES[label]}, so it is a {label}." for i, label in enumerate(of.answer, start=1)]
    return f"<think>{' '.join(lines)}</think>\n<answer>{' | '.join(of.answer)}</answer>"


def wrong(of: Puzzle) -> str:
    return f"<think>?</think><answer>{' | '.join([*of.answer[1:], of.answer[0]])}</answer>"


class Loopback:
    """An HTTP server on loopback in a thread of its own; `handle` answers a POST."""

    def __init__(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def handle(self, to: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def body_of(request: BaseHTTPRequestHandler) -> dict:
    """The JSON that was sent."""
    return json.loads(request.rfile.read(int(request.headers["Content-Length"])))


def begin_json(to: BaseHTTPRequestHandler, status: int, length: int, **headers: str) -> None:
    """Send the status and the headers of an answer of `length` bytes."""
    to.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(length), **headers}.items():
        to.send_header(name, value)
    to.end_headers()


class Server(Loopback):
    """A chat endpoint on loopback.

    behave(number, puzzle, asked) says what request `number` (from 0) gets: a dict for a message that is served whole, a str for
    one of the ways to misbehave below, or "STATUS[@RETRY-AFTER] TEXT". asked: requests of the puzzle before this one, with or
    without a hint as this one.
    """

    def __init__(self, puzzles: list[Puzzle], behave: Callable[[int, Puzzle, int], dict | str]) -> None:
        self.by_message = {of.user_message: of for of in puzzles}
        self.behave, self.lock = behave, threading.Lock()
        self.number = self.now = self.most = 0
        self.charged = 0
        """Requests that were worked on, whether or not the answer arrived."""
        self.served: list[tuple[str, bool, int]] = []
        """(puzzle id, hinted, seed of the request) of every answer that was sent whole."""
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.hold = threading.Event()
        """Requests that hang wait for it."""
        self.asked: Counter = Counter()
        super().__init__()

    def handle(self, to: BaseHTTPRequestHandler) -> None:
        body = body_of(to)
        message = body["messages"][1]["content"]
        (text,) = [text for text in self.by_message if message.startswith(text)]
        of, hinted = self.by_message[text], message != text
        with self.lock:
            number, asked = self.number, self.asked[of.id, hinted]
            self.number += 1
            self.asked[of.id, hinted] += 1
            self.now += 1
            self.most = max(self.most, self.now)
            self.bodies.append(body)
            self.keys.add(to.headers["Authorization"])
            what = self.behave(number, of, asked)
            if isinstance(what, dict) or what in ("cut", "short", "hang"):
                self.charged += 1
        try:
            self.send(to, what, (of.id, hinted, body.get("seed")), body["model"])
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client is gone
        finally:
            with self.lock:
                self.now -= 1

    def send(self, to: BaseHTTPRequestHandler, what: dict | str, who: tuple, model: str) -> None:
        message = what if isinstance(what, dict) else {"content": "lost"}
        choice = {
            "index": 0,
            "message": {"role": "assistant", **message},
            "finish_reason": message.pop("finish_reason", "stop"),
        }
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": RESPONSE_TOKENS}
        body, status, headers = json.dumps({"model": model, "choices": [choice], "usage": usage}), 200, {}
        if what == "hang":
            self.hold.wait()
        elif what == "close":
            to.close_connection = True
            return
        elif what == "cut":
            body = body[: len(body) // 2]
        elif what == "html":
            body = "<html>busy</html>"
        elif what == "overloaded":
            body = json.dumps({"error": {"message": "overloaded"}})
        elif isinstance(what, str) and what != "short":
            code, _, said = what.partition(" ")
            code, _, wait = code.partition("@")
            status, body = int(code), json.dumps({"error": {"message": said}})
            headers = {"Retry-After": wait or "0.01"} if status == 429 else {}
        if isinstance(what, dict):  # before the last byte: who reads it may look here at once
            with self.lock:
                self.served.append(who)
        data = body.encode()
        begin_json(to, status, len(data), **headers)
        to.wfile.write(data[:20] if what == "short" else data)
        to.close_connection = what == "short"

    def close(self) -> None:
        self.hold.set()
        super().close()


def here(*arguments: object, exit_code: int = 0) -> str:
    """launch/distill.py in this process, which has imported everything already; returns what it printed."""
    done = CliRunner().invoke(main, list(map(str, arguments)), env={"OPENAI_API_KEY": KEY}, catch_exceptions=False)
    assert done.exit_code == exit_code, done.output
    return done.output


def raw_rows(folder: Path) -> list[dict]:
    """Responses of the raw file, without its first line and the accounts between."""
    path = folder / "t.raw.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if "text" in row]


def report(folder: Path) -> dict:
    return json.loads((folder / "t.report.json").read_text())
