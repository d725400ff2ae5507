"""JSON schemas of structured output: those that a grammar cannot enforce are refused.

xgrammar leaves out, without an error, what it cannot express. Such an answer would not follow the
schema.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

UNENFORCED: Final = (
    "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "uniqueItems", "contains",
)  # fmt: skip
CHOICES: Final = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const")
"""Keywords beside which xgrammar reads no others."""
LENGTHS: Final = frozenset({"minLength", "maxLength"})
NEEDS_TYPE: Final = LENGTHS | {
    "pattern", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minItems", "maxItems", "minProperties", "maxProperties",
}  # fmt: skip
"""Keywords that are read only beside a `type`."""
ASSERTIONS: Final = NEEDS_TYPE | {
    "properties", "patternProperties", "additionalProperties", "propertyNames", "required", "items",
    "prefixItems", *CHOICES,
}  # fmt: skip
PATTERNS: Final = frozenset({"pattern", "patternProperties", "propertyNames"})
LOOKAROUND: Final = re.compile(r"\(\?<?[=!]")

MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMAS: Final = ("additionalProperties", "items")
"""Keywords that hold schemas: by name, in a list, or one."""


def not_enforced(schema: Any) -> str | None:
    """What an answer that a grammar allows may violate, in words; None: nothing."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if found := _violable(part):
                return found
            waiting += _inner(part)
    return None


def has_patterns(schema: Any) -> bool:
    """Whether the schema has regular expressions, or names that look so."""
    if isinstance(schema, list):
        return any(map(has_patterns, schema))
    if not isinstance(schema, dict):
        return False
    return not PATTERNS.isdisjoint(schema) or any(map(has_patterns, schema.values()))


def without_formats(schema: Any) -> Any:
    """The schema without each `format` that stands beside a length, which would be ignored."""
    if isinstance(schema, list):
        return [without_formats(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = (
        {"format"} if isinstance(schema.get("format"), str) and LENGTHS & schema.keys() else ()
    )
    return {key: without_formats(part) for key, part in schema.items() if key not in dropped}


def moved(schema: Any, place: str) -> Any:
    """The schema with its references as they must be if it stands at `place` of another one."""
    if isinstance(schema, list):
        return [moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: moved(part, place) for key, part in schema.items()}
    target = found.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        found["$ref"] = place + target.removeprefix("#")
    return found


def _inner(schema: Mapping[str, Any]) -> Iterator[Any]:
    for key in MAPS:
        if isinstance(schema.get(key), dict):
            yield from schema[key].values()
    for key in LISTS:
        if isinstance(schema.get(key), list):
            yield from schema[key]
    yield from (schema[key] for key in SCHEMAS if key in schema)
    if isinstance(names := schema.get("propertyNames"), dict):
        yield {"type": "string", **names}


def _violable(schema: Mapping[str, Any]) -> str | None:
    """What of one schema, without inner ones, is not enforced."""
    keys = schema.keys()
    if found := [key for key in UNENFORCED if schema.get(key) not in (None, False)]:
        return f"{found[0]!r}"
    if choice := next((key for key in CHOICES if key in keys), None):
        if choice == "allOf" and isinstance(schema["allOf"], list) and len(schema["allOf"]) > 1:
            return "'allOf' with several schemas"
        if others := sorted(ASSERTIONS & keys - {choice}):
            return f"{others[0]!r} beside {choice!r}"
    elif "type" not in keys and (others := sorted(NEEDS_TYPE & keys)):
        return f"{others[0]!r} without 'type'"
    if "$ref" in keys and not str(schema["$ref"]).startswith("#"):
        return "a '$ref' to another document"
    if "pattern" in keys and (lengths := sorted(LENGTHS & keys)):
        return f"{lengths[0]!r} beside 'pattern'"
    if LOOKAROUND.search(str(schema.get("pattern", ""))):
        return "a 'pattern' that looks ahead or behind"
    if "multipleOf" in keys and schema.get("type") != "integer":
        return "'multipleOf' of a type other than integer"
    properties = schema.get("properties")
    declared = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    if missing := [name for name in required or () if name not in declared]:
        return f"the required {missing[0]!r:.80}, which 'properties' lacks,"
    return None
