"""What rounding costs pebble: greedy tokens that stay, right answers, and the next token's KL.

    .venv/bin/python -m benchmarks.quantized --questions 500

float32, int8 and int4 answer the questions of the exam (pebble/score.py). The divergence is
KL(float32 || quantized) of the next token, along the answers that float32 gave, in nats.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

import lapilli
from lapilli.config.generation import SamplingParams
from lapilli.model import FusedBatch
from lapilli.pipeline import Chat
from lapilli.prompt.message import Message
from lapilli.quant import QuantConfig
from pebble.draw import draw
from pebble.score import ExamItem, exam, is_exact

ROWS = 20
RESULT = Path(__file__).parent / "results" / "quantized.json"
CONFIGS = {
    "float32": None,
    "int8": QuantConfig(bits=8, group_size=32),
    "int8 with tower": QuantConfig(bits=8, group_size=32, quantize_tower=True),
    "int8 g128": QuantConfig(bits=8, group_size=128),
    "int4": QuantConfig(bits=4),
    "int4 symmetric g128": QuantConfig(bits=4, levels="symmetric"),
    "int4 symmetric g32": QuantConfig(bits=4, levels="symmetric", group_size=32),
}


def messages_of(item: ExamItem) -> list[Message]:
    said = [*item.history, (item.question, None)]
    messages = []
    for i, (question, answer) in enumerate(said):
        messages.append(
            Message.user(question, draw(item.scene)) if i == 0 else Message.user(question)
        )
        if answer is not None:
            messages.append(Message.assistant(answer))
    return messages


def log_probabilities(chat: Chat, item: ExamItem, ids: list[int]) -> torch.Tensor:
    """Of every vocabulary entry, at each position of an answer: [answer, V]."""
    ready = chat.encode(messages_of(item))
    model = chat.model
    prompt = model.embed_prompts([ready.encoded], [list(ready.media)])
    answer = model.language_model.embed(torch.tensor([ids[:-1]], dtype=torch.long))
    fused = torch.cat((prompt.inputs_embeds, answer), dim=1)
    length = fused.shape[1]
    batch = FusedBatch(fused, torch.ones(1, length, dtype=torch.bool), torch.arange(length)[None])
    hidden = model(batch)
    scores = model.logits(hidden[:, -len(ids) :])
    return torch.log_softmax(scores[0].float(), dim=-1)


def measure(chat: Chat, items: list[ExamItem], truth: dict[str, list] | None) -> tuple[dict, dict]:
    """Figures of one model, and what the others are compared with."""
    found: dict[str, list] = {"ids": [], "logs": []}
    params = SamplingParams(max_new_tokens=80)
    right = 0
    for start in range(0, len(items), ROWS):
        batch = items[start : start + ROWS]
        answers = chat.batch([messages_of(item) for item in batch], params)
        found["ids"] += [list(answer.token_ids) for answer in answers]
        right += sum(
            is_exact(answer.text, item.answer) for answer, item in zip(answers, batch, strict=True)
        )
    along = found["ids"] if truth is None else truth["ids"]
    with torch.inference_mode():
        found["logs"] = [
            log_probabilities(chat, item, ids)
            for item, ids in zip(items, along, strict=True)
            if ids
        ]
    figures: dict[str, float] = {"accuracy": right / len(items)}
    if truth is not None:
        same = [a == b for a, b in zip(found["ids"], truth["ids"], strict=True)]
        kl = torch.cat(
            [(p.exp() * (p - q)).sum(-1) for p, q in zip(truth["logs"], found["logs"], strict=True)]
        )
        figures |= {
            "answers_unchanged": sum(same) / len(same),
            "kl_mean": kl.mean().item(),
            "kl_99th": kl.quantile(0.99).item(),
            "positions": len(kl),
        }
    return figures, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    items = exam(options.questions)
    truth = None
    report: dict[str, object] = {"model": "pebble", "questions": len(items)}
    for name, config in CONFIGS.items():
        chat = lapilli.load("pebble", dtype="float32", device="cpu", quantize=config)
        figures, found = measure(chat, items, truth)
        truth = truth or found
        report[name] = figures | ({} if config is None else {"config": asdict(config)})
        print(name, {key: round(value, 6) for key, value in figures.items()}, flush=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
