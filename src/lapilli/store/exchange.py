"""Exchange: a store as a file of other programs, and back.

    parquet, arrow, lance    columns id, vector (float32, a list of T_s * W), text_hash; metadata
                             of the schema keeps T_s, encoder and projector
    npy                      NAME.npy [n, T_s, W] in float32, and NAME.ids.txt, an id a line

Parquet and Arrow IPC need pyarrow (the extra "data"), Lance needs pylance (the extra "lance").
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from lapilli.config.reader import given_path, shown
from lapilli.errors import ConfigError, StoreError
from lapilli.shapes import Float, Tensor
from lapilli.store.manifest import Stamp, explaining_disk
from lapilli.store.reader import Store
from lapilli.store.writer import StoreWriter

_ROWS: Final = 4096
_TOKENS, _ENCODER, _PROJECTOR = b"lapilli.tokens", b"lapilli.encoder", b"lapilli.projector"

Progress = Callable[[int], None]


class Entries(NamedTuple):
    """Some entries on their way into a store; `hashes` are empty where there are none."""

    ids: list[Any]
    vectors: Float[Tensor, "n T W"]
    hashes: list[str]


def export_store(
    store: Store, path: str | Path, form: str, *, progress: Progress = lambda _: None
) -> Path:
    """Write all entries of a store to a file of another form; return the file.

    Args:
        store: whose entries are all of one encoder and projector.
        path: of the new file; a form whose files have an ending of their own adds it.
        form: parquet, arrow, lance or npy.
        progress: called with how many entries are written.

    Raises:
        StoreError: another form, a file that is there, no entries, entries of several encoders, an
            id that the form cannot say, or a full disk.
        ConfigError: the package for it is not installed.
    """
    if form not in EXPORTS:
        raise StoreError(f"form {shown(form)}: expected one of {', '.join(EXPORTS)}")
    target = given_path(path)
    if target.suffix != f".{form}":
        target = target.with_name(f"{target.name}.{form}")
    if target.exists():
        raise StoreError(f"{target} is there already: remove it, or choose another name")
    if not len(store):
        raise StoreError(f"{store.path} has no entries to export")
    with explaining_disk(target), _aside(target) as part:
        EXPORTS[form](store, part, progress)
    return target


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Yield a name that becomes the target's when all is written."""
    part = target.with_name(f".{target.name}.part")
    _remove(part)
    try:
        yield part
        part.rename(target)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _stamp_of(store: Store) -> Stamp:
    """Return what made all entries."""
    stamps = store.stamps()
    if len(stamps) > 1:
        names = ", ".join(shown(stamp.encoder) for stamp in stamps)
        raise StoreError(
            f"{store.path} has entries of {len(stamps)} encoders or projectors ({names}), and a "
            "file can say one: encode the stale ones again, or delete them"
        )
    return stamps[0]


def _pieces(store: Store, progress: Progress) -> Iterator[tuple[list[str], Tensor]]:
    ids = store.ids()
    for start in range(0, len(ids), _ROWS):
        part = ids[start : start + _ROWS]
        yield part, store.get(part)
        progress(start + len(part))


def _arrow() -> Any:  # noqa: ANN401 - pyarrow has no types
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            "Parquet and Arrow files need pyarrow: install lapilli[data], or take npy"
        ) from error
    return pyarrow


def _lance() -> Any:  # noqa: ANN401 - a module without types
    try:
        import lance
    except ImportError as error:
        raise ConfigError(
            "Lance needs pylance: install lapilli[lance], or take parquet, arrow or npy"
        ) from error
    return lance


def _record_batches(store: Store, progress: Progress) -> tuple[Any, Iterator[Any]]:
    """Return the schema of a store, and its entries in batches."""
    arrow, stamp = _arrow(), _stamp_of(store)
    said = {_TOKENS: str(store.tokens), _ENCODER: stamp.encoder}
    if stamp.projector is not None:
        said[_PROJECTOR] = stamp.projector
    size = store.tokens * store.width
    fields = [
        arrow.field("id", arrow.string(), nullable=False),
        arrow.field("vector", arrow.list_(arrow.float32(), size), nullable=False),
        arrow.field("text_hash", arrow.string()),
    ]
    schema = arrow.schema(fields, metadata=said)

    def batches() -> Iterator[Any]:
        for ids, vectors in _pieces(store, progress):
            numbers = arrow.array(vectors.reshape(-1).numpy())
            columns = [
                arrow.array(ids, arrow.string()),
                arrow.FixedSizeListArray.from_arrays(numbers, size),
                arrow.array(store.hashes(ids), arrow.string()),
            ]
            yield arrow.RecordBatch.from_arrays(columns, schema=schema)

    return schema, batches()


