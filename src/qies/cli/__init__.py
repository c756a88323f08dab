"""The command line: `qies VERB`. Each verb is one call into the package; bad input is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import qies
from qies.errors import INTERRUPTED, exit_process

try:  # a second in which Ctrl-C is likely too
    from qies.cli.bench import bench
    from qies.cli.compare import compare
    from qies.cli.data import data
    from qies.cli.fit import fit
    from qies.cli.generate import generate
    from qies.cli.ladder import ladder
    from qies.cli.plan import plan
    from qies.cli.probe import probe
    from qies.cli.report import report
    from qies.cli.study import study
    from qies.cli.train import train
    from qies.terminal import Group, Verb, run
except KeyboardInterrupt:
    print(f"qies: {INTERRUPTED}", file=sys.stderr)
    sys.exit(130)

VERBS: dict[str, Verb | Group] = {
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
    exit_process(run(VERBS, args, str(qies.__doc__)))
