"""The page at `/`, to try a text in a browser."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse


def page() -> HTMLResponse:
    """Return the page, which runs and loads nothing but what stands in it.

    It asks the endpoint as any client does, so it needs no token itself and holds none.
    """
    html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    (script,), (style,) = (
        re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


def _source(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
