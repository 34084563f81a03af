"""A scheduler in miniature: makes the plans of a few sequences by hand and drives one `ModelRunner` with them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hbserve.engine.model_runner import ModelRunner, PendingStep
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.worker import NO_TOKEN, TO_BE_DRAFTED, PlanRow, SequenceState, StepPlan
from hbserve.sampling_params import SamplingParams
from hbserve.speculation.rounds import accepted_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=None)


@dataclass
class Sequence:
    """A request as a scheduler sees it: ``computed`` tokens are in launched plans."""

    prompt: list[int]
    num_new: int
    slot: int
    block_ids: list[int]
    sampling: SamplingParams = GREEDY
    end_token_ids: list[int] = field(default_factory=list)
    computed: int = 0
    installed: bool = False
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    num_read: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def done(self) -> bool:
        """Whether all that is wanted has been launched."""
        return self.computed >= len(self.prompt) + self.num_new - 1


class Driver:
    """Makes plans by hand for one runner; blocks are scattered and come one at a time.

    Args:
        chunk: most tokens of a prompt in one step.
        feedback: decode rows take the device's last token, and ``depth`` plans are in flight.
        drafter: guesses tokens after those of a sequence, at most so many; there is then one plan in flight. It may
            leave the guesses to the runner's draft model (`TO_BE_DRAFTED`).
        rereads: the draft model is a head, which reads right guesses again.
    """

    def __init__(
        self,
        runner: ModelRunner,
        chunk: int = 512,
        feedback: bool = True,
        depth: int = 3,
        drafter: Callable[[Sequence, int], list[int]] | None = None,
        rereads: bool = False,
    ) -> None:
        self.rereads = rereads
        self.runner, self.chunk, self.feedback = runner, chunk, feedback and drafter is None
        self.depth = depth if self.feedback else 1
        self.drafter = drafter
        self.num_drafted = self.num_accepted = 0
        self.guesses: list[tuple[int, list[int], list[int]]] = []  # a slot, its tokens before, and what was guessed
        self.forced: list[tuple[Sequence, int, list[int]]] = []  # from where, and which tokens
        self.free = list(range(runner.num_blocks))
        random.Random(3).shuffle(self.free)
        self.step_id = 0

    def add(self, prompt: list[int], num_new: int, slot: int = 0, **options: Any) -> Sequence:
        return Sequence(prompt, num_new, slot, [self.free.pop()], **options)

    def state(self, sequence: Sequence) -> SequenceState:
        sampling = sequence.sampling
        penalised = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)
        return SequenceState(
            slot=sequence.slot,
            block_ids=list(sequence.block_ids),
            sampling=sampling,
            end_token_ids=sequence.end_token_ids,
            min_end_position=len(sequence.prompt) + sampling.min_tokens,
            num_prompt_tokens=len(sequence.prompt),
            history=sequence.tokens if penalised or sampling.grammar is not None else None,
        )

    def plan(self, sequences: list[Sequence]) -> tuple[StepPlan, list[Sequence]]:
        """One step of all sequences that are not done, and those of them that sample in it."""
        rows, states, sampling = [], [], []
        for sequence in sequences:
            if sequence.done:
                continue
            if not sequence.installed:
                states.append(self.state(sequence))
                sequence.installed = True
            start = sequence.computed
            decodes = start >= len(sequence.prompt)
            draft: list[int] = []
            if decodes and self.drafter is not None:
                draft = self.drafter(sequence, len(sequence.prompt) + sequence.num_new - start - 2)
            count = 1 + len(draft) if decodes else min(self.chunk, len(sequence.prompt) - start)
            needed = -(-(start + count) // self.runner.layout.block_size) - len(sequence.block_ids)
            new_block_ids = [self.free.pop() for _ in range(needed)]
            sequence.block_ids += new_block_ids
            feed_back = decodes and self.feedback
            unread = None
            if decodes and draft[:1] == [TO_BE_DRAFTED] and sequence.num_read < start:
                unread = sequence.tokens[sequence.num_read : start]
            rows.append(
                PlanRow(
                    slot=sequence.slot,
                    start=start,
                    num_tokens=count,
                    token_ids=None if feed_back else (sequence.tokens + draft)[start : start + count],
                    new_block_ids=new_block_ids,
                    sample=start + count >= len(sequence.prompt),
                    num_drafts=len(draft),
                    unread=unread,
                    unread_start=sequence.num_read,
                )
            )
            if rows[-1].sample:
                sampling.append(sequence)
            sequence.draft = draft
            sequence.computed = start + count
        self.step_id += 1
        return StepPlan(epoch=1, step_id=self.step_id, rows=rows, new_sequences=states, sends=[]), sampling

    def run(self, *sequences: Sequence) -> list[list[int]]:
        """All outputs, after as many steps as it takes."""
        in_flight: deque[tuple[PendingStep, list[Sequence]]] = deque()
        while in_flight or not all(sequence.done for sequence in sequences):
            if len(in_flight) < self.depth and not all(sequence.done for sequence in sequences):
                plan, sampling = self.plan(list(sequences))
                in_flight.append((self.runner.launch(plan), sampling))
                continue
            pending, sampling = in_flight.popleft()
            result = pending.result()
            assert result.epoch == 1
            assert result.busy_s > 0
            token_ids = iter(result.token_ids)
            draft_ids, place = iter(result.draft_ids), 0
            all_logprobs = iter(result.logprobs or [None] * len(result.token_ids))
            for sequence in sampling:
                number = 1 + len(sequence.draft)
                place += number
                is_of_model = sequence.draft[:1] == [TO_BE_DRAFTED]
                if is_of_model:
                    sequence.draft = [next(draft_ids) for _ in sequence.draft]
                    self.guesses.append((sequence.slot, sequence.tokens, sequence.draft))
                tokens, logprobs = [*islice(token_ids, number)], [*islice(all_logprobs, number)]
                tokens = [token for token in accepted_tokens(sequence.draft, tokens) if token != NO_TOKEN]
                if not tokens:  # its mask was not there: the same again
                    sequence.computed -= number
                    sequence.draft = []
                    continue
                self.num_drafted += len(sequence.draft)
                self.num_accepted += len(tokens) - 1
                sequence.computed -= number - len(tokens)
                if is_of_model and self.rereads:
                    sequence.num_read = sequence.computed - len(tokens) + 1
                elif is_of_model:  # the last guess has been fed to no pass of the draft model
                    sequence.num_read = sequence.computed - (len(tokens) == number)
                sequence.output += tokens
                forced = (result.forced or {}).get(place - 1, [])
                if len(tokens) == number and tokens[-1:] == forced[:1]:
                    self.forced.append((sequence, len(sequence.output), forced[1:]))
                sequence.logprobs += logprobs[: len(tokens)]
                sequence.draft = []
            assert next(token_ids, None) is None
        return [sequence.output for sequence in sequences]
