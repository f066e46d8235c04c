"""What all stages share: the open workdir, the base model, the data, the encoders, the mesh.

`open_run` loads all of it before anything expensive, for every arm that will be worked on, so that
a missing file, a mismatched tokenizer or an empty split stops the run in its first seconds. Of the
base model's weights it checks all but the numbers; `stages.weights` gives those of any arm.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import assets, hub
from grpo_jax.config import SFT, Config, Lora, Mesh, Optimizer, Sampling
from grpo_jax.config_arms import ancestors, group_settings, groups_of, settings_of
from grpo_jax.config_dicts import to_dict
from grpo_jax.data.corpus import Corpus, Example, load_corpus, load_test_set
from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.memory import device_bytes
from grpo_jax.infra.workdir import Workdir
from grpo_jax.infra.writers import MetricWriter
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.plan.choose import Devices, choose, said
from grpo_jax.plan.model import encoders
from grpo_jax.rewards.anchors import build_anchor
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.stages.forgetting import Retention, open_retention
from grpo_jax.stages.tasks import TaskRunner, open_tasks
from grpo_jax.text.language import LanguageGate

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A configuration with what it names, opened: its rows and its reward."""

    cfg: Config
    corpus: Corpus
    scorer: Scorer


@dataclasses.dataclass(frozen=True)
class OpenArm(Setting):
    """An arm in its setting: the configuration with its overrides."""

    name: str
    method: str
    start: str
    group: str

    @property
    def sft(self) -> SFT:
        """The section of an arm that is trained by SFT."""
        own = {"sft": self.cfg.sft, "recover": self.cfg.recover.sft}
        return own.get(self.method, self.cfg.self_sft.sft)

    @property
    def optimizer(self) -> Optimizer:
        """The section of the arm's optimizer."""
        return self.cfg.grpo.optimizer if self.method == "grpo" else self.sft.optimizer


@dataclasses.dataclass
class Run:
    """An open run. Nothing in it changes while stages run."""

    cfg: Config  # with the sizes of the mesh
    workdir: Workdir
    writer: MetricWriter
    mesh: jax.sharding.Mesh
    mesh_reason: str  # why it is this one
    base: hub.Policy  # its params are shapes
    adapter: dict | None  # what the first training stage starts from, on the host
    model: Decoder  # the base's architecture with the run's dtype, remat and dropout
    arms: dict[str, OpenArm]  # in their order, the base left out
    groups: dict[str, Setting]  # what the arms of a group are measured on
    out_of_domain: dict[str, list[Example]]  # further test sets by name, for group ""
    judges: dict[str, Any]  # encoders by the name of their score
    retention: Retention
    greedy: dict[int, Any]  # greedy samplers by max_completion_length
    tasks: TaskRunner
    key: jax.Array

    @property
    def working(self) -> list[str]:
        """The arms that this program works on."""
        return [name for name in self.arms if not self.cfg.only or name in self.cfg.only]

    def ancestors(self, name: str) -> list[str]:
        """The arms whose weights `name` needs, itself last, the base left out."""
        return ancestors(self.workdir.arms, name)


def open_run(cfg: Config, workdir: Workdir) -> Run:
    """Loads everything that `cfg` names.

    Raises:
      ValueError, FileNotFoundError: what is missing or does not fit, and the remedy.
    """
    base = hub.open_decoder(
        cfg.model.path, dtype=cfg.model.dtype, param_dtype=cfg.model.param_dtype
    )
    settings = {name: settings_of(cfg, arm) for name, arm in workdir.arms.items()}
    arms = [(settings[name], arm.method) for name, arm in workdir.arms.items()]
    cfg, mesh, mesh_reason = _place(cfg, arms, base)
    groups = {g: group_settings(cfg, workdir.arms, g) for g in groups_of(workdir.arms)}
    for own in groups.values():
        _check_lengths(own, base.config.max_position_embeddings)
    rank = cfg.model.lora.rank
    model = Decoder(
        base.config,
        jnp.dtype(cfg.model.dtype),
        remat=cfg.model.remat,
        remat_policy=cfg.model.remat_policy,
        lora_dropout=cfg.model.lora.dropout if rank else 0.0,
        rows=mesh_lib.batch_sharding(mesh) if mesh.size > 1 else None,
    )
    adapter = _open_adapter(cfg.model.lora, base) if rank else None
    opener = _Opener(cfg, base)
    greedy = {
        length: build_sampler(
            model,
            Sampling(temperature=0.0),
            length,
            base.tokenizer.eos_ids,
            mesh_lib.gathered(mesh),
        )
        for length in {own.data.max_completion_length for own in groups.values()}
    }
    main = Setting(*opener.parts(cfg))
    return Run(
        cfg=cfg,
        workdir=workdir,
        writer=MetricWriter(workdir),
        mesh=mesh,
        mesh_reason=mesh_reason,
        base=base,
        adapter=adapter,
        model=model,
        arms={
            name: OpenArm(*opener.parts(settings[name]), name, arm.method, arm.start, arm.group)
            for name, arm in workdir.arms.items()
        },
        groups={name: Setting(*opener.parts(own)) for name, own in groups.items()},
        out_of_domain=_open_test_sets(main, base),
        judges={
            key: hub.load_encoder(path)
            for key, path in _names(cfg.encoder.judge, "judge_similarity").items()
        },
        retention=open_retention(cfg, model, mesh, base.tokenizer),
        greedy=greedy,
        tasks=open_tasks(cfg, base, model, mesh),
        key=jax.random.key(workdir.seed),
    )


