"""Fail the build where a page would load something from the network: a script, a style, a font or an image.

Links to other sites are no loads. Furo and MyST-NB may change what they put into a page, so every build is looked at.
"""

import re
from pathlib import Path

ADDRESS = r"(?P<address>(?:https?:)?//[^\s\"'()<>]+)"
LOADS = [
    re.compile(rf"<(?!a\b)[^>]*\b(?:src|srcset|poster|data)\s*=\s*[\"']?{ADDRESS}"),
    re.compile(rf"<link\b(?![^>]*\brel=[\"'](?:canonical|license)[\"'])[^>]*\bhref\s*=\s*[\"']?{ADDRESS}"),
    re.compile(rf"url\(\s*[\"']?{ADDRESS}"),
    re.compile(rf"@import\s+[\"']{ADDRESS}"),
]


def loads(text):
    """Addresses that a browser would ask for when it shows this page or style sheet."""
    return [found["address"] for pattern in LOADS for found in pattern.finditer(text)]


def refuse_network(app, error):
    """Raise for the first pages that load something."""
    files = [path for kind in ("html", "css") for path in Path(app.outdir).rglob(f"*.{kind}")]
    found = {str(path): addresses for path in files if (addresses := loads(path.read_text()))}
    if found and error is None:
        msg = f"{len(found)} pages load from the network: {dict(list(found.items())[:5])}"
        raise ValueError(msg)


def setup(app):
    """Look when the build is finished."""
    app.connect("build-finished", refuse_network)
    return {"parallel_read_safe": True}
