"""The playground: a page that compares two keep ratios or budgets, or asks two questions about one document.

The static files need no API key. The page's requests to `/v1` carry the key that the user types in.
"""

from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

PATH = "/playground"
STATIC = Path(__file__).with_name("static")
INDEX = STATIC / "index.html"
MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
"""Fixed here, since a machine's own types may differ; with `nosniff` a browser runs no module of another type."""
HEADERS = {
    # No inline script and no HTML from strings: a model's answer stays text even if a script does not escape it.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            "img-src 'self'",
            "script-src 'self'",
            "style-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def has_playground(args: Namespace) -> bool:
    """Whether a server started with `args` serves the page; `vllm serve` has no --no-playground and always does."""
    return getattr(args, "playground", True)


def add_playground(app: FastAPI) -> None:
    """Serves the page at `/playground` and its files below it, for GET and HEAD; there are no other paths."""
    app.add_route(PATH, _serve(INDEX), include_in_schema=False)
    for path in sorted(STATIC.iterdir()):
        if path != INDEX:
            app.add_route(f"{PATH}/{path.name}", _serve(path), include_in_schema=False)
    app.add_route(f"{PATH}/", _redirect_slash, include_in_schema=False)


def _serve(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """Returns the endpoint of one file."""

    async def send(request: Request) -> Response:
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)

    return send


async def _redirect_slash(request: Request) -> Response:
    """Redirects to a relative address; Starlette's absolute one is wrong behind a proxy that strips a prefix."""
    return RedirectResponse(f"..{PATH}", headers=HEADERS)
