"""`/`: a page to talk with the model, one file that needs nothing else.

    web/ --vite--> page.html (in the wheel) -> GET /

The file is built, never edited: docs/guide/page.md says how. It talks to the server that it came
from; the headers here forbid it, and whatever a model writes into it, everything else.
"""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Request, Response

from lapilli.serve.service import Service

_INLINE: Final = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL)


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()
    html = files("lapilli.serve").joinpath("page.html").read_bytes()
    headers = page_headers(html)

    @routes.get("/", include_in_schema=False, response_model=None)
    async def page(http: Request) -> Response:
        """Return the page, or say that the browser's copy is still the newest."""
        known = http.headers.get("if-none-match", "")
        if headers["ETag"] in (one.strip().removeprefix("W/") for one in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(html, media_type="text/html", headers=headers)

    return routes


def page_headers(html: bytes) -> dict[str, str]:
    """Return the headers of the page; its own scripts and styles are allowed by their hashes."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for name, body in _INLINE.findall(html.decode()):
        digest = hashlib.sha256(body.encode()).digest()
        hashes[name].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(hashes["script"]),
        "style-src": " ".join(hashes["style"]),
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "dompurify",
    }
    return {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "ETag": f'"{hashlib.sha256(html).hexdigest()[:32]}"',
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
