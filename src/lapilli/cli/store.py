"""`lapilli store`: embeddings by id on disk, made of items, of files, and for other programs."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapilli.cli.terminal import (
    Adapter,
    Base,
    Device,
    IdColumn,
    Json,
    TextColumn,
    add_command,
    counting,
    loading,
    note,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lapilli.store.encode import TextEncoder

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of the store.")]
Items = Annotated[Path, typer.Argument(help="Parquet, CSV, TSV or JSONL with ids and texts.")]
File = Annotated[Path, typer.Argument(help="A file that ends in .parquet, .arrow, .lance or .npy.")]
Target = Annotated[Path, typer.Argument(help="The new file.")]
Encoder = Annotated[
    str, typer.Option(help="The language model that reads the texts: a directory or a hub id.")
]
Modality = Annotated[
    str | None,
    typer.Option(
        help="A modality of kind text of that checkpoint: it reads the texts, and what stands for "
        "them in its prompts is stored."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Vectors of an item: the states of its last tokens; without it 1, or the modality's.",
    ),
]
ReadTokens = Annotated[
    int | None, typer.Option(min=1, help="Vectors of an entry; without it, what the file says.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float16, bfloat16, float32 or int8; without it, the store's own or float16."
    ),
]
VectorColumn = Annotated[str, typer.Option("--vector", help="The column of the vectors.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Cut longer texts at their end, in tokens.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Encode in so many processes of Ray, each on one core or GPU; RAY_ADDRESS names a "
        "cluster, without it they run here.",
    ),
]
Made = Annotated[
    str | None,
    typer.Option("--encoder", help="What made the vectors; without it, what the file says."),
]
Projected = Annotated[
    str | None, typer.Option("--projector", help="The projector that the vectors went through.")
]
Form = Annotated[str, typer.Option("--to", help="parquet, arrow, lance or npy.")]
Verify = Annotated[bool, typer.Option("--verify", help="Read every file and check its digest.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no bar and no summary.")]


def build(
    items: Items,
    folder: Folder,
    *,
    encoder: Encoder,
    modality: Modality = None,
    tokens: Tokens = None,
    dtype: Dtype = None,
    id_column: IdColumn = "id",
    text_column: TextColumn = "text",
    max_length: MaxLength = None,
    base: Base = None,
    adapter: Adapter = None,
    device: Device = "auto",
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Encode the texts of items into a store; run again after a stop or a change, it goes on.

    Items whose text is the same and whose vectors are from the same encoder stay as they are.
    """
    with loading(encoder, quiet=quiet) as progress:
        from lapilli.datasets.texts import TextFile

        file = TextFile(items, id_column=id_column, text_column=text_column)

        make = partial(_encoder, encoder, base, adapter, device, (tokens, max_length, modality))
        reader = make(progress)
    with counting(quiet=quiet) as count:

        def done(items: int) -> None:
            count(items, len(file))

        if workers is None:
            from lapilli.store.encode import build_store

            encoded = build_store(folder, file, reader, dtype=dtype, progress=done)
        else:
            from lapilli.store.distributed import build_store_distributed

            encoded = build_store_distributed(
                folder,
                file,
                reader,
                make,
                workers=workers,
                gpus=float(reader.device.type == "cuda"),
                dtype=dtype,
                progress=done,
            )
    if not quiet:
        note(f"{folder}: {encoded} of {len(file)} items encoded, the others were there")


def _encoder(
    source: str,
    base: str | None,
    adapter: str | None,
    device: str,
    sizes: tuple[int | None, int | None, str | None],
    progress: "Callable[[int, int], None] | None" = None,
) -> "TextEncoder":
    """Load what reads the texts: in this process, and in every worker."""
    from lapilli.checkpoint.load import load_checkpoint
    from lapilli.store.encode import TextEncoder

    loaded = load_checkpoint(source, base=base, adapter=adapter, device=device, progress=progress)
    tokens, max_length, modality = sizes
    return TextEncoder(
        loaded.model, loaded.tokenizer, tokens=tokens, max_length=max_length, modality=modality
    )


def import_(
    file: File,
    folder: Folder,
    *,
    encoder: Made = None,
    projector: Projected = None,
    tokens: ReadTokens = None,
    dtype: Dtype = None,
    id_column: IdColumn = "id",
    vector_column: VectorColumn = "vector",
    quiet: Quiet = False,
) -> None:
    """Add the vectors of a file to a store."""
    from lapilli.store.exchange import import_store

    changed = import_store(
        file,
        folder,
        encoder=encoder,
        projector=projector,
        tokens=tokens,
        dtype=dtype,
        columns=(id_column, vector_column),
    )
    if not quiet:
        note(f"{folder}: {changed} entries are new or changed")


def export(folder: Folder, target: Target, *, form: Form, quiet: Quiet = False) -> None:
    """Write the entries of a store to a file for other programs."""
    from lapilli.store import Store
    from lapilli.store.exchange import export_store

    store = Store.open(folder)
    with counting(quiet=quiet) as count:
        made = export_store(store, target, form, progress=lambda done: count(done, len(store)))
    if not quiet:
        note(f"{made}: {len(store)} entries")


def info(folder: Folder, *, verify: Verify = False, as_json: Json = False) -> None:
    """Print what a store is: entries, sizes, and what made them."""
    from lapilli.store import Store

    store = Store.open(folder)
    if verify:
        store.verify()
    found = store.info()
    if as_json:
        said = {name: getattr(found, name) for name in found.__dataclass_fields__}
        stamps = [{**asdict(stamp), "rows": rows} for stamp, rows in found.stamps.items()]
        typer.echo(json.dumps({**said, "path": str(found.path), "stamps": stamps}, indent=2))
        return
    typer.echo(f"{found.entries} entries of {found.tokens} x {found.width} {found.dtype}")
    typer.echo(
        f"{found.bytes} bytes in {found.shards} shards, {found.dead} rows replaced or deleted"
    )
    for stamp, rows in found.stamps.items():
        after = "" if stamp.projector is None else f", projector {stamp.projector}"
        typer.echo(f"{rows} rows of encoder {stamp.encoder}{after}")


def compact(folder: Folder, *, quiet: Quiet = False) -> None:
    """Merge small files of a store and drop what was replaced or deleted; readers go on."""
    from lapilli.store import compact as compact_store

    freed = compact_store(folder)
    if not quiet:
        note(f"{folder}: {freed} bytes are free again")


app = typer.Typer(
    help="Keep embeddings by id on disk.", no_args_is_help=True, rich_markup_mode=None
)
add_command(app, "build", build)
add_command(app, "import", import_)
add_command(app, "export", export)
add_command(app, "info", info)
add_command(app, "compact", compact)
