"""The launch scripts: what they would do, what they refuse, and what they call.

The command lines of clouds and schedulers are replaced by a recorder, first on PATH, that writes
down its arguments and answers as a test tells it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grpo_jax.infra import place as place_lib
from grpo_jax.infra.provenance import requirements

ROOT = Path(__file__).parents[1]
PROGRAM = ("--config=configs/tiny.py", "--workdir=/shared/it's here")
TPU = ("--name=pod", "--zone=us-west4-a", "--type=v5litepod-16")
RECORDER = """#!{python}
import json, pathlib, sys
here = pathlib.Path({here!r})
name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([name, *args]) + "\\n")
answers = json.loads((here / "answers.json").read_text())
for index, (words, out, status) in enumerate(answers):
    if all(any(word in arg for arg in [name, *args]) for word in words):
        if out.startswith("once:"):
            out = out.removeprefix("once:")
            del answers[index]
            (here / "answers.json").write_text(json.dumps(answers))
        print(out, file=sys.stderr if status else sys.stdout)
        sys.exit(status)
"""


class Recorder:
    """A folder for PATH with stand-ins for programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.answers: list[tuple[list[str], str, int]] = []
        self.environ: dict[str, str] = {"POLL_SECONDS": "0"}
        for name in ("gcloud", "sbatch", "srun", "nvidia-smi"):
            script = folder / name
            script.write_text(RECORDER.format(python=sys.executable, here=str(folder)))
            script.chmod(0o755)

    def answer(self, *words: str, out: str = "", status: int = 0) -> None:
        """To calls that have all the words; "once:" before what is said at the first one only."""
        self.answers.append((list(words), out, status))

    def run(self, script: str, *args: str, root: Path = ROOT) -> subprocess.CompletedProcess:
        (self.folder / "answers.json").write_text(json.dumps(self.answers))
        (self.folder / "calls.jsonl").write_text("")
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(root / "launch" / script), *args],
            env=os.environ | self.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").open()]

    def verbs(self) -> list[str]:
        """What gcloud was asked to do, in order."""
        return [call[4] for call in self.calls() if call[0] == "gcloud"]


@pytest.fixture
def recorder(tmp_path):
    (tmp_path / "bin").mkdir()
    return Recorder(tmp_path / "bin")


