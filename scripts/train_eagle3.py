"""Train an EAGLE-3 head for a model, on text that the model writes itself.

``python scripts/train_eagle3.py --model examples/models/hbserve-demo --output head`` takes minutes on a CPU. Then
``hbserve serve MODEL --speculation.method eagle3 --speculation.model head`` uses the head.

As in Li et al. 2025 (EAGLE-3, "training-time test"), the head learns to continue its own chain of guesses: in pass 0
its features are the model's, and in pass s its own outputs of pass s - 1, with the attention that it will have then::

    pass 0   token t + 1, feature of t               sees pass 0 up to t                        guesses token t + 2
    pass 1   token t + 2, output of pass 0 at t      sees the same, and itself at t             guesses token t + 3

The loss is the cross-entropy of its guesses to the model's own probabilities, among the tokens that it can guess.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbserve import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo_language as language

_PASS_WEIGHT = 0.8
"""Weight of a pass relative to the one before: a guess counts only if those before it are right."""
_NUM_HELD_OUT = 32
"""Texts that are not trained on; the greedy ones of them show how often the head is right."""
_TEMPLATES = (
    "What is a {}?",
    "Write three sentences about a {} and a {}.",
    "Tell me a short story in which a {} meets a {}.",
    "List five things that one can do with a {}.",
    "Explain to a child why a {} is useful.",
    "How does a {} differ from a {}?",
    "Write an e-mail to a friend about a {}.",
    "Give me advice on how to choose a {}.",
)


class Text(NamedTuple):
    """What the model has computed of a sequence: tokens ``[n]``, joined inputs of three layers, final hidden states.

    The first ``num_prompt`` tokens are a prompt.
    """

    num_prompt: int
    tokens: Tensor
    joined: Tensor
    final: Tensor


class Head(nn.Module):
    """A head in training; the names of its parameters are those of published heads.

    Args:
        config: of the head, as in config.json.
        embedding: of the model, ``[vocab, hidden]``; it is not trained.
    """

    def __init__(self, config: dict[str, object], embedding: Tensor) -> None:
        super().__init__()
        sizes = {name: value for name, value in config.items() if isinstance(value, int)}
        hidden, inner, self.head_dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
        q, kv = (sizes[name] * self.head_dim for name in ("num_attention_heads", "num_key_value_heads"))
        self.theta, self.eps = float(str(config["rope_theta"])), float(str(config["rms_norm_eps"]))
        self.embedding = embedding
        shapes = {
            "fc": (hidden, 3 * hidden),
            "midlayer.self_attn.q_proj": (q, 2 * hidden),
            "midlayer.self_attn.k_proj": (kv, 2 * hidden),
            "midlayer.self_attn.v_proj": (kv, 2 * hidden),
            "midlayer.self_attn.o_proj": (hidden, q),
            "midlayer.mlp.gate_proj": (inner, hidden),
            "midlayer.mlp.up_proj": (inner, hidden),
            "midlayer.mlp.down_proj": (hidden, inner),
            "lm_head": (sizes["draft_vocab_size"], hidden),
        }
        norms = ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm")
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(torch.randn(shape) * 0.02) for name, shape in shapes.items()}
            | {name.replace(".", "/"): nn.Parameter(torch.ones(hidden)) for name in norms}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters by their names in a checkpoint."""
        return {f"{name.replace('/', '.')}.weight": weight.detach() for name, weight in self.weights.items()}

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name.replace(".", "/")])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name.replace(".", "/")], self.eps)

    def _heads(self, x: Tensor, name: str, shift: int | None) -> Tensor:
        """Return ``[batch, heads, tokens, head_dim]``, rotated by the tokens' places and ``shift`` more."""
        rows = self._linear(x, f"midlayer.self_attn.{name}_proj")
        heads = rows.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        if shift is None:
            return heads
        powers = torch.arange(0, self.head_dim, 2) / self.head_dim
        angles = (torch.arange(heads.shape[2]) + shift)[:, None] / self.theta**powers
        cos, sin = angles.cos(), angles.sin()
        first, second = heads.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def passes(self, tokens: Tensor, joined: Tensor, count: int) -> list[Tensor]:
        """Return the logits ``[batch, tokens - 1 - s, draft vocab]`` of each pass s; those at t guess token t + 2 + s.

        Args:
            tokens: ``[batch, tokens]``. joined: ``[batch, tokens, 3 * hidden]``.
        """
        features, logits = self._linear(joined, "fc"), []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for number in range(count):
            length = tokens.shape[1] - 1 - number
            features = features[:, :length]
            x = torch.cat(
                [
                    self._norm(self.embedding[tokens[:, 1 + number :]], "midlayer.input_layernorm"),
                    self._norm(features, "midlayer.hidden_norm"),
                ],
                -1,
            )
            q, k, v = self._heads(x, "q", number), self._heads(x, "k", number), self._heads(x, "v", None)
            groups = q.shape[1] // k.shape[1]
            keys.append(k.repeat_interleave(groups, 1))
            values.append(v.repeat_interleave(groups, 1))
            scores = q @ keys[0][:, :, :length].transpose(-1, -2)
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
            own = [(q * key[:, :, :length]).sum(-1, keepdim=True) for key in keys[1:]]
            shares = (torch.cat([scores, *own], -1) * self.head_dim**-0.5).softmax(-1)
            attended = shares[..., :length] @ values[0][:, :, :length]
            for place, value in enumerate(values[1:]):
                attended = attended + shares[..., length + place, None] * value[:, :, :length]
            residual = features + self._linear(attended.transpose(1, 2).flatten(2), "midlayer.self_attn.o_proj")
            x = self._norm(residual, "midlayer.post_attention_layernorm")
            inner = F.silu(self._linear(x, "midlayer.mlp.gate_proj")) * self._linear(x, "midlayer.mlp.up_proj")
            features = residual + self._linear(inner, "midlayer.mlp.down_proj")
            logits.append(self._linear(self._norm(features, "norm"), "lm_head"))
        return logits


