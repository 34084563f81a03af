"""A simulated worker process: it does its plans in order, on memory that may belong to another process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.tiers import FindBlocks, LoadBlocks, StoreBlocks
from hbserve.messages.transfer import Peer
from hbserve.messages.worker import (
    NO_TOKEN,
    Hello,
    InstanceCommand,
    InstanceReply,
    Leaving,
    Ping,
    PlanRow,
    Pong,
    Shutdown,
    StepLost,
    StepPlan,
    StepRef,
    StepResult,
    Superseded,
    WantsToLeave,
)
from hbserve.sampling_params import SamplingParams
from hbserve.speculation.rounds import accepted_tokens, next_round
from tests.fault_search.memory import MAX_RANKS, NOTHING, NUM_LAYERS, Arena, kv_of, next_token, score_of
from tests.fault_search.scenario import BLOCK_BYTES, BLOCK_SIZE, HEARTBEAT_TIMEOUT_S, VOCAB_SIZE
from tests.fault_search.tiers import Copies, TierMemory
from tests.fault_search.transfers import Transfers

if TYPE_CHECKING:
    from tests.fault_search.world import World

MAX_MODEL_LEN = 64
Line = tuple[int, int]
"""A scheduler's connection: number of the scheduler's process, number of the connection."""


@dataclass
class _Slot:
    """What a worker knows of a sequence."""

    table: list[int]
    sampling: SamplingParams
    end_token_ids: list[int]
    min_end_position: int
    history: list[int] | None
    last_token: int | None = None


class Process:
    """A process that can be killed, stopped and continued. Nothing happens in a stopped one until it continues."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.is_alive = True
        self.is_stopped = False
        self._backlog: list[Callable[[], None]] = []

    def do(self, work: Callable[[], None]) -> None:
        """Do something in this process, if it lives; later, if it is stopped."""
        if not self.is_alive:
            return
        if self.is_stopped:
            self._backlog.append(work)
        else:
            work()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Do something in this process after a time."""
        self.world.after(seconds, lambda: self.do(work))

    def stop(self) -> None:
        self.is_stopped = True

    def go_on(self) -> None:
        self.is_stopped = False
        backlog, self._backlog = self._backlog, []
        for work in backlog:
            self.do(work)


class Worker(Process):
    """One worker.

    Args:
        arena: the memory that it works on; with ``arena.epoch`` 0 it is the worker's own.
        on_exit: called when it has ended, with whether the scheduler had told it to.
        memories: the tiers that it copies blocks to and from.
    """

    def __init__(
        self,
        world: World,
        worker_id: str,
        role: InstanceRole,
        address: str,
        arena: Arena,
        kv_rank: int,
        on_exit: Callable[[Worker, bool], None],
        memories: Sequence[TierMemory] = (),
    ) -> None:
        super().__init__(world, worker_id)
        self.role = self._serves_as = role
        self.address, self.arena, self.kv_rank = address, arena, kv_rank
        self.num_ranks = {
            InstanceRole.PREFILL: world.scenario.prefill_ranks,
            InstanceRole.DECODE: world.scenario.decode_ranks,
        }.get(role, 1)
        self._on_exit = on_exit
        self.epoch = world.new_number()
        self.transfers = Transfers(self)
        self.copies = Copies(self, memories)
        self._scheduler_epoch = 0
        self.last_ping = world.now
        self._line: Line | None = None
        self.lines: dict[Line, None] = {}
        self.wants_to_leave = False
        self._is_used = self._is_dismissed = False
        self._held: deque[tuple[Line, InstanceCommand]] | None = None  # commands that wait for an epoch to begin
        self._plans: deque[StepPlan] = deque()
        self._running: StepPlan | None = None
        self._lost: dict[int, int] = {}  # by cell: the last step that will never be done, as on a real board
        self._slots: dict[int, _Slot] = {}
        world.listeners[address] = self

    # --- messages --------------------------------------------------------------------------------

    def on_command(self, line: Line, command: InstanceCommand) -> None:
        self.lines[line] = None
        if self._held is not None:
            self._held.append((line, command))
        elif isinstance(command, Ping):
            self._on_ping(line, command)
        elif line == self._line:
            self._handle(command)

    def _on_ping(self, line: Line, ping: Ping) -> None:
        silence_s = self.world.now - self.last_ping
        if ping.scheduler_epoch < self._scheduler_epoch and silence_s < HEARTBEAT_TIMEOUT_S:
            self.world.to_scheduler(self, line, Superseded(scheduler_epoch=self._scheduler_epoch))
            return
        self._line, self.last_ping = line, self.world.now
        if self.wants_to_leave:
            self.send(WantsToLeave(epoch=self.epoch))
        if ping.scheduler_epoch == self._scheduler_epoch and ping.known_epoch == self.epoch:
            self.send(Pong(epoch=self.epoch))
            return
        is_another = ping.scheduler_epoch != self._scheduler_epoch
        self._scheduler_epoch = ping.scheduler_epoch
        if not (is_another or self._is_used):
            self._send_hello()
            return
        self.epoch = self.world.new_number()
        self._held = deque()
        if is_another:
            for plan in self._plans:
                self._note_lost(plan.after)
        self._start_next()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        """Introduce this worker anew once nothing of the old epoch touches the memory any more."""
        if self._held is None or self._running is not None or self._plans:
            return
        self.transfers.forget_all()
        self.copies.forget_all()
        self._slots.clear()
        self._is_used = False
        self._send_hello()
        held, self._held = self._held, None
        while held:
            self.on_command(*held.popleft())
            if self._held is not None:
                self._held.extend(held)
                return

    def _send_hello(self) -> None:
        scenario = self.world.scenario
        self.send(
            Hello(
                instance_id=self.name,
                role=self.role,
                serves_as=self._serves_as,
                epoch=self.epoch,
                arena_epoch=self.arena.epoch or self.epoch,
                pid=1,
                model="m",
                dtype="float32",
                kv_dtype="float32",
                num_blocks=len(self.arena.blocks),
                block_size=BLOCK_SIZE,
                block_bytes=BLOCK_BYTES,
                num_layers=NUM_LAYERS,
                head_bytes=16,
                max_model_len=MAX_MODEL_LEN,
                vocab_size=VOCAB_SIZE,
                device="cpu",
                peers=self.peers(),
                one_sided=scenario.one_sided,
                has_eagle_head=scenario.has_eagle_head,
                tiers=self.copies.infos,
            )
        )

    def peers(self, link_epoch: int = 0) -> list[Peer]:
        """Its ranks, as others send to them."""
        first = self.kv_rank * MAX_RANKS
        return [
            Peer(rank=first + rank, epoch=self.epoch, endpoint="", link_epoch=link_epoch)
            for rank in range(self.num_ranks)
        ]

    def send(self, reply: InstanceReply) -> None:
        if self._line is not None:
            self.world.to_scheduler(self, self._line, reply)

    def _handle(self, command: InstanceCommand) -> None:
        match command:
            case StepPlan():
                self._is_used = True
                self._plans.append(command)
                self._start_next()
            case StepLost(step):
                self._note_lost(step)
                self._start_next()
            case Shutdown():
                self._is_dismissed = True
                self._start_next()
            case Ping():
                raise AssertionError
            case StoreBlocks() | LoadBlocks():
                self._is_used = True
                self.copies.handle(command)
            case FindBlocks():
                self.copies.find(command)
            case _:
                self._is_used = True
                self.transfers.handle(command)

    def has_step(self, step: StepRef) -> bool:
        """Whether it has not done this step yet."""
        plans = [*self._plans, *([] if self._running is None else [self._running])]
        return any((plan.cell, plan.step_id) == (step.cell, step.step_id) for plan in plans)

    # --- steps -----------------------------------------------------------------------------------

    def _note_lost(self, step: StepRef | None) -> None:
        """Note that a worker has ended: neither this step nor an earlier one of it will be done."""
        if step is not None:
            self._lost[step.cell] = max(step.step_id, self._lost.get(step.cell, 0))

    def _is_to_come(self, step: StepRef) -> bool:
        return max(self._lost.get(step.cell, 0), self.arena.cells.get(step.cell, 0)) < step.step_id

    def _start_next(self) -> None:
        while self._running is None and self._plans:
            plan, after = self._plans[0], self._plans[0].after
            if plan.epoch != self.epoch:  # launched steps finish, others are dropped
                self._plans.popleft()
                continue
            if after is not None and self._is_to_come(after):
                self.world.on_awaited(after)
                self.arena.waiters.append(lambda: self.do(self._start_next))
                return
            self._plans.popleft()
            self._run(plan)
        if self._is_dismissed and self._running is None and not self._plans:
            self.send(Leaving(epoch=self.epoch))
            self.end()

    def _run(self, plan: StepPlan) -> None:
        self._running = plan
        self.after(self.world.rng.uniform(0.0005, self.world.scenario.max_step_s), lambda: self._compute(plan))

    def _compute(self, plan: StepPlan) -> None:
        """Read and write the memory; the result leaves a little later."""
        if plan.epoch == self.epoch or self._held is not None:
            for state in plan.new_sequences:
                history = None if state.history is None else list(state.history)
                self._slots[state.slot] = _Slot(
                    list(state.block_ids),
                    state.sampling,
                    state.end_token_ids,
                    state.min_end_position,
                    history,
                )
        draft_ids: list[int] = []
        # Rows of one token may read before the others have written, as in `hbserve.attention.paged_decode`.
        early = {id(row): self._compute_row(row, draft_ids) for row in plan.rows if _reads_early(row)}
        late = (early[id(row)] if id(row) in early else self._compute_row(row, draft_ids) for row in plan.rows)
        token_ids = [token for tokens in late for token in tokens]
        if plan.cell is not None:
            self.arena.on_step_done(plan.cell, plan.step_id)
        for command in plan.sends if plan.epoch == self.epoch else ():
            if command.layers.count > 1:  # groups of layers leave before the step's end
                self.transfers.send(command)
        result = StepResult(
            epoch=plan.epoch,
            step_id=plan.step_id,
            token_ids=token_ids,
            logprobs=None,
            busy_s=0.002,
            draft_ids=draft_ids,
            prompt_logprobs=[self._scores(row) for row in plan.rows if row.next_token_ids is not None] or None,
        )
        following = next_round(plan, result, lambda slot: self._slots[slot].end_token_ids)
        if following is None:
            self.after(self.world.rng.uniform(0.0, 0.003), lambda: self._finish(plan, result))
        else:
            self.after(self.world.rng.uniform(0.0, 0.003), lambda: self._go_on(following, result))

    def _compute_row(self, row: PlanRow, draft_ids: list[int]) -> list[int]:
        slot = self._slots.get(row.slot)
        if slot is None:
            raise self.world.fault(f"{self.name} got a row for slot {row.slot}, of which it was told nothing")
        slot.table += row.new_block_ids
        tokens = row.token_ids
        for position, token in enumerate(row.unread or (), row.unread_start):
            self._feed(slot, position, token)
        if row.num_to_draft:
            tokens = self._drafted(row, slot)
            tokens[-row.num_to_draft :] = row.kept_guesses or tokens[-row.num_to_draft :]
            draft_ids += tokens[-row.num_to_draft :]
        if tokens is None:
            last = self.arena.last_tokens.get(row.slot) if row.sampled_elsewhere else slot.last_token
            tokens = [0 if last is None else last]
        for position, token in enumerate(tokens, row.start):
            before = self.arena.read(slot.table, position - 1) if position else NOTHING
            block, offset, contents = slot.table[position // BLOCK_SIZE], position % BLOCK_SIZE, kv_of(before, token)
            self.arena.write(block, offset, contents)
        if not row.sample:
            return []
        if slot.sampling.grammar is not None and self.world.rng.random() < 0.25:
            return [NO_TOKEN] * row.num_samples
        end = row.start + row.num_tokens
        drafts = tokens[len(tokens) - row.num_drafts :]
        sampled: list[int] = []
        for index in range(row.num_samples):
            place = end - row.num_drafts + index
            forbidden = slot.end_token_ids if place < slot.min_end_position else ()
            before_it = [self.arena.read(slot.table, position) for position in range(place)]
            history = None if slot.history is None else [*slot.history, *drafts[:index]]
            sampled.append(next_token(before_it, slot.sampling.seed or 0, history, forbidden))
        if slot.sampling.grammar is not None and row.num_drafts and self.world.rng.random() < 0.25:
            last = self.world.rng.randint(1, row.num_drafts)  # the masks from here on are late
            sampled[last:] = [NO_TOKEN] * (len(sampled) - last)
        if row.num_drafts:  # the next row has its token in its plan
            slot.last_token = None
            self.arena.last_tokens.pop(row.slot, None)
        else:
            slot.last_token = self.arena.last_tokens[row.slot] = sampled[0]
        if slot.history is not None:
            slot.history += [token for token in accepted_tokens(drafts, sampled) if token != NO_TOKEN]
        return sampled

    def _feed(self, slot: _Slot, position: int, token: int) -> None:
        """Have the draft model or head read a known token."""
        if not self.world.scenario.has_eagle_head:
            self.arena.feed_draft(slot.table, position, token)
        elif position:
            self.arena.feed_head(slot.table, position, token)

    def _check_read(self, row: PlanRow, slot: _Slot) -> None:
        """Check that the draft model or head has read all before a row that it guesses for."""
        arena = self.arena
        if self.world.scenario.has_eagle_head:
            is_read = arena.head_has_read(slot.table, row.start)
        else:
            last = row.start - 1
            is_read = last < 0 or arena.read_draft(slot.table, last) == arena.read(slot.table, last)
        if not is_read:
            raise self.world.fault(f"{self.name}: the draft model has not read the tokens before {row.start}")

    def _guess(self, slot: _Slot, position: int, token: int) -> None:
        """Have the draft model read a guess; the head reads it with a hidden state of its own."""
        if self.world.scenario.has_eagle_head:
            block, offset = slot.table[(position - 1) // BLOCK_SIZE], (position - 1) % BLOCK_SIZE
            self.arena.heads[block][offset] = (NOTHING, token)
        else:
            self.arena.feed_draft(slot.table, position, token)

    def _drafted(self, row: PlanRow, slot: _Slot) -> list[int]:
        """Return the row's tokens with the draft model's guesses, some of them right."""
        arena, rng = self.arena, self.world.rng
        assert row.token_ids is not None
        tokens = row.token_ids[: row.num_tokens - row.num_drafts]
        self._check_read(row, slot)
        self._feed(slot, row.start, tokens[0])
        contents = [arena.read(slot.table, position) for position in range(row.start)]
        for number in range(row.num_drafts + 1):
            if number:
                self._guess(slot, row.start + number, tokens[number])
            contents.append(kv_of(contents[-1] if contents else NOTHING, tokens[number]))
            if number == row.num_drafts - 1:
                return [*tokens, next_token(contents, slot.sampling.seed or 0, slot.history, ())]
            right = next_token(contents, slot.sampling.seed or 0, slot.history, ())
            tokens.append(right if rng.random() < 0.8 else rng.randrange(VOCAB_SIZE))
        return tokens

    def _scores(self, row: PlanRow) -> list[TokenLogprobs]:
        """Return the log-probabilities of the prompt tokens after a row's."""
        assert row.next_token_ids is not None
        table = self._slots[row.slot].table
        return [
            TokenLogprobs(token=score_of(self.arena.read(table, position), token), top_ids=[], top=[])
            for position, token in enumerate(row.next_token_ids, row.start)
        ]

    def _go_on(self, following: StepPlan, result: StepResult) -> None:
        """Report a round and do the next one."""
        self.send(msgspec.structs.replace(result, more=True))
        self.after(self.world.rng.uniform(0.0005, self.world.scenario.max_step_s), lambda: self._compute(following))

    def _finish(self, plan: StepPlan, result: StepResult) -> None:
        self._running = None
        self._serves_as = plan.role or self._serves_as
        self.send(result)
        if plan.epoch == self.epoch:
            for command in plan.sends:
                if command.layers.count == 1:
                    self.transfers.send(command)
        self._start_next()
        if self.is_alive:
            self._begin_epoch()

    # --- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        """End, or be killed: the memory of its own goes with it."""
        if not self.is_alive:
            return
        self.is_alive = False
        if self.world.listeners.get(self.address) is self:
            del self.world.listeners[self.address]
        for line in self.lines:
            self.world.break_connection(self, line)
        self._on_exit(self, self._is_dismissed)


def _reads_early(row: PlanRow) -> bool:
    return row.num_tokens == 1 and row.token_ids is not None
