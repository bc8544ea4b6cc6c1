"""The teacher behind any OpenAI-compatible endpoint (data.distill.distill.Teacher).

The key is known to the OpenAI client alone: it is cut out of every text that comes back before anything else sees the text.
What is decided in the event loop between two awaits needs no lock; a completion that has come is handed over without an await
in between, so that no cancellation can lose it. A teacher that ends sends nothing new and waits for what is in flight, which
will be charged: only what a kill cuts off is paid for and not there.
"""

import asyncio
import ipaddress
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai

from data.distill.distill import Completion, Request
from data.distill.meter import Meter
from data.errors import RunError
from rollout import stable_seed
from rollout.teachers.replies import TryFailedError, read_completion, refusal_text, retry_after

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


class OpenAITeacher:
    """Asks an endpoint for one response per request, `concurrency` at a time, from an event loop in a thread of its own.

    note(row): writes a line {"sent": ...} or {"lost": ...} to the raw file (data/distill/responses.py); called from that thread.
    say(text): tells the user that the endpoint wants to wait, or that responses in flight are awaited; called from it too.
    """

    def __init__(
        self, endpoint: Endpoint, meter: Meter, note: Callable[[dict[str, Any]], None], say: Callable[[str], None]
    ) -> None:
        self.endpoint, self.meter, self.note, self.say = endpoint, meter, note, say
        self.ended = self.fatal = ""
        self.stopping, self.abandoned = threading.Event(), threading.Event()
        """Nothing new is sent; nobody takes what comes, so that what is in flight is given up."""
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
                    self.abandoned.set()
                    self.stopping.set()
            asking.result()
        if self.fatal:
            raise RunError(self.fatal)

    def stop(self) -> None:
        """See Teacher. Requests in flight have until their time-out."""
        self.ended = self.ended or "stopped"
        self.stopping.set()

    def close(self) -> None:
        """See Teacher."""

    # ---- in the thread of the event loop

    async def _ask_all(self, requests: list[Request], arrived: queue.SimpleQueue) -> None:
        waiting, settled = deque(requests), asyncio.Event()
        self.halted = asyncio.Event()
        """`stopping`, for those who wait in the event loop."""
        seconds, n_senders = self.endpoint.timeout_seconds, min(self.endpoint.concurrency, len(requests))
        try:
            async with (
                openai.AsyncOpenAI(
                    api_key=self.endpoint.key,
                    base_url=self.endpoint.base_url,
                    max_retries=0,
                    timeout=openai.Timeout(seconds, connect=min(seconds / 2, 30.0)),
                    http_client=openai.DefaultAsyncHttpxClient(
                        trust_env=not is_loopback(self.endpoint.base_url)
                    ),  # no proxy
                ) as client,
                asyncio.TaskGroup() as group,
            ):
                senders = [group.create_task(self._send(client, waiting, settled, arrived)) for _ in range(n_senders)]
                guard = group.create_task(self._wind_up(senders, settled))
                await asyncio.wait(senders)
                guard.cancel()
        except* RunError as errors:  # the raw file takes no line
            self.fatal = self.fatal or str(errors.exceptions[0])

    async def _wind_up(self, senders: list[asyncio.Task], settled: asyncio.Event) -> None:
        """Once the teacher is to stop: wake the senders that wait to send; cancel those in flight only when abandoned."""
        while not self.stopping.is_set():
            await asyncio.sleep(0.05)
        self.halted.set()
        settled.set()
        if self.in_flight and not self.abandoned.is_set():
            self.say(
                f"waiting for the responses in flight ({self.in_flight}), which will be charged: at most "
                f"{self.endpoint.timeout_seconds:g} s; a second signal gives them up"
            )
        while not self.abandoned.is_set():
            await asyncio.sleep(0.05)
        for sender in senders:
            sender.cancel()

    async def _sleep(self, seconds: float) -> None:
        """Less when the teacher is to stop."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)

    async def _send(self, client: openai.AsyncOpenAI, waiting: deque, settled: asyncio.Event, arrived) -> None:
        while waiting and not self.ended and not self.stopping.is_set():
            completion = await self._ask(client, waiting.popleft(), settled)
            if completion is not None:
                arrived.put(completion)

    async def _ask(self, client: openai.AsyncOpenAI, request: Request, settled: asyncio.Event) -> Completion | None:
        """A request's completion, after as many tries as it takes; None when it was not sent and will not be."""
        worst = self.meter.worst_cost(request.chat(), self.endpoint.max_response_tokens)
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
        while (seconds := self.not_before - time.monotonic()) > 0 and not self.stopping.is_set():
            await self._sleep(seconds + rng.random() * min(1.0, self.endpoint.backoff_seconds))
        while not self.meter.fits(worst) and self.in_flight and not self.stopping.is_set():
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
                return read_completion(raw.http_response.content, request, self._clean)
            except (TimeoutError, openai.APITimeoutError) as error:
                if type(error.__cause__).__name__ in ("ConnectTimeout", "PoolTimeout"):
                    return TryFailedError("no connection in time", again=True)
                return TryFailedError(
                    f"no response within {self.endpoint.timeout_seconds:g} s", again=True, charged=True
                )
            except openai.APIStatusError as error:
                if not self._adapt(body, error):
                    return self._refusal(error)
            except openai.APIConnectionError as error:
                why = type(error.__cause__).__name__
                return TryFailedError(f"connection failed: {why}", again=True, charged=why != "ConnectError")
            except RecursionError:
                return TryFailedError("the response is nested too deeply", again=True, charged=True)
            except TryFailedError as error:
                return error

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": request.chat(),
            "temperature": self.endpoint.temperature,
            self.token_field: self.endpoint.max_response_tokens,
        }
        if self.endpoint.top_p is not None:
            body["top_p"] = self.endpoint.top_p
        if self.send_seed:
            body["seed"] = stable_seed(self.endpoint.seed, request.key) >> 32
        return body

    def _adapt(self, body: dict[str, Any], error: openai.APIStatusError) -> bool:
        """Did the endpoint refuse a field that can be renamed or left out? Newer OpenAI models know max_tokens by another name,
        and some endpoints know no seed."""
        text = refusal_text(error)
        if error.status_code not in (400, 422) or not _FIELD_REFUSED.search(text):
            return False
        if "max_tokens" in body and re.search(r"\bmax_tokens\b", text):
            self.token_field = "max_completion_tokens"
            return True
        if "seed" in body and re.search(r"\bseed\b", text):
            self.send_seed = False
            return True
        return False

    def _refusal(self, error: openai.APIStatusError) -> TryFailedError:
        status, text = error.status_code, self._clean(refusal_text(error))
        message = f"status {status}: {text[:300]}"
        if status in ENDS_THE_RUN:
            return TryFailedError(f"the endpoint {ENDS_THE_RUN[status]} ({message})", again=False, status=status)
        if status == 429 and "insufficient_quota" in text:
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
                self._end(
                    f"--base-url {self.endpoint.base_url}: {self.failed} requests in a row failed, the last with "
                    f"{failure}; try again later with --resume"
                )
        else:
            self.refused += 1
            if self.refused >= REFUSED_AT_FIRST and not self.answered:
                self._end(
                    f"--base-url {self.endpoint.base_url}: refused each of the first {self.refused} requests, the last "
                    f"with {failure}; change the settings it names"
                )

    def _end(self, sentence: str) -> None:
        if not self.stopping.is_set():
            self.fatal = sentence
            self.stopping.set()

    async def _wait(self, failure: TryFailedError, tries: int, rng: random.Random) -> None:
        """Before the next try: as long as the endpoint asks (then no other request is sent either), or a random part of a time
        that doubles."""
        pause = min(LONGEST_WAIT, self.endpoint.backoff_seconds * 2 ** (tries - 1)) * rng.uniform(0.5, 1.0)
        if failure.after is not None and failure.after > LONGEST_ASKED:
            self._end(
                f"--base-url {self.endpoint.base_url}: asks to wait {failure.after:.0f} s ({failure}); "
                "go on with --resume then"
            )
            return
        if failure.after is not None:
            if failure.after >= 5 and time.monotonic() > self.not_before:
                self.say(f"the endpoint asks to wait {failure.after:.0f} s ({failure})")
            self.not_before = max(self.not_before, time.monotonic() + failure.after)
        if failure.after is None or failure.after < pause:
            await self._sleep(pause)

    def _clean(self, text: str) -> str:
        """The text without the key, should the endpoint have quoted it."""
        return text.replace(self.endpoint.key, "[key]") if len(self.endpoint.key) >= SECRET_LENGTH else text


def is_loopback(base_url: str) -> bool:
    """Is the endpoint on this machine?"""
    host = urlsplit(base_url).hostname or ""
    with suppress(ValueError):  # a name, not an address
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
