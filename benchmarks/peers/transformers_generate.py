"""transformers' generate: prompts in, texts out."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.protocol import Channel, text_stats, torch_device_peak, torch_setup


def main() -> None:
    channel = Channel()
    spec = channel.spec
    torch, dtype, device = torch_setup(spec)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = spec["work"]
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    model: Any = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype)
    model = model.to(device).eval()
    texts, stops = spec["prompts"], spec["stops"]
    rows = work["generations"]
    at_stop = torch.tensor(stops, device=device)

    def run(_: int) -> dict[str, Any]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                do_sample=True,
                temperature=work["temperature"],
                top_k=0,
                top_p=work["top_p"],
                max_new_tokens=work["max_new_tokens"],
                num_return_sequences=rows,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
        out = out[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(out, skip_special_tokens=True)
        ended = torch.isin(out, at_stop)
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
        return text_stats(first.tolist())

    check = mean_logp(torch, model, tokenizer(texts, return_tensors="pt")["input_ids"].to(device))
    channel.ready(
        ("torch", "transformers"), check=check, attention=model.config._attn_implementation
    )
    channel.serve(run)
    channel.end(device_peak=torch_device_peak(torch, device))


def mean_logp(torch: Any, model: Any, ids: Any) -> float:
    """Mean log-prob of the prompts' own tokens: equal models agree on it."""
    with torch.inference_mode():
        logps = model(ids).logits[:, :-1].float().log_softmax(-1)
    return float(logps.gather(-1, ids[:, 1:, None]).mean())


if __name__ == "__main__":
    main()
