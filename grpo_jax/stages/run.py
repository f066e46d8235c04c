"""What all stages share: the open workdir, the base model, the data, the encoders, the mesh.

`open_run` loads all of it before anything expensive, so a missing file, a mismatched tokenizer or
an empty split stops the run in its first seconds. Of the base model's weights it checks all but the
numbers; `load_params` gives the weights of any arm, the base's read from its folder each time.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import assets, hub
from grpo_jax.config import TRAINING, Config, Lora, Optimizer, Sampling
from grpo_jax.data.corpus import Corpus, load_corpus
from grpo_jax.evals.retention import build_retention
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.infra.workdir import Workdir
from grpo_jax.infra.writers import MetricWriter
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import init_state
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.stages.tasks import TaskRunner, open_tasks
from grpo_jax.structs import TrainState
from grpo_jax.text.language import LanguageGate

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """An open run. Nothing in it changes while stages run."""

    cfg: Config
    workdir: Workdir
    writer: MetricWriter
    mesh: jax.sharding.Mesh
    base: hub.Policy  # its params are shapes
    adapter: dict | None  # what the first training stage starts from, on the host
    model: Decoder  # the base's architecture with the run's dtype, remat and dropout
    corpus: Corpus
    scorer: Scorer
    judge: Any | None
    retention: list[list[int]]  # tokenized passages of general text
    greedy: Any  # the greedy sampler
    drift: Any  # `build_retention`'s function
    tasks: TaskRunner
    key: jax.Array

    @property
    def arms(self) -> list[str]:
        """The base and the training stages, in order: those of this config, and those done."""
        done = self.workdir.stage_done
        return ["base", *(s for s in TRAINING if s in self.cfg.stages or done(s) is not None)]

    def before(self, stage: str) -> str:
        """The arm that a training stage starts from."""
        return self.arms[self.arms.index(stage) - 1]


def open_run(cfg: Config, workdir: Workdir) -> Run:
    """Loads everything that `cfg` names.

    Raises:
      ValueError, FileNotFoundError: what is missing or does not fit, and the remedy.
    """
    mesh = mesh_lib.make_mesh(cfg.mesh)
    _check_batches(cfg, mesh)
    base = hub.open_decoder(
        cfg.model.path, dtype=cfg.model.dtype, param_dtype=cfg.model.param_dtype
    )
    _check_lengths(cfg, base.config.max_position_embeddings)
    rank = cfg.model.lora.rank
    model = Decoder(
        base.config,
        jnp.dtype(cfg.model.dtype),
        remat=cfg.model.remat,
        lora_dropout=cfg.model.lora.dropout if rank else 0.0,
    )
    adapter = _open_adapter(cfg.model.lora, base) if rank else None
    corpus = load_corpus(cfg.data, base.tokenizer, assets.resolve)
    encoder = hub.load_encoder(
        cfg.encoder.path,
        dtype=cfg.encoder.dtype,
        max_length=cfg.encoder.max_length,
        batch_size=cfg.encoder.batch_size,
        pooling=cfg.encoder.pooling or None,
        normalize=cfg.encoder.normalize,
        prompt_name=cfg.encoder.prompt_name or None,
        prompt=cfg.encoder.prompt,
    )
    seen = corpus.cold_start + corpus.train
    gate = LanguageGate.fit(
        cfg.reward.language,
        [example.row.target for example in seen if example.row.target],
        [example.row.source for example in seen],
    )
    judge = hub.load_encoder(cfg.encoder.judge) if cfg.encoder.judge else None
    greedy = build_sampler(
        model,
        Sampling(temperature=0.0),
        cfg.data.max_completion_length,
        base.tokenizer.eos_ids,
        mesh_lib.replicated(mesh),
    )
    counts = ", ".join(f"{name} {count}" for name, count in corpus.report.items() if count)
    _log.info("data: %s", counts)
    _log.info("encoder: %s", encoder.describe())
    _log.info("language gate: %s", gate.describe())
    return Run(
        cfg=cfg,
        workdir=workdir,
        writer=MetricWriter(workdir),
        mesh=mesh,
        base=base,
        adapter=adapter,
        model=model,
        corpus=corpus,
        scorer=Scorer(encoder, gate, cfg.reward),
        judge=judge,
        retention=_read_passages(cfg, base.tokenizer),
        greedy=greedy,
        drift=build_retention(model),
        tasks=open_tasks(cfg, base, model, mesh),
        key=jax.random.key(workdir.seed),
    )


def _open_adapter(cfg: Lora, base: hub.Policy) -> dict | None:
    """The adapter of model.lora.path, or None; model.lora.targets must fit the model anyway."""
    wanted = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, cfg), base.params)
    if not cfg.path:
        return None
    found = hub.load_adapter(base, cfg.path)
    problems = []
    if found.rank != cfg.rank:
        problems.append(f"rank: got {cfg.rank}, the adapter has {found.rank}")
    if not math.isclose(found.alpha, cfg.alpha, rel_tol=1e-6):
        problems.append(f"alpha: got {cfg.alpha}, the adapter has {found.alpha}")
    targets = hub.Adapter(wanted, cfg.rank, cfg.alpha).targets
    if found.targets != targets:
        problems.append(f"targets: got {', '.join(targets)}, it has {', '.join(found.targets)}")
    if problems:
        lines = "".join(f"\n  model.lora.{problem}" for problem in problems)
        raise ValueError(
            f"model.lora.path: {cfg.path} was trained with other settings; set the same:{lines}"
        )
    return found.params


def _check_batches(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Every array of prompts that is placed on the mesh must divide over it."""
    for stage, sft in (("sft", cfg.sft), ("recover.sft", cfg.recover.sft)):
        if stage.split(".")[0] in cfg.stages:
            name = f"{stage}.batch_size / gradient_accumulation_steps"
            mesh_lib.check_rows(mesh, name, sft.batch_size // sft.gradient_accumulation_steps)
    if "grpo" in cfg.stages:
        parts = cfg.grpo.num_minibatches * cfg.grpo.gradient_accumulation_steps
        name = "grpo.prompts_per_step / (num_minibatches * gradient_accumulation_steps)"
        mesh_lib.check_rows(mesh, name, cfg.grpo.prompts_per_step // parts)


def _check_lengths(cfg: Config, positions: int) -> None:
    """A prompt and its completion must fit the positions that the model knows."""
    data = cfg.data
    for name, length in (
        (
            "data.max_prompt_length + data.max_completion_length",
            data.max_prompt_length + data.max_completion_length,
        ),
        ("evaluation.max_retention_length", cfg.evaluation.max_retention_length),
        ("evaluation.max_task_length", cfg.evaluation.max_task_length * bool(cfg.evaluation.tasks)),
    ):
        if length > positions:
            raise ValueError(
                f"{name}: got {length} tokens, but {cfg.model.path} has max_position_embeddings = "
                f"{positions}; lower it, or take a model with a longer context"
            )


def stage_key(run: Run, stage: str) -> jax.Array:
    """The key that all of a stage's randomness is folded from."""
    return jax.random.fold_in(run.key, TRAINING.index(stage))


def load_params(run: Run, arm: str) -> dict:
    """The merged weights of an arm, in model.param_dtype, on the mesh.

    Adapters merge along the chain: grpo = (base + sft's adapter) + grpo's adapter.
    """
    if arm == "base":
        shardings = mesh_lib.param_shardings(run.mesh, run.base.params)
        return run.base.weights.read(
            lambda path, shape: functools.reduce(operator.getitem, path, shardings)
        )
    trained = load_trained(run, arm)
    if not run.cfg.model.lora.rank:
        return trained
    before = load_params(run, run.before(arm))
    scaled = functools.partial(lora.scaled, cfg=run.cfg.model.lora)
    return jax.jit(lambda p, a: lora.merge(p, scaled(a)), donate_argnums=0)(before, trained)


def load_trained(run: Run, arm: str) -> dict:
    """The tree that a finished stage trained: the whole model or an adapter."""
    with Checkpoints(run.workdir.checkpoints / arm, run.cfg.checkpoint.keep) as checkpoints:
        step = checkpoints.best() if run.cfg.checkpoint.load_best_at_end else None
        state, _ = checkpoints.restore(abstract_state(run, arm), step)
    return state.params


def load_adapter(run: Run, arm: str) -> hub.Adapter:
    """What an arm adds to the base, as one float32 adapter in host memory on every process.

    Each stage of the chain trained an adapter on the merged weights of the one before, so theirs
    add up: as one, they have the sum of their ranks.
    """
    chain = run.arms[1 : run.arms.index(arm) + 1]
    trained = [jax.tree.map(mesh_lib.fetch, load_trained(run, stage)) for stage in chain]
    cfg = run.cfg.model.lora
    params = lora.concatenate(trained)
    return hub.Adapter(params, cfg.rank * len(chain), cfg.alpha * len(chain), cfg.dropout)


def start_adapter(run: Run, stage: str) -> dict | None:
    """The adapter of model.lora.path in its places on the mesh, if `stage` starts from it."""
    if run.adapter is None or stage != run.arms[1]:
        return None
    shardings = mesh_lib.param_shardings(run.mesh, run.adapter)
    return jax.tree.map(lambda x, s: jax.device_put(x.copy(), s), run.adapter, shardings)


def fresh_trained(run: Run, key: jax.Array, params: dict) -> dict:
    """The tree to train, from merged weights: a fresh adapter, or the weights themselves."""
    if not run.cfg.model.lora.rank:
        return params
    return lora.init(key, params, run.cfg.model.lora)


def frozen_copy(run: Run, params: dict) -> dict:
    """The weights that stay: matrices in the compute dtype (what they are cast to anyway)."""

    def copy(path: tuple, x: jax.Array) -> jax.Array:
        matrix = path[-1].key in ("kernel", "embedding")
        return jnp.array(x, run.model.dtype if matrix else x.dtype, copy=True)

    return jax.tree_util.tree_map_with_path(copy, params)


def abstract_state(run: Run, stage: str) -> TrainState:
    """The stage's TrainState as shapes, dtypes and shardings."""
    optimizer = build_optimizer(optimizer_of(run.cfg, stage), 1)

    def init(params: dict) -> TrainState:
        return init_state(fresh_trained(run, jax.random.key(0), params), optimizer)

    shapes = jax.eval_shape(init, run.base.params)
    shardings = mesh_lib.param_shardings(run.mesh, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def optimizer_of(cfg: Config, stage: str) -> Optimizer:
    """The optimizer section of a training stage."""
    return {
        "sft": cfg.sft.optimizer,
        "grpo": cfg.grpo.optimizer,
        "recover": cfg.recover.sft.optimizer,
    }[stage]


def _read_passages(cfg: Config, tokenizer: Any) -> list[list[int]]:
    """General text, one passage a line, cut to the limit; passages of one token say nothing."""
    if not cfg.evaluation.retention:
        return []
    path = assets.resolve(cfg.evaluation.retention)
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"evaluation.retention: cannot read {path}: {error}; give a UTF-8 text file with one "
            "passage a line, or '' to measure no retention on general text"
        ) from error
    lines = lines[: cfg.evaluation.max_retention_rows]
    passages = [tokenizer.encode(line)[: cfg.evaluation.max_retention_length] for line in lines]
    passages = [passage for passage in passages if len(passage) > 1]
    if not passages:
        raise ValueError(f"evaluation.retention: {path} holds no passage of two tokens or more")
    return passages
