"""What every verb of the command line shares: parsing, one-line errors with exit codes, output as text or JSON."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from qies.errors import Stopped, UserError, nearest

Verbs = Mapping[str, Callable[..., None]]


def run(verbs: Verbs, args: list[str], description: str) -> int:
    """Run the verb that `args` name; the exit code: 0, 2 on bad input, 1 on an internal failure, 128 + n after
    signal n."""
    if args and not args[0].startswith("-") and args[0] not in verbs:
        hint = nearest(args[0], verbs) or f" Known: {', '.join(verbs)}."
        return _complain(f"Unknown verb '{args[0]}'.{hint}")
    if args and args[0] in verbs and "overrides" in inspect.signature(verbs[args[0]]).parameters:
        args = [args[0], *_overrides_last(verbs[args[0]], args[1:])]
    try:
        if args and args[0] in verbs:
            _refuse_empty_paths(verbs[args[0]], args[1:])
        call = _parse(verbs, args, description)
        call()
        sys.stdout.flush()
    except UserError as e:  # of several processes all raise it alike, and the first says it
        return _complain(str(e)) if os.environ.get("RANK", "0") == "0" else 2
    except Stopped as e:
        return _complain(str(e), e.code)
    except KeyboardInterrupt:
        return _complain("stopped; run the same command again to go on.", 130)
    except SystemExit as e:
        left = isinstance(e.__context__, BrokenPipeError)  # the reader of stdout, as rich found it
        return 128 + signal.SIGPIPE if left else int(e.code or 0)
    except Exception as e:
        if isinstance(e, BrokenPipeError) and _reader_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
            return 128 + signal.SIGPIPE
        traceback.print_exc()
        return _complain(f"internal failure: {e}", 1)
    return 0


def _parse(verbs: Verbs, args: list[str], description: str) -> Callable[[], None]:
    """The verb's call with its arguments; what the parser complains about becomes one line."""
    called: list[Callable[[], None]] = []
    deferred = {name: _defer(verb, called) for name, verb in verbs.items()}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            tyro.extras.subcommand_cli_from_dict(
                deferred, args=args or ["--help"], prog="qies", description=description
            )
    except SystemExit as e:
        if e.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue(), verbs, args)) from None
    return called[0]


def _overrides_last(verb: Callable[..., None], args: list[str]) -> list[str]:
    """The arguments with options first and files and KEY=VALUE overrides after them, wherever they stood."""
    flags = {p.replace("_", "-") for p, v in inspect.signature(verb).parameters.items() if v.annotation == "bool"}
    options, others, rest = [], [], iter(args)
    for word in rest:
        if not word.startswith("-"):
            others.append(word)
            continue
        options.append(word)
        name = word.lstrip("-").replace("_", "-")
        if "=" not in word and name.removeprefix("no-") not in flags and name not in (*flags, "help", "h"):
            options += [value for value in [next(rest, None)] if value is not None]
    return [*options, *others]


def _refuse_empty_paths(verb: Callable[..., None], args: list[str]) -> None:
    """Raise UserError for an empty word where a path is due: `Path("")` would be the working directory."""
    kinds = {f"--{p.replace('_', '-')}": str(v.annotation) for p, v in inspect.signature(verb).parameters.items()}
    for before, word in zip(["", *args], args, strict=False):
        option, equals, value = word.partition("=")
        if not word:
            option = before.replace("_", "-") if before.startswith("--") and kinds.get(before) != "bool" else ""
        elif not (equals and not value and word.startswith("--")):
            continue
        if not option or "Path" in kinds.get(option.replace("_", "-"), ""):
            raise UserError(f"{option or 'An argument'} is empty; give a path, such as . for the working directory.")


def _defer(verb: Callable[..., None], called: list[Callable[[], None]]) -> Callable[..., None]:
    """The verb with its signature, but remembering its arguments instead of running."""

    @functools.wraps(verb)
    def remember(*args: Any, **kwargs: Any) -> None:
        called.append(lambda: verb(*map(_expanded, args), **{key: _expanded(value) for key, value in kwargs.items()}))

    return remember


def _expanded(value: Any) -> Any:
    """A path, or several, with `~` as the home folder: shells leave it alone behind an equals sign or in quotes."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return tuple(map(_expanded, value)) if isinstance(value, tuple) else value


def _one_line(text: str, verbs: Verbs, args: list[str]) -> str:
    """The parser's framed message as one sentence."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    words = re.sub(r"[│╭╮╰╯─┄]+|-{4,}|^\s*[|+]|[|+]\s*$", " ", plain, flags=re.MULTILINE)  # the frame
    words = " ".join(words.split())
    words = re.sub(r"^(Unrecognized options) (?=Unrecognized)|^(Parsing error|Required options) ", "", words)
    words = re.split(r"\s*(?:For full helptext|Perhaps you meant|Got errors:)", words)[0]
    verb = f"qies {args[0]}" if args and args[0] in verbs else "qies"
    hint = ""
    if (unknown := re.search(r"--[\w-]+", words)) and args and args[0] in verbs:
        hint = nearest(unknown[0], [f"--{p.replace('_', '-')}" for p in inspect.signature(verbs[args[0]]).parameters])
    return f"{words}.{hint} See {verb} --help."


def _reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as below `head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _complain(message: str, code: int = 2) -> int:
    print(f"qies: {' '.join(message.split())}", file=sys.stderr)
    return code


def show(as_json: bool, value: Any, otherwise: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        otherwise()


@contextlib.contextmanager
def training_bar(steps: int, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar on stderr for one run; yields what takes each row of metrics."""
    with Progress(disable=quiet, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps)

        def update(row: dict[str, Any]) -> None:
            loss = row["skipped"] if row["loss"] is None else f"loss {row['loss']:.3f}"
            rate = row["tokens"] / row["seconds"]
            bar.update(task, completed=row["step"] + 1, description=f"{loss}, {rate:,.0f} tok/s")

        yield update


@contextlib.contextmanager
def building_bar(quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A progress bar on stderr for a build of shards; yields what takes each `qies.data.build.Step`."""
    columns = SpinnerColumn(), *Progress.get_default_columns()[:-1], TextColumn("left"), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, transient=True, disable=quiet or not console.is_terminal, console=console) as bar:
        task = bar.add_task("starting", total=None)
        first: list[tuple[float, int]] = []  # when the first tokens of this call were there, and how many

        def update(step: Any) -> None:
            text = step.what
            if step.tokens:
                first[:] = first or [(time.monotonic(), step.tokens)]
                seconds = time.monotonic() - first[0][0]
                rate = f", {(step.tokens - first[0][1]) / seconds:,.0f} tok/s" if seconds else ""
                text += f": {step.documents:,} documents, {step.tokens:,} tokens{rate}"
            bar.update(task, completed=step.done, total=step.total or None, description=text)

        yield update
