"""Uploaded files: a picture is sent once, and named by its id afterwards.

They stay in memory until the server ends, are deleted, or newer ones need their room.
"""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from lapilli.errors import MediaTooLargeError
from lapilli.serve.answers import new_id
from lapilli.serve.errors import UnknownMediumError


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One uploaded file."""

    file_id: str
    owner: str
    name: str
    purpose: str
    data: bytes
    created: int

    def as_json(self) -> dict[str, object]:
        """Return it as OpenAI's file object."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Files:
    """Uploaded files of all owners, each seen by its own.

    Args:
        max_bytes: of all of them; the oldest go.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, owner: str, name: str, purpose: str, data: bytes) -> StoredFile:
        """Keep a file.

        Raises:
            MediaTooLargeError: it alone is larger than what may be kept.
        """
        if len(data) > self._max_bytes:
            raise MediaTooLargeError(
                f"{name} has {len(data)} bytes, the server keeps {self._max_bytes} of uploads"
            )
        file = StoredFile(new_id("file-"), owner, name, purpose, data, int(time.time()))
        with self._lock:
            self._files[file.file_id] = file
            self._bytes += len(data)
            while self._bytes > self._max_bytes:
                _, gone = self._files.popitem(last=False)
                self._bytes -= len(gone.data)
        return file

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Return a file of this owner.

        Raises:
            UnknownMediumError: there is none of this id.
        """
        with self._lock:
            file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise UnknownMediumError(f"there is no file {file_id!r} (any more): upload it again")
        return file

    def content(self, file_id: str, owner: str) -> bytes:
        """Return the bytes of a file; raises what `get` does."""
        return self.get(file_id, owner).data

    def all(self, owner: str) -> list[StoredFile]:
        """Return the files of this owner, newest first."""
        with self._lock:
            return [file for file in reversed(self._files.values()) if file.owner == owner]

    def delete(self, file_id: str, owner: str) -> None:
        """Let go of a file; raises what `get` does."""
        file = self.get(file_id, owner)
        with self._lock:
            if self._files.pop(file_id, None) is not None:
                self._bytes -= len(file.data)
