"""Finds ranks that died, hang or are cut off; the others name them and end within the time-out of the collectives.

Two threads of each rank watch, so a lost rank is found even if the main thread waits in a CUDA call that no time-out of
Python reaches. The ranks share these keys of the launcher's store (a TCPStore at MASTER_ADDR:MASTER_PORT; R: a rank):

    ted_ds/name/R     set by R at the start: "rank R (HOST, process ID)"; all messages use it
    ted_ds/beat/R     a count that R's first thread raises at every beat; read by rank R - 1 (the last rank's by itself)
    ted_ds/gone/R     how R ended; read by rank R - 1, and by rank 0 before it ends
    ted_ds/waits/R    set by R when a collective of it has failed; read by the other ranks in the same situation
    ted_ds/failed     a `Verdict` (exit code and reason) set by a rank that ends by an error of its own
    ted_ds/lost       a `Verdict` set by the rank that finds a lost one; every rank reads it at every beat, and ends
    ted_ds/asked      a count that the ranks in `waits` raise: the one that gets 1 decides which rank is lost

A beat is a 20th of the time-out, 5 s at most. When a rank dies, the first of these ends the others:

1. A collective of its neighbours fails, as gloo closes connections. They wait up to 5 s for `failed`, or for all ranks
   to be in `waits`; then one of them looks whose beat has stopped and sets `lost`.
2. Its beat stops for half of the time-out: the rank before it sets `lost`. (A job that is suspended as a whole goes on:
   a rank counts its own beats, not seconds.)
3. The store stops for half of the time-out, because its process died or a link is cut: the second thread of each rank
   ends its process.

A rank that ends because of another one has the exit code of the `Verdict`: 76, or the code of the error by which the
other rank ended.
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
from torch._C._distributed_c10d import PrefixStore, TCPStore

from ted_ds.errors import RankLost, TedError

BEATS = 20
"""In a time-out."""

LONGEST_BEAT_S = 5.0

GRACE_S = 5.0
"""How long a rank whose collective failed waits for the others to fail too."""

POLL_S = 0.1

AGAIN = "the same command goes on from the last checkpoint"

ENDED_WELL, ENDED_FOR_ANOTHER = "ended as it should", "ended because another rank was lost"
"""Values of `gone/R`; a rank that ends by an error of its own writes that error."""

STORE_ERRORS = (RuntimeError, torch.distributed.DistError)

COMMUNICATION = re.compile(r"gloo|pair closure|NCCL|nccl|Connection closed by peer|Connection reset|ProcessGroup")
"""In messages of RuntimeErrors that torch raises if another rank failed (gloo has no class of its own)."""


@dataclass(frozen=True)
class Verdict:
    """Why ranks end because of another one, and with which exit code."""

    code: int
    reason: str

    @staticmethod
    def parse(text: str) -> Verdict:
        """The verdict from its text in the store."""
        code, _, reason = text.partition(" ")
        return Verdict(int(code), reason)

    def __str__(self) -> str:
        return f"{self.code} {self.reason}"


class Keys:
    """A client of the store. Connecting may take `timeout`, as all ranks of a large job come at once.

    Afterwards a request fails if it waits longer than `wait_s` (1 s at least). Raises torch's DistError.
    """

    def __init__(self, address: str, port: int, timeout: timedelta, wait_s: float) -> None:
        client = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        client.set_timeout(timedelta(seconds=max(1.0, wait_s)))
        self.store = PrefixStore("ted_ds", client)

    def __getitem__(self, key: str) -> str:
        """The value of a key, "" if it is not set."""
        return self.store.get(key).decode(errors="replace") if self.store.check([key]) else ""

    def __setitem__(self, key: str, value: object) -> None:
        self.store.set(key, str(value))

    def name(self, rank: int) -> str:
        """The rank with its host and process, if it has come."""
        return self[f"name/{rank}"] or f"rank {rank}"


class RankWatch:
    """Watches the other ranks, and is watched by them.

    timeout: that of the collectives. address, port: of the launcher's store.
    Raises torch's DistError if the store does not answer at the start. Later it raises nothing: its threads end the
    process.
    """

    def __init__(self, rank: int, size: int, timeout: timedelta, address: str, port: int) -> None:
        self._rank, self._size, self._next = rank, size, (rank + 1) % size
        self._beat_s = min(LONGEST_BEAT_S, timeout.total_seconds() / BEATS)
        self._limit = max(2, round(timeout.total_seconds() / 2 / self._beat_s))  # in beats
        self._master = f"{address}:{port}"
        # a client for the first thread, one for the rest: a request that waits holds up all others of its client
        self._keys_of_thread, self._keys = (Keys(address, port, timeout, self._beat_s) for _ in range(2))
        self._over, self._speaking, self._said = threading.Event(), threading.Lock(), False
        self._keys[f"name/{rank}"] = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._answers = 0
        threading.Thread(target=self._watch_next, name="watch of the next rank", daemon=True).start()
        threading.Thread(target=self._watch_store, name="watch of the store", daemon=True).start()

    def close(self) -> None:
        """This rank leaves as it should, and the others need not miss it."""
        self._tell(self._keys, ENDED_WELL)
        self._over.set()

    def failed(self, error: BaseException) -> None:
        """Handles the exception that ends this rank.

        If another rank is its cause, says which one and ends the process. If not, tells the other ranks and returns:
        the caller raises the error.
        """
        if is_communication(error):
            try:
                verdict = self._find_cause()
            except STORE_ERRORS:
                verdict = self._silent_store()
            if verdict is not None:
                self._leave(verdict, self._keys)
        self._tell(self._keys, f"ended by {type(error).__name__}: {error}"[:1000], error)
        self._over.set()

    def _find_cause(self) -> Verdict | None:
        """The rank because of which this one's collective failed; None if the collective failed on all ranks.

        A poll makes up to three requests, however many ranks there are: only one rank looks at all the others.
        """
        store, deadline = self._keys.store, time.monotonic() + GRACE_S
        self._keys[f"waits/{self._rank}"] = ""
        waiting = [f"waits/{rank}" for rank in range(self._size)]
        while not store.check(["lost"]):
            if store.check(waiting):
                return None
            late = time.monotonic() - deadline
            if store.check(["failed"]) or (late > 0 and store.add("asked", 1) == 1) or late > 2 * GRACE_S:
                self._keys["lost"] = self._blamed(self._keys)
            time.sleep(POLL_S)
        return Verdict.parse(self._keys["lost"])

    def _blamed(self, keys: Keys) -> Verdict:
        """The rank that failed, else those without a beat, else those that have not failed, and so hang."""
        if text := keys["failed"]:
            failed = Verdict.parse(text)
            return Verdict(failed.code, f"{failed.reason}; {AGAIN}")
        missing = [rank for rank in range(self._size) if not keys.store.check([f"waits/{rank}"])]
        before = {rank: keys[f"beat/{rank}"] for rank in missing}
        # in a ring only the neighbours of a dead rank fail: most of the missing ranks wait, and are alive
        time.sleep(3 * self._beat_s)
        silent = [rank for rank in missing if keys[f"beat/{rank}"] == before[rank]]
        names = ", ".join(keys.name(rank) for rank in silent or missing)
        reason = f"{names} took no part in a collective: it died, hangs or is cut off; {AGAIN}"
        return Verdict(RankLost.exit_code, reason)

    def _leave(self, verdict: Verdict, keys: Keys | None) -> None:
        """Ends the process, from any thread, also while the main thread waits. keys: None: the store is silent."""
        with self._speaking:  # once: both threads may find the same
            if not self._said:
                print(f"ted_ds: rank {self._rank}: {verdict.reason}", file=sys.stderr, flush=True)
            self._said = True
        if keys is not None:
            self._tell(keys, ENDED_FOR_ANOTHER)
        os._exit(verdict.code)

    def _tell(self, keys: Keys, how: str, error: BaseException | None = None) -> None:
        """Tells the others how this rank ends. Rank 0, which may serve the store, waits two beats for them to end."""
        try:
            if error is not None:
                code = error.exit_code if isinstance(error, TedError) else RankLost.exit_code
                keys["failed"] = Verdict(code, f"{keys.name(self._rank)} {how}")
            keys[f"gone/{self._rank}"] = how
            deadline = time.monotonic() + 2 * self._beat_s
            others = [f"gone/{rank}" for rank in range(1, self._size)]
            while self._rank == 0 and time.monotonic() < deadline and not keys.store.check(others):
                time.sleep(POLL_S)
        except STORE_ERRORS:
            return  # rank 0 has left before

    def _watch_next(self) -> None:
        """The first thread: gives beats, looks for those of the next rank, and for what any rank has found."""
        keys, beats, heard, seen = self._keys_of_thread, 0, 0, ""
        while not self._over.wait(self._beat_s):
            try:
                beats += 1
                keys[f"beat/{self._rank}"] = beats
                lost = keys["lost"]
                beat, gone = keys[f"beat/{self._next}"], keys[f"gone/{self._next}"]
                self._answers += 1
                if beat != seen or gone == ENDED_WELL:
                    seen, heard = beat, beats
                # a rank that failed is gone for certain: a main thread in CUDA would wait for it until the time-out
                limit = self._limit if not gone else min(self._limit, round(3 * GRACE_S / self._beat_s))
                if not lost and beats - heard > limit:
                    lost = keys["lost"] = str(self._silent_next(keys, gone, (beats - heard) * self._beat_s))
                if lost:
                    if not self._over.is_set():
                        self._leave(Verdict.parse(lost), keys)
                    return
            except STORE_ERRORS:
                continue  # `_watch_store` decides for how long

    def _silent_next(self, keys: Keys, gone: str, seconds: float) -> Verdict:
        if gone and keys.store.check(["failed"]):
            return self._blamed(keys)
        what = gone or f"has given no sign of life for {seconds:.0f} s: it died, hangs or is cut off"
        return Verdict(RankLost.exit_code, f"{keys.name(self._next)} {what}; {AGAIN}")

    def _watch_store(self) -> None:
        """The second thread; it makes no request, as over a cut link a request may wait forever."""
        answers = quiet = 0
        while not self._over.wait(self._beat_s):
            quiet = quiet + 1 if answers == self._answers else 0
            answers = self._answers
            if quiet > self._limit:
                self._leave(self._silent_store(), None)

    def _silent_store(self) -> Verdict:
        reason = f"rank 0's store at {self._master} does not answer: rank 0 died, hangs or is cut off; {AGAIN}"
        return Verdict(RankLost.exit_code, reason)


def is_communication(error: BaseException) -> bool:
    """Whether an error says that a collective failed, so that another rank may be its cause."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and COMMUNICATION.search(str(error)) is not None
