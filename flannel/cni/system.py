"""What the plugin needs of `os`, from the module beneath it: importing `os` itself is a tenth of the plugin's time."""

from __future__ import annotations

import sys
from posix import (
    O_CREAT,
    O_TRUNC,
    O_WRONLY,
    POSIX_SPAWN_DUP2,
    close,
    dup2,
    execve,
    listdir,
    lseek,
    memfd_create,
    mkdir,
    open,  # noqa: A004 - it is what `os` calls so
    pipe,
    posix_spawn,
    read,
    rename,
    stat,
    unlink,
    waitpid,
    waitstatus_to_exitcode,
    write,
)
from posix import environ as _environ

__all__ = [
    "O_CREAT", "O_TRUNC", "O_WRONLY", "POSIX_SPAWN_DUP2", "SEEK_SET", "close", "dup2", "environ", "execve",
    "isfile", "join", "listdir", "lseek", "makedirs", "memfd_create", "open", "pipe", "posix_spawn", "read", "rename",
    "unlink", "waitpid", "waitstatus_to_exitcode", "write",
]  # fmt: skip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping

SEEK_SET = 0
_KIND, _REGULAR, _FOLDER = 0o170000, 0o100000, 0o040000


def _decoded() -> MutableMapping[str, str]:
    """The environment as `os` would have it."""
    if "os" in sys.modules:
        return sys.modules["os"].environ  # type: ignore[no-any-return]
    coding = sys.getfilesystemencoding()
    return {
        name.decode(coding, "surrogateescape"): value.decode(coding, "surrogateescape")
        for name, value in _environ.items()
    }  # type: ignore[attr-defined, unused-ignore]


environ = _decoded()


def join(folder: str, name: str) -> str:
    """The path of a name, which holds no slash, in a folder."""
    return f"{folder}{name}" if not folder or folder.endswith("/") else f"{folder}/{name}"


def isfile(path: str) -> bool:
    """Whether there is a file, by way of links too."""
    try:
        return stat(path).st_mode & _KIND == _REGULAR
    except (OSError, ValueError):
        return False


def makedirs(path: str, mode: int) -> None:
    """Make a folder and those above it, where they are not there. Raises OSError."""
    try:
        _make_folder(path, mode)
    except FileNotFoundError:
        above = path.rstrip("/").rpartition("/")[0]
        if not above or above == path:
            raise
        makedirs(above, 0o777)
        _make_folder(path, mode)


def _make_folder(path: str, mode: int) -> None:
    try:
        mkdir(path, mode)
    except FileExistsError:  # another pod's plugin may have been faster
        if stat(path).st_mode & _KIND != _FOLDER:
            raise
