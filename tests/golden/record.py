"""Records the golden curves anew: `python -m tests.golden.record`, or `make golden`.

Only for a change that is meant to change numbers (a formula, initial values, the optimizer, the
order of data), together with the proof that training still converges: the curves before and after,
in LOG.md. A refactor, another layout, a faster kernel of the same function leaves them alone: if
one moves them, it is wrong. A new version of torch may move them; the log says so then.

Prints how far each curve moved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.golden.curves import (
    DOCUMENTS,
    FILE,
    TOLERANCE,
    differences,
    manifest_of,
    read,
    record_curves,
    write,
)
from tests.prepared import small_dataset


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = small_dataset(Path(folder), DOCUMENTS)
        manifest, curves = manifest_of(data), record_curves(Path(folder), data)
    if FILE.exists():
        before, old = read()
        if before != manifest:
            print("the prepared data changed: other batches, every curve moves")
        for (variant, quantity), (worst, step) in differences(old, curves).items():
            moved = "moved" if worst > TOLERANCE else "as before"
            print(f"{variant:<12}{quantity:<16}{worst:.1e} at step {step}: {moved}")
    write(manifest, curves)
    print(f"{FILE} written; say in tests/golden/LOG.md why, with the curves of a longer run")


if __name__ == "__main__":
    main()
