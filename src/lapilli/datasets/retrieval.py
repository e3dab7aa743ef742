"""Retrieval: queries, the texts that may answer them, and graded judgements of both.

    BEIR    corpus.jsonl {"_id", "title", "text"} | queries.jsonl {"_id", "text"} | qrels/test.tsv
    TREC    judgements "query 0 document grade", runs "query Q0 document rank score name"
    SMART   .I number .T title .A author .B source .W text    (Cranfield, CACM, CISI)

A grade above 0 says that a text answers, the higher the better.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lapilli.config.reader import given_path, shown
from lapilli.errors import DataError

Judgements = dict[str, dict[str, float]]
"""Grade by id of the query and id of the text."""

_CORPUS: Final = "corpus.jsonl"
_QUERIES: Final = "queries.jsonl"


@dataclass(frozen=True, slots=True)
class Document:
    """A text that may answer."""

    title: str
    text: str

    @property
    def whole(self) -> str:
        """Return title and text as one text; a title that begins the text is not repeated."""
        return self.text if self.text.startswith(self.title) else f"{self.title}\n{self.text}"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """A collection.

    Attributes:
        documents: by id.
        queries: text by id.
        judgements: of queries that are there; a text may be judged that is not.
    """

    documents: Mapping[str, Document]
    queries: Mapping[str, str]
    judgements: Judgements


def read_beir(folder: str | Path, split: str = "test") -> Retrieval:
    """Read a folder in the layout of BEIR.

    Raises:
        DataError: a file is missing, or a line is none of its kind; the message names it.

    Source: Thakur et al. 2021 (BEIR, arXiv 2104.08663) and its repository's data.
    """
    folder = given_path(folder)
    documents = {
        _id(record, where): Document(str(record.get("title") or ""), _text(record, where))
        for where, record in _json_lines(folder / _CORPUS)
    }
    queries = {
        _id(record, where): _text(record, where) for where, record in _json_lines(folder / _QUERIES)
    }
    judged: Judgements = {}
    path = folder / "qrels" / f"{split}.tsv"
    for number, line in _lines(path):
        fields = line.split("\t")
        if number == 1 and not _is_number(fields[-1]):
            continue  # the heading
        if len(fields) != 3 or not _is_number(fields[2]):
            raise DataError(f"{path}:{number}: expected query, document and grade, by tabs")
        judged.setdefault(fields[0], {})[fields[1]] = float(fields[2])
    return Retrieval(documents, queries, judged)


def read_trec_judgements(path: str | Path) -> Judgements:
    """Read judgements as trec_eval does: query, anything, document, grade.

    Raises:
        DataError: no such file, or a line of another form.
    """
    path, judged = given_path(path), Judgements()
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 4 or not _is_number(fields[3]):
            raise DataError(f"{path}:{number}: expected query, 0, document and grade")
        judged.setdefault(fields[0], {})[fields[2]] = float(fields[3])
    return judged


def read_trec_run(path: str | Path) -> dict[str, list[tuple[str, float]]]:
    """Read a ranking as trec_eval does, and return document and score of every query, best first.

    Ranks are not read: the scores say the order, and ids where scores are equal, as in trec_eval.

    Raises:
        DataError: no such file, or a line of another form.
    """
    path = given_path(path)
    found: dict[str, list[tuple[str, float]]] = {}
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 6 or not _is_number(fields[4]):
            raise DataError(f"{path}:{number}: expected query, Q0, document, rank, score and name")
        found.setdefault(fields[0], []).append((fields[2], float(fields[4])))
    for ranked in found.values():
        ranked.sort(key=lambda pair: (pair[1], pair[0]), reverse=True)
    return found


def write_trec_run(path: str | Path, run: Mapping[str, Mapping[str, float]], name: str) -> None:
    """Write scores by query and document as a ranking that trec_eval reads.

    Raises:
        DataError: an id or a name with white space in it, which parts the fields.
    """
    lines = []
    for query, scores in run.items():
        ranked = sorted(scores.items(), key=lambda pair: (pair[1], pair[0]), reverse=True)
        for rank, (document, score) in enumerate(ranked, start=1):
            for one in (query, document, name):
                if not one or one.split() != [one]:
                    raise DataError(f"{shown(one)} cannot stand in a TREC run: it has white space")
            lines.append(f"{query} Q0 {document} {rank} {score:.9g} {name}\n")
    given_path(path).write_text("".join(lines), encoding="utf-8")


def read_smart(documents: str | Path, queries: str | Path, judgements: str | Path) -> Retrieval:
    """Read a collection in the layout of SMART, such as Cranfield.

    Queries are numbered in the order of their appearance, as the judgements count them. Judgements
    are lines "query document grade", 1 the best and 4 the least; they become 4 to 1.

    Raises:
        DataError: a file is missing, or a line is of another form.

    Note: Cranfield's readme does not say what its 225 judgements of -1 are, one for nearly every
        query. They are left out: what is not known to answer is taken for unjudged.
    """
    texts = {
        number: Document(_flat(parts.get("T", "")), _flat(parts.get("W", "")))
        for number, parts in _smart_records(given_path(documents))
    }
    asked = {
        str(i): _flat(parts.get("W", ""))
        for i, (_, parts) in enumerate(_smart_records(given_path(queries)), start=1)
    }
    path, judged = given_path(judgements), Judgements()
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 3 or not _is_number(fields[2]):
            raise DataError(f"{path}:{number}: expected query, document and grade")
        grade = float(fields[2])
        if grade > 0:
            judged.setdefault(fields[0], {})[fields[1]] = 5 - grade
    return Retrieval(texts, asked, judged)


def _smart_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield number and parts of every record; a letter that comes again goes on with its part."""
    number, parts, letter = "", dict[str, str](), ""
    for at, line in _lines(path, keep_empty=True):
        if line.startswith(".I"):
            if number:
                yield number, parts
            number, parts, letter = line[2:].strip(), {}, ""
        elif not number:
            raise DataError(f"{path}:{at}: expected .I and a number before anything else")
        elif len(line.strip()) == 2 and line[0] == "." and line[1].isupper():
            letter = line[1]
        elif letter:
            parts[letter] = f"{parts.get(letter, '')}{line}\n"
    if number:
        yield number, parts


def _flat(text: str) -> str:
    return " ".join(text.split())


def _lines(path: Path, *, keep_empty: bool = False) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines of a file.

    Raises:
        DataError: no such file, or no text in UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 (byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() or keep_empty:
            yield number, line


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: no JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} holds {shown(record)}: expected an object")
        yield where, record


def _id(record: Mapping[str, Any], where: str) -> str:
    if not isinstance(record.get("_id"), str | int):
        raise DataError(f'{where} has no "_id": found the keys {", ".join(record)}')
    return str(record["_id"])


def _text(record: Mapping[str, Any], where: str) -> str:
    if not isinstance(record.get("text"), str):
        raise DataError(f'{where}: its "text" is {shown(record.get("text"))}: expected a text')
    return str(record["text"])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
