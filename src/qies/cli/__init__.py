"""The command line: `qies VERB`. Each verb is one call into the package; bad input is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import qies
from qies.errors import INTERRUPTED, leave

try:  # a second in which Ctrl-C is likely too
    from qies.cli.ladders import ladder
    from qies.cli.models import generate
    from qies.cli.numbers import bench, compare, fit, report
    from qies.cli.probes import probe
    from qies.cli.runs import data, plan, study, train
    from qies.terminal import run
except KeyboardInterrupt:
    print(f"qies: {INTERRUPTED}", file=sys.stderr)
    sys.exit(130)

VERBS: dict[str, Callable[..., None]] = {
    "study": study,
    "plan": plan,
    "data": data,
    "train": train,
    "ladder": ladder,
    "generate": generate,
    "report": report,
    "probe": probe,
    "bench": bench,
    "fit": fit,
    "compare": compare,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 2 on bad input, 1 on an internal failure, 128 + n after signal n."""
    args = list(sys.argv[1:] if argv is None else argv)
    leave(run(VERBS, args, str(qies.__doc__)))
