"""The judge behind an endpoint: verdicts, positions, every kind of trouble, a key kept private."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from grpo_jax.evals import preference
from grpo_jax.evals.preference import Contest, Preference, Reply

KEY = "sk-very-secret-0123456789"


class Judge(http.server.ThreadingHTTPServer):
    """A fake endpoint on this machine; `answer(prompt, n)` gives (status, body, headers)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[str, int], tuple[int, str, dict]] = lambda prompt, n: said("[[C]]")
        self.requests: list[tuple[str, dict, dict]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            n = len(self.server.requests)
        status, text, headers = self.server.answer(body["messages"][0]["content"], n)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # a client that did not wait

    def log_message(self, *args: object) -> None:
        pass


def said(text: object, status: int = 200, **headers: str) -> tuple[int, str, dict]:
    return status, json.dumps({"choices": [{"message": {"content": text}}]}), headers


def picks(word: str) -> Callable[[str, int], tuple[int, str, dict]]:
    """A judge who prefers the answer with `word` in it, wherever it stands."""

    def answer(prompt: str, n: int) -> tuple[int, str, dict]:
        first, second = (part.split("\n")[1] for part in prompt.split("[Answer ")[1:])
        sides = (word in first, word in second)
        return said({(True, False): "so [[A]]", (False, True): "so [[B]]"}.get(sides, "[[C]]"))

    return answer


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Judge()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def section(judge: Judge, **fields: object) -> Preference:
    return Preference(base_url=judge.url, model="judge-1", pairs=("grpo:sft",), **fields)


def rows(*completions: str) -> list[dict]:
    return [
        {"source": f"s{i}", "reference": f"r{i}", "completion": text}
        for i, text in enumerate(completions)
    ]


def test_a_consistent_judge(judge: Judge) -> None:
    judge.answer = picks("good")
    samples = {"grpo": rows("good 1", "bad", "good", "x"), "sft": rows("bad", "good", "bad", "y")}
    found = preference.judge_arms(section(judge), samples, bootstrap=200, seed=0)["grpo:sft"]
    assert [item["outcome"] for item in found["items"]] == ["win", "lose", "win", "tie"]
    assert [item["verdicts"] for item in found["items"]][:2] == [["A", "B"], ["B", "A"]]
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values == {"win": 0.5, "tie": 0.25, "lose": 0.25, "score": 0.625}
    assert 0 <= found["metrics"]["win"]["low"] < 0.5 < found["metrics"]["win"]["high"] <= 1
    assert (found["judged"], found["disagreed"], found["malformed"], found["failed"]) == (
        4,
        0,
        0,
        0,
    )
    assert len(judge.requests) == 8
    path, _, body = judge.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.0, 512)
    assert "s0" in body["messages"][0]["content"] and "r0" in body["messages"][0]["content"]
    json.dumps(found)


def test_a_judge_who_likes_the_first_place_gives_ties(judge: Judge) -> None:
    judge.answer = lambda prompt, n: said("[[A]]")
    samples = {"grpo": rows("one", "two"), "sft": rows("three", "four")}
    found = preference.judge_arms(section(judge), samples, 0, 0)["grpo:sft"]
    assert found["metrics"]["tie"]["value"] == 1.0 and found["disagreed"] == 2


@pytest.mark.parametrize(
    "verdicts, wanted",
    [
        (("A", "B"), "win"), (("B", "A"), "lose"), (("A", "A"), "tie"), (("C", "C"), "tie"),
        (("A", "C"), "tie"), (("malformed", "B"), "malformed"), (("A", "failed"), "failed"),
        (("malformed", "failed"), "failed"),
    ],
)  # fmt: skip
def test_outcome(verdicts: tuple[str, str], wanted: str) -> None:
    assert preference.outcome(*verdicts) == wanted


def test_the_last_verdict_counts() -> None:
    assert preference.verdict_of("[[A]] would be wrong, so [[B]]") == "B"
    assert preference.verdict_of("A is better") == "malformed"


@pytest.mark.parametrize(
    "response",
    [
        said("I like both"), said(None), said({"a": 1}), (200, "not json", {}),
        (200, '{"choices": []}', {}), (200, "[]", {}), (200, "", {}),
    ],
)  # fmt: skip
def test_malformed_answers_are_counted(judge: Judge, response: tuple[int, str, dict]) -> None:
    good = picks("good")
    judge.answer = lambda prompt, n: response if "s0" in prompt else good(prompt, n)
    samples = {"grpo": rows("good", "good"), "sft": rows("bad", "bad")}
    found = preference.judge_arms(section(judge), samples, 0, 0)["grpo:sft"]
    assert (found["malformed"], found["judged"]) == (1, 1)
    assert found["metrics"]["win"]["value"] == 1.0


def test_passing_trouble_is_tried_again(judge: Judge) -> None:
    answers = [(500, "oops", {}), (429, "slow", {"Retry-After": "7"}), (503, "", {}), said("[[B]]")]
    judge.answer = lambda prompt, n: answers[n - 1]
    waits: list[float] = []
    reply = preference.build_ask(section(judge), waits.append)("prompt")
    assert reply == Reply("B", "[[B]]")
    assert waits == [1.0, 7.0, 4.0]


