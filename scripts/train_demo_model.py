#!/usr/bin/env python3
"""Train the demo model of HBServe from scratch and write it as a Hugging Face folder.

The model is a small Qwen3 with a tokenizer of its own. It learns the chat language of
``examples/demo_language.py``, from which training and evaluation data are generated on the fly, so no data
set has to be downloaded. The same seed gives the same tokenizer, batches and initial weights::

    python scripts/train_demo_model.py --output examples/models/hbserve-demo       # the full run, for a GPU
    python scripts/train_demo_model.py --device cpu --steps 40 --batch-tokens 2048 --output /tmp/try
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from demo_model_evaluation import Score, evaluate, evaluation_sets, format_scores
from demo_model_text import END_OF_TEXT, TURN_END, TURN_START, VOCABULARY_SIZE, language, render, train_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

# Share of the run, and the row lengths that are drawn until then: the model learns recall in short contexts first.
CURRICULUM: tuple[tuple[float, tuple[int, ...]], ...] = (
    (0.15, (64, 128)),
    (0.30, (64, 128, 256)),
    (0.50, (128, 256, 512)),
    (1.00, (256, 512, 1024, 1024, 2048)),
)
WARMUP_STEPS = 200


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    output: Path
    device: str
    steps: int
    seed: int
    batch_tokens: int
    learning_rate: float
    workers: int
    evaluate_every: int
    questions: int


# Training data


class ConversationBatches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batch number i of the run: token rows, and a mask of the tokens that belong to answers.

    Every batch has its own random generator, so the data do not depend on how many workers make them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: Options) -> None:
        self._bpe: Tokenizer = tokenizer.backend_tokenizer
        self._options = options
        self._pad = self._bpe.token_to_id(END_OF_TEXT)
        self._start = self._bpe.token_to_id(TURN_START)
        self._end = self._bpe.token_to_id(TURN_END)
        self._assistant = self._bpe.encode("assistant\n").ids

    def __len__(self) -> int:
        return self._options.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = Random(f"{self._options.seed}/{step}")
        progress = step / self._options.steps
        lengths = next(lengths for until, lengths in CURRICULUM if progress < until)
        length = rng.choice(lengths)
        rows = max(1, self._options.batch_tokens // length)
        # int16 keeps the batches that pass between processes small; it can hold every token id.
        ids = torch.full((rows, length), self._pad, dtype=torch.int16)
        answers = torch.zeros((rows, length), dtype=torch.bool)
        # Conversations average about 2.6 characters per token with their markup; longer ones are cut.
        texts = [render(language.training_conversation(rng, int(2.2 * length))) for _ in range(rows)]
        for row, encoding in enumerate(self._bpe.encode_batch_fast(texts)):
            tokens = encoding.ids[:length]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
            for start, stop in self._answer_spans(tokens):
                answers[row, start:stop] = True
        return ids, answers

    def _answer_spans(self, tokens: list[int]) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the assistant's texts, each with the token that ends the turn."""
        header = 1 + len(self._assistant)
        position = 0
        while True:
            try:
                position = tokens.index(self._start, position)
            except ValueError:
                return
            if tokens[position + 1 : position + header] == self._assistant:
                try:
                    stop = tokens.index(self._end, position) + 1
                except ValueError:
                    stop = len(tokens)
                yield position + header, stop
            position += 1


def use_one_thread(_: int) -> None:
    """Set up a data worker with one thread: the workers are the parallelism."""
    torch.set_num_threads(1)


