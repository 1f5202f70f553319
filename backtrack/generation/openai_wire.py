"""One address of an OpenAI-compatible server: questions out, answers in, again where that helps.

What is asked again: no connection, no answer in time, 408, 429 and 5xx. Waits double from one try
to the next, less a random part so that many clients do not come back together; a server that says
how long to wait (Retry-After) is believed. Everything else is refused at once, with what to do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any

import httpx2

if TYPE_CHECKING:
    from typing import Self

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second try, and at most between two."""

_REMEDIES = {
    401: "api_key: the server wants another one (null takes OPENAI_API_KEY)",
    403: "api_key: the server does not let this one in (null takes OPENAI_API_KEY)",
    404: "base_url and model: the address ends in /v1, the model is named as the server names it",
}


class RefusedError(ValueError):
    """The server refuses a question; asking again would not help."""


class Wire:
    """Asks for completions at one address; an async context.

    Args:
        base_url: Address of the server, such as http://127.0.0.1:8000/v1.
        api_key: Sent along; None takes OPENAI_API_KEY, or none where it is not set.
        retries: Tries after the first.
        timeout_s: Seconds that one answer may take.
        concurrency: Connections at most.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str | None,
        retries: int,
        timeout_s: float,
        concurrency: int,
    ) -> None:
        problems = []
        if not base_url.startswith(("http://", "https://")):
            problems.append(f"base_url: {base_url!r} is no address; expected http://HOST:PORT/v1")
        if retries < 0:
            problems.append(f"retries: {retries} is less than 0")
        if not timeout_s > 0:
            problems.append(f"timeout_s: {timeout_s} is not above 0")
        if concurrency < 1:
            problems.append(f"concurrency: {concurrency} is less than 1")
        if problems:
            raise ValueError("\n".join(problems))
        self.url = f"{base_url.rstrip('/')}/completions"
        self._api_key = api_key
        self._retries, self._timeout_s, self._concurrency = retries, timeout_s, concurrency
        self._client: httpx2.AsyncClient | None = None
        self._jitter = random.Random()  # of waits alone; the global state is not touched

    async def __aenter__(self) -> Self:
        key = self._api_key or os.environ.get("OPENAI_API_KEY")
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self._timeout_s,
            verify=self.url.startswith("https://"),  # reading certificates takes 0.1 s
            limits=httpx2.Limits(max_connections=self._concurrency),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()
        self._client = None

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's answer.

        Raises:
            RefusedError: If the server refuses.
            ValueError: If it has not answered after all tries, or not with JSON.
        """
        assert self._client is not None  # used as a context
        cause: Exception | None = None
        for attempt in range(self._retries + 1):
            asked_for = None
            try:
                response = await self._client.post(self.url, json=body)
            except httpx2.TransportError as error:
                cause, problem = error, f"{type(error).__name__} {error}".strip()
            else:
                if response.is_success:
                    return self._content(response)
                problem = f"status {response.status_code}: {_detail(response)}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise RefusedError(self._refusal(response.status_code, problem))
                asked_for = _retry_after(response.headers.get("Retry-After"))
            if attempt < self._retries:
                log.info("base_url: %s: %s; asking again", self.url, problem)
                await asyncio.sleep(self._wait(attempt) if asked_for is None else asked_for)
        raise ValueError(
            f"base_url: {self.url} gave no answer in {self._retries + 1} tries, in the last one "
            f"{problem}. Is the server up? Raise retries ({self._retries}) or timeout_s "
            f"({self._timeout_s:g}), or lower concurrency ({self._concurrency}); what is in "
            "cache_path, if set, is not asked again"
        ) from cause

    def _wait(self, attempt: int) -> float:
        """Return the seconds to wait after a try that failed."""
        longest = min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT)
        return longest * self._jitter.uniform(0.5, 1.0)

    def _refusal(self, status: int, problem: str) -> str:
        remedy = _REMEDIES.get(
            status,
            "model, max_new_tokens or base_url: the server must take token ids as a prompt (vLLM, "
            "SGLang and llama-server do) and have room for the prompt and max_new_tokens",
        )
        return f"base_url: {self.url} refuses with {problem}. {remedy}"

    def _content(self, response: httpx2.Response) -> dict[str, Any]:
        try:
            content = response.json()
        except ValueError as error:
            raise ValueError(
                f"base_url: {self.url} answers with something that is not JSON; "
                "expected the address of a completions API, which ends in /v1"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"base_url: {self.url} answers with no JSON object")
        return content


def _detail(response: httpx2.Response) -> str:
    """Return the server's own words, in one line."""
    return " ".join(response.text.split())[:500] or response.reason_phrase


def _retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number, or a date."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(header).timestamp() - time(), 0.0)
    except ValueError:
        return None
