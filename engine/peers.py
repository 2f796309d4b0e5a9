"""Ranks (the processes of a run) watch each other: if one is gone, the others end within a minute.

Off the reading path. NCCL, by which GPUs talk to each other, does not notice that a rank is gone and waits on. So every rank
has a thread that counts up a number of its own in the launcher's store (a small table that all ranks read and write) and
reads those of the others. A number that stands still for half a minute belongs to a process that was killed, or to a machine
that is gone. A rank that works, however long, counts on: torch and NCCL let other threads run while they compute or wait.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]


class Watcher(threading.Thread):
    """Says every few seconds that this rank lives, and ends its process when another one failed or fell silent.

    Before that the process has `grace` seconds to end by itself, with a better message than a thread has. All times are in
    seconds; `silent + every + grace` is below a minute. Nobody else uses this connection to the store, so nobody's wait can
    block this thread.
    """

    def __init__(self, every: float = 5, silent: float = 30, grace: float = 15) -> None:
        """The watcher of this process. The ranks must have met; `start` begins the watch."""
        super().__init__(daemon=True)
        self.every, self.silent, self.grace = every, silent, grace
        self.rank, self.parting, self.last_word = dist.get_rank(), threading.Event(), ""

    def run(self) -> None:
        """Watch until this rank parts, or another one is lost."""
        try:
            address, limit = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=self.silent)
            client = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=limit)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart by torchrun
            lost = self.loses_one(PrefixStore(f"peers/{attempt}", client))
        except RuntimeError:  # the store is gone, and so is the launcher or rank 0, which held it
            lost = True
        if lost and not self.parting.wait(self.grace):
            print(f"rank {self.rank}: error: another rank has ended", file=sys.stderr, flush=True)
            os._exit(1)

    def loses_one(self, store: Store) -> bool:
        """Whether another rank was lost before this one parted."""
        heard = {peer: (0, 0) for peer in range(dist.get_world_size()) if peer != self.rank}  # number, looks it stood still
        while not self.parting.wait(self.every):
            store.add(f"beats/{self.rank}", 1)
            beats = {peer: store.add(f"beats/{peer}", 0) for peer in heard}
            heard = {p: (beats[p], looks + 1 if beats[p] == before else 0) for p, (before, looks) in heard.items()}
            # Looks, not the clock: a job that was suspended as a whole has missed none.
            still = [peer for peer, (_, looks) in heard.items() if looks * self.every > self.silent]
            if store.check(["failed"]) or not all(store.check([f"parted/{peer}"]) for peer in still):
                return True
        store.set(self.last_word, "")
        return False

    def part(self, last_word: str) -> None:
        """Stop watching and leave a last word for the others."""
        self.last_word = last_word
        self.parting.set()
        self.join(self.every)


@contextmanager
def watched() -> Iterator[None]:
    """The ranks watch each other while the work lasts; one whose work fails tells the others."""
    watcher = Watcher()
    watcher.start()
    try:
        yield
    except BaseException:
        watcher.part("failed")
        raise
    watcher.part(f"parted/{watcher.rank}")
