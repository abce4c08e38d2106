"""Mutations in a guest kernel, for labs that take more than this machine's kernel has.

The same command runs in there, for one lab, and leaves its mutants.json in a folder that the guest may write to.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import Exit, LabError
from testbed.guest import runs
from testbed.guest.run import run as run_in_guest
from testbed.mutants.driver import Proof

WRITTEN = "mutants.json"


def prove_in_guest(
    backend: str, ids: Sequence[str], options: Sequence[str], *, name: str, full: bool, file: Path | None
) -> list[Proof]:
    """Make the mutations of one lab in a guest of their own; `options` are those of the lab.

    Raises LabError where there is no guest kernel, or where it dies.
    """
    kernel = runs.kernel_for(backend, options)
    with tempfile.TemporaryDirectory(prefix="mutants-guest-") as folder:
        words = ["--only", ",".join(ids), "--backend", backend, "--name", name, "--reports", folder, "--no-proofs"]
        words += ["--full"] if full else []
        words += ["--file", str(file.absolute())] if file else []
        code = run_in_guest(
            [sys.executable, "-m", "testbed.mutants", *words],
            kernel=kernel.path,
            writable=[Path(folder)],
            readable=runs.named_paths([*options, *words]),
            env=runs.environment(kernel),
        )
        if code == Exit.INTERRUPTED:
            raise KeyboardInterrupt
        if not (written := Path(folder) / WRITTEN).is_file():
            raise LabError(f"the mutations in the guest gave no proofs: exit status {code}", where=backend)
        return [Proof(**one) for one in json.loads(written.read_text(encoding="utf-8"))["mutants"]]
