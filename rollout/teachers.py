"""The teacher behind any OpenAI-compatible endpoint (data.distill.Teacher).

The key is known to the OpenAI client alone: it is cut out of every text that comes back before anything else sees the text.
What is decided in the event loop between two awaits needs no lock; a completion that has come is handed over without an await
in between, so that no cancellation can lose it.
"""

import asyncio
import json
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai

from data.distill import Completion, Request
from data.errors import RunError
from data.meter import Meter
from rollout import stable_seed

GRACE = 2.0
"""Seconds that requests in flight have to finish when the teacher is told to stop."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, at most, where the endpoint does not say how long."""
LONGEST_ASKED = 600.0
"""An endpoint that asks for a longer wait ends the run."""
FAILED_IN_A_ROW = 10
"""So many requests in a row that failed for good end the run: the endpoint is down."""
REFUSED_AT_FIRST = 8
"""So many requests refused before the first is answered end the run: the settings are wrong."""
RETRIED = (408, 409, 425, 429)
ENDS_THE_RUN = {
    401: "does not take the key: set the environment variable that --key-env names",
    402: "wants to be paid first: top up the account, then add --resume",
    403: "does not allow it: check the key's rights and --model",
    404: "does not know the model or the path: check --model and --base-url",
}
MAY_BE_CHARGED = (408, 504, 524)
"""Statuses of a gateway that gave up on a server which may have finished."""
SECRET_LENGTH = 8
"""A shorter key ("EMPTY", "none") is no secret."""
_FIELD_REFUSED = re.compile(
    r"unsupported|not supported|unrecogni[sz]ed|unknown|unexpected|extra|not permitted|forbidden", re.I
)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """How to ask an OpenAI-compatible endpoint."""

    model: str
    base_url: str
    """With the version. Example: "https://api.openai.com/v1"."""
    key: str = field(repr=False)
    temperature: float = 1.0
    top_p: float | None = None
    """None: the endpoint's own."""
    max_response_tokens: int = 4096
    seed: int = 0
    concurrency: int = 16
    """Most requests in flight."""
    timeout_seconds: float = 600.0
    """For a whole response."""
    retries: int = 8
    """Tries of a request after the first."""
    backoff_seconds: float = 1.0
    """Before the second try; doubles with every further one."""


class TryFailedError(Exception):
    """One try came to nothing. `again`: another may succeed."""

    def __init__(
        self, message: str, *, again: bool, charged: bool = False, after: float | None = None, status: int = 0
    ) -> None:
        """charged: it may cost all the same. after: seconds that the endpoint asks to wait."""
        super().__init__(message)
        self.again, self.charged, self.after, self.status = again, charged, after, status


