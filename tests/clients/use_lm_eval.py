"""lm-evaluation-harness: likelihoods, perplexity and answers, on local data, with the server's tokenizer."""

from __future__ import annotations

import os

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

URL, MODEL, KEY = os.environ["OPENAI_BASE_URL"], os.environ["MODEL"], os.environ["OPENAI_API_KEY"]
TASKS = TaskManager(include_path="tasks", include_defaults=False)

scored = simple_evaluate(
    model="local-completions",
    model_args={
        "model": MODEL,
        "base_url": f"{URL}/completions",
        "auth_token": KEY,  # for the routes of the tokenizer
        "batch_size": 4,
        "max_length": 2048,
    },
    tasks=["sums_likelihood", "sums_perplexity"],
    task_manager=TASKS,
    bootstrap_iters=0,
)["results"]
print(scored)
assert scored["sums_likelihood"]["acc,none"] == 1.0
assert abs(scored["sums_perplexity"]["byte_perplexity,none"] - 6.459) < 0.01  # as transformers computes it

answered = simple_evaluate(
    model="local-chat-completions",
    model_args={"model": MODEL, "base_url": f"{URL}/chat/completions", "num_concurrent": 3},
    tasks=["sums_answers"],
    task_manager=TASKS,
    apply_chat_template=True,
    bootstrap_iters=0,
)["results"]
print(answered)
assert answered["sums_answers"]["exact_match,none"] == 1.0
