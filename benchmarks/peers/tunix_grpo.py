"""Tunix's GRPOLearner: whole steps, run by its own training loop.

The loop draws a batch of prompts from an iterator only when the step before is over; the iterator
waits for the next command there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.peers.protocol import Channel, jax_device_peak
from benchmarks.peers.tunix_model import PACKAGES, load, mean_logp
from benchmarks.work import rewards


def main() -> None:
    channel = Channel()
    spec = channel.spec
    work = spec["work"]
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout import base_rollout

    actor, _, mesh, tokenizer = load(spec["folder"], spec["dtype"])
    reference, *_ = load(spec["folder"], spec["dtype"])
    check = mean_logp(actor, spec["prompt_ids"])
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(work["max_grad_norm"]),
                    optax.adamw(work["learning_rate"], weight_decay=0.0),
                ),
                eval_every_n_steps=1_000_000,
                max_steps=1_000_000,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work["max_new_tokens"],
                max_prompt_length=work["prompt_length"],
                kv_cache_size=work["prompt_length"] + work["max_new_tokens"],
                temperature=work["temperature"],
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        values = rewards(list(completions))
        seen.update(reward=float(np.mean(values)))
        return values

    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(
            num_generations=work["generations"],
            num_iterations=1,
            beta=work["beta"],
            kl_loss_mode="low_var_kl",  # k3, as ours and TRL's
            epsilon=0.2,
        ),
        reward_fns=reward,
    )

    def batches() -> Iterator[dict[str, np.ndarray]]:
        channel.ready(PACKAGES, check=check)
        while channel.wait():
            yield {"prompts": np.array(spec["prompts"])}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            channel.done(**seen)

    learner.train(batches())
    channel.end(device_peak=jax_device_peak(jax))


if __name__ == "__main__":
    main()
