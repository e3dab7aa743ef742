"""The keyword criterion of the original, quirk 9 included."""

from collections.abc import Sequence

import torch

from lapilli.compat.foreign import Foreign
from lapilli.shapes import Int, Tensor


class KeywordsStoppingCriteria:
    """Stops a generation when a keyword has been written in every row.

    Args:
        keywords: texts to stop at.
        tokenizer: turns them into ids, and answers into text.
        input_ids: the prompt; only its length counts.

    Note: quirk 9. It expects output ids that begin with the prompt, but generate() hands over new
        tokens only: until the answer is longer than half the prompt a keyword is noticed only when
        the last ids are exactly its ids.
    """

    def __init__(
        self,
        keywords: Sequence[str],
        tokenizer: Foreign,
        input_ids: Int[Tensor, "B T"],
    ) -> None:
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.keyword_ids = [torch.tensor(self._ids(keyword)) for keyword in keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def _ids(self, keyword: str) -> list[int]:
        ids: list[int] = self.tokenizer(keyword).input_ids
        has_bos = len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id
        return ids[1:] if has_bos else ids

    def call_for_batch(self, output_ids: Int[Tensor, "1 T"], scores: object, **_: object) -> bool:
        """Whether one row ends in a keyword, or contains one near its end."""
        row = output_ids[0]
        for ids in self.keyword_ids:
            if torch.equal(row[-len(ids) :], ids.to(row)):
                return True
        window = min(output_ids.shape[1] - self.start_len, self.max_keyword_len)
        # A negative window counts from the front: that is where the original looks (quirk 9).
        text = self.tokenizer.batch_decode(output_ids[:, -window:], skip_special_tokens=True)[0]
        return any(keyword in text for keyword in self.keywords)

    def __call__(
        self, output_ids: Int[Tensor, "B T"], scores: object = None, **kwargs: object
    ) -> bool:
        """Whether every row has met a keyword."""
        rows = output_ids.unsqueeze(1)
        return all(self.call_for_batch(row, scores, **kwargs) for row in rows)
