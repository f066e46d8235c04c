"""lm-evaluation-harness: our numbers equal its own model class's (golden/make_tasks.py).

The numbers are tested without the harness, on PolicyScorer; the class for it is a thin shell.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import make_hub, make_tasks

from grpo_jax.evals.completion import ROUND, complete, cut_at
from grpo_jax.evals.likelihood import (
    Score,
    build_likelihood,
    encode_pair,
    rolling_windows,
    score,
    text_likelihood,
)
from grpo_jax.evals.requests import GenerationArguments, PolicyScorer
from grpo_jax.evals.task_files import read_choices
from grpo_jax.evals.tasks import multiple_choice, task_statistics
from grpo_jax.hub.decoder import Policy, load_decoder
from grpo_jax.learn.logps import token_choices, token_logps

GOLDEN = json.loads((Path(make_tasks.__file__).parent / "tasks.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("harness") / "llama"
    make_hub.write_decoder(folder, "llama")
    return load_decoder(folder)


@pytest.fixture(scope="module")
def scorer(policy: Policy) -> PolicyScorer:
    return PolicyScorer(policy, batch_size=4)


def encoded(scorer: PolicyScorer) -> list:
    """The golden pairs as lm_eval encodes them."""
    pairs = []
    for context, continuation in make_tasks.PAIRS:
        if context:
            pairs.append(encode_pair(scorer.encode, context, continuation))
        else:
            pairs.append(([scorer.prefix_id], scorer.encode(continuation, False)))
    return pairs


def test_loglikelihood_equals_lm_eval(scorer: PolicyScorer) -> None:
    found = scorer.score(encoded(scorer))
    wanted = GOLDEN["loglikelihood"]
    assert [s.logprob for s in found] == pytest.approx([w[0] for w in wanted], abs=2e-4)
    assert [s.is_greedy for s in found] == [w[1] for w in wanted]
    assert [s.is_greedy for s in found].count(True) == 1


def test_rolling_equals_lm_eval(scorer: PolicyScorer) -> None:
    assert scorer.rolling(make_tasks.TEXTS) == pytest.approx(GOLDEN["rolling"], abs=1e-3)
    assert scorer.rolling([""]) == [0.0]


def test_generations_equal_lm_eval(scorer: PolicyScorer) -> None:
    for (prompt, given), wanted in zip(make_tasks.GENERATIONS, GOLDEN["generations"], strict=True):
        assert scorer.generate([prompt], GenerationArguments.read(given)) == [wanted]


def test_multiple_choice_equals_lm_eval(scorer: PolicyScorer, tmp_path: Path) -> None:
    make_tasks.write_task(tmp_path)
    rows = read_choices(tmp_path / "choices.jsonl")
    likelihood = text_likelihood(
        scorer.policy.tokenizer, scorer._likelihood, scorer.batch_size, scorer.max_length
    )
    items = multiple_choice(rows, likelihood, make_tasks.PROMPT)
    found = {
        name: float(statistic.score(statistic.rows.sum(0)))
        for name, statistic in task_statistics(items).items()
    }
    assert found == pytest.approx(GOLDEN["tiny_choices"], abs=1e-9)
    assert len(set(found.values())) == 3  # three different measures


def test_scores_do_not_depend_on_batches(scorer: PolicyScorer) -> None:
    pairs = encoded(scorer)[:5]
    wanted = scorer.score(pairs)
    found = score(pairs[::-1], scorer._likelihood, 1, scorer.max_length)[::-1]
    assert [s.tokens for s in found] == [len(pair[1]) for pair in pairs]
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in wanted], abs=1e-4)


def test_one_context_is_computed_once() -> None:
    shapes = []

    def compute(contexts, lengths, ids, mask):
        shapes.append(ids.shape)
        return ids.sum(-1).astype(float), mask.any(-1)

    pairs = [([1, 2, 3], [i, i]) for i in range(1, 10)] + [([9], [5])]
    found = score(pairs, compute, batch_size=4, max_length=16)
    assert found == [*(Score(2.0 * i, True, 2) for i in range(1, 10)), Score(5.0, True, 1)]
    # Eight continuations of the shared context, then its ninth beside the other context.
    assert shapes == [(4, 8, 4), (4, 1, 4)]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 17)])
def test_pairs_that_cannot_be_scored(pair) -> None:
    with pytest.raises(ValueError, match=r"pairs\[1\]: \d+ tokens of context"):
        score([([1], [2]), pair], None, 4, max_length=16)


def test_token_choices_equal_the_training_log_probs() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 3, 5, 8))
    head = jax.random.normal(keys[1], (8, 40))
    targets = jax.random.randint(keys[2], (2, 3, 5), 0, 40)
    mask = np.broadcast_to(np.arange(5) < np.array([[5], [0], [3]]), targets.shape)
    logps, best = token_choices(hidden, head, targets, mask, cap=2.0)
    wanted, _ = token_logps(hidden, head, targets, mask, cap=2.0)
    np.testing.assert_allclose(logps, wanted, atol=1e-5)
    np.testing.assert_array_equal(best, mask & (np.argmax(hidden @ head, -1) == targets))


def test_likelihood_on_a_mesh(policy: Policy, scorer: PolicyScorer) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = jax.device_put(policy.params, jax.sharding.NamedSharding(mesh, jax.P()))
    compute = build_likelihood(policy.model)
    pairs = encoded(scorer)[:6]
    found = score(pairs, lambda *a: compute(params, *jax.device_put(a, rows)), 8, 128)
    wanted = [s.logprob for s in scorer.score(pairs)]
    assert [s.logprob for s in found] == pytest.approx(wanted, abs=1e-4)


def test_rolling_windows_cover_each_token_once() -> None:
    ids = list(range(10))
    assert rolling_windows(ids, 99, 4) == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert rolling_windows(ids[:4], 99, 4) == [([99], [0, 1, 2, 3])]
    assert rolling_windows([], 99, 4) == []


# Generation


def test_completions_end_where_they_should() -> None:
    """A model that counts on from the prompt's last token; 50 ends."""

    def draw(ids, lengths, call):
        last = ids[np.arange(len(ids)), lengths - 1]
        tokens = last[:, None] + 1 + np.arange(4)
        ends = (tokens == 50).cumsum(1)
        mask = ends - (tokens == 50) == 0
        return tokens, mask, ends.any(1)

    prompts = [[1], [47], [1, 2, 3, 30], [10]]
    found = complete(prompts, draw, 2, max_new_tokens=10, stopped=lambda ids: 33 in ids)
    assert found == [list(range(2, 12)), [48, 49, 50], [31, 32, 33, 34], list(range(11, 21))]


