"""A Teacher (data/distill/distill.py) that requests responses from any OpenAI-compatible endpoint.

- The key: only the OpenAI client uses it. It is removed from every text that comes back before other code sees the
  text.
- No locks: everything happens in one event loop, and state changes only between two awaits. A completion that arrived
  is passed on without an await in between, so a cancellation cannot lose it.
- The end: a teacher that ends sends nothing new, but waits for the requests in flight, which are charged. Only a kill
  can lose a response that is paid for.
"""

import asyncio
import ipaddress
import os
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
from data.errors import RunError, UserError, first_line
from rollout import stable_seed
from rollout.teachers.replies import TryFailedError, read_completion, refusal_text, retry_after, spellings_of

LONGEST_WAIT = 60.0
"""Longest wait between two tries, in seconds, when the endpoint does not ask for another."""
LONGEST_WITHOUT_SIGNALS = 0.2
"""Longest wait for a completion, in seconds, before signals are looked for."""
LONGEST_ASKED = 600.0
"""An endpoint that asks for a longer wait, in seconds, ends the run."""
FAILED_IN_A_ROW = 10
"""This many requests in a row that failed for good end the run: the endpoint is down. Once one was answered, only if they are
of as many puzzles."""
REFUSED_AT_FIRST = 8
"""This many requests that were refused before the first was answered end the run: the settings are wrong."""
RETRIED = (408, 409, 425, 429)
"""HTTP statuses below 500 after which the request is sent again."""
ENDS_THE_RUN = {
    401: "does not accept the key: set the environment variable that --key-env names",
    402: "requires payment first: top up the account, then add --resume",
    403: "does not allow it: check the key's rights and --model",
    404: "does not know the model or the path: check --model and --base-url",
}
"""HTTP status -> what it means; no other request can succeed (a 403 after an answer may be one prompt's: _count_failure)."""
MAY_BE_CHARGED = (408, 504, 524)
"""HTTP statuses of a gateway that stopped waiting for a server. The server may have finished."""
SECRET_LENGTH = 8
"""A shorter key ("EMPTY", "none") is not a secret."""
_FIELD_REFUSED = re.compile(
    r"unsupported|not supported|unrecogni[sz]ed|unknown|unexpected|extra|not permitted|forbidden", re.I
)


def read_key(variable: str) -> str:
    """The key in an environment variable, without the line end that a file adds; "" when there is none.

    Raises UserError, never with the key in it, for what no request can carry.
    """
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"--key-env {variable}: its value holds a space or a character beyond ASCII; copy it again")
    return key


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible endpoint, and how requests are sent to it."""

    model: str
    base_url: str
    """With the version. Example: "https://api.openai.com/v1"."""
    key: str = field(repr=False)  # repr=False: it must not reach a log or a traceback
    temperature: float = 1.0
    top_p: float | None = None
    """None: the endpoint's default."""
    max_response_tokens: int = 4096
    seed: int = 0
    concurrency: int = 16
    """Largest number of requests in flight."""
    timeout_seconds: float = 600.0
    """Time limit for a whole response."""
    retries: int = 8
    """Number of tries after the first."""
    backoff_seconds: float = 1.0
    """Wait before the second try. It doubles with each further try."""


