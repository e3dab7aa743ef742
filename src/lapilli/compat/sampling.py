"""The sampler of the original (llava.train.llava_trainer), which lives in lapilli.train."""

from lapilli.train.data.order import (
    LengthGroupedSampler,
    even_chunks,
    grouped_by_length,
    grouped_by_modality,
)

__all__ = [
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_modality_length_grouped_indices",
    "split_to_even_chunks",
]

split_to_even_chunks = even_chunks
get_length_grouped_indices = grouped_by_length
get_modality_length_grouped_indices = grouped_by_modality