def test_cut_at() -> None:
    assert cut_at("one\ntwo. three", (". ", "\n")) == "one"
    assert cut_at("one", ("x", "")) == "one"


def test_generation_arguments() -> None:
    read = GenerationArguments.read
    assert read({}) == GenerationArguments((), 256, 0.0)
    assert read({"until": "\n", "max_tokens": 8, "do_sample": False, "temperature": 1.0}) == (
        GenerationArguments(("\n",), 8)
    )
    sampled = read({"temperature": 0.5, "top_p": 0.9, "top_k": None, "num_beams": 1})
    assert sampled == GenerationArguments(temperature=0.5, top_p=0.9)
    with pytest.raises(ValueError, match="num_beams': 4.*cannot be done"):
        read({"num_beams": 4})
    with pytest.raises(ValueError, match="do_sample is true and temperature 0"):
        read({"do_sample": True})


def test_sampling_has_a_seed(policy: Policy, scorer: PolicyScorer) -> None:
    arguments = GenerationArguments(max_new_tokens=8, temperature=2.0)
    found = scorer.generate(["a", "b"], arguments)
    assert scorer.generate(["a", "b"], arguments) == found
    assert found[0] != found[1]
    other = PolicyScorer(policy, batch_size=4, seed=1)
    other._samplers = scorer._samplers  # compiled
    assert other.generate(["a", "b"], arguments) != found


def test_limits(policy: Policy, scorer: PolicyScorer) -> None:
    with pytest.raises(ValueError, match="max_length: got 200, the model has 128"):
        PolicyScorer(policy, max_length=200)
    with pytest.raises(ValueError, match="128 new tokens leave no room"):
        scorer.generate(["a"], GenerationArguments(max_new_tokens=128))
    assert scorer.max_length > ROUND


# The shell around it, which needs the extra `harness`


def test_shell_in_lm_eval(
    policy: Policy, scorer: PolicyScorer, tmp_path: Path, capsys, monkeypatch
) -> None:
    import lm_eval.tasks

    from grpo_jax.evals import harness

    # The index of all of lm_eval's tasks takes seconds; both calls below may share it.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.cache(lm_eval.tasks.TaskManager))
    given = []

    def compiled(policy: Policy, *rest) -> PolicyScorer:
        given.extend(rest)
        return scorer

    monkeypatch.setattr(harness, "PolicyScorer", compiled)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_tasks.write_task(tmp_path)
    output = tmp_path / "results.json"
    flags = ["--tasks=tiny_choices", f"--include_path={tmp_path}", "--batch_size=4"]
    assert harness.main([str(policy.folder), *flags, f"--output={output}"]) == 0
    assert given == [4, None, 0]
    results = json.loads(output.read_text("utf-8"))
    found = results["results"]["tiny_choices"]
    wanted = GOLDEN["tiny_choices"]
    assert {k: found[f"{k},none"] for k in wanted} == pytest.approx(wanted, abs=1e-9)
    assert len(results["samples"]["tiny_choices"]) == 24
    assert "|tiny_choices|" in capsys.readouterr().out.replace(" ", "")
    assert harness.main([str(policy.folder), "--tasks=no_such_task", *flags[1:]]) == 1
    assert "error: --tasks: lm_eval has no no_such_task" in capsys.readouterr().err


def test_shell_answers_requests(policy: Policy, scorer: PolicyScorer, monkeypatch) -> None:
    from lm_eval.api.instance import Instance

    from grpo_jax.evals import harness

    monkeypatch.setattr(harness, "PolicyScorer", lambda *_: scorer)

    def requests(kind: str, arguments: list) -> list:
        return [Instance(kind, {}, tuple(a), i) for i, a in enumerate(arguments)]

    lm = harness.HarnessLM(policy)
    found = lm.loglikelihood(requests("loglikelihood", make_tasks.PAIRS), disable_tqdm=True)
    wanted = GOLDEN["loglikelihood"]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], abs=2e-4)
    assert [x for _, x in found] == [x for _, x in wanted]
    rolling = requests("loglikelihood_rolling", [[text] for text in make_tasks.TEXTS])
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(GOLDEN["rolling"], abs=1e-3)
    generations = requests("generate_until", make_tasks.GENERATIONS)
    assert lm.generate_until(generations) == GOLDEN["generations"]
    assert lm.tokenizer_name and "/" not in lm.tokenizer_name
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [{"role": "user", "content": "Q"}]
    assert lm.apply_chat_template(chat) == "<user>Q</><assistant>"
    chat.append({"role": "assistant", "content": "The answer is"})
    assert lm.apply_chat_template(chat, add_generation_prompt=False).endswith("The answer is")
