"""`/v1/files`: a picture is uploaded once, and named by its id in any number of requests."""

from typing import Annotated, Protocol, runtime_checkable

from fastapi import APIRouter, Form, Request, Response, UploadFile

from lapilli.serve.errors import invalid
from lapilli.serve.files import Files


@runtime_checkable
class KeepsFiles(Protocol):
    """What the routes need: a service with a model, or a front that asks one."""

    @property
    def files(self) -> Files:
        """Return the files."""

    async def check_picture(self, data: bytes, owner: str) -> None:
        """Refuse a picture that cannot be read."""


def router(service: KeepsFiles) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/files")
    async def upload(
        file: UploadFile, http: Request, purpose: Annotated[str, Form()] = "vision"
    ) -> dict[str, object]:
        """Keep a picture, decoded at once, so that one that cannot be read is refused here."""
        form = await http.form()  # the one that was read for the arguments, which have the last
        for name in ("file", "purpose"):
            count = len(form.getlist(name))
            if count > 1:
                raise invalid(f"{count} parts are called {name}: send one {name} a request", name)
        if purpose not in ("vision", "user_data"):
            raise invalid(f"purpose is {purpose!r}: expected vision", "purpose")
        data = await file.read()
        owner = http.state.owner
        await service.check_picture(data, owner)
        return service.files.add(owner, file.filename or "picture", purpose, data).as_json()

    @routes.get("/v1/files")
    async def listed(http: Request) -> dict[str, object]:
        """List the files of this key."""
        files = [file.as_json() for file in service.files.all(http.state.owner)]
        return {"object": "list", "data": files, "has_more": False}

    @routes.get("/v1/files/{file_id}")
    async def described(file_id: str, http: Request) -> dict[str, object]:
        """Describe a file."""
        return service.files.get(file_id, http.state.owner).as_json()

    @routes.get("/v1/files/{file_id}/content", response_model=None)
    async def content(file_id: str, http: Request) -> Response:
        """Return the bytes of a file."""
        data = service.files.content(file_id, http.state.owner)
        return Response(data, media_type="application/octet-stream")

    @routes.delete("/v1/files/{file_id}")
    async def deleted(file_id: str, http: Request) -> dict[str, object]:
        """Let go of a file."""
        service.files.delete(file_id, http.state.owner)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes
