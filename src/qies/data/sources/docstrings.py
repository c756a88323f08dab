"""Prose from docstrings: numpydoc sections and reStructuredText markup become plain paragraphs.

Summaries, explanations, notes and descriptions of parameters and results are kept. Examples, literal blocks, displayed
formulas, tables, references and lists of links are dropped.
"""

from __future__ import annotations

import ast
import gc
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator

_DROPPED_SECTIONS = {"Examples", "References", "See Also", "See also", "Methods", "Attributes", "Routine Listings"}
_ENTRY_SECTIONS = {"Parameters", "Returns", "Yields", "Raises", "Warns", "Options"}  # last word
_KEPT_DIRECTIVES = {"note", "warning", "important", "attention", "tip", "caution", "rubric"}

_UNDERLINE = re.compile(r"\s*([-=~^*#])\1{2,}\s*$")
_TABLE_RULE = re.compile(r"\s*(={2,}(\s+={2,})+|\+[-=+]{3,})\s*$")
_DIRECTIVE = re.compile(r"\s*\.\. (?:(?P<name>[\w:-]+)::|\[|_|\|)")
_NO_PROSE = re.compile(  # signatures of compiled functions, legal notices
    r"\A[\w.]+\([^()]*\)(\s*->.*)?\s*(--)?\Z|\bcopyright\b|all rights reserved|no warranty", re.IGNORECASE
)
_ITEM = re.compile(r"(?:[-*+•]|\d+[.)]|\([a-z\d]{1,2}\))\s")
_MARKS = (  # a string that every match contains, the pattern, its replacement
    ("`", re.compile(r"(?::[\w:+-]+:)?`[~!]?([^`]+?)\s+<[^>`]*>`_{0,2}"), r"\1"),  # :role:`text <target>`
    ("`", re.compile(r":[\w:+-]+:`[~!]?([^`]*)`"), r"\1"),
    ("`", re.compile(r"``([^`]*)``"), r"\1"),
    ("`", re.compile(r"`([^`]*)`_{0,2}"), r"\1"),
    ("%(", re.compile(r"%\(\w+\)s"), ""),  # placeholders for text shared by several docstrings
    ("]_", re.compile(r"\s*\[[^\[\]]{1,40}\]_"), ""),  # citations
    ("*", re.compile(r"\*\*(\S[^*]*)\*\*"), r"\1"),
    ("*", re.compile(r"(?<![\w*])\*(\w[^*]*)\*(?![\w*])"), r"\1"),
)


def parse(source: str) -> ast.Module:
    """The syntax tree, built with the garbage collector off, as its searches for cycles in the new nodes take time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the strings of others' source
            return ast.parse(source)
    finally:
        if collecting:
            gc.enable()


def docstrings(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Docstrings of a module or class and its members, and string arguments of top-level calls such as `add_newdoc`."""
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from docstrings(child)
        elif isinstance(child, ast.FunctionDef):
            yield ast.get_docstring(child) or ""
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            for argument in child.value.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield inspect.cleandoc(argument.value)


def prose(docstring: str) -> str:
    """The prose of a docstring: unwrapped paragraphs separated by blank lines; one line per parameter."""
    out = []
    for heading, lines in _sections(docstring.expandtabs().split("\n")):
        if heading not in _DROPPED_SECTIONS:
            lines = list(_without_blocks(lines))
            is_list = heading.split(" ")[-1] in _ENTRY_SECTIONS
            paragraphs = [_entries(lines)] if is_list else _paragraphs(lines)
            body = "\n\n".join(text for text in paragraphs if text and not _NO_PROSE.search(text))
            if body:
                out.append(f"{heading}\n{body}" if heading else body)
    return "\n\n".join(out)


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Pairs (heading, lines below it); the first heading is ""."""
    heading, start = "", 0
    for i in range(len(lines) - 1):
        title = lines[i].strip()
        if title and lines[i][0] != " " and _UNDERLINE.match(lines[i + 1]) and not _UNDERLINE.match(lines[i]):
            yield heading, lines[start:i]
            heading, start = _plain(title).rstrip(":"), i + 2
    yield heading, lines[start:]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without_blocks(lines: list[str]) -> Iterator[str]:
    """The lines outside of directives, literal blocks, doctests and tables."""
    i = 0
    while i < len(lines):
        line, i = lines[i], i + 1
        directive = _DIRECTIVE.match(line)
        if line.lstrip().startswith(">>>") or _TABLE_RULE.match(line):
            while i < len(lines) and lines[i].strip():
                i += 1
        elif directive and directive["name"] in _KEPT_DIRECTIVES:
            yield ""
        elif directive or line.rstrip().endswith("::"):
            if not directive:
                yield line.rstrip()[:-1]
            while i < len(lines) and (not lines[i].strip() or _indent(lines[i]) > _indent(line)):
                i += 1
            yield ""
        elif not _UNDERLINE.match(line):
            yield line


def _paragraphs(lines: Iterable[str]) -> list[str]:
    """Paragraphs with their lines joined; list items, and lines less indented than the previous, begin a new line."""
    out: list[list[str]] = []
    before = None  # indentation of the previous line, None after a blank line
    for line in lines:
        text = line.strip()
        if not text:
            before = None
        elif before is None:
            out.append([text])
            before = _indent(line)
        elif _ITEM.match(text) or _indent(line) < before:
            out[-1].append(text)
            before = _indent(line)
        else:
            out[-1][-1] += " " + text
            before = _indent(line)
    return ["\n".join(filter(None, map(_plain, paragraph))) for paragraph in out]


def _entries(lines: list[str]) -> str:
    """`name : type` with an indented description becomes `name (type): description`, one line each."""
    entries: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.strip() and _indent(line) == 0:
            entries.append((line.strip(), []))
        elif entries:
            entries[-1][1].append(line)
    out = []
    for head, description in entries:
        name, typed, kind = head.partition(" : ")
        label = _plain(f"{name} ({kind.strip()})" if typed else name.rstrip(":"))
        out.append(": ".join(filter(None, [label, " ".join(_paragraphs(description))])))
    return "\n".join(filter(None, out))


def _plain(text: str) -> str:
    for character, pattern, replacement in _MARKS:
        if character in text:
            text = pattern.sub(replacement, text)
    return " ".join(text.split())
