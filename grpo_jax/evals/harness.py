"""lm-evaluation-harness on our models: MMLU, CMMLU, HellaSwag, Belebele and the rest.

    python -m grpo_jax.evals.harness MODEL --tasks=hellaswag,mmlu --limit=100

MODEL is an exported folder, a hub id or asset:NAME. `HarnessLM` is the model class for
`lm_eval.simple_evaluate`. It needs the extra `harness` (pip install 'grpo_jax[harness]'), which
brings no torch. What it computes is what lm_eval's own class for transformers models computes,
except that reasoning models are asked without their chain of thought, as they are trained here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo_jax.evals.requests import MAX_GEN_TOKS, GenerationArguments, PolicyScorer
from grpo_jax.hub.decoder import Policy, load_decoder

try:
    from lm_eval.api.model import TemplateLM
except ImportError as _error:
    _needed = f"lm_eval cannot be imported ({_error}): pip install 'grpo_jax[harness]'"
    if __name__ == "__main__":
        sys.exit(f"error: {_needed}")
    raise ImportError(_needed) from _error


class HarnessLM(TemplateLM):
    """A policy as a model of lm-evaluation-harness.

    lm_eval.simple_evaluate(HarnessLM(load_decoder(PATH)), tasks=["hellaswag"])
    """

    def __init__(
        self, policy: Policy, batch_size: int = 16, max_length: int | None = None, seed: int = 0
    ) -> None:
        """See PolicyScorer."""
        super().__init__()
        self.core = PolicyScorer(policy, batch_size, max_length, seed)
        self.tokenizer = policy.tokenizer.pretrained
        self.batch_size = batch_size
        self.max_length = self.core.max_length

    @property
    def eot_token_id(self) -> int:
        return self.core.policy.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.core.prefix_id

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's caches of requests."""
        return self.core.policy.source.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.core.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders messages; without a generation prompt the last message stays open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=False,
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = [
            (s.logprob, s.is_greedy)
            for s in self.core.score([(context, rest) for _, context, rest in requests])
        ]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        found = self.core.rolling([request.args[0] for request in requests])
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[GenerationArguments, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(GenerationArguments.read(request.args[1]), []).append(i)
        out = [""] * len(requests)
        for arguments, members in groups.items():
            texts = self.core.generate([requests[i].args[0] for i in members], arguments)
            for i, text in zip(members, texts, strict=True):
                out[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return out


def main(arguments: Iterable[str] | None = None) -> int:
    """Command line: evaluate a model and print lm_eval's table."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.evals.harness", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or asset:NAME")
    parser.add_argument("--tasks", required=True, help="task names of lm_eval, with commas between")
    parser.add_argument("--limit", type=float, help="questions a task; below 1 a share of them")
    parser.add_argument("--num_fewshot", type=int, help="default: as the task says")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, help="tokens; default: the model's positions")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--include_path", help="a folder with task files of your own")
    parser.add_argument("--seed", type=int, default=0, help="of sampled generations")
    parser.add_argument("--output", type=Path, help="write results and samples as JSON")
    flags = parser.parse_args(list(arguments) if arguments is not None else None)
    try:
        results = _evaluate(flags)
    except (FileNotFoundError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if flags.output:
        text = json.dumps(results, indent=1, ensure_ascii=False, default=handle_non_serializable)
        flags.output.write_text(text + "\n", encoding="utf-8")
    return 0


def _evaluate(flags: argparse.Namespace) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = [name for name in flags.tasks.split(",") if name]
    manager = TaskManager(include_path=flags.include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ValueError(f"--tasks: lm_eval has no {', '.join(unknown) or 'task without a name'}")
    policy = load_decoder(flags.model, dtype=flags.dtype, param_dtype=flags.dtype)
    return simple_evaluate(
        HarnessLM(policy, flags.batch_size, flags.max_length, flags.seed),
        tasks=names,
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        apply_chat_template=flags.apply_chat_template,
        task_manager=manager,
        log_samples=flags.output is not None,
    )


if __name__ == "__main__":
    sys.exit(main())
