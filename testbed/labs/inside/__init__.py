"""What runs inside a lab while it is made: a program of several modules, made into one text.

They are handed to a bare interpreter (`python -I -S`) that sees nothing of the checkout, so they import the standard
library and each other, no more.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

BOX = ("root", "node", "box")
"""The modules of the program that makes a lab's namespaces and holds them."""

WIRE = ("root", "node")
"""The modules of the program that wires one machine that somebody else made."""

WIRE_ALL = ("root", "node", "wireall")
"""The modules of the program that wires many such machines at once, from where their pids are known."""

_LOAD = """\
import sys, types

def load(name, text):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    return module

"""


@cache
def program(*modules: str, package: str = __name__) -> str:
    """One text of these modules of a package, each after those that it imports, that calls the last one's main()."""
    folder = resources.files(package)
    loads = [f"load({f'{package}.{name}'!r}, {folder.joinpath(f'{name}.py').read_text()!r})" for name in modules]
    return _LOAD + "\n".join(loads) + ".main()\n"