class OpenAITeacher:
    """Sends requests to an endpoint, `concurrency` at a time, from an event loop in its own thread.

    note(row) writes a line {"sent": ...} or {"lost": ...} to the raw file (data/distill/responses.py). say(text) tells
    the user that the endpoint asks to wait, or that responses in flight are awaited. Both are called from that thread.
    """

    def __init__(
        self, endpoint: Endpoint, meter: Meter, note: Callable[[dict[str, Any]], None], say: Callable[[str], None]
    ) -> None:
        self.endpoint, self.meter, self.note, self.say = endpoint, meter, note, say
        self.ended = self.fatal = ""
        self.stopping, self.abandoned = threading.Event(), threading.Event()
        """stopping: send no new request. abandoned: nobody reads the completions, so cancel the requests in flight."""
        self.secret = spellings_of(endpoint.key)
        self.token_field, self.send_seed, self.send_stop = "max_tokens", True, True
        self.not_before = 0.0
        """Time, as time.monotonic(), from which the endpoint takes requests again."""
        self.in_flight = self.answered = self.refused = self.failed = 0
        """Numbers of requests: in flight, answered, refused, and failed since the last answer."""
        self.answered_before = 0
        """Answered in earlier runs: then a refusal of what is left says nothing of the settings."""
        self.unanswered: set[str] = set()
        """Ids of the puzzles asked about since the last answer: one that is never answered says nothing of the others."""

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        """See Teacher."""
        arrived: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(asyncio.run, self._ask_all(requests, arrived))
            asking.add_done_callback(lambda _: arrived.put(None))
            try:
                while (completion := _next(arrived)) is not None:
                    yield completion
            finally:
                if not asking.done():  # the caller left the loop over the completions early
                    self.abandoned.set()
                    self.stopping.set()
            asking.result()
        if self.fatal:
            raise RunError(self.fatal)

    def stop(self) -> None:
        """See Teacher. Requests in flight may go on until their time-out."""
        self.ended = self.ended or "stopped"
        self.stopping.set()

    def close(self) -> None:
        """See Teacher."""

    # ---- in the thread of the event loop

    async def _ask_all(self, requests: list[Request], arrived: queue.SimpleQueue) -> None:
        """Send all requests from `concurrency` senders that share one queue of waiting requests."""
        waiting, settled = deque(requests), asyncio.Event()
        self.halted = asyncio.Event()
        """The same as `stopping`, for coroutines of the event loop to wait on."""
        seconds, n_senders = self.endpoint.timeout_seconds, min(self.endpoint.concurrency, len(requests))
        try:
            async with self._client(seconds) as client, asyncio.TaskGroup() as group:
                senders = [group.create_task(self._send(client, waiting, settled, arrived)) for _ in range(n_senders)]
                guard = group.create_task(self._wind_up(senders, settled))
                await asyncio.wait(senders)
                guard.cancel()
        except* RunError as errors:  # the raw file cannot be written
            self.fatal = self.fatal or str(errors.exceptions[0])

    async def _wind_up(self, senders: list[asyncio.Task], settled: asyncio.Event) -> None:
        """When the teacher is told to stop, wake the waiting senders. Cancel requests in flight only when abandoned."""
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
        """Sleep; wake up early when the teacher is told to stop."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)

    async def _send(self, client: openai.AsyncOpenAI, waiting: deque, settled: asyncio.Event, arrived) -> None:
        """One sender: take waiting requests until there are none or the teacher ends."""
        while waiting and not self.ended and not self.stopping.is_set():
            completion = await self._ask(client, waiting.popleft(), settled)
            if completion is not None:
                arrived.put(completion)

    async def _ask(self, client: openai.AsyncOpenAI, request: Request, settled: asyncio.Event) -> Completion | None:
        """The completion of a request after all its tries. None when the request was never sent.

        settled: set whenever a request in flight has ended and its cost is known.
        """
        worst = self.meter.worst_cost(request.chat(), self.endpoint.max_response_tokens)
        rng = random.Random(stable_seed(self.endpoint.seed, "backoff", request.key))
        named = dict(zip(("puzzle_id", "attempt", "hinted"), request.key, strict=True))
        tries = 0
        while True:
            if not await self._may_send(worst, settled, rng):
                error = "the budget allows no further try" if self.ended == "budget" else "stopped before a further try"
                return Completion(**named, error=error) if tries else None
            if not tries and self.meter.priced:  # written before the request is sent: a kill must not hide its cost
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
            # exactly 0 when nothing is in flight: the rounding of many additions and subtractions must not add up
            self.meter.reserved = self.meter.reserved - worst if self.in_flight else 0.0
            settled.set()
            if isinstance(outcome, Completion):
                self.answered, self.failed = self.answered + 1, 0
                self.unanswered.clear()
                return outcome
            tries += 1
            if not outcome.again or tries > self.endpoint.retries or self.stopping.is_set():
                self._count_failure(outcome, request.puzzle.id)
                return Completion(**named, error=f"{outcome} ({tries} {'try' if tries == 1 else 'tries'})")
            await self._wait(outcome, tries, rng)

    def _client(self, seconds: float) -> openai.AsyncOpenAI:
        """Raises UserError for a proxy or certificates of the environment that cannot be used."""
        try:
            # on this machine no proxy
            by_environment = openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(self.endpoint.base_url))
        except Exception as error:  # ImportError, ValueError, OSError, the client library's own InvalidURL
            raise UserError(
                f"--base-url {self.endpoint.base_url}: cannot be asked through the proxy or with the certificates that the "
                f"environment names (ALL_PROXY, HTTPS_PROXY, SSL_CERT_FILE; {first_line(error)}); change these variables"
            ) from None
        return openai.AsyncOpenAI(
            api_key=self.endpoint.key,
            base_url=self.endpoint.base_url,
            max_retries=0,  # tries are counted and charged here, not in the client
            timeout=openai.Timeout(seconds, connect=min(seconds / 2, 30.0)),
            http_client=by_environment,
        )

    async def _may_send(self, worst: float, settled: asyncio.Event, rng: random.Random) -> bool:
        """Wait until the endpoint takes requests and the budget has room for the largest possible cost; reserve it.

        Returns False when the request will not be sent: the teacher ends, or the budget is used up.
        """
        while (seconds := self.not_before - time.monotonic()) > 0 and not self.stopping.is_set():
            # a random extra wait: not all senders shall start at the same moment
            await self._sleep(seconds + rng.random() * min(1.0, self.endpoint.backoff_seconds))
        while not self.meter.fits(worst) and self.in_flight and not self.stopping.is_set():
            settled.clear()
            await settled.wait()  # requests in flight will cost less than was reserved for them
        if self.stopping.is_set() or self.ended:
            return False
        if not self.meter.fits(worst):
            self.ended = "budget"
            return False
        self.meter.reserved += worst
        self.in_flight += 1
        return True

    async def _try(self, client: openai.AsyncOpenAI, request: Request) -> "Completion | TryFailedError":
        """Send a request once. It is sent again at once when the endpoint refused a field that can be left out."""
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
        """The arguments of a chat completion."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": request.chat(),
            "temperature": self.endpoint.temperature,
            self.token_field: self.endpoint.max_response_tokens,
        }
        if request.stop and self.send_stop:
            body["stop"] = [request.stop]
        if self.endpoint.top_p is not None:
            body["top_p"] = self.endpoint.top_p
        if self.send_seed:
            body["seed"] = stable_seed(self.endpoint.seed, request.key) >> 32  # 31 bits: endpoints take an int32
        return body

    def _adapt(self, body: dict[str, Any], error: openai.APIStatusError) -> bool:
        """Whether the endpoint refused a field that is now renamed or left out for all requests.

        Newer OpenAI models have another name for max_tokens, and some endpoints do not know `seed` or `stop`.
        """
        text = refusal_text(error)
        if error.status_code not in (400, 422) or not _FIELD_REFUSED.search(text):
            return False
        if "max_tokens" in body and re.search(r"\bmax_tokens\b", text):
            self.token_field = "max_completion_tokens"
            return True
        if "seed" in body and re.search(r"\bseed\b", text):
            self.send_seed = False
            return True
        if "stop" in body and re.search(r"\bstop\b", text):
            self.send_stop = False  # what comes after the look-up is not read
            return True
        return False

    def _refusal(self, error: openai.APIStatusError) -> TryFailedError:
        """The failed try for an HTTP status: whether it is worth another try, and whether it may be charged."""
        status, text = error.status_code, self._clean(refusal_text(error))
        message = f"status {status}: {text[:300]}"
        if status in ENDS_THE_RUN:
            return TryFailedError(f"the endpoint {ENDS_THE_RUN[status]} ({message})", again=False, status=status)
        if status == 429 and "insufficient_quota" in text:
            return TryFailedError(f"the endpoint {ENDS_THE_RUN[402]} ({message})", again=False, status=402)
        again = status in RETRIED or status >= 500
        after = retry_after(error.response.headers) if again else None
        return TryFailedError(message, again=again, charged=status in MAY_BE_CHARGED, after=after, status=status)

    def _count_failure(self, failure: TryFailedError, puzzle_id: str) -> None:
        """Count a request that failed for good. End the run when no other request can succeed."""
        self.unanswered.add(puzzle_id)
        many = len(self.unanswered) >= FAILED_IN_A_ROW
        # some endpoints give a moderated prompt the status of a wrong key
        if failure.status in ENDS_THE_RUN and not (failure.status == 403 and self.answered and not many):
            self._end(f"--base-url {self.endpoint.base_url}: {failure}")
        elif failure.again:
            self.failed += 1
            if self.failed >= FAILED_IN_A_ROW and (many or not self.answered):
                self._end(
                    f"--base-url {self.endpoint.base_url}: {self.failed} requests in a row failed, the last with "
                    f"{failure}; try again later with --resume"
                )
        else:
            self.refused += 1
            if self.refused >= REFUSED_AT_FIRST and not (self.answered or self.answered_before):
                self._end(
                    f"--base-url {self.endpoint.base_url}: refused each of the first {self.refused} requests, the last "
                    f"with {failure}; change the settings it names"
                )

    def _end(self, sentence: str) -> None:
        """End the run with this sentence, unless it ends already."""
        if not self.stopping.is_set():
            self.fatal = sentence
            self.stopping.set()

    async def _wait(self, failure: TryFailedError, tries: int, rng: random.Random) -> None:
        """Wait before the next try: as long as the endpoint asks (no other request is sent meanwhile), or a random part
        of a time that doubles with each try."""
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
        """The text without the key: some endpoints quote it in an error message, as it is or escaped."""
        return self.secret.sub("[key]", text) if len(self.endpoint.key) >= SECRET_LENGTH else text


def _next(arrived: queue.SimpleQueue) -> Completion | None:
    """The next entry of the queue.

    It never waits for long at once: a signal that comes just before a wait, or reaches another thread, is handled by Python
    only when the wait ends, and an endpoint may take ten minutes to end it.
    """
    while True:
        with suppress(queue.Empty):
            return arrived.get(timeout=LONGEST_WITHOUT_SIGNALS)


def is_loopback(base_url: str) -> bool:
    """Whether the endpoint is on this machine."""
    host = urlsplit(base_url).hostname or ""
    with suppress(ValueError):  # a name, not an address
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
