"""Several processes: who they are, how they meet, and how one's end becomes all's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax import config
from grpo_jax.infra import distributed, mesh, rollcall
from grpo_jax.infra import place as place_lib

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def announce(count: int, rank: int, port: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(rank),
    }


# Who this process is

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost,b",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (announce(2, 1, 7), ("localhost:7", 2, 1, None)),
        # jax would take one GPU of each node here, or the second of the one that is visible.
        (SLURM, ("gpu07:61440", 3, 2, None)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "SLURM_LOCALID": "1"}, (1,)),
        (
            SLURM
            | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}
            | {"CUDA_VISIBLE_DEVICES": "5"},
            None,
        ),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "here:1"}, ("here:1", 3, 2, None)),
        (
            OMPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1,10.0.0.2:34"},
            ("10.0.0.1:61441", 4, 3, (1,)),
        ),
        (OMPI | {"JAX_COORDINATOR_ADDRESS": "here:1"}, ("here:1", 4, 3, (1,))),
        (TPU, ("localhost:8482", 4, 3, None)),
        (
            {"JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "4"}
            | {"JAX_COORDINATOR_ADDRESS": "j-w-0-0.j:8476"},
            ("j-w-0-0.j:8476", 4, 2, None),
        ),
    ],
)
def test_the_place_of_a_process(monkeypatch, environ, place):
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "TPU"))]:
        monkeypatch.delenv(name)
    for name, value in environ.items():  # jax's own reading of it looks there
        monkeypatch.setenv(name, value)
    assert distributed.announced(environ)
    found = place_lib.find(environ)
    if place is not None and len(place) == 4:
        assert found == place_lib.Place(*place)
    else:
        assert found.local_devices == place


def test_open_mpi_5_on_one_host_agrees_on_a_port():
    one_host = OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-7@1"}
    address = place_lib.find(one_host).address
    assert place_lib.find(one_host | {"OMPI_COMM_WORLD_RANK": "0"}).address == address
    assert place_lib.find(one_host | {"PMIX_NAMESPACE": "other"}).address != address


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: got 'two', wanted a whole number"),
        ({"JAX_NUM_PROCESSES": "0"}, "wanted at least 1"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID missing"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (announce(2, 2, 7), "JAX_PROCESS_ID: got 2, wanted 0 to 1"),
        (announce(2, 1, 0), "JAX_COORDINATOR_ADDRESS: got 'localhost:0', wanted HOST:PORT"),
        (announce(2, 1, 7) | {"JAX_COORDINATOR_ADDRESS": "a"}, "wanted HOST:PORT"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JAX_NUM_PROCESSES=1 where each pod"),
        (OMPI, "Open MPI 5 does not say"),
        ({"GRPO_JAX_START_SECONDS": "soon", "JAX_NUM_PROCESSES": "2"}, "got 'soon'"),
    ],
)
def test_an_environment_that_says_too_little_or_nonsense(environ, words):
    with pytest.raises(ValueError, match=r".") as error:
        assert distributed.announced(environ)
        place_lib.start_seconds(environ)
        place_lib.find(environ)
    assert words in str(error.value)


def test_one_process_and_pods_of_their_own_pass_through():
    assert not distributed.announced({"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "3"})
    assert not distributed.announced({"TPU_WORKER_HOSTNAMES": "h", "JOB_COMPLETION_INDEX": "0"})
    with distributed.together():
        pass
    with pytest.raises(KeyError), distributed.together():
        raise KeyError("as it was")


# How they meet


def meet(*members: tuple[int, int, dict], seconds: float = 20.0) -> list:
    """What `rollcall.call` gives each (count, rank, facts), called at the same time."""
    port, out = free_port(), [None] * len(members)

    def member(i: int, count: int, rank: int, facts: dict) -> None:
        try:
            out[i] = rollcall.call(f"localhost:{port}", count, rank, facts, seconds)
        except Exception as error:
            out[i] = error

    threads = [threading.Thread(target=member, args=(i, *m)) for i, m in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return out


def test_processes_that_fit_meet_and_leave_together():
    facts = {"grpo.beta": 0.1, "stages": ("sft", "grpo")}
    first, *others = meet(*((4, rank, facts) for rank in (0, 3, 1, 2)))
    assert not others[0].leave(0.1)  # the others are still at work
    assert not others[1].leave(0.0) and not others[2].leave(0.0)
    assert first.leave(5.0) and all(other.leave(5.0) for other in others)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            [(2, 0, {"grpo.beta": 0.1, "a": 1}), (2, 1, {"grpo.beta": 0.2, "a": 1})],
            "differs from process 0: grpo.beta: 0.2 there, 0.1 here",
        ),
        ([(2, 0, {"code": "ab"}), (2, 1, {})], "code: None there, 'ab' here"),
        ([(2, 0, {}), (3, 1, {})], "was told of 3 processes, process 0 of 2"),
        ([(2, 0, {}), (3, 2, {})], "process 2 of 3"),
        ([(3, 0, {}), (3, 1, {}), (3, 1, {})], "two processes have number 1"),
    ],
)
def test_processes_that_do_not_fit_have_one_error_each(monkeypatch, members, words):
    monkeypatch.setattr(rollcall, "GRACE", 0.5)
    errors = meet(*members)
    assert all(isinstance(error, ValueError) for error in errors), errors
    assert all(words in str(error) for error in errors)


def test_a_process_that_does_not_come_is_named():
    began = time.monotonic()
    errors = meet((4, 0, {}), (4, 2, {}), seconds=1.5)
    assert all("process 1, 3 of 4 did not come within 2 s" in str(e) for e in errors), errors
    assert time.monotonic() - began < 10


def test_an_unreachable_coordinator_is_named():
    port = free_port()
    with pytest.raises(OSError, match=rf"not to be reached at localhost:{port}.*refused"):
        rollcall.call(f"localhost:{port}", 2, 1, {}, 0.5)
    with socket.create_server(("localhost", 0)) as deaf:  # connects, and says nothing
        address = f"localhost:{deaf.getsockname()[1]}"
        with pytest.raises(OSError, match=r"\(no answer\); check that it runs"):
            rollcall.call(address, 2, 1, {}, 0.5)
    with pytest.raises(OSError, match="nowhere.invalid"):
        rollcall.call("nowhere.invalid:7", 2, 1, {}, 0.5)


def test_strangers_at_the_port_do_no_harm():
    used = pytest.raises(OSError, match="another run may use it")
    with socket.create_server(("", 0)) as taken, used:
        rollcall.call(f"localhost:{taken.getsockname()[1]}", 2, 0, {}, 1.0)
    port, out = free_port(), []
    first = threading.Thread(
        target=lambda: out.append(rollcall.call(f"localhost:{port}", 2, 0, {}, 20.0))
    )
    first.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1}\n', b"[]\n", b""):
        for _ in range(100):
            try:
                stranger = socket.create_connection(("localhost", port))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        stranger.sendall(words)
        stranger.close()
    second = rollcall.call(f"localhost:{port}", 2, 1, {}, 20.0)
    first.join(20)
    assert not second.leave(0.0) and out[0].leave(5.0) and second.leave(5.0)


def children(code: str, count: int) -> list[subprocess.Popen]:
    """Processes that run `code` after they have met; `rank` and `all` are there."""
    port = free_port()
    code = (
        "import os, signal, sys, time; from grpo_jax.infra import rollcall\n"
        "rank, count, port = map(int, sys.argv[1:])\n"
        "all = rollcall.call(f'localhost:{port}', count, rank, {}, 30.0)\n"
    ) + textwrap.dedent(code)
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(count), str(port)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_others_down_by_name(victim):
    started = children(
        f"""
        time.sleep(0.5)
        if rank == {victim}:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """,
        3,
    )
    said = [child.communicate(timeout=30)[1] for child in started]
    assert [child.returncode for child in started] == [-9 if r == victim else 1 for r in range(3)]
    for rank in {0, 1, 2} - {victim}:
        assert said[rank].startswith(f"error: process {victim} of 3 (")
        assert f"process id {started[victim].pid}) has died" in said[rank]
        assert len(said[rank].splitlines()) == 1


@pytest.mark.parametrize("victim", [0, 2])
def test_a_failure_is_told_to_the_others_and_its_echo_is_not(victim):
    started = children(
        f"""
        if rank == {victim}:
            all.fail("the disk is full", "error: the disk is full")
        time.sleep(1.6)  # until the connection to the failed one breaks, in a collective
        all.fail("connection closed by peer", "an echo")
        """,
        3,
    )
    said = [child.communicate(timeout=30)[1] for child in started]
    assert [child.returncode for child in started] == [1, 1, 1]
    for rank in range(3):
        name = "" if rank == victim else f"process {victim} of 3 ("
        assert said[rank].startswith(f"error: {name}") and "the disk is full" in said[rank]
        assert len(said[rank].splitlines()) == 1


def test_the_same_failure_of_all_is_one_line_each():
    """As a mesh that does not fit: found by every process, at about the same time."""
    started = children('all.fail("mesh.data=3: no", "error: mesh.data=3: no")', 3)
    said = [child.communicate(timeout=30)[1] for child in started]
    assert [child.returncode for child in started] == [1, 1, 1]
    for text in said:
        assert text.startswith("error: ") and text.endswith("mesh.data=3: no\n")
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize("first", [0, 2])
def test_a_process_that_ends_for_a_signal_says_so(first):
    started = children(
        f"""
        if rank == {first}:
            all.tell("was ended by SIGTERM")
            os._exit(143)
        time.sleep(60)
        """,
        3,
    )
    said = [child.communicate(timeout=30)[1] for child in started]
    assert [child.returncode for child in started] == [143 if r == first else 1 for r in range(3)]
    for rank in {0, 1, 2} - {first}:
        assert said[rank].startswith(f"error: process {first} of 3 (")
        assert said[rank].endswith(") was ended by SIGTERM\n")


# The mesh


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 1, 1), "mesh.data=3, mesh.fsdp=1, mesh.tensor=1: the sizes do not fit the 8 devices"),
        ((-1, 3, 1), "the sizes do not fit the 8 devices"),
        ((-1, -1, 1), "-1 at most once"),
        ((-2, 1, 1), "wanted positive sizes"),
    ],
)
def test_meshes_that_do_not_multiply_to_the_devices(sizes, words):
    with pytest.raises(ValueError) as error:
        mesh.make_mesh(config.Mesh(*sizes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_rows_and_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"batch_size: got 3 rows, wanted a multiple of 2"):
        mesh.check_rows(2, "sft.batch_size", 3)
    mesh.check_rows(2, "sft.batch_size", 4)
    mesh.check_heads(4, "m", 8, 4)
    for heads, kv_heads in ((6, 6), (8, 2)):
        with pytest.raises(ValueError, match=f"got 4, but m has {heads} heads and {kv_heads}"):
            mesh.check_heads(4, "m", heads, kv_heads)


@pytest.mark.parametrize(
    ("owners", "tensor", "words"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], 8, "mesh.tensor would run over several of the 2 processes"),
        ([0, 1, 0, 1, 0, 1, 0, 1], 2, "mesh.tensor would run over several of the 2 processes"),
        ([0, 0, 0, 0, 0, 0, 1, 1], 2, "different numbers of devices: 6 in process 0, 2 in"),
        ([0, 0, 0, 0, 1, 1, 1, 1], 4, None),
        ([0, 0, 0, 0, 1, 1, 1, 1], 2, None),
    ],
)
def test_processes_hold_whole_rows(owners, tensor, words):
    grid = np.array([SimpleNamespace(process_index=o) for o in owners]).reshape(-1, 1, tensor)
    if words is None:
        mesh._check_processes(grid, "mesh")
    else:
        with pytest.raises(ValueError, match=words):
            mesh._check_processes(grid, "mesh")
