"""What every verb of the command line shares: parsing, one-line errors with exit codes, output as text or JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import io
import itertools
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

from qies import __version__, plugins
from qies.errors import INTERRUPTED, Stopped, UserError, nearest, speaks

Verbs = Mapping[str, Callable[..., None]]
# What the system refuses, whatever the program does: a full disk, a file system that is read-only, permissions.
SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE)


def run(verbs: Verbs, args: list[str], description: str) -> int:
    """Run the verb that `args` name; the exit code: 0, 2 on bad input, 1 on an internal failure, 128 + n after
    signal n. Characters that the terminal's encoding lacks are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(verbs, plugins.take_option(args), description)
        sys.stdout.flush()
    except UserError as e:  # of several processes all raise it alike, and the first says it
        return _complain(str(e)) if speaks() else 2
    except Stopped as e:
        return _complain(str(e), e.code)
    except KeyboardInterrupt:
        return _complain(INTERRUPTED, 130)
    except SystemExit as e:
        left = isinstance(e.__context__, BrokenPipeError)  # the reader of stdout, as rich found it
        return 128 + signal.SIGPIPE if left else int(e.code or 0)
    except Exception as e:
        if isinstance(e, BrokenPipeError) and _reader_gone():
            _drop_output()
            return 128 + signal.SIGPIPE
        if isinstance(e, OSError) and e.errno in SYSTEM:
            _drop_output()
            where = f"{e.filename}: " if e.filename is not None else ""
            return _complain(
                f"{where}{e.strerror}; free space or change permissions and run the same command again.", 1
            )
        traceback.print_exc()
        return _complain(f"internal failure: {e}", 1)
    return 0


def _dispatch(verbs: Verbs, args: list[str], description: str) -> None:
    if args == ["--version"]:
        print(f"qies {__version__}")
        return
    if not args or args[0] in ("-h", "--help"):
        print(_overview(verbs, description))
        return
    name, *rest = args
    if name not in verbs:
        hint = nearest(name, [*verbs, "--version", "--help"]) or f" Known: {', '.join(verbs)}."
        raise UserError(f"Unknown {'option' if name.startswith('-') else 'verb'} '{name}'.{hint}")
    if "overrides" in inspect.signature(verbs[name]).parameters:
        rest = _overrides_last(verbs[name], rest)
    _refuse_empty_paths(verbs[name], rest)
    _parse(verbs, [name, *rest], description)()


def _drop_output() -> None:
    """Discard what is left in the buffer of stdout if it cannot be written: Python would report that at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview(verbs: Verbs, description: str) -> str:
    """The verbs, each with the first sentence of its help."""
    lines = ["usage: qies VERB [OPTIONS]", "", description, ""]
    for name, verb in verbs.items():
        first = re.split(r"(?<=\.)\s", inspect.getdoc(verb) or "", maxsplit=1)[0]
        lines.append(f"  {name:<{max(map(len, verbs))}}  {' '.join(first.split())}")
    return "\n".join(
        [
            *lines,
            "",
            "qies VERB --help describes a verb; qies --version prints the version.",
            "Every verb takes --plugin MODULE, a module that registers mixers and arms (docs/extending.md).",
        ]
    )


def _parse(verbs: Verbs, args: list[str], description: str) -> Callable[[], None]:
    """The verb's call with its arguments; what the parser complains about becomes one line."""
    called: list[Callable[[], None]] = []
    deferred = {name: _defer(verb, called) for name, verb in verbs.items()}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            tyro.extras.subcommand_cli_from_dict(deferred, args=args, prog="qies", description=description)
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
    lines = re.sub(r"[│╭╮╰╯─┄]+|-{4,}|^[|+]|[|+]\s*$", " ", plain, flags=re.MULTILINE).splitlines()  # the frame
    words = " ".join(" ".join(lines).split())
    parameters = inspect.signature(verbs[args[0]]).parameters
    options = [f"--{name.replace('_', '-')}" for name, p in parameters.items() if p.kind != p.POSITIONAL_ONLY]
    end = f" See qies {args[0]} --help."
    if "Missing from" in words:  # each missing argument on a line of its own, its help indented deeper
        listed = itertools.takewhile(lambda line: "For full helptext" not in line, lines)
        names = [found[1] for line in listed if (found := re.match(r" {4,7}(\S+)", line))]
        needed = [n.upper() for n, p in parameters.items() if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
        flags = [name for name in names if name.startswith("--")]
        needed = needed[len(needed) - (len(names) - len(flags)) :]
        return f"qies {args[0]} needs {' and '.join([*needed, *flags])}.{end}"
    if found := re.search(r"Missing value for argument '(\S+)'. Expected (\d+) values", words):
        return f"{found[1]} needs {'a value' if found[2] == '1' else f'{found[2]} values'}.{end}"
    if found := re.search(r"invalid choice '(.*?)' for argument '(\S+)'. Expected one of \((.*?)\)", words):
        choices = [word for word in re.findall(r"'(.*?)'", found[3]) if word != "None"]
        name = found[2] if found[2].startswith("-") else found[2].upper()
        hint = nearest(found[1], choices) or f" Known: {', '.join(choices)}."
        return f"Unknown value '{found[1]}' for {name}.{hint}"
    if found := re.search(r"Error parsing (\S+): (?:no type matching (\S+) could be instantiated from \[)?(.*)", words):
        kinds = found[2] or ("INT" if "int()" in found[3] else "FLOAT")
        wanted = [f"'{literal}'" for literal in re.findall(r"{(.*?)}", kinds) if literal != "None"]
        wanted += [word for kind, word in (("INT", "an integer"), ("FLOAT", "a number")) if kind in kinds.split("|")]
        if wanted and (value := re.search(r"'(.*?)'", found[3])):
            return f"{found[1]} is '{value[1]}'; it must be {' or '.join(wanted)}.{end}"
    if found := re.search(r"Unrecognized (?:or misplaced )?options: (\S+)", words):
        kind = "Unknown option" if found[1].startswith("-") else "Unexpected argument"
        return f"{kind} '{found[1]}'.{nearest(found[1], options) if kind == 'Unknown option' else ''}{end}"
    return f"{words}{end}"


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
    """A progress bar on stderr for a build of shards; yields what takes each `qies.data.builder.progress.Step`."""
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
