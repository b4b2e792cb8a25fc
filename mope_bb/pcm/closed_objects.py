"""JSON schemas whose objects hold what they name, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

_MIXING: Final = frozenset(
    {
        *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "$recursiveRef"),
        *("dependentSchemas", "dependencies", "patternProperties", "propertyNames", "contains"),
        *("unevaluatedProperties", "unevaluatedItems"),
    }
)
"""Keywords by which more than one schema speaks of the same value."""
_NEUTRAL: Final = frozenset(
    {
        *("type", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "nullable"),
        *("discriminator", "$defs", "definitions", "$schema", "$id", "$anchor", "$comment"),
    }
)
"""Keywords beside which a lone keyword of `_MIXING` still says all there is."""


def close_objects(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema`, of JSON, with `"additionalProperties": false` where an object lists its `properties` and says nothing.

    JSON Schema lets such an object hold anything besides; who writes a schema hardly ever wants that, and servers that
    enforce schemas do not allow it. What fits the closed schema fits `schema`: an object is left open where another
    schema (as of `allOf`) or a keyword (as `required`) may want more of it than it lists.
    """
    seen: set[tuple[int, bool]] = set()
    found: dict[bool, set[int]] = {False: set(), True: set()}
    waiting: list[tuple[Any, bool]] = [(schema, False)]
    while waiting:
        here, is_shared = waiting.pop()
        if not isinstance(here, Mapping) or (id(here), is_shared) in seen:
            continue
        seen.add((id(here), is_shared))
        found[is_shared or not _may_close(here)].add(id(here))
        for inner, shares in _inner(here):
            target: Any = inner
            if isinstance(inner, str):
                target = _resolve(schema, inner)
                if target is None:
                    return schema  # to where it leads, others may lead too
            waiting.append((target, is_shared or shares))
    closed: Mapping[str, Any] = _rebuild(schema, found[False] - found[True])
    return closed


def _may_close(schema: Mapping[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", ())
    return (
        isinstance(properties, Mapping)
        and isinstance(required, list | tuple)
        and not schema.keys() & (_MIXING | {"additionalProperties", "enum", "const"})
        and all(isinstance(name, str) and name in properties for name in required)
        and _number(schema.get("minProperties", 0)) <= len(properties)
    )


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[Any, bool]]:
    """The schemas in `schema`, and the references, as text; with each whether others speak of the same value."""
    mixing = schema.keys() & _MIXING
    shares = bool(mixing) and not _passes_on(schema, mixing)
    for keyword, value in schema.items():
        if keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            yield str(value), shares
        elif keyword in ("properties", "patternProperties", "dependentSchemas", "dependencies"):
            if isinstance(value, Mapping):
                yield from ((inner, shares) for inner in value.values())
        elif keyword in ("allOf", "anyOf", "oneOf", "prefixItems", "items"):
            yield from ((inner, shares) for inner in (value if isinstance(value, list | tuple) else [value]))
        elif keyword in ("additionalProperties", "additionalItems") or keyword in _MIXING:
            yield value, shares


def _passes_on(schema: Mapping[str, Any], mixing: set[str]) -> bool:
    """Whether `schema` says no more than its one keyword that mixes, and of each value one schema alone decides."""
    if len(mixing) > 1 or schema.keys() - mixing - _NEUTRAL:
        return False
    (keyword,) = mixing
    if keyword == "allOf":
        return isinstance(schema["allOf"], list | tuple) and len(schema["allOf"]) == 1
    # Of `oneOf` the others must not fit, which closed ones would do less often; those that a tag tells apart do not.
    return keyword in ("anyOf", "$ref") or (keyword == "oneOf" and "discriminator" in schema)


def _resolve(root: Any, reference: str) -> Any:
    """The schema at a pointer (RFC 6901) into `root`; None for other references, and where nothing is."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    here = root
    for part in reference.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(here, Mapping):
            here = here.get(name)
        elif isinstance(here, list | tuple) and name in map(str, range(len(here))):
            here = here[int(name)]
        else:
            return None
    return here


def _rebuild(value: Any, closed: set[int]) -> Any:
    if isinstance(value, Mapping):
        found = {key: _rebuild(inner, closed) for key, inner in value.items()}
        return {**found, "additionalProperties": False} if id(value) in closed else found
    return [_rebuild(inner, closed) for inner in value] if isinstance(value, list | tuple) else value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("inf")
