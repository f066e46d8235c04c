"""What a model can still do: the tasks of `evaluation.tasks`, put to an arm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from grpo_jax import assets, hub
from grpo_jax.config import Config, Sampling
from grpo_jax.evals.completion import ROUND, text_completions
from grpo_jax.evals.likelihood import build_likelihood, text_likelihood
from grpo_jax.evals.tasks import Prompts, Task, load_tasks, run_tasks
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.models.decoder import Decoder
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import Array


@dataclasses.dataclass
class TaskRunner:
    """The questions, and the jitted functions that put them to any arm."""

    cfg: Config
    mesh: jax.sharding.Mesh
    base: hub.Policy
    tasks: list[Task]
    likelihood: Any
    answer: Any  # a greedy sampler of ROUND tokens

    def run(self, params: dict) -> dict[str, dict[str, Any]]:
        """Results by task, as evals.tasks.run_tasks gives them; {} where none is asked for."""
        if not self.tasks:
            return {}
        cfg, tokenizer = self.cfg.evaluation, self.base.tokenizer

        def compute(*arrays: np.ndarray) -> tuple[Array, Array]:
            logps, hits = self.likelihood(params, *mesh_lib.put_same(self.mesh, arrays))
            return mesh_lib.fetch(logps), mesh_lib.fetch(hits)

        def draw(ids: np.ndarray, lengths: np.ndarray, call: int) -> tuple[Any, Any, Any]:
            on_mesh = mesh_lib.put_same(self.mesh, (ids, lengths))
            key = jax.random.key(call)  # greedy: nothing looks at it
            rollout = self.answer({"params": params}, *on_mesh, key, num_generations=1)
            ids, mask = (mesh_lib.fetch(x)[:, 0] for x in (rollout.ids, rollout.mask))
            return ids, mask, mesh_lib.fetch(rollout.ended)[:, 0]

        chat, length = self.cfg.data.chat, cfg.max_task_length
        return run_tasks(
            self.tasks,
            text_likelihood(tokenizer, compute, cfg.batch_size, length),
            text_completions(tokenizer, draw, cfg.batch_size, length, chat),
            Prompts(cfg.choice_prompt, cfg.reading_prompt, cfg.max_answer_length),
            cfg.bootstrap,
            self.cfg.data.seed,
        )


def open_tasks(
    cfg: Config, base: hub.Policy, model: Decoder, mesh: jax.sharding.Mesh
) -> TaskRunner:
    """Reads the files of all tasks.

    Raises:
      ValueError, FileNotFoundError: what is wrong with a task, and where.
    """
    evaluation = cfg.evaluation
    tasks = load_tasks(evaluation.tasks, evaluation.max_task_rows, cfg.data.seed, assets.resolve)
    greedy, gathered = Sampling(temperature=0.0), mesh_lib.gathered(mesh)
    answer = build_sampler(model, greedy, ROUND, base.tokenizer.eos_ids, gathered)
    return TaskRunner(cfg, mesh, base, tasks, build_likelihood(model), answer)