@pytest.fixture
def checkout(tmp_path):
    """The launch scripts beside an environment that is made already, as far as they look."""
    root = tmp_path / "check out"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("configs/tiny.py", "setup.cfg", "pyproject.toml"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    # Its own words for "nothing to install" depend on the Python, so the function is replaced.
    with (root / "launch" / "venv.sh").open("a") as file:
        file.write('\nmake_venv() { echo "venv $*" >&2; }\n')
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    return root


def test_scripts_pass_shellcheck():
    found = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(found).exists():
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted(map(str, (ROOT / "launch").glob("*.sh"))), "launch/slurm.sbatch"]
    done = subprocess.run([found, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("tpu_vm.sh", ("--name=Pod", "--zone=us-west4-a"), "--name: got 'Pod'"),
        ("tpu_vm.sh", ("--name=pod; rm -rf /", "--zone=us-west4-a"), "--name: got"),
        ("tpu_vm.sh", ("--name=pod", "--zone=mars"), "--zone: got 'mars'"),
        ("tpu_vm.sh", (*TPU[:2], *PROGRAM), "--type: got ''"),
        ("tpu_vm.sh", (*TPU, "--nfs=a:b;c", *PROGRAM), "--nfs: got 'a:b;c'"),
        ("tpu_vm.sh", (*TPU, "--attempts=0", *PROGRAM), "--attempts: got '0'"),
        ("tpu_vm.sh", (*TPU, PROGRAM[0]), "--workdir=FOLDER is missing"),
        ("tpu_vm.sh", (*TPU, "--sopt", *PROGRAM), "unknown argument '--sopt'"),
        ("slurm.sbatch", ("--nodes=two", *PROGRAM), "--nodes: got 'two'"),
        ("slurm.sbatch", ("--time=tomorrow", *PROGRAM), "--time: got 'tomorrow'"),
        ("slurm.sbatch", ("--config=configs/none.py",), "--config: no file configs/none.py"),
        ("gpu.sh", ("--gpus=a", *PROGRAM), "--gpus: got 'a'"),
        ("gpu.sh", PROGRAM[1:], "--config=FILE is missing"),
        ("local_processes.sh", ("--processes=0", *PROGRAM), "--processes: got '0'"),
        ("local_processes.sh", ("--devices=x", *PROGRAM), "--devices: got 'x'"),
        ("repro.sh", (), "wanted RUN"),
        ("repro.sh", ("--dry", "runs/x"), "unknown argument '--dry'"),
        ("repro.sh", ("/nowhere",), "no run in /nowhere (no config.json)"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_called(recorder, script, args, words):
    done = recorder.run(script, *args)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert recorder.calls() == []


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("tpu_vm.sh", (*TPU, "--delete"), "tpu-vm create pod"),
        ("slurm.sbatch", ("--nodes=2",), "+ sbatch --nodes=2"),
        ("gpu.sh", ("--gpus=0",), "grpo_jax.main"),
        ("local_processes.sh", ("--processes=3",), "JAX_PROCESS_ID=2"),
    ],
)
def test_dry_runs_show_and_call_nothing(recorder, script, args, words):
    recorder.environ["PYTHON"] = sys.executable
    done = recorder.run(script, "--dry-run", *args, *PROGRAM)
    assert done.returncode == 0, done.stderr
    assert words in done.stderr and "it\\" in done.stderr  # the quote is quoted
    assert [call for call in recorder.calls() if call[0] != "nvidia-smi"] == []


def test_help_is_the_head_of_the_script(recorder):
    done = recorder.run("slurm.sbatch", "--help")
    assert done.returncode == 0 and "--nodes=2" in done.stdout and "#" not in done.stdout


# TPU VMs


def test_tpu_is_created_installed_run_and_deleted(recorder, checkout):
    recorder.answer("describe", "value(state)", out="once:NOT_FOUND", status=1)
    recorder.answer("describe", "value(labels", out="grpo-jax-launch")
    recorder.answer("kill -0", "--worker=0", status=1)  # nothing runs there yet
    done = recorder.run(
        "tpu_vm.sh", *TPU, "--spot", "--nfs=10.0.0.2:/s", "--delete", *PROGRAM, root=checkout
    )
    assert done.returncode == 0, done.stderr
    assert recorder.verbs() == [
        "describe", "create", "ssh", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "describe", "delete",
    ]  # fmt: skip
    create = recorder.calls()[1]
    for flag in (
        "--accelerator-type=v5litepod-16",
        "--spot",
        "--labels=created-by=grpo-jax-launch",
    ):
        assert flag in create
    start = next(call for call in recorder.calls() if any("setsid" in arg for arg in call))
    assert "--worker=all" in start
    command = next(arg for arg in start if arg.startswith("--command="))
    quoted = command.split("bash -c ", 1)[1].split(" >run.log", 1)[0]
    inner = subprocess.run(
        ["bash", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=True
    ).stdout
    outer = inner.split(";")[0].replace(".venv/bin/python", "printf '%s\\n'")
    words = subprocess.run(["bash", "-c", outer], capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == ["-m", "grpo_jax.main", *PROGRAM]  # through two shells unharmed


def test_tpu_of_others_is_reused_but_never_deleted(recorder, checkout):
    recorder.answer("describe", "value(state)", out="READY")
    recorder.answer("describe", "value(labels", out="")
    done = recorder.run("tpu_vm.sh", *TPU, "--delete", *PROGRAM, root=checkout)
    assert done.returncode == 2 and "was not created by this script" in done.stderr
    assert not {"create", "delete"} & set(recorder.verbs())
    done = recorder.run("tpu_vm.sh", *TPU[:2], "--teardown", root=checkout)
    assert done.returncode == 2 and "delete" not in recorder.verbs()


def test_preempted_tpu_is_made_anew(recorder, checkout):
    recorder.answer("tail -n", out="once:connection lost", status=255)
    for state in ("once:READY", "once:PREEMPTED", "once:PREEMPTED"):
        recorder.answer("describe", "value(state)", out=state)
    recorder.answer("describe", "value(state)", out="once:NOT_FOUND", status=1)
    recorder.answer("describe", "value(state)", out="READY")
    recorder.answer("describe", "value(labels", out="grpo-jax-launch")
    recorder.answer("kill -0", "--worker=0", status=1)
    done = recorder.run("tpu_vm.sh", *TPU, *PROGRAM, root=checkout)
    assert done.returncode == 0, done.stderr
    verbs = recorder.verbs()
    assert verbs.count("delete") == verbs.count("create") == 1
    assert verbs.index("delete") < verbs.index("create") and verbs.count("scp") == 2
    assert "attempt 2 of 20" in done.stderr


def test_a_vm_that_cannot_be_made_anew_is_tried_again(recorder, checkout):
    recorder.answer("tail -n", out="once:connection lost", status=255)
    recorder.answer("create", out="once:no more capacity", status=1)
    recorder.answer("describe", "value(state)", out="once:READY")
    for _ in range(3):  # behind the loss, at the second attempt and at the third
        recorder.answer("describe", "value(state)", out="once:NOT_FOUND", status=1)
    recorder.answer("describe", "value(state)", out="READY")
    recorder.answer("kill -0", "--worker=0", status=1)
    done = recorder.run("tpu_vm.sh", *TPU, *PROGRAM, root=checkout)
    assert done.returncode == 0, done.stderr
    assert recorder.verbs().count("create") == 2 and "attempt 3 of 20" in done.stderr
    recorder.answers.clear()
    recorder.answer("describe", out="NOT_FOUND", status=1)
    recorder.answer("create", out="no more capacity", status=1)
    done = recorder.run("tpu_vm.sh", *TPU, *PROGRAM, root=checkout)
    assert done.returncode == 2 and recorder.verbs().count("create") == 1
    assert done.stderr.endswith("error: pod could not be created; see above\n")


def test_a_program_that_was_told_to_end_goes_on(recorder, checkout):
    """As before a preemption, while the VM still counts as ready: 128 + SIGTERM."""
    recorder.answer("describe", "value(state)", out="READY")
    recorder.answer("run.status)", out="once:", status=1)
    recorder.answer("cat grpo_jax/run.status", out="143")
    recorder.answer("kill -0", "--worker=0", status=1)
    done = recorder.run("tpu_vm.sh", *TPU, *PROGRAM, root=checkout)
    assert done.returncode == 0 and "attempt 2 of 20" in done.stderr, done.stderr


def test_nothing_is_started_where_the_program_did_not_arrive(recorder, checkout):
    recorder.answer("describe", "value(state)", out="READY")
    recorder.answer("scp", status=1)
    recorder.answer("kill -0", "--worker=0", status=1)
    done = recorder.run("tpu_vm.sh", *TPU, *PROGRAM, root=checkout)
    assert done.returncode == 2 and "pod could not be set up" in done.stderr
    assert not any("setsid" in arg for call in recorder.calls() for arg in call)


def test_failed_program_is_not_started_again(recorder, checkout):
    recorder.answer("describe", "value(state)", out="READY")
    recorder.answer("run.status)", status=1)
    recorder.answer("kill -0", "--worker=0", status=1)
    done = recorder.run("tpu_vm.sh", *TPU, *PROGRAM, root=checkout)
    assert done.returncode == 1 and "the program has failed" in done.stderr
    assert recorder.verbs().count("scp") == 1


def test_no_permission_is_not_taken_for_no_tpu(recorder, checkout):
    recorder.answer("describe", out="PERMISSION_DENIED: no", status=1)
    done = recorder.run("tpu_vm.sh", *TPU, *PROGRAM, root=checkout)
    assert done.returncode == 2 and "PERMISSION_DENIED" in done.stderr
    assert set(recorder.verbs()) == {"describe"}


# SLURM, one host, several processes


def test_slurm_submits_itself_and_runs_in_the_job(recorder, checkout):
    recorder.environ["EXTRAS"] = "cuda12"
    args = ("--nodes=2", "--gpus=8", "--time=1-00:00:00", *PROGRAM)
    done = recorder.run("slurm.sbatch", *args, root=checkout)
    assert done.returncode == 0 and "venv .venv cuda12" in done.stderr
    (call,) = recorder.calls()
    assert call[:5] == [
        "sbatch",
        "--nodes=2",
        f"--export=ALL,GRPO_JAX_ROOT={checkout}",
        "--gpus-per-node=8",
        "--time=1-00:00:00",
    ]
    assert call[5] == "launch/slurm.sbatch"
    spool = checkout.parent / "spool"  # where SLURM keeps the copy that runs
    (spool / "launch").mkdir(parents=True)
    shutil.copy(checkout / call[5], spool / "launch" / "slurm_script")
    recorder.environ |= {"SLURM_JOB_ID": "7", "GRPO_JAX_ROOT": str(checkout)}
    done = recorder.run("slurm_script", *call[6:], root=spool)
    assert done.returncode == 0, done.stderr
    (call,) = recorder.calls()
    assert call[0] == "srun" and call[-4:] == ["-m", "grpo_jax.main", *PROGRAM]


def test_gpu_checks_the_driver_and_the_numbers(recorder, checkout):
    recorder.answer("nvidia-smi", "--query-gpu", out="0\n1")
    recorder.answer("nvidia-smi", out="| CUDA Version: 12.4 |")
    done = recorder.run("gpu.sh", "--gpus=2", *PROGRAM, root=checkout)
    assert done.returncode == 2 and "there is no GPU 2 here, only 0, 1" in done.stderr
    (checkout / ".venv/bin/python").unlink()
    (checkout / ".venv/bin/python").symlink_to(recorder.folder / "srun")  # records too
    done = recorder.run("gpu.sh", "--gpus=1", "--deterministic", *PROGRAM, root=checkout)
    assert "+ export XLA_FLAGS=--xla_gpu_deterministic_ops=true" in done.stderr
    assert done.returncode == 0 and "venv .venv cuda12" in done.stderr
    assert recorder.calls()[-1][1:] == ["-m", "grpo_jax.main", *PROGRAM]


def test_local_processes_end_with_the_worst_status(recorder, checkout, tmp_path):
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo 4567 && exit\n'
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"\n'
        "exit $((JAX_PROCESS_ID * 3))\n"
    )
    program.chmod(0o755)
    recorder.environ["PYTHON"] = str(program)
    done = recorder.run("local_processes.sh", "--processes=2", *PROGRAM, root=checkout)
    assert done.returncode == 3
    lines = sorted(done.stdout.splitlines())
    assert lines == ["[0] 0 of 2 at localhost:4567", "[1] 1 of 2 at localhost:4567"]


def test_local_processes_are_told_to_end_and_waited_for(recorder, checkout, tmp_path):
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo 4567 && exit\n'
        "trap 'sleep 0.5; echo saved; exit 143' TERM\n"
        f'touch "{tmp_path}/$JAX_PROCESS_ID"\nwhile true; do sleep 0.1; done\n'
    )
    program.chmod(0o755)
    command = ["bash", str(checkout / "launch" / "local_processes.sh"), *PROGRAM]
    environ = os.environ | {"PYTHON": str(program)}
    started = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    while not all((tmp_path / rank).exists() for rank in "01"):
        time.sleep(0.05)
    started.terminate()
    said = started.communicate(timeout=30)[0]
    assert started.returncode == 143
    assert sorted(said.splitlines()) == ["[0] saved", "[1] saved"]


# Kubernetes


def test_jobset_says_what_a_process_must_know():
    jobset = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environ = {item["name"]: item["value"] for item in container["env"]}
    pods = spec["parallelism"]
    assert pods == spec["completions"] and spec["completionMode"] == "Indexed"
    environ["JOB_COMPLETION_INDEX"] = str(pods - 1)  # Kubernetes adds it
    assert place_lib.announced(environ)
    host = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    assert place_lib.find(environ) == place_lib.Place(f"{host}:8476", pods, pods - 1)
    config, workdir = container["args"]
    assert (ROOT / config.removeprefix("--config=")).exists()
    (mount,) = container["volumeMounts"]
    assert workdir.startswith(f"--workdir={mount['mountPath']}/")


def test_repro_makes_the_environment_of_the_lock_where_it_is_another(recorder, checkout, tmp_path):
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.json").write_text('{\n  "git_revision": "abc"\n}\n')
    done = recorder.run("repro.sh", str(run), root=checkout)
    assert done.returncode == 2 and "has no requirements.lock" in done.stderr
    own = checkout / ".venv/bin/python"
    own.unlink()  # a link would not find the packages
    own.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} "$@"\n')
    own.chmod(0o755)
    (run / "requirements.lock").write_text(requirements())
    done = recorder.run("repro.sh", str(run), "--dry-run", root=checkout)
    assert "note: the code was abc, and is" in done.stderr
    assert "-m grpo_jax.repro" in done.stderr and "-m venv" not in done.stderr
    (run / "requirements.lock").write_text("# Python 3.11.7; Linux\njax==0.0.1\n")
    done = recorder.run("repro.sh", str(run), str(tmp_path / "b"), "--dry-run", root=checkout)
    made = re.findall(r"-m venv --clear (\.venv-lock-[0-9a-f]{12})\n", done.stderr)
    lines = done.stderr.splitlines()
    assert len(made) == 1 and done.returncode == 0
    assert f"{made[0]}/bin/python -m pip install --quiet --requirement" in lines[-3]
    assert "--no-deps --editable ." in lines[-2]
    quoted = f"{tmp_path}/a\\ run {tmp_path}/b"
    assert lines[-1].endswith(f"{made[0]}/bin/python -m grpo_jax.repro {quoted}")
    recorder.environ["PYTHON"] = sys.executable  # the user's own is taken as it is
    done = recorder.run("repro.sh", str(run), "--dry-run", root=checkout)
    assert "-m venv" not in done.stderr and f"{sys.executable} -m grpo_jax.repro" in done.stderr
