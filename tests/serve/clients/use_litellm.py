"""litellm: the routes of a server like vLLM (hosted_vllm/), of Anthropic, Ollama and Cohere.

Rankings go to /rerank, /v1/rerank and /v2/rerank, by what each provider's own client asks for.
"""

import base64
import sys
from pathlib import Path

import litellm

url, path = sys.argv[1:]
litellm.num_retries = 0
uri = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
picture = {"type": "image_url", "image_url": {"url": uri}}
content = [picture, {"type": "text", "text": "What color is the circle?"}]
messages = [{"role": "user", "content": content}]

for name, base in (
    ("hosted_vllm/pebble", f"{url}/v1"),
    ("anthropic/pebble", url),
    ("ollama_chat/pebble", url),
):
    options = {"model": name, "api_base": base, "api_key": "none", "messages": messages}
    found = litellm.completion(**options)
    assert found.choices[0].message.content == "red", found
    assert found.usage.prompt_tokens > 64
    chunks = list(litellm.completion(stream=True, **options))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "red", (name, said)
texts = ["a blue square", "a red circle", "tools"]
for name, base in (
    ("hosted_vllm/pebble", url),
    ("hosted_vllm/pebble", f"{url}/v1"),
    ("jina_ai/pebble", f"{url}/v1"),
    ("cohere/pebble", url),
):
    options = {"model": name, "api_base": base, "api_key": "none", "query": "a red circle"}
    found = litellm.rerank(documents=texts, **options)
    order = [one["index"] for one in found.results]
    scores = [one["relevance_score"] for one in found.results]
    assert sorted(order) == [0, 1, 2], (name, found)
    assert scores == sorted(scores, reverse=True), (name, found)
    best = litellm.rerank(documents=texts, top_n=1, **options)
    assert [one["index"] for one in best.results] == order[:1], (name, best)
options = {"model": "hosted_vllm/gpt-9", "api_base": f"{url}/v1", "messages": messages}
try:
    litellm.completion(**options)
except litellm.NotFoundError:
    print("all of it answered")
