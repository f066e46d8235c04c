"""The start of a run with several processes: who is there, and were all told the same?

jax's own start-up ends a process with a stack trace when another does not come, and does not notice
processes that were told different things. So all meet here first, at the coordinator's address and
before jax listens there: process 0 hears who everybody is, what they run and with which
configuration, and says go or why not. The connections stay open (`peers`).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_jax.infra.peers import Line, NotOursError, Peers

GRACE = 5.0  # seconds for the others to arrive, once something is known to be wrong
SHOWN = 8  # differences that one error lists

_PROTOCOL = "grpo_jax 1"


def call(address: str, count: int, rank: int, facts: Mapping[str, Any], seconds: float) -> Peers:
    """Waits until all processes are there and checks that they were told the same.

    Args:
      address: "host:port" of process 0, which listens there meanwhile; free again afterwards.
      count: processes of the run; rank: this one's number, from 0.
      facts: name -> JSON value of what must be the same in every process.
      seconds: to wait at most.

    Raises:
      ValueError: what differs, or who is missing; the same on every process.
      OSError: process 0 cannot be reached, or cannot listen at the address.
    """
    end = time.monotonic() + seconds
    hello = {
        "protocol": _PROTOCOL,
        "count": count,
        "rank": rank,
        "who": f"{socket.gethostname()}, process id {os.getpid()}",
        "facts": json.loads(json.dumps(facts)),
    }
    meet = _gather if rank == 0 else _answer
    return Peers(rank, count, *meet(address, hello, end, seconds))


def _gather(
    address: str, hello: dict[str, Any], end: float, seconds: float
) -> tuple[dict[int, Line], dict[int, str]]:
    """Process 0's part: hears all, then says go or no."""
    count, names = hello["count"], {0: _name(hello)}
    lines: dict[int, Line] = {}
    waiting: list[Line] = []  # connected, but not named yet
    refused: list[Line] = []
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(address))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        while len(lines) < count - 1:
            left = end - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(left):
                if key.fileobj is server:
                    line = Line(server.accept()[0])
                    waiting.append(line)
                    selector.register(line.socket, selectors.EVENT_READ, line)
                    continue
                line = key.data
                rank = next((r for r, known in lines.items() if known is line), None)
                try:
                    messages = line.receive()
                    new = _checked(messages[0]) if messages and rank is None else None
                except OSError:  # gone again, or a stranger
                    selector.unregister(line.socket)
                    line.socket.close()
                    if line in waiting:
                        waiting.remove(line)
                    if rank is not None:
                        problems.append(f"{names[rank]} has left before the run began")
                        lines.pop(rank)
                        end = min(end, time.monotonic() + GRACE)
                    continue
                if new is None:
                    continue
                waiting.remove(line)
                found = _compare(hello, new)
                if new["rank"] in names:
                    found.append(
                        f"two processes have number {new['rank']}: {names[new['rank']]} and "
                        f"{new['who']}"
                    )
                if found:
                    problems += found
                    refused.append(line)
                    end = min(end, time.monotonic() + GRACE)
                if not (new["rank"] in names or new["rank"] >= count):
                    lines[new["rank"]], names[new["rank"]] = line, _name(new)
                missing = sorted(set(range(count)) - names.keys())
                for known in lines.values():
                    with contextlib.suppress(OSError):
                        known.send({"missing": missing})
    missing = sorted(set(range(count)) - names.keys())
    if missing and not problems:
        problems = [_who_is_missing(missing, count, seconds)]
    everyone = [*lines.values(), *(line for line in refused if line not in lines.values())]
    verdict = {"no": _listed(problems)} if problems else {"go": names[0]}
    for line in everyone:
        with contextlib.suppress(OSError):
            line.send(verdict)
    for line in waiting + (everyone if problems else []):
        line.hang_up()
    if problems:
        raise ValueError(_listed(problems))
    return lines, names


def _answer(
    address: str, hello: dict[str, Any], end: float, seconds: float
) -> tuple[dict[int, Line], dict[int, str]]:
    """The part of the others: says who this is, until process 0 answers."""
    host, port = split(address)
    count, rank = hello["count"], hello["rank"]
    reason, missing = "no answer", list[int]()
    while (left := end - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((host, port), timeout=min(left, GRACE)))
            line.send(hello)
            for message in _until(line, end):
                if "no" in message:
                    raise ValueError(message["no"])
                if "go" in message:
                    return {0: line}, {0: message["go"], rank: _name(hello)}
                missing = message.get("missing", missing)
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    if missing:
        raise ValueError(_who_is_missing(missing, count, seconds))
    raise OSError(
        f"process {rank} of {count}: process 0 was not to be reached at {address} within "
        f"{seconds:.0f} s ({reason}); check that it runs, that this is its address "
        "(JAX_COORDINATOR_ADDRESS), and that no firewall is between"
    )


def _until(line: Line, end: float) -> Iterator[dict[str, Any]]:
    """Messages as they come; ends with the time, ConnectionError if the other side hangs up."""
    while (left := end - time.monotonic()) > 0:
        line.socket.settimeout(left)
        try:
            messages = line.receive()
        except TimeoutError:
            break
        finally:
            line.socket.settimeout(GRACE)
        for i, message in enumerate(messages):
            line.unread = messages[i + 1 :]
            yield message


def _listen(address: str) -> socket.socket:
    port = split(address)[1]
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise OSError(
            f"process 0: cannot listen at port {port} ({error.strerror}); another run may use it: "
            "choose another port in JAX_COORDINATOR_ADDRESS"
        ) from None


def split(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; ValueError if it is not one."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS: got {address!r}, wanted HOST:PORT")
    return host.strip("[]"), int(port)


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    kinds = {"protocol": str, "count": int, "rank": int, "who": str, "facts": dict}
    for name, kind in kinds.items():
        if not isinstance(message.get(name), kind):
            raise NotOursError("not one of our messages")
    return message


def _compare(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    who = _name(theirs)
    if theirs["protocol"] != ours["protocol"] or theirs["rank"] < 0:
        return [f"{who} runs another version of this program than process 0"]
    if theirs["count"] != ours["count"]:
        return [f"{who} was told of {theirs['count']} processes, process 0 of {ours['count']}"]
    mine, other = ours["facts"], theirs["facts"]
    lines = []
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            lines.append(f"{name}: {other.get(name)!r:.80} there, {mine.get(name)!r:.80} here")
    if not lines:
        return []
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"{who} differs from process 0: {'; '.join(lines[:SHOWN] + more)}"]


def _listed(problems: list[str]) -> str:
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "the processes do not fit together: " + "\n  ".join(problems[:SHOWN] + more)


def _who_is_missing(missing: list[int], count: int, seconds: float) -> str:
    shown = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
    return (
        f"process {shown} of {count} did not come within {seconds:.0f} s; see its log, and check "
        "the number of processes (JAX_NUM_PROCESSES)"
    )


def _name(hello: dict[str, Any]) -> str:
    return f"process {hello['rank']} of {hello['count']} ({hello['who']})"