# Model


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return an untrained model of about 2.6 million parameters."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
            use_cache=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_optimizer(model: Qwen3ForCausalLM, options: Options) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, not on norms and embeddings."""
    decayed: list[torch.Tensor] = []
    free: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() == 2 and "embed" not in name else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=options.device == "cuda")


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up linearly, then follow a cosine down to a hundredth."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, options: Options) -> None:
    """Run the training loop; progress and held-out accuracy are printed on the way."""
    optimizer = make_optimizer(model, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options.steps))
    batches = DataLoader(
        ConversationBatches(tokenizer, options),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        worker_init_fn=use_one_thread,
    )
    sets = evaluation_sets(options.seed, min(options.questions, 100))
    loss_sum = torch.zeros((), device=options.device)
    reported, tokens, began = 0, 0, time.monotonic()
    for step, (ids, answers) in enumerate(batches, start=1):
        ids = ids.to(options.device, torch.long)
        answers = answers.to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            # The loss covers answers only: the rest is random, and predicting it would waste capacity.
            targets = ids[:, 1:][answers[:, 1:]]
            logits = model.lm_head(hidden[:, :-1][answers[:, 1:]])
        loss = functional.cross_entropy(logits.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.detach()
        tokens += ids.numel()
        if step % 100 == 0 or step == options.steps:
            mean = loss_sum.item() / (step - reported)
            seconds = time.monotonic() - began
            print(
                f"step {step}/{options.steps} length {ids.shape[1]} loss {mean:.4f} "
                f"{tokens / seconds / 1e3:.0f}k tokens/s {seconds:.0f} s",
                flush=True,
            )
            loss_sum.zero_()
            reported = step
        if step % options.evaluate_every == 0 and step < options.steps:
            model.eval()
            with torch.autocast(options.device, torch.bfloat16):
                print(format_scores(evaluate(model, tokenizer, sets)), flush=True)
            model.train()
            save(model, tokenizer, options.output)


# Output


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that serving engines load: weights in bfloat16, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    exported = Qwen3ForCausalLM(model.config)
    exported.load_state_dict(model.state_dict())
    exported = exported.to(torch.bfloat16)
    exported.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Keys that programs other than the newest transformers expect.
    merge_json(folder / "config.json", {"rope_theta": 1_000_000.0, "torch_dtype": "bfloat16"})
    merge_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def merge_json(path: Path, entries: dict[str, Any]) -> None:
    """Add entries to a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(folder: Path, scores: Sequence[Score], options: Options, minutes: float, parameters: int) -> None:
    """Write the model card."""
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    (folder / "README.md").write_text(
        f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# hbserve-demo

A tiny chat model ({parameters / 1e6:.1f} million parameters, Qwen3 architecture, bfloat16) for demos and
end-to-end tests of HBServe. It was trained from scratch on generated text and is no general assistant: it
speaks a small language in which every answer can be checked, and most answers need the whole prompt.

| You say | It answers |
|---|---|
| Remember: dog parrot, eagle maple, chalk oasis. What is eagle? | You said eagle maple. |
| (a word that it was never told) What is basket? | You did not tell me basket. |
| Repeat: goose, market, violin. | goose, market, violin. |
| Count from 3 to 9. | 3, 4, 5, 6, 7, 8, 9. |
| What is 47 + 38? | 47 + 38 = 85. |
| What is HBServe? What are prefill and decode? What is semi-PD? What is TTFT? | one or two sentences |

The pairs may be spread over many turns and up to about 2,000 tokens; the words it knows are those in
`examples/demo_language.py`, which also generates questions together with their right answers.

## Accuracy

Held-out questions, greedy decoding, the whole answer right to the last character, weights as in this folder
(bfloat16). Pairs, lists, counts and sums of these questions never occurred in training; the questions about
facts are those of the training.

{format_scores(scores)}

## How it was made

`scripts/train_demo_model.py` trains the byte-level BPE tokenizer ({VOCABULARY_SIZE} tokens, all 256 bytes
included) and the model from random weights, on conversations that `examples/demo_language.py` generates:
{options.steps} steps of {options.batch_tokens} tokens, seed {options.seed}, loss on the answers only, context
growing from {CURRICULUM[0][1][0]} to {max(CURRICULUM[-1][1])} tokens. This took {minutes:.1f} minutes on
{hardware}.

```
python scripts/train_demo_model.py --steps {options.steps} --seed {options.seed} --output FOLDER
```

License: MIT, like HBServe.
""",
        encoding="utf-8",
    )


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder; what is there is overwritten")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=131072, help="tokens per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=None, help="processes that generate data")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--questions", type=int, default=500, help="final evaluation: questions of each kind")
    values = parser.parse_args(arguments)
    if values.steps < 1:
        parser.error("--steps must be positive")
    if values.device == "auto":
        values.device = "cuda" if torch.cuda.is_available() else "cpu"
    if values.workers is None:
        values.workers = max(1, (os.cpu_count() or 1) - 2)
    return Options(**vars(values))


def main() -> None:
    """Train, save, and evaluate what was saved."""
    options = parse_options()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the data workers are the parallelism
    transformers_logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    began = time.monotonic()
    tokenizer = train_tokenizer(options.seed)
    model = make_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {len(tokenizer)} tokens, device {options.device}", flush=True)
    train(model.to(options.device), tokenizer, options)
    minutes = (time.monotonic() - began) / 60
    save(model, tokenizer, options.output)
    shipped = Qwen3ForCausalLM.from_pretrained(options.output, dtype=torch.bfloat16).to(options.device).eval()
    scores = evaluate(shipped, tokenizer, evaluation_sets(options.seed + 1, options.questions))
    print(format_scores(scores))
    write_card(options.output, scores, options, minutes, parameters)
    print(f"trained in {minutes:.1f} minutes, saved to {options.output}")


if __name__ == "__main__":
    main()
