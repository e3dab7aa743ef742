"""A chat of Gradio over `lapilli serve`: pip install gradio openai, then start both.

Usage: python gradio_chat.py [http://127.0.0.1:8000/v1]
"""

import base64
import sys
from pathlib import Path

import gradio as gr
from openai import OpenAI

client = OpenAI(base_url=(sys.argv[1:] or ["http://127.0.0.1:8000/v1"])[0], api_key="none")


def part(path):
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def answer(message, history):
    content = [*map(part, message["files"]), {"type": "text", "text": message["text"]}]
    messages, said = [{"role": "user", "content": content}], ""
    for chunk in client.chat.completions.create(model="default", messages=messages, stream=True):
        said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        yield said


if __name__ == "__main__":
    gr.ChatInterface(answer, multimodal=True, title="lapilli").launch()
