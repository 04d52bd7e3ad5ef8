"""Markdown that shows text as it is, whatever that text says.

The names of models, data sets, splits and metrics are other people's. Everything that is inserted
into the model card comes from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

# Of underscores, those that are not within a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|#&~$]|(?<![^\W_])_|_(?![^\W_])")


def escape(value: Any) -> Markup:
    """`value` on one line, free of Markdown syntax; `Markup` stays as it is."""
    if isinstance(value, Markup):
        return value
    printable = "".join(c if c.isprintable() else " " for c in str(value))
    return Markup(_SPECIAL.sub(lambda c: f"&#{ord(c[0])};", " ".join(printable.split())))


def code(value: Any) -> Markup:
    """A span of code, also within a table; what has line breaks is shown as Python writes it."""
    text = str(value) if str(value).isprintable() else repr(value)
    if "`" in text or "\\|" in text:  # no span, or no cell, holds these
        return Markup(f"<code>{escape(text)}</code>")
    return Markup("`" + text.replace("|", "\\|") + "`")


def literal(text: str) -> Markup:
    """`text` as a Python string, for a block of code."""
    return Markup(json.dumps(text, ensure_ascii=False))


def links(names: Iterable[str], folder: str = "") -> Markup:
    """Links to repositories in a `folder` of the Hub; of what cannot be there, the mere names."""
    return Markup(", ").join(
        Markup(f"[{escape(name)}](https://huggingface.co/{folder}{quote(name)})")
        if "/" in name and is_hub_id(name)
        else code(name)
        for name in names
    )


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> Markup:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return Markup("\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines))