def test_lasting_trouble_is_a_failure_of_the_pair(judge: Judge) -> None:
    good = picks("good")
    judge.answer = lambda prompt, n: (500, "down", {}) if "s1" in prompt else good(prompt, n)
    cfg = section(judge, retries=1)
    ask = preference.build_ask(cfg, lambda seconds: None)
    items = preference.judge_pairs(
        [Contest("s0", "", "good", "bad"), Contest("s1", "", "good", "bad")], ask, cfg
    )
    assert [item["outcome"] for item in items] == ["win", "failed"]
    assert items[1]["texts"] == ["HTTP 500: down"] * 2
    assert preference.summarise(items, 0, 0)["failed"] == 1
    assert len(judge.requests) == 2 + 2 * 2


def test_timeouts(judge: Judge) -> None:
    judge.answer = lambda prompt, n: (time.sleep(0.6), said("[[A]]"))[1]
    cfg = section(judge, timeout=0.1, retries=1)
    reply = preference.build_ask(cfg, lambda seconds: None)("prompt")
    assert reply.verdict == "failed" and "timed out" in reply.text
    assert len(judge.requests) == 2


def test_nobody_there() -> None:
    cfg = Preference("http://127.0.0.1:9/v1", "m", pairs=("a:b",), retries=0)
    contests = [Contest("s", "", "x", "y")]
    items = preference.judge_pairs(contests, preference.build_ask(cfg), cfg)
    with pytest.raises(ValueError, match="no verdict on 1 pairs; it said: .*refused"):
        preference.summarise(items, 0, 0)


def test_a_refused_request_ends_it(judge: Judge) -> None:
    judge.answer = lambda prompt, n: (401, "wrong key", {})
    samples = {"grpo": rows("a"), "sft": rows("b")}
    with pytest.raises(ValueError, match="refuses the request: HTTP 401: wrong key"):
        preference.judge_arms(section(judge), samples, 0, 0)


def test_the_key_is_sent_and_shown_nowhere(judge: Judge, monkeypatch, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge.answer = lambda prompt, n: said(f"your key is {KEY} [[A]]")
    cfg = section(judge, api_key_env="JUDGE_KEY", retries=0)
    samples = {"grpo": rows("a"), "sft": rows("b")}
    found = preference.judge_arms(cfg, samples, 0, 0)
    assert judge.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    judge.answer = lambda prompt, n: (403, f"bad key {KEY}", {})
    with pytest.raises(ValueError, match=r"bad key \[key\]") as refused:
        preference.judge_arms(cfg, samples, 0, 0)
    printed = capfd.readouterr()
    for text in (json.dumps(found), str(refused.value), repr(cfg), caplog.text, *printed):
        assert KEY not in text


def test_the_key_does_not_follow_a_redirect(judge: Judge, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge.answer = lambda prompt, n: (302, "", {"Location": f"{judge.url}/elsewhere"})
    with pytest.raises(ValueError, match="HTTP 302"):
        preference.build_ask(section(judge, api_key_env="JUDGE_KEY"))("prompt")
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"base_url": "localhost:8000"}, "base_url: got .*wanted http"),
        ({"base_url": "https://me:hush@host/v1"}, "has a user, a query"),
        ({"base_url": "https://host/v1?key=hush"}, "has a user, a query"),
        ({"model": ""}, "model: got ''"),
        ({"api_key_env": "sk-hush"}, "wanted the NAME of an environment variable"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
        ({"prompt": "{source} {first}"}, "prompt: lacks {second}"),
        ({"pairs": ()}, r"pairs: got \(\)"),
        ({"pairs": ("grpo",)}, "wanted arms to compare as FIRST:SECOND"),
    ],
)
def test_incomplete_sections(fields: dict, message: str) -> None:
    good = {"base_url": "https://host/v1", "model": "m", "pairs": ("a:b",)}
    cfg = Preference(**{**good, **fields})
    with pytest.raises(ValueError, match=message) as error:
        preference.build_ask(cfg)
    assert "hush" not in str(error.value)
    assert preference.check_preference(Preference(**good)) == []


def test_off_by_default() -> None:
    assert preference.judge_arms(Preference(), {}, 0, 0) == {}
    assert preference.check_preference(Preference()) == []


def test_arms_that_cannot_be_compared(judge: Judge) -> None:
    with pytest.raises(ValueError, match="no arm 'sft'; there are grpo"):
        preference.judge_arms(section(judge), {"grpo": rows("a")}, 0, 0)
    with pytest.raises(ValueError, match="were measured on other rows"):
        preference.judge_arms(section(judge), {"grpo": rows("a"), "sft": rows("a", "b")}, 0, 0)
    assert not judge.requests


def test_braces_in_texts_stay_text(judge: Judge) -> None:
    samples = {"grpo": rows("{second} {source}"), "sft": rows("\\1")}
    preference.judge_arms(section(judge), samples, 0, 0)
    assert all(
        "{second} {source}" in body["messages"][0]["content"] for _, _, body in judge.requests
    )
