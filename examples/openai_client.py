"""The gateway through the `openai` package: an answer as it is written, then one that must be JSON of a given form.

llmasos up                                             # prints the address of a gateway
python examples/openai_client.py http://127.0.0.1:8000
"""

import json
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
    "required": ["city", "capital"],
    "additionalProperties": False,
}

client = OpenAI(base_url=f"{sys.argv[1].rstrip('/')}/v1", api_key="none")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Tell me of the city of Paris."}],
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
)
print(json.loads(answer.choices[0].message.content or ""))
