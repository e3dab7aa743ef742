"""A table of pictures and answers, as a spreadsheet saves it: one question about one picture a row.

    image,question,answer        a conversation of one turn
    image,caption                the same with an empty question: what the stage align reads

Rows are kept in memory. Other columns are left alone.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lapilli.errors import DataError
from lapilli.train.data.pictures import PictureFolder

_ANSWERS: Final = ("answer", "caption")


class CsvSource:
    """The rows of one file; its first line names the columns.

    Raises:
        DataError: no column "answer" or "caption", or a file that is no text.
    """

    def __init__(self, path: Path, folder: PictureFolder) -> None:
        self.name = str(path)
        self._path, self._folder = path, folder
        self._rows: list[tuple[int, Mapping[str, str | None]]] = []
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                columns = reader.fieldnames or ()
                begin = reader.line_num + 1
                for row in reader:
                    self._rows.append((begin, row))
                    begin = reader.line_num + 1
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is no table in UTF-8: {error}") from error
        self._answer = next((name for name in _ANSWERS if name in columns), "")
        if not self._answer:
            raise DataError(
                f"{path} has the columns {', '.join(columns) or 'none'}: expected image, question "
                "and answer, or image and caption"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> dict[str, Any]:
        """See Source: a record in LLaVA's format."""
        row = self._rows[index][1]
        if None in row or None in row.values():
            raise DataError(f"{self.where(index)} has not as many fields as the first line")
        image, question = row.get("image"), row.get("question") or ""
        asked = "\n".join(filter(None, ("<image>" if image else "", question)))
        turns = [("human", asked), ("gpt", row[self._answer] or "")]
        record: dict[str, Any] = {
            "id": row.get("id") or str(index + 1),
            "conversations": [{"from": who, "value": text} for who, text in turns],
        }
        return {**record, "image": image} if image else record

    def where(self, index: int) -> str:
        """See Source."""
        return f"{self.name}:{self._rows[index][0]}"

    def media(self, index: int, name: object) -> object:
        """See Source."""
        return self._folder.find(name)