def export_parquet(store: Store, path: Path, progress: Progress) -> None:
    """Write a Parquet file."""
    schema, batches = _record_batches(store, progress)
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def export_arrow(store: Store, path: Path, progress: Progress) -> None:
    """Write an Arrow IPC file, which other programs can map."""
    schema, batches = _record_batches(store, progress)
    with _arrow().OSFile(str(path), "wb") as file, _arrow().ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def export_lance(store: Store, path: Path, progress: Progress) -> None:
    """Write a Lance dataset, a folder."""
    lance = _lance()
    schema, batches = _record_batches(store, progress)
    lance.write_dataset(batches, str(path), schema=schema)


def export_npy(store: Store, path: Path, progress: Progress) -> None:
    """Write an array, and the ids beside it."""
    ids = store.ids()
    broken = next((one for one in ids if len(one.splitlines()) > 1 or one.endswith("\n")), None)
    if broken is not None:
        raise StoreError(f"id {shown(broken)} has a line break: export to parquet or arrow")
    names = ids_file(path.with_name(path.name.removeprefix(".").removesuffix(".part")))
    if names.exists():
        raise StoreError(f"{names} is there already: remove it, or choose another name")
    _stamp_of(store)
    shape = (len(ids), store.tokens, store.width)
    array = np.lib.format.open_memmap(path, mode="w+", dtype="<f4", shape=shape)
    done = 0
    for part, vectors in _pieces(store, progress):
        array[done : done + len(part)] = vectors.numpy()
        done += len(part)
    array.flush()
    names.write_text("".join(f"{one}\n" for one in ids), encoding="utf-8", newline="")


def ids_file(path: Path) -> Path:
    """Return the file of the ids beside an array."""
    return path.with_name(f"{path.name.removesuffix('.npy')}.ids.txt")


EXPORTS: Final[Mapping[str, Callable[[Store, Path, Progress], None]]] = {
    "parquet": export_parquet,
    "arrow": export_arrow,
    "lance": export_lance,
    "npy": export_npy,
}
"""Function of every form by its name, which is also the ending of its files."""


def import_store(
    source: str | Path,
    path: str | Path,
    *,
    encoder: str | None = None,
    projector: str | None = None,
    tokens: int | None = None,
    dtype: str | None = None,
    columns: tuple[str, str] = ("id", "vector"),
    progress: Progress = lambda _: None,
) -> int:
    """Add the entries of a file to a store; return how many are new or changed.

    Args:
        source: .parquet, .arrow, .lance or .npy; ids of an array stand in NAME.ids.txt beside it.
        path: of the store; made where there is none.
        encoder: what made the vectors; None: what the file says.
        projector: the same of the projector.
        tokens: T_s; None: what the file says, or 1.
        dtype: number format; None: that of the store, or float16.
        columns: names of ids and vectors in a table.
        progress: called with how many entries are read.

    Raises:
        StoreError: no such file, a damaged one, or one without these columns; vectors of several
            widths; nobody says the encoder; see StoreWriter.
        ConfigError: the package for it is not installed.
    """
    file = given_path(source)
    form = file.suffix.lower().removeprefix(".")
    if form not in IMPORTS:
        raise StoreError(f"{file}: expected a file that ends in {', '.join(IMPORTS)}")
    if not file.exists():
        raise StoreError(f"{file} is not there: expected a file of ids and vectors")
    said, batches = IMPORTS[form](file, columns, tokens)
    encoder = encoder or said.get(_ENCODER)
    if encoder is None:
        raise StoreError(
            f"{file} does not say what made its vectors: name it (--encoder), so that they can be "
            "told from others"
        )
    done = changed = 0
    with StoreWriter(
        path, encoder=encoder, projector=projector or said.get(_PROJECTOR), dtype=dtype
    ) as writer:
        for entries in batches:
            hashes = entries.hashes or None
            changed += writer.add(entries.ids, entries.vectors, hashes=hashes)
            done += len(entries.ids)
            progress(done)
    return changed


Opened = tuple[dict[bytes, str], Iterator[Entries]]
"""What the metadata of a file says, and its entries."""


def _open_tables(
    file: Path,
    open_batches: Callable[[], tuple[Any, Iterator[Any]]],
    columns: tuple[str, str],
    tokens: int | None,
) -> Opened:
    """Return the entries of record batches."""
    arrow = _arrow()
    try:
        schema, batches = open_batches()
    except ConfigError:  # a package that is not installed
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read: {error!s:.200}") from error
    for name in columns:
        if name not in schema.names:
            raise StoreError(
                f"{file} has the columns {', '.join(schema.names[:12])}: expected {shown(name)}; "
                "the options --id and --vector name others"
            )
    said = {key: value.decode() for key, value in (schema.metadata or {}).items()}
    count = tokens or int(said.get(_TOKENS, "0")) or None

    def entries() -> Iterator[Entries]:
        try:
            for batch in batches:
                if batch.num_rows:
                    yield _entries(file, batch, columns, count)
        except (arrow.ArrowException, OSError) as error:
            raise StoreError(f"{file} is damaged: {error!s:.200}") from error

    return said, entries()