class OpenAITeacher:
    """Asks an endpoint for one response per request, `concurrency` at a time, from an event loop in a thread of its own.

    note(row): writes a line {"sent": ...} or {"lost": ...} to the raw file (data/responses.py); called from that thread.
    say(text): tells the user that the endpoint wants to wait.
    """

    def __init__(
        self, endpoint: Endpoint, meter: Meter, note: Callable[[dict[str, Any]], None], say: Callable[[str], None]
    ) -> None:
        self.endpoint, self.meter, self.note, self.say = endpoint, meter, note, say
        self.ended = self.fatal = ""
        self.stopping = threading.Event()
        self.token_field, self.send_seed = "max_tokens", True
        self.not_before = 0.0
        """Of time.monotonic(): when the endpoint takes requests again."""
        self.in_flight = self.answered = self.refused = self.failed = 0
        """Requests in flight, answered, refused, and failed since the last that was answered."""

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        """See Teacher."""
        arrived: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(asyncio.run, self._ask_all(requests, arrived))
            asking.add_done_callback(lambda _: arrived.put(None))
            try:
                while (completion := arrived.get()) is not None:
                    yield completion
            finally:
                if not asking.done():
                    self.stopping.set()
            asking.result()
        if self.fatal:
            raise RunError(self.fatal)

    def stop(self) -> None:
        """See Teacher. Requests in flight have GRACE seconds to finish; they may have been charged."""
        self.ended = self.ended or "stopped"
        self.stopping.set()

    def close(self) -> None:
        """See Teacher."""

    # ---- in the thread of the event loop

    async def _ask_all(self, requests: list[Request], arrived: queue.SimpleQueue) -> None:
        waiting, settled = deque(requests), asyncio.Event()
        seconds, n_senders = self.endpoint.timeout_seconds, min(self.endpoint.concurrency, len(requests))
        try:
            async with openai.AsyncOpenAI(
                api_key=self.endpoint.key, base_url=self.endpoint.base_url, max_retries=0,
                timeout=openai.Timeout(seconds, connect=min(seconds, 30.0)),
                http_client=openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(self.endpoint.base_url)),  # no proxy
            ) as client, asyncio.TaskGroup() as group:  # fmt: skip
                senders = [group.create_task(self._send(client, waiting, settled, arrived)) for _ in range(n_senders)]
                guard = group.create_task(self._cut_short(senders))
                await asyncio.wait(senders)
                guard.cancel()
        except* RunError as errors:  # the raw file takes no line
            self.fatal = self.fatal or str(errors.exceptions[0])

    async def _cut_short(self, senders: list[asyncio.Task]) -> None:
        while not self.stopping.is_set():
            await asyncio.sleep(0.05)
        await asyncio.wait(senders, timeout=GRACE)
        for sender in senders:
            sender.cancel()

    async def _send(self, client: openai.AsyncOpenAI, waiting: deque, settled: asyncio.Event, arrived) -> None:
        while waiting and not self.ended and not self.stopping.is_set():
            completion = await self._ask(client, waiting.popleft(), settled)
            if completion is not None:
                arrived.put(completion)

    async def _ask(self, client: openai.AsyncOpenAI, request: Request, settled: asyncio.Event) -> Completion | None:
        """A request's completion, after as many tries as it takes; None when it was not sent and will not be."""
        worst = self.meter.worst(request.chat(), self.endpoint.max_response_tokens)
        rng = random.Random(stable_seed(self.endpoint.seed, "backoff", request.key))
        named = dict(zip(("puzzle_id", "attempt", "hinted"), request.key, strict=True))
        tries = 0
        while True:
            if not await self._may_send(worst, settled, rng):
                error = "the budget allows no further try" if self.ended == "budget" else "stopped before a further try"
                return Completion(**named, error=error) if tries else None
            if not tries and self.meter.priced:
                self.note({"sent": worst, **named})
            outcome: Completion | TryFailedError
            outcome, lost = await self._try(client, request), 0.0
            if isinstance(outcome, Completion):
                self.meter.count(outcome.prompt_tokens, outcome.completion_tokens, worst)
            elif outcome.charged and self.meter.priced:
                lost = worst
                self.note({"lost": worst, **named, "error": str(outcome)})
            self.meter.lost += lost
            self.in_flight -= 1
            self.meter.reserved = self.meter.reserved - worst if self.in_flight else 0.0
            settled.set()
            if isinstance(outcome, Completion):
                self.answered, self.failed = self.answered + 1, 0
                return outcome
            tries += 1
            if not outcome.again or tries > self.endpoint.retries or self.stopping.is_set():
                self._count_failure(outcome)
                return Completion(**named, error=f"{outcome} ({tries} {'try' if tries == 1 else 'tries'})")
            await self._wait(outcome, tries, rng)

    async def _may_send(self, worst: float, settled: asyncio.Event, rng: random.Random) -> bool:
        """Wait until the endpoint takes requests and the budget has room for the worst case, which is then reserved."""
        while (seconds := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(seconds + rng.random() * min(1.0, self.endpoint.backoff_seconds))
        while not self.meter.fits(worst) and self.in_flight:
            settled.clear()
            await settled.wait()  # what is in flight will cost less than its worst case
        if self.stopping.is_set() or self.ended:
            return False
        if not self.meter.fits(worst):
            self.ended = "budget"
            return False
        self.meter.reserved += worst
        self.in_flight += 1
        return True

    async def _try(self, client: openai.AsyncOpenAI, request: Request) -> "Completion | TryFailedError":
        """Send a request once, or again with a field left out that the endpoint refused."""
        while True:
            body = self._body(request)
            try:
                async with asyncio.timeout(self.endpoint.timeout_seconds):
                    raw = await client.chat.completions.with_raw_response.create(**body)
                completion = read_completion(raw.http_response.content, request)
                return replace(
                    completion, text=self._clean(completion.text), reasoning=self._clean(completion.reasoning),
                    model=self._clean(completion.model),
                )  # fmt: skip
            except (TimeoutError, openai.APITimeoutError):
                return TryFailedError(
                    f"no response within {self.endpoint.timeout_seconds:g} s", again=True, charged=True
                )
            except openai.APIStatusError as error:
                if not self._adapt(body, error):
                    return self._refusal(error)
            except openai.APIConnectionError as error:
                why = type(error.__cause__).__name__
                return TryFailedError(f"connection failed: {why}", again=True, charged=why != "ConnectError")
            except TryFailedError as error:
                return TryFailedError(self._clean(str(error)), again=error.again, charged=error.charged)

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model, "messages": request.chat(), "temperature": self.endpoint.temperature,
            self.token_field: self.endpoint.max_response_tokens,
        }  # fmt: skip
        if self.endpoint.top_p is not None:
            body["top_p"] = self.endpoint.top_p
        if self.send_seed:
            body["seed"] = stable_seed(self.endpoint.seed, request.key) >> 32
        return body

    def _adapt(self, body: dict[str, Any], error: openai.APIStatusError) -> bool:
        """Did the endpoint refuse a field that can be renamed or left out? Newer OpenAI models know max_tokens by another name,
        and some endpoints know no seed."""
        said = _said(error)
        if error.status_code not in (400, 422) or not _FIELD_REFUSED.search(said):
            return False
        if "max_tokens" in body and re.search(r"\bmax_tokens\b", said):
            self.token_field = "max_completion_tokens"
            return True
        if "seed" in body and re.search(r"\bseed\b", said):
            self.send_seed = False
            return True
        return False

    def _refusal(self, error: openai.APIStatusError) -> TryFailedError:
        status, said = error.status_code, self._clean(_said(error))
        message = f"status {status}: {said[:300]}"
        if status in ENDS_THE_RUN:
            return TryFailedError(f"the endpoint {ENDS_THE_RUN[status]} ({message})", again=False, status=status)
        if status == 429 and "insufficient_quota" in said:
            return TryFailedError(f"the endpoint {ENDS_THE_RUN[402]} ({message})", again=False, status=402)
        again = status in RETRIED or status >= 500
        after = retry_after(error.response.headers) if again else None
        return TryFailedError(message, again=again, charged=status in MAY_BE_CHARGED, after=after, status=status)

    def _count_failure(self, failure: TryFailedError) -> None:
        """Of a request that failed for good: end the run where no other can fare better."""
        if failure.status in ENDS_THE_RUN:
            self._end(f"--base-url {self.endpoint.base_url}: {failure}")
        elif failure.again:
            self.failed += 1
            if self.failed >= FAILED_IN_A_ROW:
                self._end(f"--base-url {self.endpoint.base_url}: {self.failed} requests in a row failed, the last with "
                          f"{failure}; try again later with --resume")  # fmt: skip
        else:
            self.refused += 1
            if self.refused >= REFUSED_AT_FIRST and not self.answered:
                self._end(f"--base-url {self.endpoint.base_url}: refused each of the first {self.refused} requests, the last "
                          f"with {failure}; change the settings it names")  # fmt: skip

    def _end(self, sentence: str) -> None:
        self.fatal = self.fatal or sentence
        self.stopping.set()

    async def _wait(self, failure: TryFailedError, tries: int, rng: random.Random) -> None:
        """Before the next try: as long as the endpoint asks (then no other request is sent either), or a random part of a time
        that doubles."""
        pause = min(LONGEST_WAIT, self.endpoint.backoff_seconds * 2 ** (tries - 1)) * rng.uniform(0.5, 1.0)
        if failure.after is not None and failure.after > LONGEST_ASKED:
            self._end(f"--base-url {self.endpoint.base_url}: asks to wait {failure.after:.0f} s ({failure}); "
                      "go on with --resume then")  # fmt: skip
            return
        if failure.after is not None:
            if failure.after >= 5 and time.monotonic() > self.not_before:
                self.say(f"the endpoint asks to wait {failure.after:.0f} s ({failure})")
            self.not_before = max(self.not_before, time.monotonic() + failure.after)
        if failure.after is None or failure.after < pause:
            await asyncio.sleep(pause)

    def _clean(self, text: str) -> str:
        """The text without the key, should the endpoint have quoted it."""
        return text.replace(self.endpoint.key, "[key]") if len(self.endpoint.key) >= SECRET_LENGTH else text


