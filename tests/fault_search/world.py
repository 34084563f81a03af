"""The simulated world: clock, wires, processes and faults around the real scheduler core."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from hbserve.config import InstanceRole
from hbserve.messages.admin import PrepareRoles, RemoveInstance, SetRole
from hbserve.messages.client import AbortRequest, ClientMessage, SchedulerReply, SubscribeReady
from hbserve.messages.membership import Join
from hbserve.messages.supervisor import Predecessor, SetWorkers
from hbserve.messages.transfer import Peer
from hbserve.messages.worker import InstanceCommand, InstanceReply, StepRef
from hbserve.scheduler.core_io import ClientGone, ConnectionBroke, FromClient, FromWorker, InboxEvent, Outbox, Start
from hbserve.scheduler.scheduler import CpuScheduler
from tests.fault_search.checks import check_books, check_idle, check_nothing_was_overlooked
from tests.fault_search.client import Client, _Request
from tests.fault_search.memory import MAX_RANKS, NOTHING, Arena
from tests.fault_search.scenario import HEARTBEAT_TIMEOUT_S, Fault, Scenario
from tests.fault_search.supervisor import Joiner, Launcher, Split, Supervisor
from tests.fault_search.tiers import TierMemory
from tests.fault_search.worker import Line, Process, Worker

_START = 1000.0
_DEADLINE_S = 200.0
"""Simulated time after the last fault by which every request must have ended."""
_STEPS_PER_CHECK = 8
_MAX_JOINERS = 3
_REPEATABLE = AbortRequest, SubscribeReady, SetWorkers, SetRole, PrepareRoles, RemoveInstance, Join
"""Messages that mean the same if they come twice."""
_ROLES = InstanceRole.PREFILL, InstanceRole.DECODE
_PLAIN_ROLES = (*_ROLES, InstanceRole.UNIFIED)


class FoundFault(AssertionError):
    """The system did something wrong."""


class SchedulerProcess(Process):
    """The scheduler's process: the real core, with a simulated shell."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"scheduler-{number}")
        self.number = number
        addresses = {
            instance.instance_id: f"tcp://{instance.instance_id}"
            for instance in world.config.gpu_instances
            if instance.instance_type is not InstanceRole.SEMI_PD
        }
        predecessor = None
        if number > 1:
            removed = [launcher.instance_id for launcher in world.configured if launcher.has_left]
            predecessor = Predecessor(reason="killed", failed=False, num_restarts=number - 1, removed=removed)
        self.core = CpuScheduler(world.config, addresses, Start(world.now, int(world.now * 1e9), predecessor))
        self.connections: dict[int, str] = {}
        self.num_steps = 0
        self._inbox: list[InboxEvent] = []
        self._is_woken = False
        self._alarm = 0
        self.wake()

    def post(self, event: InboxEvent) -> None:
        if self.is_alive:
            self._inbox.append(event)
            self.wake()

    def wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self.after(self.world.rng.choice((0.0, 0.0001, 0.002)), self._step)

    def _step(self) -> None:
        world = self.world
        self._is_woken = False
        inbox, self._inbox = self._inbox, []
        outbox = self.core.step(world.now, inbox)
        self.num_steps += 1
        self._act(outbox)
        if self.num_steps % _STEPS_PER_CHECK == 0:
            check_books(self.core)
        if world.supervisor is None and outbox.call_at > world.now:
            self._act(check_nothing_was_overlooked(self.core, world.now))

    def _act(self, outbox: Outbox) -> None:
        world = self.world
        self.connections.update(outbox.connects)
        for connection, command in outbox.to_workers:
            if connection in self.connections:
                world.to_worker(self, connection, self.connections[connection], command)
        for client, reply in outbox.to_clients:
            world.to_client(self, client, reply)
        for connection in outbox.disconnects:
            del self.connections[connection]
        for _, text in outbox.log:
            world.trace(f"{self.name}: {text}")
        self._alarm += 1
        alarm = self._alarm
        world.at(outbox.call_at, lambda: self.do(lambda: self.wake() if alarm == self._alarm else None))

    def die(self) -> None:
        self.is_alive = False


