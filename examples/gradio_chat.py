"""A chat of Gradio over `lapilli serve`: pip install gradio openai, then start both.

Usage: python gradio_chat.py [http://127.0.0.1:8000/v1]
"""

import base64
import sys
from pathlib import Path

import gradio as gr
from openai import OpenAI

client = OpenAI(base_url=(sys.argv[1:] or ["http://127.0.0.1:8000/v1"])[0], api_key="none")


def part(given):
    if isinstance(given, str) or "text" in given:
        return {"type": "text", "text": given if isinstance(given, str) else given["text"]}
    data = base64.b64encode(Path(given.get("file", given)["path"]).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def turn(role, content):
    given = [content] if isinstance(content, str) else content
    return {"role": role, "content": [part(one) for one in given]}


def answer(message, history):
    earlier = [turn(one["role"], one["content"]) for one in history]
    asked = turn("user", [*({"path": path} for path in message["files"]), message["text"]])
    said, options = "", {"model": "default", "messages": [*earlier, asked], "stream": True}
    for chunk in client.chat.completions.create(**options):
        said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        yield said


if __name__ == "__main__":
    gr.ChatInterface(answer, multimodal=True, title="lapilli").launch()
