"""The page at ``/``, with which a person tries the server: three files of this package, and nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""File and type of each path."""
HEADERS = {
    # Scripts, styles and requests go to this server only. Nothing inline runs, so that no text could become a script.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Let an application answer the paths of :data:`PAGE`. The page holds no secret, so that it needs no API key."""
    for path, (name, kind) in PAGE.items():
        _add_file(app, path, (files("sentcompress.serving") / "page" / name).read_bytes(), kind)


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path)
    def file() -> Response:
        # The characters are named in the type: a browser does not guess them.
        return Response(content, headers=HEADERS, media_type=f"{kind}; charset=utf-8")
