"""Semi-PD from start to end: serve, change the split while serving, show the status.

python examples/semi_pd/semi_pd_example.py [--model-path FOLDER] [--prefill-sm 70] [--decode-sm 30]
"""

import argparse
import asyncio
from pathlib import Path

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.sampling_params import SamplingParams
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "hbserve-demo"
QUESTIONS = ["What is prefill?", "What is decode?", "What is 47 + 38?"]


async def ask(llm: DisaggregatedLLM) -> list[str]:
    sampling = SamplingParams(temperature=0, max_tokens=32)
    answers = await asyncio.gather(
        *(llm.chat([{"role": "user", "content": question}], sampling) for question in QUESTIONS)
    )
    return [answer["text"] for answer in answers]


def show(manager: ProcessRotationManager) -> None:
    status = manager.get_status()
    split = status["current_sm_allocation"]
    print(f"split: prefill {split['prefill_percentage']} %, decode {split['decode_percentage']} %")
    for worker in status["workers"]:
        print(f"  {worker['role']} at {worker['percentage']} %: {worker['state']}")
    resident = status["resident_manager"]
    print(f"  resident process: {resident['weights_bytes']} bytes of weights, {resident['kv_bytes']} of KV cache")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default=str(DEMO_MODEL))
    parser.add_argument("--prefill-sm", type=int, default=70)
    parser.add_argument("--decode-sm", type=int, default=30)
    arguments = parser.parse_args()
    config = PdDisaggConfig(
        arguments.model_path,
        mode="semi_pd",
        prefill_percentage=arguments.prefill_sm,
        decode_percentage=arguments.decode_sm,
        ladder={"prefill": [], "decode": []},
        num_blocks=512,
        log_level="WARNING",
    )
    async with DisaggregatedLLM(config) as llm:
        manager = llm.supervisors["semi-0"]
        assert isinstance(manager, ProcessRotationManager)
        show(manager)
        print("\n".join(await ask(llm)))

        print("another split, while requests are served")
        manager.request_sm_reallocation(SMAllocation(prefill_percentage=60, decode_percentage=40))
        answers = []
        while manager.get_status()["switch_requested"]:
            answers.append(await ask(llm))
        show(manager)
        same = all(answer == answers[0] for answer in answers)
        print(f"answered {len(answers) * len(QUESTIONS)} times meanwhile, always the same: {same}")


asyncio.run(main())