class World:
    """One run of a scenario.

    Args:
        tell: called with each line of the trace.
    """

    def __init__(self, scenario: Scenario, tell: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.config = scenario.config()
        self.now = _START
        self.rng = random.Random(scenario.seed)
        self._tell = tell
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = self._last_number = 0
        self._last_delivery: dict[object, float] = {}
        self.listeners: dict[str, Worker] = {}
        self.requests: dict[str, _Request] = {}
        self.is_wire_bad = self.is_wire_noisy = self._kills_awaited = self.is_tier_bad = False
        self.tier_rng = random.Random(scenario.seed)
        self.memories = [TierMemory(kind, "shared", num_slots) for kind, num_slots in scenario.tier_slots.items()]
        self.launchers: list[Launcher | Joiner] = []
        self._to_be_removed: set[str] = set()
        self.scheduler = SchedulerProcess(self, 1)
        self.clients = {identity: Client(self, identity) for identity in (b"a", b"b")}
        self.supervisor: Supervisor | None = None
        for kv_rank, instance in enumerate(self.config.gpu_instances):
            if instance.instance_type is InstanceRole.SEMI_PD:
                self.supervisor = Supervisor(self, instance.instance_id)
            else:
                self.launchers.append(Launcher(self, instance.instance_id, instance.instance_type, kv_rank))

    # --- time ------------------------------------------------------------------------------------

    def at(self, time: float, work: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (max(time, self.now), self._num_events, work))

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        self.at(self.now + seconds, work)

    def new_number(self) -> int:
        """Return a number that grows, as the time does that real processes take for an epoch."""
        self._last_number = max(self._last_number + 1, int(self.now * 1e9))
        return self._last_number

    def trace(self, *parts: object) -> None:
        """Add a line to the trace, if there is one."""
        if self._tell is not None:
            self._tell(f"{self.now - _START:9.4f} {' '.join(map(str, parts))}")

    def fault(self, text: str) -> FoundFault:
        """Return the error that ends the run."""
        self.trace(f"WRONG: {text}")
        return FoundFault(text)

    # --- wires: in order between two ends, and never at once -------------------------------------

    def _deliver(self, wire: object, work: Callable[[], None]) -> None:
        delay_s = self.rng.choice((0.0001, 0.0003, 0.001, 0.01))
        at = max(self.now + delay_s, self._last_delivery.get(wire, 0.0))
        self._last_delivery[wire] = at
        self.at(at, work)

    def to_worker(self, scheduler: SchedulerProcess, connection: int, address: str, command: InstanceCommand) -> None:
        line = scheduler.number, connection
        self.trace("to", address, command)

        def arrive() -> None:
            worker = self.listeners.get(address)
            if worker is not None:
                worker.do(lambda: worker.on_command(line, command))

        self._deliver((line, "out"), arrive)

    def to_scheduler(self, worker: Worker, line: Line, reply: InstanceReply) -> None:
        self.trace("from", worker.name, reply)
        self._post_on(worker, line, FromWorker(line[1], reply))

    def break_connection(self, worker: Worker, line: Line) -> None:
        self._post_on(worker, line, ConnectionBroke(line[1]))

    def _post_on(self, worker: Worker, line: Line, event: InboxEvent) -> None:
        scheduler, connection = self.scheduler, line[1]
        if scheduler.number != line[0]:
            return  # of a scheduler that has ended

        def arrive() -> None:
            if connection in scheduler.connections:
                scheduler.post(event)

        self._deliver((worker, line), arrive)

    def from_client(self, client: bytes, session: int, message: ClientMessage) -> None:
        scheduler = self.scheduler
        if scheduler.number == session:
            self.trace("from", client, message)
            is_repeated = self.scenario.repeats and isinstance(message, _REPEATABLE) and self.rng.random() < 0.3
            for _ in range(1 + is_repeated):
                self._deliver((client, session, "in"), lambda: scheduler.post(FromClient(client, message)))

    def to_client(self, scheduler: SchedulerProcess, identity: bytes, reply: SchedulerReply) -> None:
        client: Client | Supervisor | Joiner | None = self.clients.get(identity) or self.supervisor
        client = next((joiner for joiner in self._joiners if joiner.identity == identity), client)
        if client is None:
            return
        if isinstance(client, Client) and not client.is_alive:
            scheduler.post(ClientGone(identity))
            return
        self._deliver((identity, scheduler.number), lambda: client.on_reply(scheduler.number, reply))

    def receiver_of(self, peer: Peer) -> Worker | None:
        """Return the worker that a transfer goes to, if it is still the one that was meant."""
        for launcher in self.launchers:
            for worker in launcher.workers:
                if (worker.kv_rank, worker.epoch) == (peer.rank // MAX_RANKS, peer.epoch):
                    return worker
        return None

    def on_wire(self, contents: list[int], part: int) -> list[int]:
        """Return contents as they arrive: damaged, where the wire is noisy and checksums are compared."""
        if self.is_wire_noisy and self.scenario.verify and self.rng.random() < 0.3:
            return [contents[0] ^ (part & -part), *contents[1:]]
        return list(contents)

    # --- memory ----------------------------------------------------------------------------------

    def check_write(self, arena: Arena, block: int, offset: int, contents: int) -> None:
        """Check that a write harms nobody: the block has an owner, and is not sealed with other contents."""
        core = self.scheduler.core
        instance = core.instances.get(arena.instance_id)
        if instance is None or not self.scheduler.is_alive or instance.unsettled or not instance.arena_epoch:
            return
        owner: Worker | None = getattr(arena, "owner", None)
        if instance.arena_epoch != (arena.epoch if owner is None else owner.epoch):
            return
        pool = instance.pool
        if not pool._owners[block]:
            raise self.fault(f"a write into block {block} of {arena.instance_id}, which has no owner")
        before = arena.blocks[block][offset]
        if pool._hash[block] is not None and before not in (NOTHING, contents):
            raise self.fault(f"a write into block {block} of {arena.instance_id}, which is sealed")

    # --- faults ----------------------------------------------------------------------------------

    @property
    def workers(self) -> list[Worker]:
        if self.supervisor is not None:
            return self.supervisor.workers
        return [worker for launcher in self.launchers for worker in launcher.workers]

    def _inject(self, fault: Fault) -> None:
        workers, number = self.workers, fault.number
        self.trace(f"FAULT: {fault.kind} {number} for {fault.lasts_s} s")
        match fault.kind:
            case "kill_worker" if workers:
                worker = workers[number % len(workers)]
                self.trace(f"kill {worker.name}")
                worker.end()
            case "kill_awaited":
                self._kills_awaited = True
            case "stop_worker" if workers:
                self._stop(workers[number % len(workers)], fault.lasts_s)
            case "kill_scheduler":
                self._kill_scheduler()
            case "stop_scheduler":
                if fault.lasts_s < HEARTBEAT_TIMEOUT_S:
                    self._stop(self.scheduler, fault.lasts_s)
                else:
                    self.scheduler.stop()  # its launcher kills it
                    self.after(fault.lasts_s, self._kill_scheduler)
            case "bad_wire":
                self.is_wire_bad, self.is_wire_noisy = number % 2 == 0, number % 2 == 1
                self.after(fault.lasts_s, self._mend_wire)
            case "bad_tier":
                self.is_tier_bad = True
                self.after(fault.lasts_s, self._mend_tier)
            case "kill_client":
                list(self.clients.values())[number % 2].die()
            case "rotate" if self.supervisor is not None:
                self.supervisor.rotate(Split(30 + 10 * (number % 7), 50))
            case "rotate_mixed" if self.supervisor is not None:
                self.supervisor.rotate(Split(50, 50, is_mixed=True))
            case "kill_holder" if self.supervisor is not None:
                self.supervisor.kill_holder()
            case "set_role":
                launcher = self.launchers[number % len(self.launchers)]
                role = _PLAIN_ROLES[number % len(_PLAIN_ROLES)]
                if number % 2:
                    roles = {other.instance_id: _ROLES[place % 2] for place, other in enumerate(self.launchers, number)}
                    self.from_client(b"operator", self.scheduler.number, PrepareRoles(roles=roles))
                message = SetRole(
                    query_id=number, instance_id=launcher.instance_id, role=role, deadline_s=max(1.0, fault.lasts_s)
                )
                self.from_client(b"operator", self.scheduler.number, message)
            case "join" if len(self._joiners) < _MAX_JOINERS:
                joined_as = [self.launchers[0].role] if self.scenario.mode == "unified" else [*_ROLES]
                self.launchers.append(Joiner(self, len(self._joiners), joined_as[number % len(joined_as)]))
            case "leave" if self._joiners:
                for worker in self._joiners[number % len(self._joiners)].workers:
                    worker.wants_to_leave = True
            case "remove":
                name = self.launchers[number % len(self.launchers)].instance_id
                self._to_be_removed.add(name)
                removal = RemoveInstance(query_id=number, instance_id=name, deadline_s=max(1.0, fault.lasts_s))
                self.from_client(b"operator", self.scheduler.number, removal)

    def on_awaited(self, step: StepRef) -> None:
        """A worker waits for another one's step: the moment at which that other one is missed most."""
        for worker in self.workers if self._kills_awaited else ():
            if worker.has_step(step):
                self._kills_awaited = False
                self.trace(f"kill {worker.name}, which others wait for")
                self.after(self.rng.choice((0.0, 0.001)), worker.end)

    @property
    def configured(self) -> list[Launcher]:
        return [launcher for launcher in self.launchers if isinstance(launcher, Launcher)]

    @property
    def _joiners(self) -> list[Joiner]:
        return [launcher for launcher in self.launchers if isinstance(launcher, Joiner)]

    @property
    def has_lost_a_phase(self) -> bool:
        """Whether no instance is left for one of the phases, because the last one was told to leave or was removed."""
        known = self.scheduler.core.instances
        stays = [
            launcher
            for launcher in self.launchers
            if not (launcher.has_left or any(worker.wants_to_leave for worker in launcher.workers))
            and (launcher.instance_id in known or launcher.instance_id not in self._to_be_removed)
        ]
        names = [(launcher.instance_id, launcher.role) for launcher in stays]
        roles = [known[name].role if name in known else role for name, role in names]
        return not (any(role.prefills for role in roles) and any(role.decodes for role in roles))

    def _stop(self, process: Process, lasts_s: float) -> None:
        self.trace(f"stop {process.name}")
        process.stop()
        self.after(lasts_s, process.go_on)

    def _mend_wire(self) -> None:
        self.is_wire_bad = self.is_wire_noisy = False

    def _mend_tier(self) -> None:
        self.is_tier_bad = False

    def _kill_scheduler(self) -> None:
        old = self.scheduler
        if not old.is_alive:
            return
        self.trace(f"kill {old.name}")
        old.die()
        self.after(self.rng.uniform(0.1, 0.5), lambda: self._start_scheduler(old.number + 1))

    def _start_scheduler(self, number: int) -> None:
        self.scheduler = SchedulerProcess(self, number)
        clients: list[Client | Supervisor] = [*self.clients.values()]
        clients += [] if self.supervisor is None else [self.supervisor]
        for client in clients:
            self.after(self.rng.uniform(0.0, 0.05), client.on_new_scheduler)

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end.

        Raises:
            FoundFault: if anything is wrong; other errors are those of the core itself.
        """
        begin = self.now + 0.5
        identities = list(self.clients)
        last = begin
        for spec in self.scenario.requests:
            self.at(begin + spec.at, lambda spec=spec: self._begin(identities[spec.client], spec))  # type: ignore[misc]
            last = max(last, begin + spec.at)
        for fault in self.scenario.faults:
            self.at(begin + fault.at, lambda fault=fault: self._inject(fault))  # type: ignore[misc]
            last = max(last, begin + fault.at + fault.lasts_s)
        self._run_until(lambda: self.now >= last and not self._open(), last + _DEADLINE_S)
        # What is pinned by transfers and steps is freed a little later.
        self._run_until(lambda: check_idle(self.scheduler.core) is None, self.now + 3 * _DEADLINE_S)

    def _begin(self, identity: bytes, spec: object) -> None:
        client = self.clients[identity]
        client.add(spec)  # type: ignore[arg-type]
        if spec.abort_at is not None and client.is_alive:  # type: ignore[attr-defined]
            request = list(client.requests.values())[-1]
            self.after(spec.abort_at - spec.at, lambda: client.abort(request))  # type: ignore[attr-defined]

    def _open(self) -> list[str]:
        return [request.id for request in self.requests.values() if request.end is None]

    def _run_until(self, is_over: Callable[[], bool], deadline: float) -> None:
        while self._events:
            if is_over():
                return
            at, _, work = heapq.heappop(self._events)
            if at > deadline:
                break
            self.now = max(self.now, at)
            work()
        what = self._open() or check_idle(self.scheduler.core)
        raise self.fault(f"still waiting at the deadline: {what}")
