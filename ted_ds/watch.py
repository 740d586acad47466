"""Whether the other ranks are alive: a rank that died, hangs or is cut off is named, and nobody waits for it for ever.

A thread of each rank gives signs of life in the launcher's key-value store and looks for those of the next rank. So a
lost rank is found even while a main thread waits in a CUDA call that no time-out of Python's reaches.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta

import torch

from ted_ds.errors import RankLost

BEATS = 20
"""Signs of life within the time-out."""

LONGEST_BEAT_S = 5.0

GRACE_S = 5.0
"""How long a rank that failed in a collective waits for the others to fail too: who does not is the one to blame."""

AGAIN = "the same command goes on from the last checkpoint"

POLL_S = 0.1

FAILED = "failed"
"""In the store: the last rank that ended by an error of its own, and that error."""

WELL, BEREFT = "ended as it should", "ended because another rank was lost"

STORE_ERRORS = (RuntimeError, torch.distributed.DistError)

COMMUNICATION = re.compile(r"gloo|pair closure|NCCL|nccl|Connection closed by peer|Connection reset|ProcessGroup")
"""In messages of RuntimeErrors that torch raises where another rank failed (gloo has no class of its own)."""


class RankWatch:
    """This rank's part of the watch.

    timeout: as the collectives'. A rank without a sign of life for half of it is lost.
    address, port: of the launcher's store.
    Raises nothing by itself: the thread ends the process with RankLost's exit code.
    """

    def __init__(self, rank: int, size: int, timeout: timedelta, address: str, port: int) -> None:
        self._rank, self._size, self._next = rank, size, (rank + 1) % size
        self._limit_s = timeout.total_seconds() / 2
        self._beat_s = min(LONGEST_BEAT_S, timeout.total_seconds() / BEATS)
        self._master = f"{address}:{port}"
        wait = timedelta(seconds=max(1.0, self._beat_s))
        # a client for the thread and one for the rest: a request that waits holds up the others of its client
        self._of_thread, self._store = (
            torch.distributed.PrefixStore(
                "ted_ds",
                torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait),
            )
            for _ in range(2)
        )
        self._over, self._speaking, self._said = threading.Event(), threading.Lock(), False
        self._store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        self._answered = time.monotonic()
        threading.Thread(target=self._run, name="rank watch", daemon=True).start()
        threading.Thread(target=self._oversee, name="rank watch's watch", daemon=True).start()

    def close(self) -> None:
        """This rank leaves as it should: nobody misses it."""
        self._go(self._store, WELL)
        self._over.set()

    def failed(self, error: BaseException) -> None:
        """An exception has ended this rank: where it is another one's doing, ends the process, saying whose.

        An error of this rank's own is told to the others, and is the caller's to raise.
        """
        if is_communication(error):
            try:
                reason = self._post_mortem()
            except STORE_ERRORS:
                reason = self._silent_store()
            if reason is not None:
                self._leave(reason, self._store)
        self._go(self._store, f"ended by {type(error).__name__}: {error}"[:1000])
        self._over.set()

    def _post_mortem(self) -> str | None:
        """Which rank is to blame that this one's collective failed: None: all of them failed in it.

        A request or three a poll, whatever the number of ranks: one of them alone asks after each.
        """
        store, grace = self._store, min(GRACE_S, self._limit_s)
        deadline = time.monotonic() + grace
        store.set(f"waits/{self._rank}", "")
        waiting = [f"waits/{rank}" for rank in range(self._size)]
        while not store.check(["lost"]):
            if store.check(waiting):
                return None
            late = time.monotonic() - deadline
            if store.check([FAILED]) or (late > 0 and store.add("asked", 1) == 1) or late > grace:
                store.set("lost", self._blamed(store))
            time.sleep(POLL_S)
        return _text(store.get("lost"))

    def _blamed(self, store: torch.distributed.Store) -> str:
        if store.check([FAILED]):
            return f"{_text(store.get(FAILED))}; {AGAIN}"
        missing = [rank for rank in range(self._size) if not store.check([f"waits/{rank}"])]
        names = ", ".join(self._name(store, rank) for rank in missing)
        return f"{names} took no part in a collective: it died, hangs or is cut off; {AGAIN}"

    def _leave(self, reason: str, store: torch.distributed.Store) -> None:
        """Ends the process, from any thread, whatever the main thread waits for."""
        self._say(reason)
        self._go(store, BEREFT)
        os._exit(RankLost.exit_code)

    def _say(self, reason: str) -> None:
        """Once: the threads find the same."""
        with self._speaking:
            if not self._said:
                print(f"ted_ds: rank {self._rank}: {reason}", file=sys.stderr, flush=True)
            self._said = True

    def _go(self, store: torch.distributed.Store, how: str) -> None:
        """Tells the others; rank 0, whose store it may be, stays until they have gone or heard of it."""
        try:
            if how not in (WELL, BEREFT):
                store.set(FAILED, f"{self._name(store, self._rank)} {how}")
            store.set(f"gone/{self._rank}", how)
            deadline = time.monotonic() + 2 * self._beat_s
            others = [f"gone/{rank}" for rank in range(1, self._size)]
            while self._rank == 0 and time.monotonic() < deadline and not store.check(others):
                time.sleep(POLL_S)
        except STORE_ERRORS:
            return  # rank 0 has left before

    def _run(self) -> None:
        store, beats, seen = self._of_thread, 0, ""
        heard = self._answered
        while not self._over.wait(self._beat_s):
            try:
                beats += 1
                store.set(f"beat/{self._rank}", str(beats))
                if store.check(["lost"]):
                    return self._end(_text(store.get("lost")))
                key = f"beat/{self._next}"
                beat = _text(store.get(key)) if store.check([key]) else ""
                key = f"gone/{self._next}"
                gone = _text(store.get(key)) if store.check([key]) else ""
                self._answered = answered = time.monotonic()
                silent = f"has given no sign of life for {answered - heard:.0f} s: it died, hangs or is cut off"
                if beat != seen or gone == WELL:
                    seen, heard = beat, answered
                elif answered - heard > self._limit_s:
                    lost = f"{self._name(store, self._next)} {gone or silent}; {AGAIN}"
                    store.set("lost", lost)
                    return self._end(lost)
            except STORE_ERRORS:
                continue  # `_oversee` says for how long

    def _oversee(self) -> None:
        """Touches no store: over a cut link a request waits for ever, the client's time-out is for keys alone."""
        while not self._over.wait(self._beat_s):
            if time.monotonic() - self._answered > self._limit_s:
                self._say(self._silent_store())
                os._exit(RankLost.exit_code)

    def _end(self, reason: str) -> None:
        if not self._over.is_set():
            self._leave(reason, self._of_thread)

    def _name(self, store: torch.distributed.Store, rank: int) -> str:
        key = f"name/{rank}"
        return _text(store.get(key)) if store.check([key]) else f"rank {rank}"

    def _silent_store(self) -> str:
        return f"rank 0's store at {self._master} does not answer: rank 0 died, hangs or is cut off; {AGAIN}"


def is_communication(error: BaseException) -> bool:
    """Whether an error says that a collective failed, and so may be another rank's doing."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and COMMUNICATION.search(str(error)) is not None


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