def _entries(file: Path, batch: Any, columns: tuple[str, str], tokens: int | None) -> Entries:  # noqa: ANN401
    """Return the entries of a record batch, whose vectors are lists, or lists of lists."""
    arrow = _arrow()
    column = batch.column(columns[1])
    shape = [batch.num_rows]
    while hasattr(column, "flatten") and arrow.types.is_nested(column.type):
        if column.null_count:
            raise StoreError(f"{file}: a {shown(columns[1])} is missing: give every id its vector")
        values = column.flatten()
        size, rest = divmod(len(values), len(column))
        lengths = set(arrow.compute.list_value_length(column).unique().to_pylist())
        if rest or len(lengths) > 1:
            raise StoreError(
                f"{file}: vectors have {sorted(lengths)[:5]} numbers: expected as many in each"
            )
        shape.append(size)
        column = values
    if len(shape) == 1 or not arrow.types.is_floating(column.type) or column.null_count:
        raise StoreError(
            f"{file}: {shown(columns[1])} is {batch.schema.field(columns[1]).type}: expected lists "
            "of floating point numbers"
        )
    numbers = torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
    hashes = batch.column("text_hash").to_pylist() if "text_hash" in batch.schema.names else []
    return Entries(
        batch.column(columns[0]).to_pylist(),
        _by_tokens(file, numbers.reshape(shape), tokens),
        hashes if all(isinstance(one, str) for one in hashes) else [],
    )


def _by_tokens(file: Path, vectors: Tensor, tokens: int | None) -> Tensor:
    """Return vectors as [n, T_s, W]."""
    if vectors.ndim == 3 and tokens in (None, vectors.shape[1]):
        return vectors
    size = vectors[0].numel()
    if vectors.ndim != 2 or size % (tokens or 1):
        raise StoreError(
            f"{file}: entries are {list(vectors.shape[1:])} numbers, which are not {tokens} vectors"
        )
    return vectors.reshape(len(vectors), tokens or 1, -1)


def import_parquet(file: Path, columns: tuple[str, str], tokens: int | None) -> Opened:
    """Open a Parquet file."""

    def open_batches() -> tuple[Any, Iterator[Any]]:
        from pyarrow.parquet import ParquetFile

        opened = ParquetFile(file)
        return opened.schema_arrow, opened.iter_batches(_ROWS)

    return _open_tables(file, open_batches, columns, tokens)


def import_arrow(file: Path, columns: tuple[str, str], tokens: int | None) -> Opened:
    """Open an Arrow IPC file."""

    def open_batches() -> tuple[Any, Iterator[Any]]:
        arrow = _arrow()
        opened = arrow.ipc.open_file(arrow.memory_map(str(file)))
        return opened.schema, map(opened.get_batch, range(opened.num_record_batches))

    return _open_tables(file, open_batches, columns, tokens)


def import_lance(file: Path, columns: tuple[str, str], tokens: int | None) -> Opened:
    """Open a Lance dataset."""

    def open_batches() -> tuple[Any, Iterator[Any]]:
        opened = _lance().dataset(str(file))
        return opened.schema, opened.to_batches(batch_size=_ROWS)

    return _open_tables(file, open_batches, columns, tokens)


def import_npy(file: Path, columns: tuple[str, str], tokens: int | None) -> Opened:
    """Open an array and the ids beside it."""
    names = ids_file(file)
    try:
        ids = names.read_text("utf-8").split("\n")
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise StoreError(
            f"{names} is not there: expected an id a line, one for each row"
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{file} cannot be read: {error!s:.200}") from error
    ids = [one.removesuffix("\r") for one in (ids[:-1] if ids[-1] == "" else ids)]
    if array.ndim not in (2, 3) or array.dtype.kind != "f" or len(array) != len(ids):
        raise StoreError(
            f"{file} is {array.dtype} {list(array.shape)}, and {names} has {len(ids)} ids: "
            "expected floating point numbers, a row for each"
        )

    def entries() -> Iterator[Entries]:
        for start in range(0, len(ids), _ROWS):
            part = torch.from_numpy(np.array(array[start : start + _ROWS]))
            yield Entries(ids[start : start + _ROWS], _by_tokens(file, part, tokens), [])

    return {}, entries()


IMPORTS: Final[Mapping[str, Callable[[Path, tuple[str, str], int | None], Opened]]] = {
    "parquet": import_parquet,
    "arrow": import_arrow,
    "lance": import_lance,
    "npy": import_npy,
}
"""Function of every form by the ending of its files."""
