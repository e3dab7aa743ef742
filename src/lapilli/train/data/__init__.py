"""Training data: files, formats, samples, their encoding and their order."""

from lapilli.train.data.dataset import (
    Dataset,
    EncodedDataset,
    encoded_dataset,
    open_dataset,
    open_source,
    order_of,
)
from lapilli.train.data.encoder import EncodedSample, SampleEncoder
from lapilli.train.data.sample import Sample, to_sample
from lapilli.train.data.source import Source

__all__ = [
    "Dataset",
    "EncodedDataset",
    "EncodedSample",
    "Sample",
    "SampleEncoder",
    "Source",
    "encoded_dataset",
    "open_dataset",
    "open_source",
    "order_of",
    "to_sample",
]