def read_completion(content: bytes, request: Request) -> Completion:
    """The completion in a response body. Raises TryFailedError, with the chance that it was charged, when there is none."""
    try:
        body = json.loads(content)
    except ValueError:
        raise TryFailedError("the response is not JSON, or cut short", again=True, charged=True) from None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        said = " ".join(str(body.get("error", "") if isinstance(body, dict) else "").split())[:300]
        raise TryFailedError(f"the response holds no completion {said}".rstrip(), again=True, charged=not said)
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return Completion(
        puzzle_id=request.puzzle.id, attempt=request.attempt, hinted=request.hinted, text=_text(message.get("content")),
        reasoning=_text(message.get("reasoning_content")) or _text(message.get("reasoning")),
        finish_reason=str(choice.get("finish_reason") or ""), model=str(body.get("model") or ""),
        **{name: count if isinstance(count, int) else None for name, count in counts.items()},
    )  # fmt: skip


def _text(content: Any) -> str:
    """Text, or a list of parts some of which are text."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _said(error: openai.APIStatusError) -> str:
    """What the endpoint wrote about a refusal, as one line."""
    body = error.body
    if isinstance(body, dict) and body.get("message"):
        body = " ".join(str(body[name]) for name in ("message", "code") if body.get(name))
    return " ".join(str(body if body is not None else error.response.reason_phrase).split())


def retry_after(headers: Any) -> float | None:
    """Seconds that a response's headers ask to wait; None when they do not say."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        return max(0.0, float(headers["retry-after"]))
    except KeyError:
        return None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except ValueError:
        return None


def is_loopback(base_url: str) -> bool:
    """Is the endpoint on this machine?"""
    host = urlsplit(base_url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
