"""Small things that programs of the original share (llava.utils, llava.model.utils)."""

import json
import logging
import os
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeAlias
from urllib.request import Request, urlopen

Foreign: TypeAlias = Any
"""Anything that a program brings: an argument namespace, a configuration, a tensor of any kind."""

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."


def disable_torch_init() -> None:
    """Do nothing: lapilli never initialises weights that it is about to read."""


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """Return a logger that writes to stderr and to a file in the working directory."""
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        form = logging.Formatter(
            "%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S"
        )
        handlers = (
            logging.StreamHandler(sys.stderr),
            logging.FileHandler(logger_filename, encoding="utf-8", delay=True),
        )
        for handler in handlers:
            handler.setFormatter(form)
            logger.addHandler(handler)
    return logger


def pretty_print_semaphore(semaphore: Foreign) -> str:
    """Return the state of a semaphore as a text; of none "None"."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def violates_moderation(text: str) -> bool:
    """Ask OpenAI's moderation whether a text breaks its rules.

    Note: as in the original, any failure means no.
    """
    try:
        request = Request(
            "https://api.openai.com/v1/moderations",
            json.dumps({"input": text}).encode(),
            {
                "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
                "Content-Type": "application/json",
            },
        )
        with urlopen(request, timeout=5) as answer:  # noqa: S310  the address is fixed
            return bool(json.loads(answer.read())["results"][0]["flagged"])
    except (OSError, HTTPException, KeyError, IndexError, ValueError):
        return False


def auto_upgrade(config: str | Path) -> None:
    """Give a config.json of the first releases the model type that programs of today look for.

    Note: the original asks for a yes on the terminal; here what is changed is told on stderr.
    """
    path = Path(config) / "config.json"
    if not path.is_file():
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    if "llava" not in str(config).lower() or "llava" in str(written.get("model_type", "")):
        return
    written |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    sys.stderr.write(f"{path}: model_type is llava_llama now\n")


def replace_llama_attn_with_flash_attn() -> None:
    """Do nothing: torch chooses the kernel of attention by itself."""


replace_llama_attn_with_xformers_attn = replace_llama_attn_with_flash_attn
