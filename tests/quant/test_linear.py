"""A stored vocabulary table gives the numbers of a converted one."""

import pytest
import torch

from lapilli.quant.linear import StoredEmbedding


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_float32_unless_somebody_says_otherwise(stored):
    table = torch.randn(7, 4).to(stored)
    ids = torch.tensor([[3, 3, 0]])
    embedding = StoredEmbedding(table)
    assert torch.equal(embedding(ids), table.float()[ids])
    embedding.dtype = torch.bfloat16
    assert torch.equal(embedding(ids), table.bfloat16()[ids])
    assert embedding.weight.dtype == stored
