"""Read the replies of an OpenAI-compatible endpoint: a completion with its token counts, or the reason of a refusal."""

import html.entities
import re
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from data.distill.distill import Completion, Request
from data.files import parse_json

BROKEN_OFF = ("error", "abort", "aborted", "insufficient_system_resource")
"""Reasons why a response ended that are the endpoint's, with status 200: it is no answer of the model."""
MOST_TOKENS = 10**9
"""A larger token count is not believed."""


class TryFailedError(Exception):
    """One try of a request failed."""

    def __init__(
        self, message: str, *, again: bool, charged: bool = False, after: float | None = None, status: int = 0
    ) -> None:
        """again: another try may succeed. charged: it may be charged all the same.

        after: seconds that the endpoint asks to wait, or None. status: HTTP status, 0 without one.
        """
        super().__init__(message)
        self.again, self.charged, self.after, self.status = again, charged, after, status


def read_completion(content: bytes, request: Request, clean: Callable[[str], str]) -> Completion:
    """The completion in the body of a response. Raises TryFailedError when there is none.

    clean(text): the text without the key. It is applied before a text is shortened, or half a key might remain.
    """
    try:
        body = parse_json(content)
    except ValueError:
        raise TryFailedError("the response is not JSON, or cut short", again=True, charged=True) from None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        error = " ".join(clean(str(body.get("error", "") if isinstance(body, dict) else "")).split())[:300]
        raise TryFailedError(f"the response holds no completion {error}".rstrip(), again=True, charged=not error)
    if choice.get("error") or choice.get("finish_reason") in BROKEN_OFF:
        error = " ".join(clean(str(choice.get("error") or choice["finish_reason"])).split())[:300]
        raise TryFailedError(f"the endpoint broke the response off ({error})", again=True, charged=True)
    prompt_tokens, completion_tokens = token_counts(body.get("usage"))
    return Completion(
        puzzle_id=request.puzzle.id,
        attempt=request.attempt,
        hinted=request.hinted,
        text=clean(_text(message.get("content"))),
        reasoning=clean(_text(message.get("reasoning_content")) or _text(message.get("reasoning"))),
        finish_reason=clean(_text(choice.get("finish_reason"))),
        model=clean(_text(body.get("model"))),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def token_counts(usage: Any) -> tuple[int | None, int | None]:
    """(prompt tokens, completion tokens) from the field `usage` of a response; None for a number that is missing.

    Some endpoints count reasoning only in the total. It is charged, so it belongs to the completion.
    """
    counts = [
        usage.get(f"{name}_tokens") if isinstance(usage, dict) else None for name in ("prompt", "completion", "total")
    ]
    # `type(c) is int`, because bool is an int too; the numbers decide what a budget allows
    prompt, completion, total = (c if type(c) is int and 0 <= c <= MOST_TOKENS else None for c in counts)
    if prompt is not None and total is not None and total >= prompt:
        completion = max(completion or 0, total - prompt)
    return prompt, completion


def _text(content: Any) -> str:
    """The text of a message's content, which is a string or a list of parts."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def refusal_text(error: openai.APIStatusError) -> str:
    """The endpoint's own message about a refusal, as one line."""
    body = error.body if error.body is not None else error.response.reason_phrase
    if isinstance(body, dict) and body.get("message"):
        body = " ".join(str(body[name]) for name in ("message", "code") if body.get(name))
    return " ".join(str(body).split())


def spellings_of(secret: str) -> re.Pattern:
    """Matches a text as it is and escaped, whole or in part: as JSON, Python, C, HTML or a URL write it, also twice.

    So a page of HTML and JSON that does not parse do not show it. An endpoint that means to show the key it was sent can
    write it in ways that no pattern knows.

    >>> [bool(spellings_of("sk-a").search(text)) for text in ("sk-a", "sk&#45;a", r"s\\u006b-a", "sk%2Da", "sk-b")]
    [True, True, True, True, False]
    """
    names: dict[str, list[str]] = {}
    for name, char in html.entities.html5.items():
        names.setdefault(char, []).append(re.escape(name))

    def spellings(char: str) -> str:
        code = ord(char)
        # the counts are bounded, or a reply of a million backslashes could keep the pattern busy for hours
        forms = [
            rf"\\{{0,8}}{re.escape(char)}",
            rf"\\{{1,8}}(?i:u\{{?0{{0,6}}{code:x}\}}?|x{code:02x}|0{{0,1}}{code:o})",
            rf"&(?:amp;){{0,3}}#(?i:0{{0,6}}{code}|x0{{0,6}}{code:x})(?![0-9a-fA-F]);?",
            rf"%(?:25){{0,3}}(?i:{code:02x})",
        ]
        if char in names:
            forms.append(rf"&(?:amp;){{0,3}}(?:{'|'.join(sorted(names[char], key=len, reverse=True))})")
        return f"(?:{'|'.join(forms)})"

    return re.compile("".join(map(spellings, secret)))


def retry_after(headers: Any) -> float | None:
    """Seconds that the headers of a response ask to wait, as a number or a date. None when they do not ask."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) / per_second)
    with suppress(KeyError, ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return None
