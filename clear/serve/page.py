"""The page at /docs: what the server accepts, from its OpenAPI description. It loads nothing from anywhere."""

from html import escape
from typing import Any

from clear.serve.settings import Settings

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
code, pre { font-family: ui-monospace, monospace; background: #f4f4f4 } pre { padding: .8rem; overflow: auto }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3rem .6rem; vertical-align: top;
border-bottom: 1px solid #ddd } .method { font-weight: 600 }
"""


def render(spec: dict[str, Any], settings: Settings) -> str:
    """The page for an OpenAPI description."""
    parts = [f"<h1>{escape(spec['info']['title'])}: {escape(settings.name)}</h1>"]
    parts.append('<p>Also as <a href="/openapi.json">OpenAPI</a>.</p>')
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            parts.append(f'<h2><span class="method">{method.upper()}</span> <code>{escape(path)}</code></h2>')
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                parts.append(_fields(body))
                parts.append(f"<pre>{escape(_example(settings))}</pre>")
    for name, schema in spec["components"]["schemas"].items():
        parts.append(f'<h2 id="{escape(name)}"><code>{escape(name)}</code></h2>')
        parts.append(f"<p>{escape(schema.get('description', ''))}</p>{_fields(schema)}")
    parts.append(f"<h2>Limits</h2>{_limits(settings)}")
    return f'<!doctype html><meta charset="utf-8"><title>CLEAR</title><style>{_STYLE}</style>{"".join(parts)}'


def _fields(schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{_type(field)}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field</th><th>values</th></tr>{rows}</table>"


def _type(field: dict[str, Any]) -> str:
    """A schema in words, with links to the parts."""
    if "$ref" in field:
        name = escape(field["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in field:
        return " or ".join(_type(form) for form in field["anyOf"] if form.get("type") != "null")
    if "enum" in field:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    words = {"minimum": "from", "maximum": "to", "exclusiveMaximum": "below"}
    bounds = [f"{word} {field[key]}" for key, word in words.items() if key in field]
    return escape(" ".join([str(field.get("type", "any")), *bounds]))


def _example(settings: Settings) -> str:
    return (
        'curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d \'{"model": "'
        f'{settings.name}", "messages": [{{"role": "user", "content": [\n'
        '  {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},\n'
        '  {"type": "text", "text": "which colour is the circle ?"}]}]}\''
    )


def _limits(settings: Settings) -> str:
    shown = {
        "bytes of a request": settings.body,
        "pixels of a picture": settings.pixels,
        "tokens read": settings.prompt,
        "tokens written": settings.tokens,
        "seconds": f"{settings.seconds:g}",
        "pictures by URL": "from public addresses" if settings.fetch else "refused",
    }
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value}</td></tr>" for name, value in shown.items())
    return f"<table>{rows}</table>"
