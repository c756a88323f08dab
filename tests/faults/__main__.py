"""`make faults`: inject every fault and write the table and every outcome; exit code 1 if a requirement is violated."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import faults
from qies.errors import UserError
from qies.records import code_version, environment
from qies.storage import require_writable, write_json, write_text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=faults.__doc__)
    parser.add_argument("--cases", nargs="*", default=(), help="names of rows of the table; by default all")
    parser.add_argument("--quick", action="store_true", help="inject each fault only a few times")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments at which faults are injected")
    parser.add_argument("--out", type=Path, help="JSON file; its rows of faults that are not injected now are kept")
    parser.add_argument("--markdown", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    try:
        todo = faults.chosen(args.cases)
        for path in filter(None, (args.out, args.markdown)):
            require_writable(path)
    except UserError as error:
        parser.error(str(error))
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        console.print(f"moments are drawn from seed {args.seed}")
        tasks = {f.name: bar.add_task(f.name, total=faults.total(f, args.quick)) for f in todo}

        def tell(fault: faults.Fault, outcome: faults.Outcome) -> None:
            bar.update(tasks[fault.name], advance=1)
            if outcome.wrong:
                console.print(f"{fault.name}: {outcome.what}: {outcome.wrong}", highlight=False, markup=False)

        rows = faults.run(todo, args.seed, quick=args.quick, tell=tell)
    value = {"what": "faults", "environment": environment(), "code_version": code_version()}
    added = [row.to_dict() | {"seed": args.seed, "code_version": value["code_version"]} for row in rows]
    value |= {"faults": faults.joined(args.out, added)}
    if args.out is not None:
        write_json(args.out, value)
    if args.markdown is not None:
        write_text(args.markdown, faults.page(value))
    Console().print(faults.table(rows, args.seed))
    return int(any(row.held < row.injections for row in rows))


if __name__ == "__main__":
    sys.exit(main())
