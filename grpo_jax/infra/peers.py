"""The other processes of a run: a TCP connection of each to process 0, open until the end.

A process that dies closes its own (the kernel does it, also after `kill -9`), a machine that
vanishes stops answering keepalives, and process 0 tells the others, who stop with its words.
Messages are JSON objects, one a line. `rollcall` opens the connections.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

LONGEST = 2**20  # bytes of a message; whoever sends more is not one of us
PATIENCE = 5.0  # seconds that sending, or connecting, may take
ECHO = 1.5  # seconds in which the failure of another process becomes known


class NotOursError(OSError):
    """What arrived is not one of our messages."""


class Peers:
    """The open connections of a run; made by `rollcall.call`. A thread of its own reads them.

    Args:
      peers: in process 0 rank -> connection; in the others {0: connection}.
      names: rank -> "process 1 of 2 (host, process id 7)" of this process and its peers.
    """

    def __init__(self, rank: int, count: int, peers: dict[int, Line], names: dict[int, str]):
        self.rank, self.count = rank, count
        self._peers, self._names = peers, names
        self._done: set[int] = set()
        self._all_done = threading.Event()
        self._lock = threading.Lock()
        for line in peers.values():
            line.keep_alive()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self, seconds: float | None = None) -> bool:
        """Says that this process has finished and waits for all others to say so.

        Returns:
          False if they have not after `seconds`; None waits as long as they live.
        """
        with contextlib.suppress(OSError):
            if self.rank == 0:
                self._finished(0)
            else:
                self._peers[0].send({"done": True})
        return self._all_done.wait(seconds)

    def fail(self, message: str, text: str) -> NoReturn:
        """Ends this process with status 1 and the others, who print `message`, with it.

        If another has failed already, of which this failure is but the echo, its words are said.

        Args:
          text: what this process itself prints on stderr.
        """
        time.sleep(ECHO)  # the thread that reads has the say meanwhile
        with self._lock:
            print(text, file=sys.stderr)
            self._tell(f"{self._names[self.rank]} has failed: {message}")
            _end(None)

    def tell(self, words: str) -> None:
        """Says to the others that this process `words`, upon which they end with status 1."""
        with self._lock:
            self._tell(f"{self._names[self.rank]} {words}")

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, line in self._peers.items():
            self._hear(rank, line.unread)
            selector.register(line.socket, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                rank = key.data
                try:
                    messages = self._peers[rank].receive()
                except OSError:
                    selector.unregister(key.fileobj)
                    if rank not in self._done and not self._all_done.is_set():
                        self._stop(
                            f"{self._names[rank]} has died without a word (killed, out of memory, "
                            "or its machine is gone); see its log. All processes stop; start them "
                            "again and the run goes on from its last checkpoint"
                        )
                    continue
                self._hear(rank, messages)

    def _hear(self, rank: int, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "failed" in message:
                self._stop(message["failed"])
            elif self.rank == 0:
                self._finished(rank)
            else:
                self._all_done.set()

    def _finished(self, rank: int) -> None:
        with self._lock:
            self._done.add(rank)
            if len(self._done) < self.count or self._all_done.is_set():
                return
            self._all_done.set()
            for line in self._peers.values():
                with contextlib.suppress(OSError):
                    line.send({"done": True})

    def _stop(self, message: str) -> NoReturn:
        with self._lock:
            if self.rank == 0:
                self._tell(message)
            _end(message)

    def _tell(self, message: str) -> None:
        for line in self._peers.values():
            with contextlib.suppress(OSError):
                line.send({"failed": message})
        for line in self._peers.values():
            line.hang_up()


class Line:
    """A connection that carries one JSON object a line."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.unread: list[dict[str, Any]] = []  # that came with the last of the roll call
        self._rest = b""
        connection.settimeout(PATIENCE)

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived, after waiting for some of it.

        Raises:
          ConnectionError: the other side has hung up; NotOursError: it is not one of us.
        """
        data = self.socket.recv(2**16)
        if not data:
            raise ConnectionError("it hung up; perhaps something else listens there")
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise NotOursError("something else answers there; choose another port") from None
        if len(self._rest) > LONGEST or not all(isinstance(m, dict) for m in messages):
            raise NotOursError("something else answers there; choose another port")
        return messages

    def keep_alive(self) -> None:
        """A machine that does not answer for about 30 seconds counts as gone."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # macOS names the first one otherwise
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def hang_up(self) -> None:
        """No more will be said; what was said still arrives."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)


def _end(message: str | None) -> NoReturn:
    """Ends the process whatever its other threads wait for."""
    if message:
        print(f"error: {message}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
