"""Where samples come from and how they become rows: files, formats, labels, order."""

from lapilli.train.data.dataset import Dataset, Rows, open_dataset, order_of, rows_of
from lapilli.train.data.encoder import Row, RowMaker
from lapilli.train.data.formats import to_sample
from lapilli.train.data.sample import Sample
from lapilli.train.data.source import Source, open_source

__all__ = [
    "Dataset",
    "Row",
    "RowMaker",
    "Rows",
    "Sample",
    "Source",
    "open_dataset",
    "open_source",
    "order_of",
    "rows_of",
    "to_sample",
]
