"""The watch: every rank's heartbeat in the launch's store, so that a rank that died or hangs is named.

A thread per rank writes its heartbeat once a second and reads the heartbeats of the others. If a rank died, failed or
hangs, the others reach a verdict: one sentence with rank, node and phase. The main thread then has a few seconds to
stop by itself (a collective with a dead peer usually raises), and the process ends. Without the watch the other ranks
would wait for a collective's time-out of half an hour, which does not name the rank.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from data.errors import first_line
from rollout import RunError

BEAT_SECONDS = 1.0
"""Time between two heartbeats."""
SILENT_SECONDS = 10.0
"""A rank without a heartbeat for this long counts as dead."""
PAUSE_SECONDS = 10.0
"""A rank whose own heartbeats are further apart was stopped (Slurm's SUSPEND, SIGSTOP), or its store is slow: what is more is no
time without progress."""
SILENT_LOOKS = 5
"""And without one in so many looks of the rank that judges."""
JOIN_SECONDS = 300.0
"""A rank that has sent no heartbeat this long after the start of this rank is lost; after --hang-seconds where that is less."""
LATE_SECONDS = 30.0
"""After so long rank 0 says for which ranks all wait: one that was killed before it had joined cannot say it itself."""
MEET_SECONDS = 0.1
"""Time between two looks at who has come to a meeting."""
GOODBYE_SECONDS = 60.0
"""How long rank 0, at the very end, waits for the others to leave the store."""
STORE_BEATS = 30
"""A store that has answered nothing for so many looks, one every BEAT_SECONDS, counts as gone."""
CLOSE_SECONDS = 5.0
"""How long a rank that ends waits for its last word to reach the store."""
GRACE_SECONDS = 8.0
"""Time from the verdict to the end of the process."""
STACKS_SECONDS = 15.0
"""How long a rank waits for the others' stacks after a hang."""
WAITING_SECONDS = 10.0
"""A wait for another rank that lasts so long is written to status.json."""


class RankLost(RunError):
    """Another rank died, failed or hangs; the message names its rank, node and phase."""


@dataclass
class Beat:
    """The heartbeat of a rank: what it reports about itself."""

    rank: int
    node: str
    host: str
    pid: int
    number: int = 0
    """Heartbeats so far."""
    progress: int = 0
    """Phases and micro-batches finished so far."""
    phase: str = "start"
    step: int = 0
    """1-based; 0 before the first step."""
    waiting: str = ""
    """The collective in which it waits for other ranks; empty while it works."""
    seconds: float = 0.0
    """Time since its progress last changed."""
    failed: str = ""
    """The error that ended it; empty otherwise."""
    done: bool = False
    """It left the run in order."""

    def __str__(self) -> str:
        return f"rank {self.rank} on node {self.node} ({self.host.split('|')[0]}, process {self.pid})"

    def place(self) -> str:
        return f"phase '{self.phase}'" + (f" of step {self.step}" if self.step else "")


def this_host() -> str:
    """Name of machine, boot and process namespace. Ranks with equal names can look up each other's processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            boot = handle.read().strip()
        # containers of one machine share its boot id, but a process number means nothing in another container
        return f"{socket.gethostname()}|{boot}|{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: a name that no other rank has
        return f"{socket.gethostname()}|{os.getpid()}"


class Watch:
    """One rank's heartbeat, and its view of the others.

    store: shared by all `size` ranks of the launch. hang_seconds: longest allowed time without progress.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, hang_seconds: float) -> None:
        # a clone is a connection of its own: the main thread can block in the store without silencing the heartbeat
        self.store, self.size, self.hang_seconds = store.clone(), size, hang_seconds
        # torchrun says it, or srun; else the ranks of a node follow one another
        node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID")
        node = node or str(rank // int(os.environ.get("LOCAL_WORLD_SIZE") or size))
        self.me = Beat(rank=rank, node=node, host=this_host(), pid=os.getpid())
        self.verdict = ""
        self.since = self.began = self.beaten = time.monotonic()
        """When something was finished; when this rank joined; when it last sent a heartbeat."""
        self.on_hang: Callable[[], None] = lambda: None
        """Called on a hang, to let a process of this rank (its sampler) print its stacks too."""
        self.on_wait: Callable[[str], None] = lambda who: None
        """Called, at most every WAITING_SECONDS, with whom this rank has been waiting for as long."""
        self.on_lost: Callable[[BaseException], None] = lambda error: None
        """Called before the process is ended because the main thread is stuck."""
        self.last_told, self.late_told = self.began, False
        self.teller: threading.Thread | None = None
        """Calls on_wait."""
        self.heard: dict[int, tuple[int, float, int]] = {}
        """rank -> (number of its last heartbeat, when it came, at which of this rank's looks)."""
        self.looks = 0
        self.over = threading.Event()
        self.rounds = self.unanswered = 0
        """Rounds of heartbeats made; looks of the guard in which no round was finished."""
        self.publish()  # at once: the others learn that this rank has joined
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()
        threading.Thread(target=self.guard, name="guard of the watch", daemon=True).start()

    # ---- called by the main thread

    def enter(self, phase: str, step: int) -> None:
        """A new phase begins."""
        self.me.phase, self.me.step = phase, step
        self.advance()

    def advance(self) -> None:
        """Something was finished: a micro-batch or a phase."""
        self.me.progress += 1
        self.since = time.monotonic()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside this context the rank waits for others, so it is not the rank to blame for a hang."""
        before, self.me.waiting = self.me.waiting, what
        try:
            yield
        finally:
            self.me.waiting = before

    def meet(self, what: str) -> None:
        """Return once all ranks of the launch have called this. Raises RankLost if one of them is lost meanwhile."""
        # a counter in the store and not a collective: ranks that only sample are in no process group with the others.
        # it is never reset, so each `what` works once per launch
        place = "meet/" + "-".join(what.split())
        try:
            self.store.add(place, 1)
            while self.store.add(place, 0) < self.size and not self.verdict:
                time.sleep(MEET_SECONDS)
        except RuntimeError as error:  # the rank that holds the store is gone
            raise RankLost(self.explain(error) or f"the store of the launch is gone ({first_line(error)})") from None
        if self.verdict:
            raise RankLost(self.verdict)

    def close(self, failed: str = "") -> None:
        """End the thread and publish how this rank ended."""
        self.over.set()
        self.thread.join(timeout=CLOSE_SECONDS)  # it may be stuck in a store that is gone
        self.me.failed, self.me.done = failed, not failed
        in_time(self.publish)

    def leave_store(self) -> None:
        """The last use of the store, after close(): rank 0 returns once no other rank will use it any more.

        Where no launcher holds the store (Slurm's srun), rank 0 does, and it ends with rank 0's process.
        """
        if self.me.rank:
            in_time(lambda: self.store.add("meet/gone", 1))
            return
        deadline = time.monotonic() + GOODBYE_SECONDS  # a rank that died after its work must not keep this one

        def wait_for_all() -> None:
            while self.store.add("meet/gone", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(MEET_SECONDS)

        in_time(wait_for_all, GOODBYE_SECONDS + CLOSE_SECONDS)

    def explain(self, error: BaseException) -> str:
        """Why a collective raised: the verdict, or "" if no other rank is to blame. Waits some seconds for one."""
        # a rank is declared dead only after SILENT_SECONDS, while a collective with it fails at once; in rounds, which a
        # busy machine makes slowly; longer while the store is silent: then the guard is about to say so
        enough, most = self.rounds + SILENT_SECONDS / BEAT_SECONDS + 3, time.monotonic() + 6 * SILENT_SECONDS
        while not self.verdict and ((self.rounds < enough and time.monotonic() < most) or self.unanswered > 3):
            time.sleep(0.1)
        return self.verdict

    # ---- called by the thread

    def run(self) -> None:
        """Write and read heartbeats until the run is over or a rank is lost."""
        beats: list[Beat] = []
        while not self.over.wait(BEAT_SECONDS):  # a pause that close() ends early
            try:
                self.publish()
                beats = self.read()
                if not self.verdict:
                    self.verdict = self.judge(beats, time.monotonic())
                self.tell_who_is_waited_for(beats)
                self.tell_who_is_late(beats, time.monotonic())
            except RuntimeError as error:  # the base of every error of torch.distributed
                self.verdict = (
                    f"the store of the launch does not answer: the launcher of node 0 is gone ({first_line(error)})"
                )
            self.rounds += 1
            if self.verdict:
                self.give_up(beats)
                return

    def guard(self) -> None:
        """In a thread of its own: a call of the store never returns when the link to node 0 is gone, so `run` cannot see it.

        It counts its own looks, not seconds: a process that was stopped, or whose lock native code held, has missed none.
        """
        seen = -1
        while not self.over.wait(BEAT_SECONDS) and not self.verdict:
            self.unanswered = self.unanswered + 1 if self.rounds == seen else 0
            seen = self.rounds
            if self.unanswered >= STORE_BEATS:
                silent = f"the store of the launch has not answered for {STORE_BEATS * BEAT_SECONDS:.0f} s"
                self.verdict = f"{silent}: node 0, or the network to it, is gone"
                self.give_up()

    def publish(self) -> None:
        """Write this rank's heartbeat."""
        self.me.number += 1
        now = time.monotonic()
        if (stopped := now - self.beaten - PAUSE_SECONDS) > 0:
            self.since = min(now, self.since + stopped)  # min: something may be done since it went on
            self.began += stopped
        self.beaten = now
        self.me.seconds = now - self.since
        self.store.set(f"watch/{self.me.rank}", json.dumps(asdict(self.me)))

    def read(self) -> list[Beat]:
        """The heartbeats of the other ranks that have joined."""
        names = [f"watch/{rank}" for rank in range(self.size) if rank != self.me.rank]
        # check first: a get of a key that is not there would block this thread
        names = [name for name in names if self.store.check([name])]
        return [Beat(**json.loads(value)) for value in (self.store.multi_get(names) if names else [])]

    def judge(self, beats: list[Beat], now: float) -> str:
        """The verdict on the others at time `now` (of time.monotonic); "" while all is well."""
        self.looks += 1
        for beat in beats:
            if beat.done:  # its silence is no death
                continue
            if beat.failed:
                return f"{beat} failed in {beat.place()}: {beat.failed}"
            # -1: the first heartbeat is always new
            number, heard, look = self.heard.get(beat.rank, (-1, now, self.looks))
            # compare numbers, not times: the clocks of two nodes may differ
            if beat.number != number:
                self.heard[beat.rank] = (beat.number, now, self.looks)
            # seconds alone would blame the others for a pause of this machine, or of the store
            elif now - heard > SILENT_SECONDS and self.looks - look >= SILENT_LOOKS:
                return f"{beat} died in {beat.place()}: no sign of life for {now - heard:.0f} s"
            elif beat.host == self.me.host and is_gone(beat.pid):
                return f"{beat} died in {beat.place()}: its process is gone"
        missing, limit = self.missing(beats), min(JOIN_SECONDS, self.hang_seconds)
        if missing and now - self.began > limit:
            why = f" (--hang-seconds {self.hang_seconds:g})" if limit < JOIN_SECONDS else ""
            return f"{missing} not joined in {limit:.0f} s{why}: look at what its launcher printed"
        everyone = sorted([*beats, self.me], key=lambda beat: beat.rank)
        alive = [beat for beat in everyone if not beat.done]
        stuck = [beat for beat in alive if beat.seconds > self.hang_seconds]
        # ranks that wait for a slow rank make no progress either: they hang only if nobody works
        if not stuck or (len(stuck) < len(alive) and all(beat.waiting for beat in stuck)):
            return ""
        # blame a working rank before a waiting one, and among those the rank with the least progress
        working = [beat for beat in stuck if not beat.waiting] or stuck
        least = min(beat.progress for beat in working)
        first, *tied = [beat for beat in working if beat.progress == least]
        others = f" (or rank {', '.join(str(beat.rank) for beat in tied)}, as far as it)" if tied else ""
        return (
            f"{first}{others} hangs in {first.place()}: no progress for {first.seconds:.0f} s (--hang-seconds "
            f"{self.hang_seconds:g})" + (f", waiting for {first.waiting}" if first.waiting else "")
        )

    def missing(self, beats: list[Beat]) -> str:
        """ "rank 1 has", "ranks 1, 3 have": those of which nothing was ever heard; "" when all have joined."""
        ranks = sorted(set(range(self.size)) - {beat.rank for beat in beats} - {self.me.rank})
        numbers = ", ".join(map(str, ranks))
        return (f"ranks {numbers} have" if len(ranks) > 1 else f"rank {numbers} has") if ranks else ""

    def tell_who_is_late(self, beats: list[Beat], now: float) -> None:
        """Rank 0 says once on which ranks the start waits."""
        if self.me.rank or self.late_told or now - self.began < LATE_SECONDS:
            return
        if missing := self.missing(beats):
            say(f"note: {missing} not joined after {LATE_SECONDS:.0f} s; all others wait")
        self.late_told = True

    def tell_who_is_waited_for(self, beats: list[Beat]) -> None:
        """Call on_wait when this rank has been waiting for long. beats: of the other ranks."""
        what, seconds = self.me.waiting, time.monotonic() - self.since
        if not what or min(seconds, time.monotonic() - self.last_told) < WAITING_SECONDS:
            return
        self.last_told = time.monotonic()
        working = [f"{beat} in {beat.place()}" for beat in beats if not (beat.done or beat.waiting)]
        if (
            self.teller is None or not self.teller.is_alive()
        ):  # it writes a file: a slow disk must not stop the heartbeats
            text = f"{', '.join(working) or what}, for {seconds:.0f} s"
            self.teller = threading.Thread(target=self._tell, args=(text,), daemon=True)
            self.teller.start()

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # it is no more than a note
            self.on_wait(text)

    def give_up(self, beats: Sequence[Beat] = ()) -> None:
        """Print the stacks of a hang, and end the process with the verdict unless the main thread ends first."""
        if " hangs in " in self.verdict:
            with suppress(RuntimeError):  # the store may go meanwhile
                self.show_stacks(beats)
        # os._exit and not sys.exit: the main thread may be blocked in native code for ever
        if not self.over.wait(GRACE_SECONDS):
            say(f"{self.me} stops in {self.me.place()}: {self.verdict}")
            self.on_lost(RankLost(self.verdict))
            os._exit(1)

    def show_stacks(self, beats: Sequence[Beat]) -> None:
        """Every rank stores its own stacks; the first rank that is alive prints the stacks of all. beats: of the others."""
        self.on_hang()
        self.store.set(f"watch/stacks/{self.me.rank}", stacks())
        # the other ranks reach their verdict with their next heartbeat; one in native code never stores any
        there, deadline = [self.me.rank], time.monotonic() + STACKS_SECONDS
        alive = {self.me.rank, *(beat.rank for beat in beats if not beat.done)}
        while alive - set(there) and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS)
            there = [rank for rank in range(self.size) if self.store.check([f"watch/stacks/{rank}"])]
        if self.me.rank != there[0]:
            return
        for rank in there:
            say(f"---- stacks of rank {rank}\n{self.store.get(f'watch/stacks/{rank}').decode()}")
        missing = sorted(set(range(self.size)) - set(there))
        if missing:
            say(f"---- no stacks of rank {', '.join(map(str, missing))}: in native code, stopped, or gone")


def in_time(call: Callable[[], object], seconds: float | None = None) -> None:
    """Make a call of the store, and leave it alone if it takes longer: over a link that is gone it never returns.

    seconds: None is CLOSE_SECONDS.
    """

    def quietly() -> None:
        with suppress(RuntimeError):  # the store is gone already, so no rank is left to read it
            call()

    thread = threading.Thread(target=quietly, name="last words", daemon=True)
    thread.start()
    thread.join(timeout=CLOSE_SECONDS if seconds is None else seconds)


def stacks() -> str:
    """The Python stack of every thread of this process, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: names.get(item[0]) != "MainThread")
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)) for ident, frame in frames
    )


def is_gone(pid: int) -> bool:
    """Has this process of this machine ended? A zombie, which waits for its parent to read its exit code, has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            # the field before the state is the program's name in brackets, which may hold spaces and brackets itself
            return handle.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # gone before the opening, or between it and the reading
        return True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
