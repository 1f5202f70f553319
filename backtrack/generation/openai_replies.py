"""What a completions API answered, whatever its dialect: ids, log-probs, and why it stopped.

vLLM            choices[0].token_ids, logprobs.tokens ["token_id:5", ...], stop_reason 259
SGLang          choices[0].text, logprobs.tokens ["a", "[RESET]"], matched_stop 259
llama-server    choices[0].logprobs.content [{"id": 5, "logprob": ..., "top_logprobs": [...]}]

Nothing that follows a [RESET] or an end of turn counts, whatever a server sends on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from backtrack.tokens import encode_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

_ID_PREFIX = "token_id:"
"""How vLLM writes an id in place of a token's text."""
_NO_LOGPROB = -9999.0
"""What vLLM writes where it has none; its batches of mixed questions lack some."""

End = Literal["reset", "stop", "length"]
_STOP: End = "stop"


class Step(NamedTuple):
    """Log-probabilities at one generated token; the model's own, before bias and temperature.

    Attributes:
        reset: Of [RESET], in nats; None where the server does not give it.
        others: Of the other tokens it gives, in nats; the likeliest are among them.
    """

    reset: float | None
    others: tuple[float, ...]


UNKNOWN = Step(None, ())


class Part(NamedTuple):
    """What one question brought.

    Attributes:
        ids: Up to the token that ended them, itself not included.
        steps: One for each generated token, the one that ended them included; empty where the
            server gives no log-probs.
        end: What ended them: [RESET], the end of the turn, or the number of tokens asked for.
        num_tokens: Tokens generated, the one that ended them included.
        has_ids: Whether the server gave ids; its text was encoded otherwise.
    """

    ids: list[int]
    steps: list[Step]
    end: End
    num_tokens: int
    has_ids: bool


