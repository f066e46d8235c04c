"""TRL's GRPOTrainer: whole steps, run by its own training loop.

A callback holds the loop between two steps until the next command comes, so a measured step is
everything that the trainer does for it: the data loader, generation, rewards, log-probs, update.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.peers.protocol import Channel, torch_device_peak, torch_setup
from benchmarks.peers.transformers_generate import mean_logp
from benchmarks.work import rewards


def main() -> None:
    channel = Channel()
    spec = channel.spec
    torch, _, device = torch_setup(spec)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    work = spec["work"]
    output = tempfile.TemporaryDirectory()
    args = GRPOConfig(
        output_dir=output.name,
        model_init_kwargs={"dtype": "float32"},  # master weights; bf16 = autocast
        bf16=spec["dtype"] == "bfloat16",
        use_cpu=device == "cpu",
        per_device_train_batch_size=work["prompts"] * work["generations"],
        gradient_accumulation_steps=1,
        num_generations=work["generations"],
        max_completion_length=work["max_new_tokens"],
        temperature=work["temperature"],
        beta=work["beta"],
        loss_type=work["loss_type"],
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=work["max_grad_norm"],
        gradient_checkpointing=work["checkpointing"],
        num_iterations=1,
        max_steps=1_000_000,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [*rewards(completions)]

    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    prompts = Dataset.from_dict({"prompt": spec["prompts"] * 64})
    trainer = GRPOTrainer(
        spec["folder"], reward, args, train_dataset=prompts, processing_class=tokenizer
    )

    def next_command(control: Any) -> None:
        if not channel.wait():
            control.should_training_stop = True

    class Gate(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ids = tokenizer(spec["prompts"], return_tensors="pt")["input_ids"]
            model = trainer.accelerator.unwrap_model(trainer.model)
            check = mean_logp(torch, model, ids.to(model.device))
            channel.ready(("torch", "transformers", "trl", "accelerate"), check=check)
            next_command(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            metrics = trainer._metrics["train"]
            channel.done(
                mean_length=metrics["completions/mean_length"][-1],
                reward=metrics["reward"][-1],
                kl=metrics["kl"][-1],
            )
            next_command(control)

    trainer.add_callback(Gate())
    trainer.train()
    channel.end(device_peak=torch_device_peak(torch, device))


if __name__ == "__main__":
    main()
