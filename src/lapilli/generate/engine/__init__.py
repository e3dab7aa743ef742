"""One engine for one request or hundreds: continuous batching over blocks of keys and values."""

from lapilli.config.generation import EngineOptions
from lapilli.generate.engine.async_engine import AsyncEngine
from lapilli.generate.engine.engine import Engine
from lapilli.generate.engine.request import Request, RequestHandle

__all__ = ["AsyncEngine", "Engine", "EngineOptions", "Request", "RequestHandle"]