def prompts(rng: random.Random, count: int, is_demo: bool) -> list[list[language.Message]]:
    """Return conversations to be answered: questions of the demo's language, or of a few templates."""
    if not is_demo:
        words = language.WORDS
        return [
            [{"role": "user", "content": rng.choice(_TEMPLATES).format(rng.choice(words), rng.choice(words))}]
            for _ in range(count)
        ]
    kinds = (
        lambda: language.recall_question(rng, rng.randint(3, 12), held_out=False),
        lambda: language.copy_question(rng, rng.randint(4, 30), held_out=False),
        lambda: language.count_question(rng, held_out=False),
        lambda: language.sum_question(rng, held_out=False),
    )
    return [list(rng.choice(kinds)().messages) for _ in range(count)]


def write_texts(options: argparse.Namespace, is_demo: bool) -> list[tuple[list[int], list[int]]]:
    """Have the model answer; returns the tokens of prompts and of answers, half of them greedy."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rng = random.Random(options.seed)
    asked = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in prompts(rng, options.sequences, is_demo)
    ]
    sampling = [
        SamplingParams(temperature=0.8 * (index % 2), seed=index, max_tokens=options.tokens)
        for index in range(len(asked))
    ]
    with LLM(options.model, mode="unified", log_level="WARNING") as llm:
        outputs = llm.generate(asked, sampling)
    return [(prompt, output["token_ids"]) for prompt, output in zip(asked, outputs, strict=True)]


@torch.no_grad()
def read_texts(model: nn.Module, texts: list[tuple[list[int], list[int]]], layers: list[int]) -> list[Text]:
    """Compute what the model stores of its texts."""
    read = []
    for prompt, answer in texts:
        tokens = prompt + answer
        found = model(torch.tensor([tokens]), output_hidden_states=True)
        joined = torch.cat([found.hidden_states[layer][0] for layer in layers], -1)
        final = found.hidden_states[-1][0]
        read.append(Text(len(prompt), torch.tensor(tokens), joined.bfloat16(), final.bfloat16()))
    return read


def batch_of(texts: list[Text]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad texts to a batch; the last result says which tokens are real."""
    pad = nn.utils.rnn.pad_sequence
    tokens = pad([text.tokens for text in texts], batch_first=True)
    joined = pad([text.joined for text in texts], batch_first=True)
    final = pad([text.final for text in texts], batch_first=True)
    is_real = pad([torch.ones(len(text.tokens), dtype=torch.bool) for text in texts], batch_first=True)
    return tokens, joined.float(), final.float(), is_real


def loss_of(head: Head, texts: list[Text], lm_head: Tensor, count: int) -> Tensor:
    """Return the cross-entropy of all passes. ``lm_head``: the model's rows of the tokens that the head can guess."""
    tokens, joined, final, is_real = batch_of(texts)
    losses = []
    for number, logits in enumerate(head.passes(tokens, joined, count)):
        length, first = logits.shape[1] - 1, 1 + number
        wanted = F.linear(final[:, first : first + length], lm_head).softmax(-1)
        losses.append(-(wanted * logits[:, :length].log_softmax(-1)).sum(-1)[is_real[:, 1 + first :]].mean())
    return torch.stack([_PASS_WEIGHT**number * loss for number, loss in enumerate(losses)]).sum()


