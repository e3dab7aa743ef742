"""openai-agents: an agent with a function, over the Responses API, which is its default."""

import asyncio
import base64
import sys
from pathlib import Path
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

url, path = sys.argv[1:]
set_default_openai_client(AsyncOpenAI(base_url=f"{url}/v1", api_key="none"), use_for_tracing=False)
set_tracing_disabled(True)
uri = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
CONTENT = [
    {"type": "input_image", "image_url": uri, "detail": "auto"},
    {"type": "input_text", "text": "What color is the circle?"},
]
painted = []


class Circle(BaseModel):
    color: Literal["red", "green", "blue"]


@function_tool
def paint(color: Literal["red", "green", "blue"]) -> str:
    """Paint a circle."""
    painted.append(color)
    return "painted"


async def main():
    given = [{"role": "user", "content": CONTENT}]
    plain = Agent(name="eye", instructions="Be brief.", model="pebble")
    found = await Runner.run(plain, given)
    assert found.final_output == "red", found
    stream = Runner.run_streamed(plain, given)
    kinds = [event.type async for event in stream.stream_events()]
    assert "raw_response_event" in kinds
    assert stream.final_output == "red"
    typed = Agent(name="eye", model="pebble", output_type=Circle)
    assert (await Runner.run(typed, given)).final_output.color in ("red", "green", "blue")
    painter = Agent(
        name="painter",
        model="pebble",
        tools=[paint],
        model_settings=ModelSettings(tool_choice="required", parallel_tool_calls=False),
    )
    result = await Runner.run(painter, given)
    assert painted, result
    assert result.context_wrapper.usage.total_tokens > 0


asyncio.run(main())
print("all of it answered")
