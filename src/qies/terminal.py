"""The command line: parsing, one-line errors with exit codes, and output as text or JSON, shared by all verbs."""

from __future__ import annotations

import contextlib
import dataclasses
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from qies import __version__, plugins
from qies.errors import INTERRUPTED, Stopped, UserError, reports_errors, unknown

Verb = Callable[..., None]
Parameters = Mapping[str, inspect.Parameter]


@dataclass(frozen=True)
class Group:
    """A verb with subcommands, such as `data` in `qies data build`."""

    help: str
    verbs: Mapping[str, Verb]


Verbs = Mapping[str, Verb | Group]
# Errors of the environment: a full disk, a read-only file system, missing permissions.
SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE)


def run(verbs: Verbs, args: list[str], description: str) -> int:
    """Run the verb in `args` and return the exit code: 0, 2 for bad input, 1 for an internal failure, 128 + n after
    signal n. Characters that the terminal cannot encode are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(verbs, plugins.take_option(args), description)
        sys.stdout.flush()
    except UserError as e:  # all ranks of a run raise it; rank 0 prints it
        return _complain(str(e)) if reports_errors() else _silent()
    except Stopped as e:
        return _complain(str(e), e.code)
    except KeyboardInterrupt:
        return _complain(INTERRUPTED, 130)
    except SystemExit as e:
        left = isinstance(e.__context__, BrokenPipeError)  # raised by rich when the reader of stdout has exited
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


def _dispatch(verbs: Verbs, args: list[str], description: str, prog: str = "qies") -> None:
    """Call the verb in `args`. `prog` is the command line before them."""
    if args == ["--version"] and prog == "qies":
        print(f"qies {__version__}")
        return
    if args[:1] in (["-h"], ["--help"]) or (not args and prog == "qies"):
        print(_overview(verbs, description, prog))
        return
    if not args:
        raise UserError(f"{prog} needs a verb: {', '.join(verbs)}. See {prog} --help.")
    name, *rest = args
    if name not in verbs:
        options = ["--help", "--version"] if prog == "qies" else ["--help"]
        raise unknown("option" if name.startswith("-") else "verb", name, [*verbs, *options])
    verb = verbs[name]
    if isinstance(verb, Group):
        _dispatch(verb.verbs, rest, verb.help, f"{prog} {name}")
    else:
        _parse(verb, rest, f"{prog} {name}")()


def _drop_output() -> None:
    """Discard the buffer of stdout if it cannot be written; Python would report it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview(verbs: Verbs, description: str, prog: str) -> str:
    """The help of a group: its verbs with the first sentence of their help, and an example of each."""
    lines = [f"usage: {prog} VERB [OPTIONS]", "", description, ""]
    texts = {name: verb.help if isinstance(verb, Group) else inspect.getdoc(verb) or "" for name, verb in verbs.items()}
    for name, text in texts.items():
        first = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
        lines.append(f"  {name:<{max(map(len, verbs))}}  {' '.join(first.split())}")
    end = f"{prog} VERB --help describes a verb"
    if prog == "qies":
        plugin = "Every verb takes --plugin MODULE, a module that registers mixers and arms (docs/extending.md)."
        return "\n".join([*lines, "", f"{end}; qies --version prints the version.", plugin])
    examples = [found[0] for text in texts.values() if (found := re.search(rf" +{prog} .*", text))]
    return "\n".join([*lines, "", "For example:", "", *examples, "", f"{end}."])


def _parse(verb: Verb, args: list[str], prog: str) -> Callable[[], None]:
    """Parse the arguments and return the call of the verb. Raises UserError, in one line, for a parser error.

    tyro accepts only one contiguous group of positional arguments; further ones are added to the `overrides` of a verb.
    """
    parameters = _parameters(verb)
    _refuse_empty_paths(parameters, args)
    _refuse_unknown_options(parameters, args, prog)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            (values, options), others = tyro.cli(_defer(verb), args=args, prog=prog, return_unknown_args=True)
    except SystemExit as e:
        if e.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue(), parameters, prog)) from None
    if others and "overrides" not in parameters:
        raise UserError(f"Unexpected argument '{others[0]}'. See {prog} --help.")
    if others:
        values = (*values[:-1], (*values[-1], *others))
    return lambda: verb(*map(_expanded, values), **{key: _expanded(value) for key, value in options.items()})


def _parameters(verb: Verb) -> Parameters:
    """The parameters of the verb, with a dataclass replaced by its fields."""
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            for f in dataclasses.fields(parameter.default):
                found[f.name] = inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        else:
            found[name] = parameter
    return found


def _refuse_unknown_options(parameters: Parameters, args: list[str], prog: str) -> None:
    """Raise UserError for an unknown option, with the most similar option of the verb."""
    known = [f"--{name.replace('_', '-')}" for name, p in parameters.items() if p.kind != p.POSITIONAL_ONLY]
    negated = [f"--no-{name.replace('_', '-')}" for name, p in parameters.items() if p.annotation == "bool"]
    for word in args:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in (*known, *negated, "--help", "--"):
            raise unknown("option", option, known, otherwise="", note=f"See {prog} --help.")


