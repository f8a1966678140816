"""The page: one HTML file without anything from elsewhere, and the policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

PAGE = files("batchwright.server").joinpath("dashboard.html").read_text(encoding="utf-8")


def _source(tag: str) -> str:
    """The hash by which a policy allows the page's own script or style."""
    text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


PAGE_POLICY = (
    f"default-src 'none'; script-src {_source('script')}; style-src {_source('style')}; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
