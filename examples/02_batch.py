"""Many questions in one batch: rows of any length, with pictures and without, each as if alone.

python examples/02_batch.py [MODEL [PICTURE]]
"""

import sys
from pathlib import Path

import lapilli
from lapilli import Message, SamplingParams

PICTURE = Path(__file__).parent / "picture.png"


def main(model: str = "pebble", picture: str = str(PICTURE)) -> None:
    chat = lapilli.load(model)
    conversations = [
        [Message.user("What is in this picture?", picture)],
        [Message.user("How many things are there?", picture)],
        [
            Message.user("What is in this picture?", picture),
            Message.assistant("I am not sure."),
            Message.user("Is there a circle?"),
        ],
    ]
    params = SamplingParams(max_new_tokens=32, logprobs=0)
    for conversation, answer in zip(conversations, chat.batch(conversations, params), strict=True):
        surest = sum(report.logprob for report in answer.logprobs or ())
        print(f"{conversation[-1].text}  ->  {answer.text}  (log-probability {surest:.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
