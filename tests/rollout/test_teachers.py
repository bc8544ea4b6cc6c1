"""A teacher behind an endpoint that misbehaves: retries, kills, budgets, hints, and a key that stays secret."""

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data.distill.distill import Completion, Request
from data.distill.lookups import call_in
from data.distill.meter import Meter
from data.distill.responses import RawFile
from data.errors import RunError, UserError
from data.puzzles import Puzzle, read_rows, write_puzzles
from data.variants import convert
from rollout.teachers.openai import Endpoint, OpenAITeacher, is_loopback
from rollout.teachers.replies import retry_after, spellings_of, token_counts
from tests.helpers.commands import ROOT, run_command
from tests.helpers.endpoints import (
    KEY,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Server,
    here,
    puzzle,
    raw_rows,
    report,
    right,
    wrong,
)


@pytest.fixture
def serve(tmp_path):
    """serve(number of puzzles, behave) -> Server; its puzzles are in tmp_path / "p.jsonl"."""
    servers = []

    def start(n: int, behave) -> Server:
        puzzles = [puzzle(i) for i in range(n)]
        write_puzzles(tmp_path / "p.jsonl", puzzles)
        servers.append(Server(puzzles, behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def words(folder: Path, server: Server, *more: object) -> list:
    return [
        "--puzzles",
        folder / "p.jsonl",
        "--out",
        folder / "t.jsonl",
        "--teacher",
        "openai",
        "--model",
        "m",
        "--base-url",
        server.url,
        "--backoff-seconds",
        0.01,
        *more,
    ]


def start(*arguments: object, env: dict | None = None) -> subprocess.Popen:
    """launch/distill.py as a process that can be killed."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch/distill.py"), *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OPENAI_API_KEY": KEY, **(env or {})},
    )


def until(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def teacher(server: Server, meter: Meter | None = None, note=lambda row: None, **settings) -> OpenAITeacher:
    settings = {"model": "m", "key": KEY, "backoff_seconds": 0.01, "concurrency": 4, **settings}
    return OpenAITeacher(Endpoint(base_url=server.url, **settings), meter or Meter(), note, lambda text: None)


def served_raw(server: Server) -> None:
    """The endpoint sends a message {"mood": body or (headers, status, body)} as it is."""
    send = server.send

    def raw(to, what, who: tuple, model: str) -> None:
        if not isinstance(what, dict) or "mood" not in what:
            return send(to, what, who, model)
        mood = what["mood"]
        headers, status, body = mood if isinstance(mood, tuple) else ({}, 200, mood)
        to.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(body)

    server.send = raw


def held(server: Server, together: int, first: int = 0) -> threading.Event:
    """From request `first` on, none is answered before `together` have arrived, nor before the event is set."""
    send, released, there = server.send, threading.Event(), threading.Barrier(together)
    arrived = itertools.count()

    def wait(to, what, who: tuple, model: str) -> None:
        if next(arrived) >= first:
            there.wait(timeout=600)
            if isinstance(what, dict):
                released.wait(timeout=600)
        send(to, what, who, model)

    server.send = wait
    return released


def ask(of: OpenAITeacher, n: int) -> dict:
    return {done.puzzle_id: done for done in of.sample([Request(puzzle=puzzle(i), attempt=0) for i in range(n)])}


# ---- one endpoint, many moods


def test_a_misbehaving_endpoint_is_asked_until_it_answers_and_nothing_is_bought_twice(serve, tmp_path):
    moods = [
        "429 slow down",
        "500 oops",
        "cut",
        "short",
        "close",
        "hang",
        "html",
        "overloaded",
        "408 late",
        "503 busy",
    ] * 2
    server = serve(9, lambda number, of, asked: moods[number] if number < len(moods) else {"content": right(of)})
    kinds: list[str] = []
    meter = Meter(price_in=1.0, price_out=1.0)
    asking = teacher(
        server, meter, lambda row: kinds.append("lost" if "lost" in row else "sent"), timeout_seconds=10, retries=30
    )
    done = ask(asking, 9)
    assert [done[f"p{i}"].text for i in range(9)] == [right(puzzle(i)) for i in range(9)]
    assert Counter(name for name, *_ in server.served) == Counter(f"p{i}" for i in range(9))
    assert asking.not_before > 0 and server.number == len(moods) + 9 and server.keys == {f"Bearer {KEY}"}
    worst = [meter.worst_cost(puzzle(i).chat(), 4096) for i in range(9)]
    assert kinds.count("sent") == 9 and kinds.count("lost") == 2 * len(["cut", "short", "close", "hang", "html", "408"])
    assert 12 * min(worst) <= meter.lost <= 12 * max(worst) and meter.reserved == 0
    assert (meter.prompt_tokens, meter.completion_tokens) == (9 * PROMPT_TOKENS, 9 * RESPONSE_TOKENS)


def test_as_many_requests_fly_as_allowed_and_no_more(serve):
    together = threading.Barrier(3)
    server = serve(9, lambda number, of, asked: {"content": right(of)})
    send = server.send

    def meet(*arguments) -> None:
        together.wait(timeout=300)  # no request is answered before three have arrived
        send(*arguments)

    server.send = meet
    assert len(ask(teacher(server, concurrency=3), 9)) == 9
    assert server.most == 3


def test_what_no_further_try_can_mend_is_recorded_once_or_ends_the_run(serve):
    context = "400 This model's maximum context length is 100 tokens"
    server = serve(3, lambda number, of, asked: context if of.id == "p1" else {"content": right(of)})
    done = ask(teacher(server), 3)
    assert (
        done["p1"].error == f"status {context.replace(' ', ': ', 1)} (1 try)"
        and server.number == 3
        and not done["p0"].error
    )
    for status, sentence in (
        (401, "does not accept the key"),
        (404, "does not know the model"),
        (402, "requires payment first"),
    ):
        server = serve(3, lambda number, of, asked, status=status: f"{status} no: {KEY}")
        with pytest.raises(RunError, match=sentence) as caught:
            ask(teacher(server, concurrency=1), 3)
        assert KEY not in str(caught.value) and "[key]" in str(caught.value) and server.number == 1
    server = serve(20, lambda number, of, asked: "400 unsupported value: temperature")
    with pytest.raises(RunError, match="refused each of the first 8 requests"):
        ask(teacher(server, concurrency=1), 20)
    server = serve(20, lambda number, of, asked: "500 down")
    with pytest.raises(RunError, match="10 requests in a row failed, the last with status 500: down.*--resume"):
        ask(teacher(server, retries=1), 20)
    server = serve(20, lambda number, of, asked: "429@7200 enough for today")
    with pytest.raises(RunError, match="asks to wait 7200 s .status 429: enough for today.; go on with --resume then"):
        ask(teacher(server), 20)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "9", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "soon"}, None),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 +9999999999999"}, None),
        ({}, None),
    ],
)
def test_how_long_an_endpoint_asks_to_wait(headers, seconds):
    assert retry_after(headers) == seconds


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 300, "completion_tokens": 100, "total_tokens": 400}, (300, 100)),
        (
            {"prompt_tokens": 300, "completion_tokens": 100, "total_tokens": 5400},
            (300, 5100),
        ),  # reasoning is counted only in the total
        ({"prompt_tokens": 300, "total_tokens": 400}, (300, 100)),
        ({"prompt_tokens": 300, "completion_tokens": 100, "total_tokens": 0}, (300, 100)),
        ({"prompt_tokens": -5, "completion_tokens": True}, (None, None)),
        ({"prompt_tokens": 10**400, "completion_tokens": "7"}, (None, None)),
        (None, (None, None)),
        ([], (None, None)),
    ],
    ids=lambda value: str(value)[:80],
)
def test_how_many_tokens_a_response_cost(usage, counts):
    assert token_counts(usage) == counts


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.1.2.3/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://127.evil.com/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_which_endpoints_are_on_this_machine(url, here):
    assert is_loopback(url) is here


def test_one_reply_that_cannot_be_read_costs_the_others_nothing(serve):
    """JSON nested too deeply for the parser, in body, error and content; and a wait that is no number."""
    moods = {
        0: b"[" * 200_000,
        1: b'{"error": ' + b"[" * 900 + b"]" * 900 + b"}",
        2: b'{"choices": [{"message": {"content": ' + b'[{"text": ' * 300 + b'""' + b"}]" * 300 + b"}}]}",
        3: ({"retry-after-ms": "soon"}, 429, b'{"error": {"message": "slow"}}'),
    }
    server = serve(4, lambda number, of, asked: {"content": right(of)} if number > 3 else {"mood": moods[number]})
    served_raw(server)
    done = ask(teacher(server), 4)
    assert (
        sum(done[f"p{i}"].text == right(puzzle(i)) for i in range(4)) >= 3
    )  # deep content may be accepted as a message without text
    assert not any(completion.error for completion in done.values())


def test_a_connection_that_never_stood_cost_nothing():
    kinds, meter = [], Meter(price_in=1.0, price_out=1.0)
    with socket.socket() as full, contextlib.ExitStack() as callers:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than its queue takes: further ones get no answer
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        endpoint = Endpoint(model="m", base_url=url, key=KEY, timeout_seconds=10.0, retries=0)
        asking = OpenAITeacher(endpoint, meter, kinds.append, print)
        assert ask(asking, 1)["p0"].error == "no connection in time (1 try)"
    assert meter.lost == 0 and [list(row)[0] for row in kinds] == ["sent"]


def test_an_endpoint_with_its_own_names_and_reasoning_apart(serve):
    def behave(number: int, of: Puzzle, asked: int) -> dict | str:
        body = server.bodies[-1]
        if "max_tokens" in body:
            return "400 Unsupported parameter: 'max_tokens' is not supported with this model."
        if "seed" in body:
            return "422 extra_forbidden: body.seed"
        return {"content": "<answer>x</answer>", "reasoning_content": f"because {KEY}", "finish_reason": "length"}

    server = serve(1, behave)
    done = ask(teacher(server, max_response_tokens=7, top_p=0.9, temperature=0.3), 1)["p0"]
    assert done.trace == "<think>because [key]</think>\n<answer>x</answer>" and done.finish_reason == "length"
    last = server.bodies[-1]
    assert {name: value for name, value in last.items() if name != "messages"} == {
        "model": "m",
        "max_completion_tokens": 7,
        "temperature": 0.3,
        "top_p": 0.9,
    }
    assert last["messages"] == puzzle(0).chat()


# ---- kills, budgets


@pytest.mark.slow(2)
def test_a_kill_loses_nothing_and_buys_nothing_twice(serve, tmp_path):
    server = serve(12, lambda number, of, asked: "hang" if number >= 7 else {"content": (wrong, right)[number % 2](of)})
    given = words(tmp_path, server, "--concurrency", 3, "--candidates", 3)
    process = start(*given)
    until(lambda: len(raw_rows(tmp_path)) == 7 and (server.number, server.now) == (10, 3), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(tmp_path / "t.raw.jsonl", "a") as handle:
        handle.write('{"puzzle_id": "p11", "attempt": 0, "hinted": false, "te')
    bought = raw_rows(tmp_path)
    server.behave = lambda number, of, asked: {"content": right(of)}
    assert "already holds responses; add --resume" in here(*given, exit_code=2)
    assert "--resume: temperature was 1.0" in here(*given, "--resume", "--temperature", 0.5, exit_code=2)
    assert server.number == 10
    last = json.loads(here(*given, "--resume").splitlines()[-1])
    rows = raw_rows(tmp_path)
    assert last["puzzles_accepted"] == 12 == len(read_rows(tmp_path / "t.jsonl"))
    assert len(rows) == len(server.served) == len(set(server.served)) == last["traces_drawn"]
    assert len({(row["puzzle_id"], row["attempt"]) for row in rows}) == len(rows) > 12 and len(bought) == 7
    before = (tmp_path / "t.jsonl").read_bytes()
    here(*given, "--resume", "--keep", "all")
    assert server.number == 10 + len(rows) - 7 and (tmp_path / "t.jsonl").read_bytes() == before


@pytest.mark.slow(2)
def test_a_signal_waits_for_what_is_in_flight_and_says_how_to_go_on(serve, tmp_path):
    server = serve(8, lambda number, of, asked: {"content": right(of)})
    released = held(server, together=2, first=4)
    given = words(tmp_path, server, "--concurrency", 2)
    process = start(*given)
    until(lambda: len(raw_rows(tmp_path)) == 4 and (server.number, server.now) == (6, 2), process)
    process.terminate()
    assert any("waiting for the responses in flight (2)" in line for line in process.stderr)  # after lines of progress
    released.set()
    said = process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM and "stopped by SIGTERM" in said and "--resume" in said
    assert len(raw_rows(tmp_path)) == 6 == server.number and not (tmp_path / "t.jsonl").exists()
    here(*given, "--resume")
    assert server.number == 8 == len(raw_rows(tmp_path)) == len(read_rows(tmp_path / "t.jsonl"))


@pytest.mark.slow(2)
def test_a_second_signal_gives_up_what_is_in_flight(serve, tmp_path):
    server = serve(3, lambda number, of, asked: "hang" if number else {"content": right(of)})
    process = start(*words(tmp_path, server, "--concurrency", 2))
    until(lambda: len(raw_rows(tmp_path)) == 1 and (server.number, server.now) == (3, 2), process)
    process.terminate()
    assert any("a second signal gives them up" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT and len(raw_rows(tmp_path)) == 1


def test_a_signal_is_heard_during_a_wait_whichever_thread_it_reaches(serve):
    """One that reaches another thread does not end the wait, no more than one that comes just before it."""
    server, heard, in_time = serve(1, lambda number, of, asked: "hang"), threading.Event(), []
    asking = teacher(server)

    def signal_itself() -> None:
        while not server.now:
            time.sleep(0.02)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        in_time.append(heard.wait(300))
        server.hold.set()

    before = signal.signal(signal.SIGUSR2, lambda *_: (asking.stop(), heard.set()))
    try:
        threading.Thread(target=signal_itself, daemon=True).start()
        assert ask(asking, 1)["p0"].text == "lost" and in_time == [True] and asking.ended == "stopped"
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.slow(2)
@pytest.mark.parametrize("mood", ["402 pay first", "429@7200 enough for today"])
def test_a_run_that_ends_by_itself_takes_in_what_is_in_flight(serve, mood):
    server = serve(9, lambda number, of, asked: mood if number == 3 else {"content": right(of)})
    released, said, came = held(server, together=8), [], []
    endpoint = Endpoint(model="m", base_url=server.url, key=KEY, concurrency=8, backoff_seconds=0.01)
    asking = OpenAITeacher(endpoint, Meter(), lambda row: None, lambda text: (said.append(text), released.set()))
    with pytest.raises(RunError, match=mood.partition(" ")[2]):
        for completion in asking.sample([Request(puzzle=puzzle(i), attempt=0) for i in range(9)]):
            came.append(completion)
    assert said[0].startswith("waiting for the responses in flight (7), which will be charged: at most 600 s")
    assert sum(completion.text != "" for completion in came) == 7 == len(server.served) and server.number == 8


def test_a_teacher_that_waits_for_its_turn_stops_at_once(serve):
    server = serve(2, lambda number, of, asked: "429@500 slow down")
    endpoint = Endpoint(model="m", base_url=server.url, key=KEY, concurrency=1)
    asking = OpenAITeacher(endpoint, Meter(), lambda row: None, lambda text: asking.stop())
    done = ask(asking, 2)
    assert [completion.error for completion in done.values()] == ["stopped before a further try"]
    assert asking.ended == "stopped" and server.number == 1


@pytest.mark.slow(3)
def test_the_budget_is_never_passed_not_even_across_a_kill(serve, tmp_path):
    """The endpoint charges for all its work: responses, incomplete ones, and those lost by a kill or time-out."""
    kinds = {5: "cut", 9: "500 oops", 11: "short"}
    server = serve(40, lambda number, of, asked: "hang" if number >= 14 else kinds.get(number, {"content": wrong(of)}))
    limit = 2 * RESPONSE_TOKENS
    prices = ("--price-in", 1, "--price-out", 10, "--max-response-tokens", limit, "--budget", 0.06)
    given = words(tmp_path, server, "--concurrency", 4, "--candidates", 4, *prices)
    process = start(*given)
    until(lambda: (server.number, server.now) == (18, 4) and len(raw_rows(tmp_path)) == len(server.served), process)
    process.kill()
    process.wait()
    asked_before = server.number

    def behave(number: int, of: Puzzle, asked: int) -> dict | str:
        if (number - asked_before) % 5 == 0:
            return ("cut", "500 oops")[number % 2]
        return {"content": right(of) if of.id < "p2" else wrong(of)}

    server.behave = behave
    assert "--budget 0.06 is used up" in here(*given, "--resume", "--retries", 20)
    cost = server.charged * (PROMPT_TOKENS * 1 + RESPONSE_TOKENS * 10) / 1e6
    found = report(tmp_path)
    spent, lost = found["cost"]["spent"], found["cost"]["lost_at_most"]
    worst = max(Meter(price_in=1.0, price_out=10.0).worst_cost(puzzle(i).chat(), limit) for i in range(40))
    assert cost <= spent + lost <= 0.06 < spent + lost + worst
    assert found["ended"] == "budget" and spent == pytest.approx(
        len(server.served) * (PROMPT_TOKENS + 10 * RESPONSE_TOKENS) / 1e6
    )
    assert found["tokens"] == {
        "prompt": PROMPT_TOKENS * len(server.served),
        "completion": RESPONSE_TOKENS * len(server.served),
    }
    number = server.number
    here(*given[:-1], 0, "--resume")  # requests nothing, and writes what was accepted
    assert server.number == number and len(read_rows(tmp_path / "t.jsonl")) == found["puzzles_accepted"]


def test_what_was_bought_before_prices_were_given_counts_at_its_worst(serve, tmp_path):
    """The endpoint counts no tokens."""
    server = serve(
        4,
        lambda number, of, asked: {
            "mood": json.dumps({"choices": [{"message": {"content": right(of)}, "finish_reason": "stop"}]}).encode()
        },
    )
    served_raw(server)
    given = words(tmp_path, server, "--max-response-tokens", 1000)
    here(*given, "--limit", 2)
    assert report(tmp_path)["cost"]["spent"] == 0
    said = here(*given, "--price-in", 2, "--price-out", 8, "--budget", 5, "--resume")
    priced = Meter(price_in=2.0, price_out=8.0)
    cost = report(tmp_path)["cost"]
    assert cost["spent"] == pytest.approx(sum(priced.worst_cost(puzzle(i).chat(), 1000) for i in range(4)), abs=1e-6)
    assert cost["responses_without_token_counts"] == 4 and "(without token counts: 4, at the worst case)" in said


def test_a_lower_threshold_leaves_the_truth_in_its_rows(serve, tmp_path):
    server = serve(3, lambda number, of, asked: {"content": wrong(of) if of.id == "p1" else right(of)})
    here(*words(tmp_path, server, "--accept", "reward.cellpuzzles:mixed_reward", "--accept-at", 0))
    rows = read_rows(tmp_path / "t.jsonl")
    assert [row.get("answer") for row in rows] == [None, " | ".join(puzzle(1).answer), None]
    assert [Puzzle.from_row(row).answer for row in rows] == [puzzle(i).answer for i in range(3)]


# ---- hints, variants, the key


def test_a_workflow_asks_an_endpoint_once_for_every_step(serve, tmp_path):
    """p2, of three cells: no answer is right, their vote is, and a trace is asked for; a resumed run asks for nothing."""
    said = ["T cell | B cell | B cell", "T cell | T cell | monocyte", "B cell | B cell | monocyte"]

    def behave(number: int, of: Puzzle, asked: int) -> dict:
        hinted = server.bodies[-1]["messages"][1]["content"] != of.user_message
        if of.id != "p2" or hinted:
            return {"content": right(of)}
        return {"content": f"<think>?</think><answer>{said[asked]}</answer>"}

    server = serve(3, behave)
    given = words(tmp_path, server, "--candidates", 3, "--workflow", "consensus", "--concurrency", 1)
    given += ["--price-in", 1, "--price-out", 1]
    here(*given)
    assert len(server.bodies) == 10 and not any("stop" in body for body in server.bodies)
    found, rows = report(tmp_path), read_rows(tmp_path / "t.jsonl")
    assert (found["workflow"]["from_answers"], found["workflow"]["written"]) == (2, 1)
    assert found["cost"]["spent"] == pytest.approx(10 * (PROMPT_TOKENS + RESPONSE_TOKENS) / 1e6)
    assert [(row["puzzle_id"], row.get("hinted")) for row in rows] == [("p0", None), ("p1", None), ("p2", True)]
    here(*given, "--resume")
    assert len(server.bodies) == 10 and read_rows(tmp_path / "t.jsonl") == rows
    assert report(tmp_path)["cost"]["spent"] == found["cost"]["spent"]


def test_an_endpoint_is_told_where_to_stop():
    endpoint = Endpoint(model="m", base_url="http://127.0.0.1/v1", key="none")
    teacher = OpenAITeacher(endpoint, Meter(), lambda row: None, lambda text: None)
    request = Request(puzzle=puzzle(0), attempt=0, ask=" Look it up.", stop="</call>")
    body = teacher._body(request)
    assert body["stop"] == ["</call>"] and body["messages"][1]["content"].endswith(" Look it up.")
    assert "stop" not in teacher._body(Request(puzzle=puzzle(0), attempt=0))


def test_an_endpoint_that_knows_no_stop_is_asked_without_it(serve):
    def behave(number: int, of: Puzzle, asked: int) -> dict | str:
        if "stop" in server.bodies[-1]:
            return "400 Unsupported parameter: 'stop' is not supported with this model."
        return {"content": "<call>markers(CD3D)</call> and more"}

    server = serve(1, behave)
    request = Request(puzzle=puzzle(0), attempt=0, ask=" Look it up.", stop="</call>")
    (done,) = teacher(server).sample([request])
    assert not done.error and call_in(done.text) == "markers(CD3D)" and "stop" not in server.bodies[-1]


def test_a_hinted_trace_is_kept_only_when_it_does_not_show_the_hint(serve, tmp_path):
    def behave(number: int, of: Puzzle, asked: int) -> dict:
        hinted = server.bodies[-1]["messages"][1]["content"] != of.user_message
        if of.id == "p0" or not hinted:
            return {"content": right(of) if of.id == "p0" else wrong(of)}
        leaking = {
            "p1": right(of).replace("<think>", "<think>The hint gives the types. "),
            "p2": f"<think>{', '.join(of.answer)}: MS4A1 CD3D LYZ NKG7</think><answer>{' | '.join(of.answer)}</answer>",
            "p3": wrong(of),
        }
        return {"content": right(of) if asked else leaking[of.id]}

    server = serve(4, behave)
    given = words(tmp_path, server, "--candidates", 2, "--hint", "--hint-candidates", 1)
    here(*given)
    first = report(tmp_path)
    assert first["hinted"] == {"traces_drawn": 3, "puzzles_accepted": 0, "leaks": 2} and first["rows"] == 1
    assert set(first["rejected"]["leak"]["details"]) == {
        "a hint: 'hint'",
        "no argument: no gene of cell 1 before the whole answer",
    }
    here(*given[:-1], 2, "--resume")
    rows = read_rows(tmp_path / "t.jsonl")
    assert [(row["puzzle_id"], row["attempt"], row.get("hinted")) for row in rows] == [
        ("p0", 0, None),
        ("p1", 1, True),
        ("p2", 1, True),
        ("p3", 1, True),
    ]
    assert [row["user_msg"] for row in rows] == [puzzle(i).user_message for i in range(4)]
    assert [row["assistant_msg"] for row in rows] == [right(puzzle(i)) for i in range(4)]
    assert server.number == 1 + 3 * 2 + 3 * 2 and report(tmp_path)["by"]["tissue"]["lung"]["accepted"] == 2


def test_variants_are_served_and_every_candidate_is_drawn_where_asked(serve, tmp_path):
    texts = {"p0/cell-1": "CD3D", "p0/cell-2": "MS4A1"}
    server = serve(
        1,
        lambda number, of, asked: {
            "content": f"<think>{'long ' * (3 - asked)}{texts[of.id]}</think><answer>{of.answer[0]}</answer>"
        },
    )
    cells = convert([puzzle(0)], "cell")
    write_puzzles(tmp_path / "p.jsonl", cells)
    server.by_message = {of.user_message: of for of in cells}
    here(*words(tmp_path, server, "--candidates", 3, "--stop-at", 0, "--keep", "shortest"))
    rows = read_rows(tmp_path / "t.jsonl")
    assert server.number == 6 and [row["id"] for row in rows] == ["p0/cell-1", "p0/cell-2"]
    assert all(
        row["assistant_msg"].startswith("<think>long CD3D" if "1" in row["id"][2:] else "<think>long MS")
        for row in rows
    )


@pytest.mark.slow(3)
def test_the_key_is_nowhere(serve, tmp_path):
    """The key is in no file, output, command line or environment of the reward, although the endpoint quotes it."""
    (tmp_path / "own.py").write_text(
        "import os\nfrom reward.cellpuzzles import batch_reward\n\n\ndef fn(completion, puzzle):\n"
        f"    open({str(tmp_path / 'env.txt')!r}, 'w').write(str(dict(os.environ)))\n"
        "    return batch_reward(completion, puzzle)\n"
    )
    quote = f"<think>{KEY} "
    moods = [f"500 key {KEY} is busy", f"400 key {KEY} may not"]
    server = serve(
        4, lambda number, of, asked: moods[number] if number < 2 else {"content": right(of).replace("<think>", quote)}
    )
    given = words(tmp_path, server, "--accept", f"{tmp_path}/own.py:fn", "--retries", 0, "--candidates", 1)
    process = start(*given, env={"OPENAI_LOG": "debug"})
    seen, said = b"", None
    while said is None:  # and not "while it runs": it may end after a wait was over, with its output not read yet
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            seen += Path(f"/proc/{process.pid}/cmdline").read_bytes()
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = "".join(process.communicate(timeout=0.1)).encode()
    seen += said
    assert process.returncode == 0 and len(read_rows(tmp_path / "t.jsonl")) == 2, seen
    assert b"HTTP Request: POST" in seen and server.keys == {f"Bearer {KEY}"}
    server.behave = lambda number, of, asked: f"401 {KEY} is not valid"
    refused = run_command("distill", *given, "--resume", env={"OPENAI_API_KEY": KEY})
    assert refused.returncode == 1 and "does not accept the key" in refused.stderr
    seen += (refused.stdout + refused.stderr).encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"t.raw.jsonl", "t.report.json", "env.txt"}
    assert KEY.encode() not in seen + b"".join(path.read_bytes() for path in files)


def test_no_part_of_the_key_is_kept_that_a_cut_or_an_escape_would_leave(serve):
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    message = (
        f'{{"choices": [{{"message": {{"content": "x"}}, "finish_reason": "stop {KEY}"}}], "model": "m {escaped}"}}'
    )
    moods = [
        b'{"error": "%s"}' % ("y" * 288 + KEY).encode(),
        b'{"error": "%s"}' % escaped.encode(),
        message.encode(),
        ({}, 400, b'{"error": {"message": "%s"}}' % ("y" * 288 + KEY).encode()),
    ]
    server = serve(4, lambda number, of, asked: {"mood": moods[number]})
    served_raw(server)
    done = ask(teacher(server, concurrency=1, retries=0), 4)
    assert KEY[:8] not in str(done)
    assert [done[f"p{i}"].error.count("[key]") for i in (0, 1, 3)] == [1, 1, 1]
    assert (done["p2"].finish_reason, done["p2"].model) == ("stop [key]", "m [key]")


ESCAPES = (
    lambda char: f"&#{ord(char)};",
    lambda char: f"&#X00{ord(char):x};",
    lambda char: f"&amp;#{ord(char)};",
    lambda char: f"\\\\u{ord(char):04X}",
    lambda char: f"\\x{ord(char):02x}",
    lambda char: f"%{ord(char):02x}",
    lambda char: f"%25{ord(char):02X}",
    lambda char: {"_": "&lowbar;", "/": "\\/", "+": "&plus;"}.get(char, char),
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_key_is_known_however_it_is_escaped(serve, escape):
    """In a page of HTML that comes with a refusal, and in a reply that is no JSON and is quoted as an error."""
    key = "sk-Ab_9/" + KEY.removeprefix("sk-") + "+="
    shown = "".join(map(escape, key))
    server = serve(2, lambda number, of, asked: {"mood": ({}, 400, f"<html><p>{shown}</p>".encode())})
    served_raw(server)
    done = ask(teacher(server, concurrency=1, retries=0, key=key), 2)
    assert [of.error for of in done.values()] == ["status 400: <html><p>[key]</p> (1 try)"] * 2
    assert spellings_of(key).sub("[key]", f"a{shown}b") == "a[key]b"
    other = "".join(map(escape, key[:-1]))
    assert spellings_of(key).sub("[key]", other) == other


@pytest.mark.slow(2)
def test_what_an_endpoint_writes_keeps_the_pattern_of_the_key_from_looping():
    """Without bounds on what is repeated each of these would take hours."""
    pattern = spellings_of("\\\\&%00sk-" + KEY)
    for text in ("\\" * 50_000, "&amp;" * 10_000, "%25" * 10_000, "&#" + "0" * 50_000):
        assert pattern.sub("[key]", text) == text


def test_a_distillation_in_which_nothing_was_answered_names_the_status(serve, tmp_path):
    server = serve(2, lambda number, of, asked: "500 out of memory")
    done = run_command(
        "distill", *words(tmp_path, server, "--retries", 0, "--candidates", 1), env={"OPENAI_API_KEY": KEY}
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert (
        "none of 2 requests was answered, the last with status 500: out of memory (1 try)" in said
        and "--resume" in said
    )
    assert "--candidates" not in said


@pytest.mark.parametrize("replaced", [False, True])
def test_a_raw_file_that_was_removed_while_it_grows_ends_the_run(tmp_path, replaced):
    """Found by the campaign: what was bought afterwards went to a file without a name, and the exit code was 0."""
    path, done = tmp_path / "t.raw.jsonl", Completion(puzzle_id="p0", attempt=0, hinted=False, text="bought")
    says = "t.raw.jsonl: was removed or replaced while responses were written"
    with (
        pytest.raises(RunError, match=says),  # at the end too, where nothing more is written
        RawFile(path, {"teacher": "openai"}, Meter(), resume=False, replace=False, sync=False) as raw,
    ):
        raw.append(done)
        path.unlink()
        if replaced:
            path.write_text("")
        for _ in range(2):
            with pytest.raises(RunError, match=says):
                raw.append(done)


def test_a_full_disk_ends_the_run_and_leaves_whole_lines_behind(tmp_path):
    path, limits = tmp_path / "t.raw.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    done = Completion(puzzle_id="p0", attempt=0, hinted=False, text="bought " * 20)
    with RawFile(path, {"teacher": "openai"}, Meter(), resume=False, replace=False, sync=True) as raw:
        raw.append(done)
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, limits[1]))
        try:
            for _ in range(2):  # nothing may follow the incomplete line
                with pytest.raises(RunError, match="cannot be written .*make room, then add --resume"):
                    raw.append(done)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(path.read_bytes()) == len(whole) + 50
    with RawFile(path, {"teacher": "openai"}, Meter(), resume=True, replace=False, sync=True) as raw:
        assert path.read_bytes() == whole and list(raw.completions.values()) == [done]


def test_puzzles_that_are_never_answered_do_not_end_what_others_have_paid_for(serve):
    """Two that always fail, after all others are answered: 16 failures in a row say nothing of the endpoint."""
    server = serve(4, lambda number, of, asked: "500 too long" if of.id in ("p0", "p1") else {"content": right(of)})
    asker = teacher(server, retries=0, concurrency=1)
    assert not any(one.error for one in asker.sample([Request(puzzle=puzzle(i), attempt=0) for i in (2, 3)]))
    hard = [Request(puzzle=puzzle(i), attempt=attempt) for attempt in range(8) for i in (0, 1)]
    assert all(one.error for one in asker.sample(hard)) and server.number == 18 and not asker.fatal


def test_a_resumed_run_is_not_ended_by_what_the_endpoint_refuses_for_good(serve, tmp_path):
    """p1 is too long for it, in this call and in the next, which has nothing else left to ask."""
    server = serve(
        3, lambda number, of, asked: "400 maximum context length" if of.id == "p1" else {"content": right(of)}
    )
    here(*words(tmp_path, server))
    first = (tmp_path / "t.jsonl").read_bytes()
    here(*words(tmp_path, server, "--resume"))
    assert (tmp_path / "t.jsonl").read_bytes() == first


def test_a_moderated_prompt_is_not_a_refused_key(serve):
    server = serve(
        3, lambda number, of, asked: "403 your input was flagged" if of.id == "p1" else {"content": right(of)}
    )
    done = ask(teacher(server, concurrency=1), 3)
    assert "status 403" in done["p1"].error and not done["p0"].error and not done["p2"].error


@pytest.mark.parametrize(
    "choice",
    [
        {"finish_reason": "insufficient_system_resource", "message": {"role": "assistant", "content": "half"}},
        {"finish_reason": "error", "error": {"code": 502}, "message": {"role": "assistant", "content": ""}},
    ],
)
def test_a_response_that_the_endpoint_broke_off_is_asked_for_again(serve, choice):
    broken = json.dumps({"model": "m", "choices": [choice]}).encode()
    server = serve(1, lambda number, of, asked: {"mood": broken} if number == 0 else {"content": right(of)})
    served_raw(server)
    done = ask(teacher(server, concurrency=1), 1)["p0"]
    assert not done.error and done.text == right(puzzle(0)) and server.number == 2


def test_a_proxy_that_cannot_be_used_is_named(serve, monkeypatch):
    server = serve(1, lambda number, of, asked: {"content": right(of)})
    monkeypatch.setattr("rollout.teachers.openai.is_loopback", lambda url: False)
    monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be asked through the proxy .*ALL_PROXY.*change these variables"):
        ask(teacher(server), 1)


def test_an_endpoint_that_stops_answering_ends_the_run_also_after_answers(serve):
    """A spent or revoked key, and on --resume an endpoint that is down: what is left need not be asked."""
    server = serve(30, lambda number, of, asked: {"content": right(of)} if number < 2 else "403 key limit exceeded")
    with pytest.raises(RunError, match="does not allow it"):
        ask(teacher(server, concurrency=1), 30)
    assert server.number == 12
    server = serve(2, lambda number, of, asked: "500 down")
    asker = teacher(server, retries=0, concurrency=1)
    asker.answered_before = 100
    hard = [Request(puzzle=puzzle(i), attempt=attempt) for attempt in range(8) for i in (0, 1)]
    with pytest.raises(RunError, match="10 requests in a row failed"):
        list(asker.sample(hard))
