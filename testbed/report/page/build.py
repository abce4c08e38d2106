"""The page of a run from the data of its `checks.json`: what is derived is derived here, the template only shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent


@cache
def _environment() -> jinja2.Environment:
    """Everything is escaped: names, packets and what programs print come from strangers."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def page_of(document: Mapping[str, Any]) -> str:
    """The page of a run; `document` is what `checks.json` holds."""
    return _environment().get_template("page.html.j2").render(run=document["run"], checks=document["checks"])
