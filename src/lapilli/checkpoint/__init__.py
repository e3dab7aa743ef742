"""Files on disk or hub become a model, a tokenizer and a report, and back."""
