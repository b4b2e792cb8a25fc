"""The files of the page, as a browser should take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

POLICY: Final = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
"""Nothing from elsewhere, nothing inline, in no other page."""


class PageFiles(StaticFiles):
    """The folder `page`, which another installation may lack: then there is no page."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parent / "page", check_dir=False)

    async def index(self, request: Request) -> Response:
        """The page itself."""
        return await self.get_response("index.html", request.scope)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """See StaticFiles."""
        response = super().file_response(*args, **kwargs)
        response.headers["content-security-policy"] = POLICY
        # A new version shows at once; what has not changed costs one question (ETag).
        response.headers["cache-control"] = "no-cache"
        return response
