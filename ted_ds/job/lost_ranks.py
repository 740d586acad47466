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
from dataclasses import dataclass
from datetime import timedelta

import torch

from ted_ds.errors import RankLost, TedError

BEATS = 20
"""Signs of life within the time-out."""

LONGEST_BEAT_S = 5.0

GRACE_S = 5.0
"""How long a rank that failed in a collective waits for the others to fail too: who does not is the one to blame."""

AGAIN = "the same command goes on from the last checkpoint"

POLL_S = 0.1

FAILED, LOST = "failed", "lost"
"""In the store, as `Verdict`s: the last rank that ended by an error of its own, and what all others leave for."""

WELL, BEREFT = "ended as it should", "ended because another rank was lost"

STORE_ERRORS = (RuntimeError, torch.distributed.DistError)

COMMUNICATION = re.compile(r"gloo|pair closure|NCCL|nccl|Connection closed by peer|Connection reset|ProcessGroup")
"""In messages of RuntimeErrors that torch raises where another rank failed (gloo has no class of its own)."""


@dataclass(frozen=True)
class Verdict:
    """Why a rank ends because of another, and with which code: the other's, where it ended by a TedError of its own."""

    code: int
    reason: str

    @staticmethod
    def read(text: bytes) -> Verdict:
        """What `written` has put into the store."""
        code, _, reason = _text(text).partition(" ")
        return Verdict(int(code), reason)

    def written(self) -> str:
        """For the store."""
        return f"{self.code} {self.reason}"


