"""From what is known of runs to one HTML file: templates, style and script lie beside, all goes into the page.

Everything from outside is escaped, and the page's own policy lets it reach nothing: no request, no other script.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

from stages.pages.figures import duration, number, size

if TYPE_CHECKING:
    from jinja2 import Environment

SCRIPT, STYLE = "page.js", "page.css"


def render(name: str, **context: object) -> bytes:
    """Return the page of the template `name`, UTF-8. A name that the context lacks raises jinja2.UndefinedError."""
    from markupsafe import Markup

    environment = _environment()
    # Not templates: a brace of theirs is a brace.
    script, style = (_source(environment, each) for each in (SCRIPT, STYLE))
    page = environment.get_template(name).render(
        script=Markup(script), style=Markup(style), policy=policy(script), **context
    )
    return page.encode()


def policy(script: str) -> str:
    """Return the content security policy of a page: its own script and style, pictures inside it, nothing else."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stages.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "number": number, "size": size}
    return environment
