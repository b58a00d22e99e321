"""The OpenAPI description as one page to read, without a script and without another server's files."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem; font-size: 1.1rem } code, h2 { font-family: ui-monospace, monospace }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884 }
b.method { display: inline-block; min-width: 3.5rem }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; frame-ancestors 'none'"

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1><p>{{ summary }} The same as <a href="/openapi.json">OpenAPI</a>.</p>
{% for one in operations %}
<h2><b class="method">{{ one.method }}</b> {{ one.path }}</h2><p>{{ one.about }}</p>
{% if one.fields %}<p>Fields, as {{ one.kinds }}:</p>
<table><tr><th>field<th>type<th>default<th>
{% for field in one.fields %}
<tr><td><code>{{ field.name }}</code><td>{{ field.type }}<td>{{ field.default }}<td>{{ field.about }}
{% endfor %}</table>{% endif %}
<table><tr><th>status<th>answer<th>
{% for answer in one.answers %}<tr><td>{{ answer.status }}<td>{{ answer.type }}<td>{{ answer.about }}
{% endfor %}</table>
{% endfor %}
<h1>Answers</h1>
{% for schema in schemas %}
<h2 id="{{ schema.name }}">{{ schema.name }}</h2><p>{{ schema.about }}</p>
<table><tr><th>field<th>type<th>
{% for field in schema.fields %}<tr><td><code>{{ field.name }}</code><td>{{ field.type }}<td>{{ field.about }}
{% endfor %}</table>
{% endfor %}
</body></html>
""")


def describe(openapi: dict[str, Any]) -> str:
    """The page for this description."""
    about = openapi["info"]
    return _PAGE.render(
        title=about["title"],
        summary=about.get("summary", ""),
        style=Markup(_STYLE),
        operations=list(_operations(openapi)),
        schemas=[
            {"name": name, "about": schema.get("description", ""), "fields": _fields(schema)}
            for name, schema in openapi.get("components", {}).get("schemas", {}).items()
        ],
    )


def _operations(openapi: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            yield {
                "method": method.upper(),
                "path": path,
                "about": operation.get("description") or operation.get("summary", ""),
                "kinds": " or ".join(content),
                "fields": _fields(next(iter(content.values()))["schema"]) if content else [],
                "answers": [
                    {"status": status, "about": said.get("description", ""), "type": _answer(said)}
                    for status, said in operation["responses"].items()
                ],
            }


def _answer(said: dict[str, Any]) -> str:
    return ", ".join(
        _type(of["schema"]) if kind == "application/json" else kind
        for kind, of in said.get("content", {}).items()
        if of.get("schema") is not None
    )


def _fields(schema: dict[str, Any]) -> list[dict[str, str]]:
    required = schema.get("required", [])
    return [
        {
            "name": name,
            "type": _type(field),
            "default": "required" if name in required else json.dumps(field["default"]) if "default" in field else "",
            "about": field.get("description", ""),
        }
        for name, field in schema.get("properties", {}).items()
    ]


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key] if one.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f" {low} … {high}" if low is not None and high is not None else ""
    name = "file" if schema.get("format") == "binary" else schema.get("type", "")
    return f"{name}{bounds}"
