"""Pairwise judging by a language model behind any OpenAI-compatible endpoint; off by default.

In: two arms' texts for the same sources. Out: the rates at which the first wins, ties and loses,
with confidence intervals, and every verdict. Each pair is judged twice with the positions swapped;
where the two verdicts disagree it is a tie, because judges favour a position (Zheng et al., arXiv
2306.05685). The key is read from the environment and goes into the request's header, nowhere else.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import numpy as np

from grpo_jax.config import Preference
from grpo_jax.evals.completion import fill
from grpo_jax.evals.metrics import Statistic, bootstrap_intervals

_VERDICT = re.compile(r"\[\[(A|B|C)\]\]")
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_WAIT = 60.0  # seconds between two tries

# A request that failed for good, or an answer without a verdict.
FAILED, MALFORMED = "failed", "malformed"


class Contest(NamedTuple):
    """Two texts for one source."""

    source: str
    reference: str  # '' if there is none
    first: str
    second: str


class Reply(NamedTuple):
    """What came of one request."""

    verdict: str  # "A", "B", "C" (a tie), "malformed" or "failed"
    text: str  # the judge's words, or what went wrong


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_preference(cfg: Preference) -> list[str]:
    """What is wrong with the section, one line a problem; [] while it is off."""
    if not cfg.base_url:
        return []
    problems = []
    parts = urllib.parse.urlsplit(cfg.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problems.append(f"base_url: got {_public(cfg.base_url)!r}, wanted http(s)://HOST/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        problems.append(
            "base_url: has a user, a query or a fragment, and is written into the run's files; a "
            "key belongs into the environment variable that api_key_env names"
        )
    if not cfg.model:
        problems.append("model: got '', wanted the judge's name at the endpoint")
    if cfg.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", cfg.api_key_env):
        problems.append("api_key_env: wanted the NAME of an environment variable, not a key")
    elif cfg.api_key_env and not os.environ.get(cfg.api_key_env):
        problems.append(f"api_key_env: the environment variable {cfg.api_key_env} is not set")
    missing = [name for name in ("{source}", "{first}", "{second}") if name not in cfg.prompt]
    if missing:
        problems.append(f"prompt: lacks {', '.join(missing)}")
    if not cfg.pairs or any(pair.count(":") != 1 for pair in cfg.pairs):
        problems.append(f"pairs: got {cfg.pairs}, wanted arms to compare as FIRST:SECOND")
    return problems


def judge_arms(
    cfg: Preference,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    bootstrap: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Judges `cfg.pairs` of arms.

    Args:
      cfg: the section; nothing is asked while it is off.
      samples: each arm's rows with "source", "reference" and "completion", in the same order.
      bootstrap, seed: see `summarise`.

    Returns:
      {"FIRST:SECOND": {"metrics", counts, "items"}}, JSON-ready; {} while judging is off.

    Raises:
      ValueError: the section is not complete, an arm is missing or has other rows, the endpoint
        refuses the requests, or gives no verdict at all.
    """
    if not cfg.base_url:
        return {}
    ask = build_ask(cfg)
    found = {}
    for pair in cfg.pairs:
        sides = []
        for arm in pair.split(":"):
            if arm not in samples:
                raise ValueError(
                    f"preference.pairs: no arm {arm!r}; there are {', '.join(samples)}"
                )
            sides.append(samples[arm][: cfg.max_rows or None])
        keys = [[(row["source"], row["reference"]) for row in side] for side in sides]
        if keys[0] != keys[1]:
            raise ValueError(f"preference.pairs: the arms of {pair} were measured on other rows")
        contests = [
            Contest(a["source"], a["reference"], a["completion"], b["completion"])
            for a, b in zip(*sides, strict=True)
        ]
        items = judge_pairs(contests, ask, cfg)
        found[pair] = {**summarise(items, bootstrap, seed), "items": items}
    return found


def judge_pairs(
    contests: Sequence[Contest], ask: Callable[[str], Reply], cfg: Preference
) -> list[dict[str, Any]]:
    """Asks about each pair twice, several requests at one time.

    Args:
      contests: the pairs.
      ask: one request, such as `build_ask`'s; called from `cfg.concurrency` threads.

    Returns:
      One item a pair: {"source", "outcome", "verdicts", "texts"}. outcome is "win", "tie" or "lose"
      of the first text, or what went wrong: "malformed" or "failed". verdicts and texts are
      the judge's, first with the first text as A, then with it as B.
    """

    def prompt(contest: Contest, swapped: bool) -> str:
        first, second = contest.first, contest.second
        if swapped:
            first, second = second, first
        values = {"source": contest.source, "reference": contest.reference}
        return fill(cfg.prompt, {**values, "first": first, "second": second})

    prompts = [prompt(contest, swapped) for contest in contests for swapped in (False, True)]
    pool = ThreadPoolExecutor(cfg.concurrency)
    try:
        replies = list(pool.map(ask, prompts))
    finally:
        pool.shutdown(cancel_futures=True)  # a refused request ends the others
    items = []
    for i, contest in enumerate(contests):
        pair = replies[2 * i : 2 * i + 2]
        items.append(
            {
                "source": contest.source,
                "outcome": outcome(*(reply.verdict for reply in pair)),
                "verdicts": [reply.verdict for reply in pair],
                "texts": [reply.text for reply in pair],
            }
        )
    return items