@torch.no_grad()
def acceptance(head: Head, texts: list[Text], token_ids: Tensor, count: int) -> list[float]:
    """Return how often the s-th guess of a chain is the answer's token, if those before it are."""
    right, tried = [0] * count, [0] * count
    for text in texts:
        tokens, joined, _, _ = batch_of([text])
        is_right = torch.ones(tokens.shape[1], dtype=torch.bool)
        is_right[: text.num_prompt - 1] = False  # behind the answer's first token
        for number, logits in enumerate(head.passes(tokens, joined, count)):
            length = logits.shape[1] - 1
            is_right = is_right[:length]
            tried[number] += int(is_right.sum())
            guesses = token_ids[logits[0, :length].argmax(-1)]
            is_right = is_right & (guesses == tokens[0, 2 + number : 2 + number + length])
            right[number] += int(is_right.sum())
    return [one / max(all_, 1) for one, all_ in zip(right, tried, strict=True)]


def config_of(model_config: dict[str, object], layers: list[int], draft_vocab_size: int) -> dict[str, object]:
    """Return the head's config.json: a layer of the model's own sizes."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    num_heads, hidden = int(str(model_config["num_attention_heads"])), int(str(model_config["hidden_size"]))
    rope = model_config.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else model_config.get("rope_theta", 10000.0)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{name: model_config[name] for name in sizes},
        "head_dim": model_config.get("head_dim") or hidden // num_heads,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": model_config["rms_norm_eps"],
        "rope_theta": theta,
        "max_position_embeddings": model_config["max_position_embeddings"],
        "tie_word_embeddings": False,
        "draft_vocab_size": draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": layers,
        "torch_dtype": "bfloat16",
    }


def save(head: Head, config: dict[str, object], token_ids: Tensor, folder: Path) -> None:
    """Write the head's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    can_guess = torch.zeros(len(head.embedding), dtype=torch.bool)
    can_guess[token_ids] = True
    tensors = {name: weight.bfloat16() for name, weight in head.tensors().items()}
    tensors |= {"d2t": token_ids - torch.arange(len(token_ids)), "t2d": can_guess}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / "model.safetensors")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--sequences", type=int, default=400, help="texts that the model writes")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--draft-vocab", type=int, default=8192, help="tokens that the head can guess, at most")
    parser.add_argument("--passes", type=int, default=5, help="of the training-time test")
    parser.add_argument("--batch", type=int, default=8, help="texts of a step")
    parser.add_argument("--seconds", type=float, default=120, help="time of training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.sequences < _NUM_HELD_OUT + options.batch:
        parser.error(f"--sequences must be at least --batch and {_NUM_HELD_OUT} more, got {options.sequences}")
    return options


def main() -> None:
    """Write texts, train, and report how often the head is right."""
    options = parse_options()
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device).eval()
    config = model.config.to_dict()
    num_layers = config["num_hidden_layers"]
    layers = [2, num_layers // 2, num_layers - 3] if num_layers > 6 else [1, num_layers // 2, num_layers - 1]
    texts = write_texts(options, is_demo="hbserve-demo" in Path(options.model).resolve().name)
    torch.set_default_device(device)
    written = torch.tensor([token for prompt, answer in texts for token in prompt + answer])
    counts = torch.bincount(written, minlength=config["vocab_size"])
    token_ids = counts.argsort(descending=True)[: options.draft_vocab].sort().values
    print(f"{len(texts)} texts, {int(counts.sum())} tokens, {int((counts > 0).sum())} different", flush=True)
    read = read_texts(model, texts, layers)
    held_out, read = read[:_NUM_HELD_OUT:2], read[_NUM_HELD_OUT:]  # greedy answers
    embedding, lm_head = model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach()[token_ids]
    head = Head(config_of(config, layers, len(token_ids)), embedding)
    with torch.no_grad():
        head.weights["lm_head"].copy_(lm_head)
        head.weights["norm"].copy_(model.model.norm.weight)
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng, started, step = random.Random(options.seed), time.monotonic(), 0
    while (spent := time.monotonic() - started) < options.seconds:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (step + 1) / 20) * max(0.02, 1 - spent / options.seconds)
        loss = loss_of(head, rng.sample(read, options.batch), lm_head, options.passes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            found = acceptance(head, held_out, token_ids, 5)
            shown = " ".join(f"{value:.3f}" for value in found)
            state = f"{spent:.0f} s, step {step}: loss {float(loss.detach()):.3f}"
            print(f"{state}, acceptance of guess 1 to 5: {shown}", flush=True)
    save(head, config_of(config, layers, len(token_ids)), token_ids, options.output)
    shown = " ".join(f"{value:.3f}" for value in acceptance(head, held_out, token_ids, 5))
    print(f"{options.output}: acceptance of guess 1 to 5, each if those before it are right: {shown}")


if __name__ == "__main__":
    main()
