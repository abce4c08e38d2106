"""The two executables of a node, as scripts that run this package from wherever it was copied to."""

from __future__ import annotations


def launchers(python: str, lib: str) -> dict[str, str]:
    """Return the text of the executables `flanneld` and `flannel` (the CNI plugin).

    `python` is the interpreter's absolute path, `lib` the folder that holds the folder `flannel`. Both run isolated
    (-I) and without site-packages (-S): nothing of the node's Python can change what they do. A shebang passes one
    word, so both stand in it. Raises ValueError for a path that a shebang cannot hold.
    """
    if " " in python or len(python) > 100 or not python.startswith("/") or "\n" in lib:
        raise ValueError(f"a script cannot name {python!r} as interpreter; give a short absolute path without spaces")
    head = f"#!{python} -IS\nimport sys\nsys.dont_write_bytecode = True\nsys.path.insert(0, {lib!r})\n"
    return {
        "flanneld": head + "import os\nfrom flannel.entry import main\nsys.exit(main(sys.argv, os.environ))\n",
        "flannel": head + "from flannel.cni.plugin import main\nsys.exit(main())\n",
    }