class _Opener:
    """Opens settings; what two of them share is opened once."""

    def __init__(self, cfg: Config, base: hub.Policy):
        self.base = base
        encoder = cfg.encoder
        self.encoder = hub.load_encoder(
            encoder.path,
            dtype=encoder.dtype,
            max_length=encoder.max_length,
            batch_size=encoder.batch_size,
            pooling=encoder.pooling or None,
            normalize=encoder.normalize,
            prompt_name=encoder.prompt_name or None,
            prompt=encoder.prompt,
        )
        _log.info("encoder: %s", self.encoder.describe())
        self._made: dict[str, Any] = {}

    def parts(self, cfg: Config) -> tuple[Config, Corpus, Scorer]:
        """The fields of a Setting."""
        data, reward = to_dict(cfg.data), to_dict(cfg.reward)
        corpus = self._once([data], lambda: self._corpus(cfg))
        gate = self._once([data, cfg.reward.language], lambda: self._gate(cfg, corpus))
        scorer = self._once([data, reward], lambda: self._scorer(cfg, corpus, gate))
        return cfg, corpus, scorer

    def _once(self, what: list[Any], make: Callable[[], Any]) -> Any:
        key = json.dumps(what)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _corpus(self, cfg: Config) -> Corpus:
        corpus = load_corpus(cfg.data, self.base.tokenizer, assets.resolve)
        counts = [f"{name} {count}" for name, count in corpus.report.items() if count]
        _log.info("data: %s", ", ".join(counts))
        return corpus

    def _gate(self, cfg: Config, corpus: Corpus) -> LanguageGate:
        seen = corpus.cold_start + corpus.train
        gate = LanguageGate.fit(
            cfg.reward.language,
            [example.row.target for example in seen if example.row.target],
            [example.row.source for example in seen],
        )
        _log.info("language gate: %s", gate.describe())
        return gate

    def _scorer(self, cfg: Config, corpus: Corpus, gate: LanguageGate) -> Scorer:
        rows = [[example.row for example in part] for part in (corpus.train, corpus.dev)]
        anchor = build_anchor(cfg.reward.anchor, rows, cfg.data.seed)
        return Scorer(self.encoder, gate, cfg.reward, anchor, distributed.gather)


def _open_test_sets(main: Setting, base: hub.Policy) -> dict[str, list[Example]]:
    seen = main.corpus.cold_start + main.corpus.train
    return {
        name: load_test_set(assets.resolve(path), main.cfg.data, base.tokenizer, seen)
        for name, path in _names(main.cfg.evaluation.out_of_domain).items()
    }


def _names(paths: tuple[str, ...], prefix: str = "") -> dict[str, str]:
    """Short names of paths, as results call them: PREFIX/NAME, or PREFIX if there is only one.

    Raises:
      ValueError: two paths with one name.
    """
    found: dict[str, str] = {}
    for path in paths:
        name = path.rstrip("/").rsplit("/", 1)[-1].removeprefix("asset:").split(".")[0]
        key = "/".join(filter(None, (prefix, name)))
        if key in found:
            raise ValueError(f"{path} and {found[key]} have one name, {key}; rename one")
        found[prefix if prefix and len(paths) == 1 else key] = path
    return found


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


def _place(
    cfg: Config, arms: list[tuple[Config, str]], base: hub.Policy
) -> tuple[Config, jax.sharding.Mesh, str]:
    """The configuration with the mesh's sizes, the mesh, and why it is this one."""
    devices, usable = jax.devices(), device_bytes()
    found = Devices(
        len(devices),
        len(devices) // jax.process_count(),
        usable,
        backend=jax.default_backend(),
    )
    held = encoders(cfg)[0] if usable else 0.0
    split, reason = choose(cfg.mesh, arms or [(cfg, "evaluate")], base.config, found, held)
    sizes = Mesh(split.data, split.fsdp, split.tensor)
    if len(devices) > 1:
        _log.info("mesh: %s (%s)", said(split), reason)
    return dataclasses.replace(cfg, mesh=sizes), mesh_lib.make_mesh(sizes, devices), reason


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