def _refuse_empty_paths(parameters: Parameters, args: list[str]) -> None:
    """Raise UserError for an empty path, since `Path("")` is the working directory."""
    kinds = {f"--{p.replace('_', '-')}": str(v.annotation) for p, v in parameters.items()}
    for before, word in zip(["", *args], args, strict=False):
        option, equals, value = word.partition("=")
        if not word:
            option = before.replace("_", "-") if before.startswith("--") and kinds.get(before) != "bool" else ""
        elif not (equals and not value and word.startswith("--")):
            continue
        if not option or "Path" in kinds.get(option.replace("_", "-"), ""):
            raise UserError(f"{option or 'An argument'} is empty; give a path, such as . for the working directory.")


def _defer(verb: Verb) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function with the signature of the verb that returns its arguments."""

    @functools.wraps(verb)
    def arguments(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    return arguments


def _expanded(value: Any) -> Any:
    """Expand `~` in paths; shells do not do so after an equals sign or in quotes."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return tuple(map(_expanded, value)) if isinstance(value, tuple) else value


def _one_line(text: str, parameters: Parameters, prog: str) -> str:
    """Convert the parser's framed message to one sentence."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = re.sub(r"[│╭╮╰╯─┄]+|-{4,}|^[|+]|[|+]\s*$", " ", plain, flags=re.MULTILINE).splitlines()  # the frame
    words = " ".join(" ".join(lines).split())
    end = f" See {prog} --help."
    if "Missing from" in words:  # each missing argument on a line of its own, its help indented deeper
        listed = itertools.takewhile(lambda line: "For full helptext" not in line, lines)
        names = [found[1] for line in listed if (found := re.match(r" {4,7}(\S+)", line))]
        needed = [n.upper() for n, p in parameters.items() if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
        flags = [name for name in names if name.startswith("--")]
        needed = needed[len(needed) - (len(names) - len(flags)) :]
        return f"{prog} needs {' and '.join([*needed, *flags])}.{end}"
    if found := re.search(r"Missing value for argument '(\S+)'. Expected (\d+) values", words):
        return f"{found[1]} needs {'a value' if found[2] == '1' else f'{found[2]} values'}.{end}"
    if found := re.search(r"invalid choice '(.*?)' for argument '(\S+)'. Expected one of \((.*?)\)", words):
        choices = [word for word in re.findall(r"'(.*?)'", found[3]) if word != "None"]
        name = found[2] if found[2].startswith("-") else found[2].upper()
        return str(unknown("value", found[1], choices, where=f"for {name}"))
    if found := re.search(r"Error parsing (\S+): (?:no type matching (\S+) could be instantiated from \[)?(.*)", words):
        kinds = found[2] or ("INT" if "int()" in found[3] else "FLOAT")
        wanted = [f"'{literal}'" for literal in re.findall(r"{(.*?)}", kinds) if literal != "None"]
        wanted += [word for kind, word in (("INT", "an integer"), ("FLOAT", "a number")) if kind in kinds.split("|")]
        if wanted and (value := re.search(r"'(.*?)'", found[3])):
            return f"{found[1]} is '{value[1]}'; it must be {' or '.join(wanted)}.{end}"
    return f"{words}{end}"


def _reader_gone() -> bool:
    """Whether stdout is a pipe whose reader has exited, such as `head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _silent() -> int:
    """Exit code 2 for ranks that do not print errors. torchrun kills all ranks when the first one fails, so these wait
    for rank 0 to print."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(30)
    return 2


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
    """A progress bar on stderr for one run. Yields a function to call with each row of metrics."""
    with Progress(disable=quiet, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps)

        def update(row: dict[str, Any]) -> None:
            loss = row["skipped"] if row["loss"] is None else f"loss {row['loss']:.3f}"
            rate = row["tokens"] / row["seconds"]
            bar.update(task, completed=row["step"] + 1, description=f"{loss}, {rate:,.0f} tok/s")

        yield update


@contextlib.contextmanager
def building_bar(quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A progress bar on stderr for a build. Yields a function to call with each `qies.data.builder.progress.Step`."""
    columns = SpinnerColumn(), *Progress.get_default_columns()[:-1], TextColumn("left"), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, transient=True, disable=quiet or not console.is_terminal, console=console) as bar:
        task = bar.add_task("starting", total=None)
        first: list[tuple[float, int]] = []  # time and number of the first tokens of this call

        def update(step: Any) -> None:
            text = step.what
            if step.tokens:
                first[:] = first or [(time.monotonic(), step.tokens)]
                seconds = time.monotonic() - first[0][0]
                rate = f", {(step.tokens - first[0][1]) / seconds:,.0f} tok/s" if seconds else ""
                text += f": {step.documents:,} documents, {step.tokens:,} tokens{rate}"
            bar.update(task, completed=step.done, total=step.total or None, description=text)

        yield update
