"""The content security policy of a page that asks for nothing outside itself."""

import base64
import hashlib


def content_policy(script: str, style: str, *others: str) -> str:
    """Allows the contents of one script and one style element, images in the page itself, and `others`."""
    own = [f"script-src {_source(script)}", f"style-src {_source(style)}", "img-src data:"]
    return "; ".join(["default-src 'none'", *own, "base-uri 'none'", "form-action 'none'", *others])


def _source(text: str) -> str:
    """An element's content, by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
