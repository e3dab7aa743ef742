"""Data sets of users, items and queries: readers of the field's layouts, and splits.

    RecBole's atomic files, Parquet   interactions.py   Interactions: who took what, when
    BEIR, TREC, SMART                 retrieval.py      Retrieval: queries, texts, judgements
    texts by id                       texts.py          TextFile: items of a store or a ranking
    rows of any of them               tables.py         columns by name

Knows files and numbers; must not know models.
"""
