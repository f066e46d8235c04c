"""What a benchmark harness asks a model, answered by a policy; needs no harness itself.

In: texts. Out: log-likelihoods of continuations and of whole texts, and generations, with
lm-evaluation-harness's conventions for special tokens, long texts and stop strings.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Sampling
from grpo_jax.evals.completion import ROUND, complete, cut_at
from grpo_jax.evals.likelihood import Pair, Score, build_likelihood, rolling_windows, score
from grpo_jax.hub.decoder import Policy
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import Array

MAX_GEN_TOKS = 256  # lm_eval's default
# Generation settings that say what is done anyway.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}


class GenerationArguments(NamedTuple):
    """What a task says about generation, in our words."""

    stops: tuple[str, ...] = ()
    max_new_tokens: int = MAX_GEN_TOKS
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def read(cls, given: dict[str, Any]) -> GenerationArguments:
        """Reads a task's generation_kwargs, with lm_eval's defaults: greedy, 256 tokens.

        Raises:
          ValueError: a setting that would be ignored.
        """
        rest = {name: value for name, value in given.items() if value is not None}
        until = rest.pop("until", ())
        stops = (until,) if isinstance(until, str) else tuple(until)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limits = [int(rest.pop(name)) for name in names if name in rest]
        temperature = float(rest.pop("temperature", 0.0))
        sample = rest.pop("do_sample", temperature > 0.0)
        if sample and temperature == 0.0:
            raise ValueError("generation_kwargs: do_sample is true and temperature 0; set one")
        truncations = {name: rest.pop(name) for name in ("top_k", "top_p", "min_p") if name in rest}
        unknown = {name: v for name, v in rest.items() if _NEUTRAL.get(name) != v}
        if unknown:
            raise ValueError(f"generation_kwargs: {unknown} cannot be done here; leave it out")
        limit = limits[0] if limits else MAX_GEN_TOKS
        if not sample:  # truncations do not change greedy decoding
            return cls(stops, limit)
        return cls(stops, limit, temperature, **truncations)


class PolicyScorer:
    """Token-level requests on a policy: what a harness asks a model, without the harness."""

    def __init__(
        self, policy: Policy, batch_size: int = 16, max_length: int | None = None, seed: int = 0
    ) -> None:
        """Puts the parameters on the default device.

        Args:
          policy: from `hub.load_decoder`.
          batch_size: requests at a time, up to likelihood.ROW_TOKENS tokens each.
          max_length: tokens that the model may read; None: as many as it knows positions.
          seed: of sampled generations.
        """
        self.policy = policy
        self.batch_size = batch_size
        self.max_length = max_length or policy.config.max_position_embeddings
        if self.max_length > policy.config.max_position_embeddings:
            raise ValueError(
                f"max_length: got {max_length}, the model has "
                f"{policy.config.max_position_embeddings} positions"
            )
        self._params = jax.tree.map(jnp.asarray, policy.params)
        self._likelihood = functools.partial(build_likelihood(policy.model), self._params)
        self._samplers: dict[tuple, Any] = {}
        self._key = jax.random.key(seed)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Text -> ids. Special tokens in the text are such; a BOS is never doubled.

        Args:
          add_special_tokens: None adds what the tokenizer adds, unless the text begins with BOS.
        """
        pretrained = self.policy.tokenizer.pretrained
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(pretrained.decode([self.prefix_id]))
        return pretrained.encode(text, add_special_tokens=add_special_tokens)

    @property
    def prefix_id(self) -> int:
        """The token that stands before a text without context: BOS, or else EOS."""
        pretrained = self.policy.tokenizer.pretrained
        bos, eos = pretrained.bos_token_id, pretrained.eos_token_id
        return next(i for i in (bos, eos, self.policy.tokenizer.eos_id) if i is not None)

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """See evals.likelihood.score."""
        return score(pairs, self._likelihood, self.batch_size, self.max_length)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-prob of whole texts of any length, each token once; see `rolling_windows`."""
        windows = [
            rolling_windows(self.encode(text), self.prefix_id, self.max_length) for text in texts
        ]
        flat = iter(self.score([window for part in windows for window in part]))
        return [float(sum(next(flat).logprob for _ in part)) for part in windows]

    def generate(self, prompts: Sequence[str], arguments: GenerationArguments) -> list[str]:
        """Completions before their stop strings, white space kept.

        Raises:
          ValueError: max_new_tokens leaves no room for a prompt.
        """
        room = self.max_length - arguments.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks: {arguments.max_new_tokens} new tokens leave no room for a prompt "
                f"in {self.max_length}; lower it"
            )
        draw = functools.partial(self._draw, arguments)

        def decode(ids: list[int]) -> str:
            return self.policy.tokenizer.pretrained.decode(ids, skip_special_tokens=True)

        def stopped(ids: list[int]) -> bool:
            text = decode(ids)
            return cut_at(text, arguments.stops) != text

        rows = [self.encode(prompt)[-room:] or [self.prefix_id] for prompt in prompts]
        found = complete(rows, draw, self.batch_size, arguments.max_new_tokens, stopped)
        return [cut_at(decode(ids), arguments.stops) for ids in found]

    def _draw(
        self, arguments: GenerationArguments, ids: np.ndarray, lengths: np.ndarray, call: int
    ) -> tuple[Array, Array, Array]:
        length = min(ROUND, 1 << (arguments.max_new_tokens - 1).bit_length())
        _, _, temperature, top_k, top_p, min_p = arguments
        setting = (temperature, top_k, top_p, min_p, length)
        if setting not in self._samplers:
            self._samplers[setting] = build_sampler(
                self.policy.model,
                Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
                length,
                self.policy.tokenizer.eos_ids,
            )
        sample = self._samplers[setting]
        key = jax.random.fold_in(self._key, call)
        found = sample({"params": self._params}, ids, lengths, key, num_generations=1)
        return found.ids[:, 0], found.mask[:, 0], found.ended[:, 0]
