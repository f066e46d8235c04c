"""python -m grpo_jax.main --config=configs/NAME.py --workdir=runs/NAME [--config.grpo.beta=0.02]

Reads the configuration, opens everything it names, trains its arms in order and measures them. The
same command resumes an interrupted run; what is finished is not done again.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from grpo_jax import assets
from grpo_jax.config import Config
from grpo_jax.config_check import validate
from grpo_jax.config_dicts import flatten, to_dict
from grpo_jax.flags import check_flags
from grpo_jax.infra import distributed, signals
from grpo_jax.infra.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; created, or resumed.")

_log = logging.getLogger("grpo_jax")


def train(cfg: Config, workdir: str) -> None:
    """Runs the arms and stages of `cfg` in `workdir`.

    Raises:
      ValueError, FileNotFoundError, OSError: one message that names the thing and the remedy.
      FloatingPointError: training diverged; what was saved before is intact.
      MemoryError: which phase exhausted a device's memory, and what to lower.
      Stopped: a signal ended the training behind a step, which is saved.
    """
    import jax

    validate(cfg)
    jax.config.update("jax_compilation_cache_dir", _compilation_cache())
    distributed.initialize(flatten(to_dict(cfg)))
    opened = Workdir.open(workdir, cfg)
    distributed.check_shared(opened.config)
    # Models, flax and transformers take seconds to import: a bad config should not wait for them.
    from grpo_jax.stages.evaluate import measure_arm, measure_base, report, run_evaluate
    from grpo_jax.stages.exhausted import phase
    from grpo_jax.stages.export import run_export
    from grpo_jax.stages.grpo import run_grpo
    from grpo_jax.stages.run import open_run
    from grpo_jax.stages.self_sft import run_self_sft
    from grpo_jax.stages.sft import run_sft
    from grpo_jax.stages.weights import run_interpolate

    train_by = {
        "sft": run_sft,
        "self_sft": run_self_sft,
        "grpo": run_grpo,
        "recover": run_sft,
        "interpolate": run_interpolate,
    }
    behind = {"evaluate": run_evaluate, "export": run_export}
    with closing(opened), _naming(opened.path):
        with phase("loading", cfg):
            run = open_run(cfg, opened)
        opened.note_mesh(run.cfg.mesh, run.mesh_reason)
        with closing(run.writer):
            if "evaluate" in cfg.stages:  # first: whatever it needs is missing now or never
                with phase("evaluation", run.cfg):
                    measure_base(run)
            for name in run.working:
                if opened.arm_done(name) is not None:
                    _log.info("%s: done before", name)
                    continue
                for other in run.ancestors(name)[:-1]:
                    opened.wait_for(other)
                arm = run.arms[name]
                train_by[arm.method](run, arm)
                _log.info("%s: %.0f s", name, opened.arm_cost(name)["seconds"])
                if "evaluate" in cfg.stages:
                    with phase("evaluation", run.cfg):
                        measure_arm(run, name)
                    report(run)  # so that the first arms can be looked at while others train
            for stage in [stage for stage in cfg.stages if stage in behind]:
                if opened.stage_done(stage):
                    _log.info("%s: done before", stage)
                    continue
                began = time.monotonic()
                with phase("evaluation" if stage == "evaluate" else "loading", run.cfg):
                    behind[stage](run)
                opened.mark_done(stage)
                _log.info("%s: %.0f s", stage, time.monotonic() - began)
            summary = report(run)
        if distributed.is_main():
            print(f"\n{summary}\n\nreport: {opened.report}")


@contextmanager
def _naming(workdir: Path) -> Iterator[None]:
    """Says what to do about a disk that takes nothing more, where the error itself does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        file = error.filename or "a file"
        raise OSError(
            f"workdir {workdir}: {file} cannot be written ({error.strerror}); make room on the "
            "disk and start the same command again, it goes on from the last checkpoint"
        ) from error


def _compilation_cache() -> str:
    """Where compiled programs are kept between runs; JAX_COMPILATION_CACHE_DIR overrides it."""
    default = str(assets.cache_folder() / "compiled")
    return os.environ.get("JAX_COMPILATION_CACHE_DIR", default)


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    launch(_CONFIG.value, str(_WORKDIR.value))


def launch(cfg: Config, workdir: str) -> None:
    """`train` as a program: a log on stderr, signals, and SystemExit with one line for an error."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every detail there
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    with signals.ending(), distributed.together():
        try:
            train(cfg, workdir)
        except signals.Stopped as stop:
            if distributed.is_main():
                print(stop, file=sys.stderr)
            sys.exit(stop.status)
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            if os.environ.get("GRPO_JAX_TRACEBACK"):
                raise
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    check_flags(sys.argv)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(_main)
