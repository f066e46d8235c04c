"""Tunix's sampler: prompts in, texts out. Its cache is as small as the work allows."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.protocol import Channel, jax_device_peak, text_stats
from benchmarks.peers.tunix_model import PACKAGES, load, mean_logp


def main() -> None:
    channel = Channel()
    spec = channel.spec
    work = spec["work"]
    import jax
    from tunix.generate import sampler

    model, config, _, tokenizer = load(spec["folder"], spec["dtype"])
    texts = [text for text in spec["prompts"] for _ in range(work["generations"])]
    cache = sampler.CacheConfig(
        cache_size=work["prompt_length"] + work["max_new_tokens"],
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sample = sampler.Sampler(model, tokenizer, cache)
    stops = spec["stops"]

    def run(index: int) -> dict[str, Any]:
        out = sample(
            texts,
            max_generation_steps=work["max_new_tokens"],
            max_prompt_length=work["prompt_length"],
            temperature=work["temperature"],
            top_p=work["top_p"],
            top_k=None,
            eos_tokens=stops,
            seed=index,
        )
        # Tunix leaves the token that ended a row out; count it as the others do.
        limit = work["max_new_tokens"]
        return text_stats([min(len(tokens) + 1, limit) for tokens in out.tokens])

    channel.ready(PACKAGES, check=mean_logp(model, spec["prompt_ids"]))
    channel.serve(run)
    channel.end(device_peak=jax_device_peak(jax))


if __name__ == "__main__":
    main()
