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
_MAY_BE_NONE = ("redirects", "cache_bytes", "upload_bytes", "prefix_bytes")


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
        prefix_bytes: of keys and values that are kept of what scores, rankings and decisions share,
            each of the three for itself.
        letters: of all texts of one request together.
        idle_seconds: that a body, or the head of a request, may pause.
        body_seconds: for the whole of a body.
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
    prefix_bytes: int = 256 * MIB
    letters: int = 8 * MIB
    idle_seconds: float = 30.0
    body_seconds: float = 300.0
    fetch_seconds: float = 10.0
    redirects: int = 3

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name.endswith("_seconds"):
                if not value > 0:
                    raise ConfigError(f"{name} must be above 0, got {value}")
            else:
                check_count(name, value, least=0 if name in _MAY_BE_NONE else 1)


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
        ConfigError: an address that other machines reach, and no key; sampling that the engine
            does not do.
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
        if self.sampling.num_beams > 1 or self.sampling.length_penalty != 1:
            raise ConfigError(
                "a server does not search by beams: leave --num-beams and --length-penalty out"
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

    A limit that is left empty is none. Without an option, the keys are those of the environment
    variable LAPILLI_API_KEY, which commas separate. No message shows a key.

    Raises:
        ConfigError: a name or a key that is empty, or a limit that is no number above 0.
    """
    texts = given or [one for one in os.environ.get("LAPILLI_API_KEY", "").split(",") if one]
    found = []
    for number, text in enumerate(texts):
        name, equals, rest = text.partition("=")
        if not equals:
            found.append(ApiKey(key=text, name=f"key{number}"))
            continue
        key, *limits = rest.split(":")
        if not name.strip():
            raise ConfigError(
                f"API key {number + 1} has an '=' and no name before it: write NAME=KEY, or a key "
                "without '='"
            )
        if "=" in rest:
            raise ConfigError(
                f"API key of {name!r:.40}: what follows the name has an '=' in it, and it is not "
                "clear where the key begins: choose a key without '='"
            )
        rate, most = _limits(limits, name)
        found.append(ApiKey(key=key, name=name, requests_per_minute=rate, concurrent=most))
    return tuple(found)


def _limits(given: list[str], name: str) -> tuple[int, int]:
    """Return the limits of a key as numbers; 0 where one is left out.

    Raises:
        ConfigError: one that is no whole number above 0, or more than there are.
    """
    are_right = all(one == "" or (one.isascii() and one.isdecimal() and int(one)) for one in given)
    if len(given) > 2 or not are_right:
        raise ConfigError(
            f"API key of {name!r:.40}: expected NAME=KEY:REQUESTS_PER_MINUTE:CONCURRENT with whole "
            "numbers above 0 as limits: leave a limit empty where there is none, as in "
            "NAME=KEY::CONCURRENT"
        )
    rate, most = [*(int(one or 0) for one in given), 0, 0][:2]
    return rate, most