class ReplyReader:
    """Reads answers: what counts of each is what comes before its first [RESET] or end of turn.

    Args:
        tokenizer: Spells the ids.
        reset_id: Id of [RESET].
        stop_ids: Ids that end an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, reset_id: int, stop_ids: Collection[int]
    ) -> None:
        self._tokenizer, self._reset_id = tokenizer, reset_id
        self._ends: dict[int, End] = {**dict.fromkeys(stop_ids, _STOP), reset_id: "reset"}
        self._special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._spelled: dict[str, End] = {
            str(tokenizer.convert_ids_to_tokens(token)): end for token, end in self._ends.items()
        }
        self._is_spelled_out = False
        self._reset_names = (reset_id, str(tokenizer.convert_ids_to_tokens(reset_id)))

    def read(self, content: Mapping[str, Any], *, limit: int) -> Part:
        """Return what counts of a server's answer.

        Args:
            content: The JSON object.
            limit: Tokens asked for.

        Raises:
            ValueError: If it is no completion, or was broken off.
        """
        try:
            (choice,) = content["choices"]
            reason, text = choice["finish_reason"], str(choice["text"])
            stop = choice.get("stop_reason", choice.get("matched_stop"))
            tables = _tables(choice.get("logprobs") or {})
            ids = choice.get("token_ids")
            num_tokens = (content.get("usage") or {}).get("completion_tokens")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"base_url: the server's answer is no completion ({type(error).__name__}: "
                f"{error}); expected one choice with text and finish_reason, as OpenAI writes it"
            ) from error
        if reason not in ("stop", "length"):
            raise ValueError(
                f"base_url: the server broke an answer off with finish_reason {reason!r}; whole "
                "answers end with 'stop' or 'length'. Its log says why"
            )
        end: End = "reset" if reason == "stop" and stop == self._reset_id else reason
        if ids is None:
            ids = self._named_ids(tables, num_tokens)
        if ids is None:
            return self._from_text(text, end, num_tokens, limit)
        return self._from_ids(ids[:limit], end, [self._step(table) for _, table in tables])

    def read_trial(self, content: Mapping[str, Any]) -> Part:
        """Return what counts of an answer whose first token is [RESET], and learn how it is shown.

        Raises:
            ValueError: As `read` does.
        """
        part = self.read(content, limit=1)
        self._is_spelled_out = self._reset_names[1] in content["choices"][0]["text"]
        return part

    def _named_ids(
        self, tables: Sequence[tuple[int | str, Mapping[int | str, float]]], num_tokens: int | None
    ) -> list[int] | None:
        """Return the ids that log-probs name; None where they do not, but the text serves.

        llama-server leaves out tokens that end within a character, and a [RESET] after them.
        """
        ids = [name for name, _ in tables if isinstance(name, int)]
        if ids and len(ids) == len(tables) == num_tokens:
            return ids
        if ids and not self._is_spelled_out:
            raise ValueError(
                f"base_url: the server names {len(ids)} of {num_tokens} tokens, and a [RESET] may "
                "be among the others. Start llama-server with --special, which spells it out, or "
                "use a server that gives token_ids (vLLM from 0.10.2)"
            )
        return None

    def _from_ids(self, ids: list[int], end: End, steps: list[Step]) -> Part:
        """Return what counts of `ids`; a server may leave the last one out, or its log-probs."""
        num_kept = num_tokens = len(ids)
        first = next((i for i, token in enumerate(ids) if token in self._ends), None)
        if first is not None:
            num_kept, num_tokens, end = first, first + 1, self._ends[ids[first]]
        elif end != "length" and ids and ids[-1] in self._special_ids:
            num_kept -= 1  # an end that only the server's own config names
        elif end != "length":
            num_tokens += 1
        if steps:
            steps = [*steps, *[UNKNOWN] * num_tokens][:num_tokens]
        return Part(ids[:num_kept], steps, end, num_tokens, True)

    def _from_text(self, text: str, end: End, num_tokens: int | None, limit: int) -> Part:
        """Return what counts of `text`.

        A model that spells "[RESET]" in other tokens is cut there too: text cannot tell.
        """
        places = {text.find(word): how for word, how in self._spelled.items() if word in text}
        if places:
            text, end, num_tokens = text[: min(places)], places[min(places)], None
        ids = encode_text(self._tokenizer, text)
        if num_tokens is None:
            num_tokens = len(ids) + (end != "length")
        return Part(ids, [], end, min(max(num_tokens, 1), limit), False)

    def _step(self, table: Mapping[int | str, float]) -> Step:
        names = self._reset_names
        reset = next((table[name] for name in names if name in table), None)
        return Step(reset, tuple(p for name, p in table.items() if name not in names))


def reset_margin(step: Step, temperature: float) -> float:
    """Return by how much [RESET] leads the other tokens together, in nats; -inf where unknown.

    At temperature 0 that is its logit less the largest other. At T it is l_R - T logsumexp(l / T)
    over the others: with Gumbel noise the best of them is distributed as that sum plus the noise of
    one token, so that a bias b resets where margin + b + T (g_R - g) > 0. Exact at T = 1, where the
    sum follows from the probability of [RESET]; otherwise over the tokens that the server gives.

    Args:
        step: Log-probs of one token.
        temperature: At least 0.
    """
    if step.reset is None:
        return -math.inf
    if temperature == 1:
        return step.reset - math.log(-math.expm1(min(step.reset, -1e-12)))
    if not step.others:
        return -math.inf
    best = max(step.others)
    if temperature == 0:
        return step.reset - best
    total = sum(math.exp((other - best) / temperature) for other in step.others)
    return step.reset - best - temperature * math.log(total)


def _tables(logprobs: Mapping[str, Any]) -> list[tuple[int | str, dict[int | str, float]]]:
    """Return, for each token, its name and the log-probs by name; names are ids where given."""
    if "content" in logprobs:  # chat completions and llama-server
        entries = [[*(one.get("top_logprobs") or ()), one] for one in logprobs["content"] or ()]
        named = [[(e.get("id", e["token"]), e.get("logprob")) for e in es] for es in entries]
    else:  # OpenAI's completions
        tokens, own = logprobs.get("tokens") or (), logprobs.get("token_logprobs") or ()
        top = logprobs.get("top_logprobs") or [{}] * len(tokens)
        named = [
            [*(table or {}).items(), (token, logprob)]
            for token, logprob, table in zip(tokens, own, top, strict=True)
        ]
    return [
        (
            _name(pairs[-1][0]),
            {_name(key): float(p) for key, p in pairs if p is not None and p > _NO_LOGPROB},
        )
        for pairs in named
    ]


def _name(key: int | str) -> int | str:
    if isinstance(key, str) and key.startswith(_ID_PREFIX):
        return int(key.removeprefix(_ID_PREFIX))
    return key
