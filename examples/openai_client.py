"""A streamed chat with a running server, with OpenAI's own client.

python scripts/start_pd_disagg.py --config configs/unified.yaml
python examples/openai_client.py --url http://127.0.0.1:8000 "What is 47 + 38?"
"""

import argparse
import os

import openai

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
parser.add_argument("question", nargs="*", default=["Hello!"], help="asked one after the other, in one conversation")
arguments = parser.parse_args()

# The client needs a key, even for a server that asks for none.
client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key=os.environ.get("HBSERVE_API_KEY", "none"))
model = client.models.list().data[0].id
messages: list[dict[str, str]] = []
for question in arguments.question:
    messages.append({"role": "user", "content": question})
    answer = ""
    print(f"> {question}")
    stream = client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
    for chunk in stream:
        text = chunk.choices[0].delta.content or ""
        print(text, end="", flush=True)
        answer += text
    print()
    messages.append({"role": "assistant", "content": answer})
