"""JSON that strangers send: exactly these fields, each of its type."""

import json
from collections.abc import Mapping
from typing import Any

from fedscan_server.edge.refused import Refused


def fields(body: bytes, types: Mapping[str, type]) -> dict[str, Any]:
    """The body as a JSON object with exactly these fields.

    Raises:
        Refused: 400.
    """
    tree = any_object(body)
    if set(tree) != set(types) or not all(type(tree[name]) is kind for name, kind in types.items()):
        raise Refused(400, f"The request's fields are not {', '.join(types) or 'none'}.", "server/docs/api.md")
    return tree


def any_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refused: 400.
    """
    try:
        tree = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "The request is not JSON.") from None
    if not isinstance(tree, dict):
        raise Refused(400, "The request is not a JSON object.")
    return tree


def _no_constant(text: str) -> None:
    raise ValueError(text)  # NaN and Infinity are no JSON
