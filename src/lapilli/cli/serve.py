"""`lapilli serve`: a server of one model, for every client that speaks the field's protocols."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.terminal import (
    ChatOptions,
    Cores,
    Engine,
    EngineKind,
    StoreOfModality,
    note,
    open_stores,
    reachable,
    reachable_stores,
)
from lapilli.config.generation import MIB, SamplingParams
from lapilli.errors import ConfigError

if TYPE_CHECKING:
    from lapilli.pipeline import Chat

Model = Annotated[str | None, typer.Argument(help="A directory, a hub id, or pebble.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="KEY, or NAME=KEY:REQUESTS_PER_MINUTE:CONCURRENT, where an empty limit is none; "
        "repeatable. Without it the environment variable LAPILLI_API_KEY counts.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What requests call the model; left out: what it is loaded by."),
]
Rows = Annotated[int, typer.Option(help="Answers that are worked on at the same time.", min=1)]
Context = Annotated[
    int | None,
    typer.Option(
        help="Longest context, tokens of prompt and answer together; left out: as many as the "
        "model reads.",
        min=1,
    ),
]
CacheBytes = Annotated[
    int | None,
    typer.Option(help="Memory for keys and values, cached ones included, in bytes.", min=MIB),
]
FeatureBytes = Annotated[
    int, typer.Option(help="Memory for features of pictures that are kept, in bytes.", min=0)
]
PictureBytes = Annotated[
    int, typer.Option(help="Memory for pictures that are kept prepared, in bytes.", min=0)
]
PrefixBytes = Annotated[
    int,
    typer.Option(
        help="Memory for what scores, rankings and decisions share, in bytes for each of them.",
        min=0,
    ),
]
UploadBytes = Annotated[int, typer.Option(help="Memory for uploaded files, in bytes.", min=0)]
Remote = Annotated[
    bool, typer.Option("--allow-remote-images", help="Fetch pictures from http(s) URLs.")
]
Root = Annotated[
    Path | None, typer.Option("--media-root", help="A folder whose files requests may name.")
]
Origins = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", help="A web page's origin that may ask; repeatable."),
]
WithoutKey = Annotated[
    bool, typer.Option("--without-key", help="Let other machines ask without a key.")
]
Replicas = Annotated[int, typer.Option(help="Engines of Ray.", min=1)]


@dataclass(frozen=True)
class Loader:
    """Loads the model in a process of Ray's.

    Attributes:
        how: options of the model; its paths mean the same on every machine.
        stores: options NAME=STORE.
        limits: fields of EngineOptions.
    """

    how: ChatOptions
    stores: tuple[str, ...]
    limits: dict[str, Any]

    def __call__(self) -> "Chat":
        """Return the model."""
        return replace(self.how, quiet=True).load(open_stores(self.stores), **self.limits)


def serve(
    checkpoint: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Keys = None,
    name: Name = None,
    rows: Rows = 16,
    context: Context = None,
    cache_bytes: CacheBytes = None,
    feature_bytes: FeatureBytes = 256 * MIB,
    picture_bytes: PictureBytes = 256 * MIB,
    prefix_bytes: PrefixBytes = 256 * MIB,
    upload_bytes: UploadBytes = 512 * MIB,
    allow_remote_images: Remote = False,
    media_root: Root = None,
    allow_origin: Origins = None,
    without_key: WithoutKey = False,
    store: StoreOfModality = None,
    engine: Engine = EngineKind.LOCAL,
    replicas: Replicas = 1,
    cores: Cores = 1,
    *,
    how: ChatOptions,
) -> None:
    """Serve a model over HTTP: OpenAI's protocol and others, and a page to talk with it."""
    from lapilli.serve.address import bind
    from lapilli.serve.options import Limits, ServeOptions, keys_of

    if name is not None and not name.strip():
        raise ConfigError("--name is empty: give the model a name, or leave the option out")
    options = ServeOptions(
        host=host,
        port=port,
        keys=keys_of(api_key or []),
        model_name=name or "",
        allow_remote_images=allow_remote_images,
        media_root=media_root,
        allow_origins=tuple(allow_origin or ()),
        without_key=without_key,
        sampling=SamplingParams.from_options(**how.sampling),
        limits=Limits(
            cache_bytes=picture_bytes, prefix_bytes=prefix_bytes, upload_bytes=upload_bytes
        ),
    )
    limits: dict[str, Any] = {
        "max_rows": rows,
        "kv_bytes": cache_bytes,
        "feature_bytes": feature_bytes,
        "context_length": context,
    }
    if checkpoint is not None:
        how = how.of_model(checkpoint)

    def ready(address: str) -> None:
        if not how.quiet:
            note(f"lapilli: ready on {address}")

    if engine is EngineKind.RAY:
        run_distributed = _runner("run_distributed", "lapilli.serve.distributed")
        loader = Loader(reachable(how), reachable_stores(store or []), limits)
        run_distributed(
            loader, options, ready, replicas=replicas, cores=cores, device=how.device, rows=rows
        )
        return
    with bind(options) as taken:  # a port that is taken is said before a model is loaded
        run = _runner("run", "lapilli.serve.run")
        run(how.load(open_stores(store or []), **limits), options, ready, taken)


def _runner(name: str, module: str) -> Any:  # noqa: ANN401  a function, imported where needed
    """Return what runs the server.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f'the server needs more packages ({error.name}): pip install "lapilli[serve]"'
        ) from error
