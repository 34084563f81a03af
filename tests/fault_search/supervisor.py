"""What starts workers: a launcher for each, or the supervisor of a semi-PD instance, whose holder keeps the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hbserve.config import InstanceRole
from hbserve.messages.admin import RemoveInstance
from hbserve.messages.client import SchedulerReply
from hbserve.messages.membership import Join, Joined
from hbserve.messages.supervisor import SetWorkers, WorkerLost, WorkerSpec
from tests.fault_search.memory import Arena
from tests.fault_search.scenario import HEARTBEAT_TIMEOUT_S
from tests.fault_search.tiers import TierMemory
from tests.fault_search.worker import Worker

if TYPE_CHECKING:
    from tests.fault_search.world import World

_DRAIN_TIMEOUT_S = 6.0


class Launcher:
    """Starts a worker with memory of its own, and starts it again when it has ended."""

    def __init__(self, world: World, instance_id: str, role: InstanceRole, kv_rank: int) -> None:
        self.world, self.instance_id, self.role, self.kv_rank = world, instance_id, role, kv_rank
        self.address = f"tcp://{instance_id}"
        self.has_left = False
        self.start()

    def start(self) -> None:
        world = self.world
        arena = Arena(self.instance_id, world.scenario.num_blocks, 0, world.check_write)
        self.worker = Worker(
            world,
            self.instance_id,
            self.role,
            self.address,
            arena,
            self.kv_rank,
            self._on_exit,
            world.memories,
        )
        arena.owner = self.worker  # type: ignore[attr-defined]
        world.trace(f"{self.instance_id} starts")

    def _on_exit(self, worker: Worker, is_dismissed: bool) -> None:
        self.world.trace(f"{self.instance_id} has ended")
        self.has_left = is_dismissed
        if not is_dismissed:
            self.world.after(self.world.rng.uniform(0.05, 1.0), self.start)
            return
        # A scheduler that was started since the removal does not know of it.
        message = RemoveInstance(query_id=0, instance_id=self.instance_id, deadline_s=0.0, has_ended=True)
        self.world.from_client(b"launcher", self.world.scheduler.number, message)

    @property
    def workers(self) -> list[Worker]:
        return [self.worker] if self.worker.is_alive else []


class Joiner:
    """Starts an instance that the configuration does not name, and has it join the system.

    It asks again when its worker does not hear the scheduler, and when its worker has ended without being told to.
    """

    def __init__(self, world: World, number: int, role: InstanceRole) -> None:
        self.world, self.role = world, role
        self.instance_id, self.address = f"j{number}", f"tcp://127.0.0.1:{9000 + number}"
        self.identity = self.instance_id.encode()
        self.worker: Worker | None = None
        self.has_left = False
        self._keep_asking()

    @property
    def workers(self) -> list[Worker]:
        return [] if self.worker is None or not self.worker.is_alive else [self.worker]

    def _keep_asking(self) -> None:
        if self.has_left:
            return
        if not self.workers or self.world.now - self.workers[0].last_ping > HEARTBEAT_TIMEOUT_S:
            message = Join(
                instance_id=self.instance_id, role=self.role, address=self.address, kv_rank=None, num_ranks=None
            )
            self.world.from_client(self.identity, self.world.scheduler.number, message)
        self.world.after(1.0, self._keep_asking)

    def on_reply(self, session: int, reply: SchedulerReply) -> None:
        if isinstance(reply, Joined) and reply.error is None and not self.workers and not self.has_left:
            arena = Arena(self.instance_id, self.world.scenario.num_blocks, 0, self.world.check_write)
            name = f"{self.instance_id}/{self.world.new_number()}"
            memories = [
                memory
                if memory.info.by_name
                else TierMemory(memory.info.name, name, memory.info.num_slots, is_own=True)
                for memory in self.world.memories
            ]
            self.worker = Worker(
                self.world, self.instance_id, self.role, self.address, arena, reply.kv_rank, self._on_exit, memories
            )
            arena.owner = self.worker  # type: ignore[attr-defined]

    def _on_exit(self, worker: Worker, is_dismissed: bool) -> None:
        self.world.trace(f"{self.instance_id} has ended")
        self.has_left |= is_dismissed


class Split(NamedTuple):
    """How the phases share the device, in percent."""

    prefill: int
    decode: int
    is_mixed: bool = False


class Supervisor:
    """The supervisor of a semi-PD instance: it owns the memory's holder, and says which workers there are."""

    identity = b"supervisor"

    def __init__(self, world: World, instance_id: str) -> None:
        self.world, self.instance_id = world, instance_id
        self.session = world.scheduler.number
        self._by_id: dict[str, Worker] = {}
        self._shares: dict[str, int] = {}
        self._current: list[str] = []
        self._draining: list[str] = []
        self._split = Split(80, 60)
        self.arena: Arena | None = None
        self._count = 0
        self._start_holder()

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker in self._by_id.values() if worker.is_alive]

    # --- what the scheduler is told --------------------------------------------------------------

    def _announce(self, reason: str) -> None:
        def specs(names: list[str]) -> list[WorkerSpec]:
            return [
                WorkerSpec(
                    worker_id=name, role=self._by_id[name].role, percentage=self._shares[name], address=f"tcp://{name}"
                )
                for name in names
            ]

        message = SetWorkers(
            instance_id=self.instance_id,
            arena_epoch=0 if self.arena is None else self.arena.epoch,
            workers=specs(self._current),
            draining=specs(self._draining),
            prefill_percentage=self._split.prefill,
            decode_percentage=self._split.decode,
            mixed=self._split.is_mixed,
            reason=reason,
        )
        self.world.from_client(self.identity, self.session, message)

    def on_new_scheduler(self) -> None:
        self.session = self.world.scheduler.number
        self._announce("there is a new scheduler")

    def on_reply(self, session: int, reply: SchedulerReply) -> None:
        if isinstance(reply, WorkerLost) and reply.worker_id in self._by_id:
            self.world.trace(f"supervisor kills {reply.worker_id}: {reply.reason}")
            self._by_id[reply.worker_id].end()

    # --- processes -------------------------------------------------------------------------------

    def _start_holder(self) -> None:
        world = self.world
        self.arena = Arena(self.instance_id, world.scenario.num_blocks, world.new_number(), world.check_write)
        self._current = [self._start(role, share) for role, share in self._wanted]
        self._announce("the memory is there")

    def _start(self, role: InstanceRole, share: int) -> str:
        assert self.arena is not None
        self._count += 1
        name = f"{self.instance_id}-{role}-{self._count}"
        self._shares[name] = share
        self._by_id[name] = Worker(
            self.world,
            name,
            role,
            f"tcp://{name}",
            self.arena,
            0,
            lambda worker, _: self._on_exit(worker),
            self.world.memories,
        )
        self.world.trace(f"{name} starts")
        return name

    def _on_exit(self, worker: Worker) -> None:
        self.world.after(self.world.rng.uniform(0.005, 0.1), lambda: self._on_ended(worker))

    def _on_ended(self, worker: Worker) -> None:
        """A worker's process has ended, and so it writes nothing any more."""
        name = worker.name
        self.world.trace(f"supervisor: {name} has ended")
        del self._by_id[name]
        if name in self._draining:
            self._draining.remove(name)
            self._announce(f"{name} has ended")
        elif name in self._current:
            self._current.remove(name)
            if self.arena is not None:
                self._announce(f"{name} was lost")
                self.world.after(self.world.rng.uniform(0.05, 0.5), self._complete)
        if self.arena is None and not self._by_id:
            self.world.after(0.2, self._start_holder)

    def _complete(self) -> None:
        """Start what is missing."""
        if self.arena is None:
            return
        there = [(self._by_id[name].role, self._shares[name]) for name in self._current]
        missing = [wanted for wanted in self._wanted if wanted not in there]
        if missing:
            self._current += [self._start(role, share) for role, share in missing]
            self._announce("a lost worker is replaced")

    @property
    def _wanted(self) -> list[tuple[InstanceRole, int]]:
        """The workers of the split, each with its share."""
        split, steps = self._split, ((100,) if self.world.scenario.has_ladder else ())
        if split.is_mixed:
            return [(InstanceRole.UNIFIED, 100)]
        return [(InstanceRole.PREFILL, share) for share in (split.prefill, *steps)] + [
            (InstanceRole.DECODE, share) for share in (split.decode, *steps)
        ]

    def rotate(self, split: Split) -> None:
        """Change to another split; workers that it has no place for finish their steps and end."""
        if self.arena is None:
            return
        self._split = split
        wanted = self._wanted
        for name in list(self._current):
            share = self._by_id[name].role, self._shares[name]
            if share in wanted:
                wanted.remove(share)
                continue
            self._current.remove(name)
            self._draining.append(name)
            self.world.after(_DRAIN_TIMEOUT_S, self._by_id[name].end)  # one that was lost does not end by itself
        self._current += [self._start(role, share) for role, share in wanted]
        self._announce("rotation")

    def kill_holder(self) -> None:
        """The memory is lost, and every worker on it."""
        if self.arena is None:
            return
        self.arena = None
        names, self._current, self._draining = list(self._by_id), [], []
        self._announce("the holder was lost")
        for name in names:
            self._by_id[name].end()
        if not names:
            self.world.after(0.2, self._start_holder)
