"""langchain-openai: a chat model, its stream, a bound tool, structured output."""

import base64
import sys
from pathlib import Path
from typing import Literal

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, path = sys.argv[1:]
uri = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


class Paint(BaseModel):
    """Paint a circle."""

    color: Literal["red", "blue"]


picture = {"type": "image_url", "image_url": {"url": uri}}
messages = [HumanMessage([picture, {"type": "text", "text": "What color is the circle?"}])]
for responses in (False, True):
    chat = ChatOpenAI(
        model="pebble",
        base_url=f"{url}/v1",
        api_key="none",
        use_responses_api=responses,
        stream_usage=True,
    )
    found = chat.invoke(messages)
    assert found.text == "red", found
    chunks = list(chat.stream(messages))
    assert "".join(chunk.text for chunk in chunks) == "red"
    assert sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata) > 0
    [call] = chat.bind_tools([Paint], tool_choice="any").invoke(messages).tool_calls
    assert call["name"] == "Paint"
    assert call["args"]["color"] in ("red", "blue")
    form = chat.with_structured_output(Paint).invoke(messages)
    assert form.color in ("red", "blue")
print("all of it answered")
