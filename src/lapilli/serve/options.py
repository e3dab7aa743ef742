"""Options of the server: where it listens, who may ask, and how much a request may take.

Imports neither torch nor the web framework, so that the command line may read them.
"""

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from lapilli.config.generation import MIB, SamplingParams, check_count
from lapilli.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key, and what its owner may do.

    Attributes:
        key: the secret.
        name: what logs and limits call its owner.
        requests_per_minute: 0: no limit.
        concurrent: most requests at the same time; 0: no limit.
    """

    key: str
    name: str = "default"
    requests_per_minute: int = 0
    concurrent: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not self.key.strip() or not self.key.isascii():
            raise ConfigError(f"the API key of {self.name!r} must be text in ASCII, and not empty")
        for name in ("requests_per_minute", "concurrent"):
            check_count(f"{name} of the API key {self.name!r}", getattr(self, name), least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may take.

    Attributes:
        body_bytes: of a request's body.
        image_bytes: of one picture, encoded.
        image_pixels: of one picture.
        decoded_bytes: that decoding one picture may hold.
        images: of one request.
        choices: answers to one prompt (`n`).
        workers: threads that fetch and decode.
        waiting: requests that may wait for one of them.
        upload_bytes: of all uploaded files together.
        cache_bytes: of pictures that are kept prepared.
        fetch_seconds: for the whole of one remote picture.
        redirects: of one remote picture.
    """

    body_bytes: int = 64 * MIB
    image_bytes: int = 20 * MIB
    image_pixels: int = 50_000_000
    decoded_bytes: int = 512 * MIB
    images: int = 64
    choices: int = 16
    workers: int = 2
    waiting: int = 256
    upload_bytes: int = 512 * MIB
    cache_bytes: int = 256 * MIB
    fetch_seconds: float = 10.0
    redirects: int = 3

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "fetch_seconds":
                least = 0 if name in ("redirects", "cache_bytes", "upload_bytes") else 1
                check_count(name, getattr(self, name), least=least)
        if not self.fetch_seconds > 0:
            raise ConfigError(f"fetch_seconds must be above 0, got {self.fetch_seconds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of a server.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        keys: who may ask; none: everybody who reaches it.
        model_name: what requests call the model; "": the name that it was loaded by.
        allow_remote_images: whether http(s) URLs of pictures are fetched.
        media_root: a folder whose files requests may name; None: none.
        allow_origins: web pages of other origins that may ask.
        without_key: serve other machines without asking for a key.
        sampling: what counts where a request says nothing, the longest answer too.
        limits: what one request may take.

    Raises:
        ConfigError: an address that other machines reach, and no key; or beams.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[ApiKey, ...] = ()
    model_name: str = ""
    allow_remote_images: bool = False
    media_root: Path | None = None
    allow_origins: tuple[str, ...] = ()
    without_key: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_count("port", self.port, least=0)
        if not (self.keys or self.without_key or self.is_local):
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and there is no API key: "
                "give --api-key, or --without-key if everybody may ask"
            )
        if self.sampling.num_beams > 1:
            raise ConfigError(
                f"num_beams {self.sampling.num_beams}: a server answers by its engine, which does "
                "not search by beams: leave it at 1"
            )
        names = [key.name for key in self.keys]
        if len({key.key for key in self.keys}) < len(names) or len(set(names)) < len(names):
            raise ConfigError("API keys and their names must differ from each other")
        if self.media_root is not None and not self.media_root.is_dir():
            raise ConfigError(f"media root {self.media_root} is no folder")

    @property
    def is_local(self) -> bool:
        """True when only this machine can reach the server."""
        if self.host in LOOPBACK:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def keys_of(given: list[str]) -> tuple[ApiKey, ...]:
    """Return the keys of options `KEY` or `NAME=KEY[:REQUESTS_PER_MINUTE[:CONCURRENT]]`.

    Without one, those of the environment variable LAPILLI_API_KEY, which commas separate.

    Raises:
        ConfigError: a limit that is no number, or an empty key.
    """
    texts = given or [one for one in os.environ.get("LAPILLI_API_KEY", "").split(",") if one]
    found = []
    for number, text in enumerate(texts):
        name, equals, rest = text.partition("=")
        if not equals:
            found.append(ApiKey(key=text, name=f"key{number}"))
            continue
        key, *limits = rest.split(":")
        try:
            rate, most = [*map(int, limits), 0, 0][:2]
        except ValueError as error:
            raise ConfigError(
                f"API key of {name!r}: expected NAME=KEY:REQUESTS_PER_MINUTE:CONCURRENT with whole "
                "numbers as limits"
            ) from error
        found.append(ApiKey(key=key, name=name, requests_per_minute=rate, concurrent=most))
    return tuple(found)