class RankWatch:
    """This rank's part of the watch.

    timeout: as the collectives'. A rank without a sign of life for half of it is lost; half of it as this rank counts
    its own signs, so that a job which was suspended as a whole goes on.
    address, port: of the launcher's store.
    Raises nothing by itself: the threads end the process. Raises torch's DistError where the store does not answer yet.
    """

    def __init__(self, rank: int, size: int, timeout: timedelta, address: str, port: int) -> None:
        self._rank, self._size, self._next = rank, size, (rank + 1) % size
        self._beat_s = min(LONGEST_BEAT_S, timeout.total_seconds() / BEATS)
        self._limit = max(2, round(timeout.total_seconds() / 2 / self._beat_s))
        self._master = f"{address}:{port}"
        # a client for the thread and one for the rest: a request that waits holds up the others of its client
        self._of_thread, self._store = (_client(address, port, timeout, self._beat_s) for _ in range(2))
        self._over, self._speaking, self._said = threading.Event(), threading.Lock(), False
        self._store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        self._answers = 0
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
                verdict = self._post_mortem()
            except STORE_ERRORS:
                verdict = self._silent_store()
            if verdict is not None:
                self._leave(verdict, self._store)
        self._go(self._store, f"ended by {type(error).__name__}: {error}"[:1000], error)
        self._over.set()

    def _post_mortem(self) -> Verdict | None:
        """Which rank is to blame that this one's collective failed: None: all of them failed in it.

        A request or three a poll, whatever the number of ranks: one of them alone asks after each.
        """
        store = self._store
        deadline = time.monotonic() + GRACE_S
        store.set(f"waits/{self._rank}", "")
        waiting = [f"waits/{rank}" for rank in range(self._size)]
        while not store.check([LOST]):
            if store.check(waiting):
                return None
            late = time.monotonic() - deadline
            if store.check([FAILED]) or (late > 0 and store.add("asked", 1) == 1) or late > 2 * GRACE_S:
                store.set(LOST, self._blamed(store).written())
            time.sleep(POLL_S)
        return Verdict.read(store.get(LOST))

    def _blamed(self, store: torch.distributed.Store) -> Verdict:
        """Who failed, else who gives no signs, else who has not failed too, and so hangs."""
        if store.check([FAILED]):
            failed = Verdict.read(store.get(FAILED))
            return Verdict(failed.code, f"{failed.reason}; {AGAIN}")
        missing = [rank for rank in range(self._size) if not store.check([f"waits/{rank}"])]
        before = {rank: self._beat(store, rank) for rank in missing}
        time.sleep(3 * self._beat_s)  # in a ring only the neighbours of a dead rank fail: most just wait, and are alive
        silent = [rank for rank in missing if self._beat(store, rank) == before[rank]]
        names = ", ".join(self._name(store, rank) for rank in silent or missing)
        return Verdict(
            RankLost.exit_code, f"{names} took no part in a collective: it died, hangs or is cut off; {AGAIN}"
        )

    def _leave(self, verdict: Verdict, store: torch.distributed.Store) -> None:
        """Ends the process, from any thread, whatever the main thread waits for."""
        self._say(verdict.reason)
        self._go(store, BEREFT)
        os._exit(verdict.code)

    def _say(self, reason: str) -> None:
        """Once: the threads find the same."""
        with self._speaking:
            if not self._said:
                print(f"ted_ds: rank {self._rank}: {reason}", file=sys.stderr, flush=True)
            self._said = True

    def _go(self, store: torch.distributed.Store, how: str, error: BaseException | None = None) -> None:
        """Tells the others; rank 0, whose store it may be, stays until they have gone or heard of it."""
        try:
            if error is not None:
                code = error.exit_code if isinstance(error, TedError) else RankLost.exit_code
                store.set(FAILED, Verdict(code, f"{self._name(store, self._rank)} {how}").written())
            store.set(f"gone/{self._rank}", how)
            deadline = time.monotonic() + 2 * self._beat_s
            others = [f"gone/{rank}" for rank in range(1, self._size)]
            while self._rank == 0 and time.monotonic() < deadline and not store.check(others):
                time.sleep(POLL_S)
        except STORE_ERRORS:
            return  # rank 0 has left before

    def _run(self) -> None:
        """Beats, and listens to the next rank, and to what any rank has found."""
        store, beats, heard, seen = self._of_thread, 0, 0, ""
        while not self._over.wait(self._beat_s):
            try:
                beats += 1
                store.set(f"beat/{self._rank}", str(beats))
                if store.check([LOST]):
                    return self._end(Verdict.read(store.get(LOST)))
                beat, gone = self._beat(store, self._next), self._value(store, f"gone/{self._next}")
                self._answers += 1
                # one that failed is certainly gone: what waits for it in CUDA would wait for long
                limit = self._limit if not gone else min(self._limit, round(3 * GRACE_S / self._beat_s))
                if beat != seen or gone == WELL:
                    seen, heard = beat, beats
                elif beats - heard > limit:
                    found = self._silent(store, gone, (beats - heard) * self._beat_s)
                    store.set(LOST, found.written())
                    return self._end(found)
            except STORE_ERRORS:
                continue  # `_oversee` says for how long

    def _silent(self, store: torch.distributed.Store, gone: str, seconds: float) -> Verdict:
        if gone and store.check([FAILED]):
            return self._blamed(store)
        what = gone or f"has given no sign of life for {seconds:.0f} s: it died, hangs or is cut off"
        return Verdict(RankLost.exit_code, f"{self._name(store, self._next)} {what}; {AGAIN}")

    def _oversee(self) -> None:
        """Touches no store: over a cut link a request waits for ever, the client's time-out is for keys alone."""
        answers = quiet = 0
        while not self._over.wait(self._beat_s):
            quiet = quiet + 1 if answers == self._answers else 0
            answers = self._answers
            if quiet > self._limit:
                verdict = self._silent_store()
                self._say(verdict.reason)
                os._exit(verdict.code)

    def _end(self, verdict: Verdict) -> None:
        if not self._over.is_set():
            self._leave(verdict, self._of_thread)

    def _beat(self, store: torch.distributed.Store, rank: int) -> str:
        return self._value(store, f"beat/{rank}")

    def _name(self, store: torch.distributed.Store, rank: int) -> str:
        return self._value(store, f"name/{rank}") or f"rank {rank}"

    @staticmethod
    def _value(store: torch.distributed.Store, key: str) -> str:
        return _text(store.get(key)) if store.check([key]) else ""

    def _silent_store(self) -> Verdict:
        reason = f"rank 0's store at {self._master} does not answer: rank 0 died, hangs or is cut off; {AGAIN}"
        return Verdict(RankLost.exit_code, reason)


def _client(address: str, port: int, timeout: timedelta, wait_s: float) -> torch.distributed.Store:
    """Connects within `timeout`: a large job's ranks come all at once. Its requests then wait for a beat at most."""
    client = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    client.set_timeout(timedelta(seconds=max(1.0, wait_s)))
    return torch.distributed.PrefixStore("ted_ds", client)


def is_communication(error: BaseException) -> bool:
    """Whether an error says that a collective failed, and so may be another rank's doing."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and COMMUNICATION.search(str(error)) is not None


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