def outcome(straight: str, swapped: str) -> str:
    """What two verdicts together say about the first text, which is A, and B when swapped."""
    for trouble in (FAILED, MALFORMED):
        if trouble in (straight, swapped):
            return trouble
    return {("A", "B"): "win", ("B", "A"): "lose"}.get((straight, swapped), "tie")


def summarise(items: Sequence[dict[str, Any]], bootstrap: int, seed: int) -> dict[str, Any]:
    """Rates over the pairs that were judged.

    Args:
      items: of `judge_pairs`.
      bootstrap: resamples behind each 95% interval; seed: of the resampling.

    Returns:
      "metrics": win, tie, lose and score (wins and half the ties), {"value", "low", "high"}; and
      the counts "judged", "malformed", "failed", and "disagreed": ties by contradiction.

    Raises:
      ValueError: no pair was judged; the first thing that went wrong is in it.
    """
    found = [item["outcome"] for item in items]
    judged = [o for o in found if o in ("win", "tie", "lose")]
    if not judged:
        said = next((t for i in items for v, t in _replies(i) if v in (FAILED, MALFORMED)), "")
        raise ValueError(f"the judge gave no verdict on {len(items)} pairs; it said: {said!r:.300}")
    values = {name: np.array([o == name for o in judged], float) for name in ("win", "tie", "lose")}
    values["score"] = values["win"] + values["tie"] / 2
    statistics = {
        name: Statistic(np.stack([v, np.ones(len(v))], 1), lambda s: s[..., 0] / s[..., 1])
        for name, v in values.items()
    }
    disagreed = sum(
        item["outcome"] == "tie" and tuple(item["verdicts"]) != ("C", "C") for item in items
    )
    return {
        "metrics": bootstrap_intervals(statistics, bootstrap, seed),
        "judged": len(judged),
        "disagreed": disagreed,
        MALFORMED: found.count(MALFORMED),
        FAILED: found.count(FAILED),
    }


def _replies(item: dict[str, Any]) -> list[tuple[str, str]]:
    return list(zip(item["verdicts"], item["texts"], strict=True))


def verdict_of(text: str) -> str:
    """The last [[A]], [[B]] or [[C]] in a judge's answer, or "malformed"."""
    found = _VERDICT.findall(text)
    return found[-1] if found else MALFORMED


def build_ask(
    cfg: Preference, sleep: Callable[[float], None] = time.sleep
) -> Callable[[str], Reply]:
    """The function ask(prompt): one chat completion, tried again after passing trouble.

    Trouble that passes is a lost connection, a timeout, and the statuses 408, 409, 425, 429, 5xx;
    the wait doubles from one second, or is what the server's Retry-After says, at most a minute.

    Raises (the function):
      ValueError: the endpoint refuses the request itself, as for a wrong key or model.
      ValueError (here): the section is not complete; see `check_preference`.
    """
    if not cfg.base_url:
        raise ValueError("preference: base_url is empty, so judging is off")
    if problems := check_preference(cfg):
        raise ValueError("".join(f"\npreference.{problem}" for problem in problems).strip())
    key = os.environ[cfg.api_key_env] if cfg.api_key_env else ""
    url = cfg.base_url.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json", "User-Agent": "grpo_jax"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    opener = urllib.request.build_opener(_NoRedirect)

    def public(text: str) -> str:
        """A server may quote the key that it got."""
        return text.replace(key, "[key]") if key else text

    def once(body: bytes) -> str:
        request = urllib.request.Request(url, body, headers)
        with opener.open(request, timeout=cfg.timeout) as response:
            return response.read().decode("utf-8", "replace")

    def ask(prompt: str) -> Reply:
        message = {"role": "user", "content": prompt}
        fields = {"model": cfg.model, "messages": [message], "temperature": cfg.temperature}
        body = json.dumps({**fields, "max_tokens": cfg.max_tokens}).encode()
        trouble, wait = "", 1.0
        for attempt in range(cfg.retries + 1):
            if attempt:
                sleep(min(wait, _LONGEST_WAIT))
            wait = 2.0**attempt
            try:
                return _reply(public(once(body)))
            except urllib.error.HTTPError as error:
                with error:
                    trouble = f"HTTP {error.code}: {public(_excerpt(error))}"
                    if error.code not in _TRANSIENT:
                        _refused(url, trouble)
                    wait = _retry_after(error, wait)
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # URLError and timeouts are OSErrors
                trouble = public(f"{type(error).__name__}: {error}")
        return Reply(FAILED, trouble)

    return ask


def _reply(content: str) -> Reply:
    """The verdict in a response; one that is no chat completion is malformed."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return Reply(MALFORMED, content[:500])
    if not isinstance(text, str):
        return Reply(MALFORMED, content[:500])
    return Reply(verdict_of(text), text)


def _refused(url: str, trouble: str) -> NoReturn:
    raise ValueError(f"preference: {_public(url)} refuses the request: {trouble}") from None


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(500).decode("utf-8", "replace")
    except OSError:
        return error.reason


def _retry_after(error: urllib.error.HTTPError, wait: float) -> float:
    """Seconds, where the server says so in seconds; a date is passed over for our own wait."""
    said = error.headers.get("Retry-After", "")
    return float(said) if re.fullmatch(r"\d+(\.\d+)?", said) else wait


def _public(url: str) -> str:
    """The URL without what may be secret in it."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))
