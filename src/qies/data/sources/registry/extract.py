"""Text extraction from the files of packages: one reader per file type, from bytes to documents (id, text).

Code blocks, tables, images and link targets are removed, and, for every type, paragraphs with few letters.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

from qies.data.sources.builtin import chapters, speech
from qies.data.sources.docstrings import docstrings, parse, prose

Documents = Iterator[tuple[str, str]]
"""Pairs (suffix of the file's id, text)."""

_SHORTEST = 200  # minimum characters of a document
_LETTERS = 0.72  # minimum fraction of letters among the non-space characters of a paragraph of prose
_COMMON = frozenset(
    [
        "the",
        "of",
        "and",
        "to",
        "in",
        "a",
        "is",
        "that",
        "for",
        "it",
        "as",
        "be",
        "with",
        "by",
        "on",
        "are",
        "this",
        "or",
        "an",
        "not",
        "from",
        "i",
        "you",
        "his",
    ]
)


def is_prose(paragraph: str) -> bool:
    """False for a paragraph in which too few characters are letters, or more than one letter in fifty is not Latin.

    There is no minimum length, so headings and the lines of plays are kept.
    """
    dense = "".join(paragraph.split())
    letters = sum(map(str.isalpha, dense))
    foreign = sum(character.isalpha() and character > "\u024f" for character in dense)
    return letters >= _LETTERS * len(dense) and 50 * foreign <= letters


def is_english(text: str) -> bool:
    """Whether at least one word in seven is among the 24 most common of English (in prose, one in three is)."""
    words = re.findall(r"[^\W\d_]+", text[:20_000].casefold())
    return 7 * sum(word in _COMMON for word in words) >= len(words) > 0


def _decoded(content: bytes) -> str:
    """Decode UTF-8, else Latin-1, in which old texts are encoded."""
    try:
        return content.decode("utf-8-sig").replace("\0", "")
    except UnicodeDecodeError:
        return content.decode("latin-1").replace("\0", "")


def _plain(content: bytes) -> Documents:
    yield "", _decoded(content)


def _speech(content: bytes) -> Documents:
    yield "", speech(_decoded(content))


def _bible(content: bytes) -> Documents:
    for name, verses in chapters(_decoded(content).splitlines()):
        yield f"#{name}", verses


_RST_ONLY = re.compile(r"^(:[\w -]+:.*|\s*\.\.\s.*)$", re.MULTILINE)  # field lists and one-line comments


def _rst(content: bytes) -> Documents:
    yield "", prose(_RST_ONLY.sub("", _decoded(content)))


_MARKDOWN = (
    (re.compile(r"\A---\n.*?\n---\n", re.DOTALL), ""),  # front matter
    (re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1", re.DOTALL | re.MULTILINE), ""),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"^ *\|.*$|^(?: {4}|\t)\S.*$|^ *[-=*_]{3,} *$", re.MULTILINE), ""),  # tables, code, rules
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"^#+ +|<[^>\n]+>|(?<!\w)[*_]{1,3}(?=\w)|(?<=[\w.,!?])[*_]{1,3}(?!\w)|`", re.MULTILINE), ""),
)


def _markdown(content: bytes) -> Documents:
    text = _decoded(content)
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    yield "", text


class _Page(HTMLParser):
    """Collects the text of block elements as paragraphs, without the content of `_SKIPPED` elements."""

    _SKIPPED = frozenset(
        [
            "script",
            "style",
            "pre",
            "table",
            "nav",
            "head",
            "header",
            "footer",
            "form",
            "svg",
            "select",
            "button",
            "sup",
            "math",
        ]
    )
    _BLOCKS = frozenset(
        [
            "p",
            "div",
            "li",
            "dt",
            "dd",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "blockquote",
            "br",
            "section",
            "article",
            "ul",
            "ol",
            "dl",
            "body",
            "center",
        ]
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[list[str]] = [[]]
        self.skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if tag in self._SKIPPED or (tag == "div" and not _NO_TEXT.isdisjoint(classes)) or self.skipping:
            if tag not in ("br", "img", "input", "hr", "meta", "link", "p", "li", "dt", "dd"):
                self.skipping.append(tag)
        elif tag in self._BLOCKS:
            self.paragraphs.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipping:
            while self.skipping.pop() != tag:
                pass
        elif tag in self._BLOCKS and not self.skipping:
            self.paragraphs.append([])

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.paragraphs[-1].append(data)


_NO_TEXT = frozenset(
    ["sphinxsidebar", "related", "highlight", "navheader", "navfooter", "toc", "footer", "document-nav"]
)


def html_text(page: str) -> str:
    """The paragraphs of an HTML page or fragment, separated by blank lines."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    paragraphs = (" ".join("".join(parts).replace("\u00b6", "").split()) for parts in parser.paragraphs)
    return "\n\n".join(filter(None, paragraphs))


def _html(content: bytes) -> Documents:
    yield "", html_text(_decoded(content))


def _python(content: bytes) -> Documents:
    try:
        module = parse(_decoded(content))
    except (SyntaxError, ValueError, RecursionError):  # templates and test data of packages may not be Python
        return
    parts = (prose(text) for text in docstrings(module) if len(text) >= 100)
    yield "", "\n\n".join(part for part in parts if len(part) >= 100)


def _values(tree: Any, keys: frozenset[str]) -> Iterator[str]:
    """The strings under `keys` anywhere in parsed JSON, in document order."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                if key in keys and isinstance(value, str):
                    yield value
            stack.extend(value for value in reversed(node.values()) if isinstance(value, dict | list))
        elif isinstance(node, list):
            stack.extend(value for value in reversed(node) if isinstance(value, dict | list))


def _json(*keys: str, shortest: int) -> Callable[[bytes], Documents]:
    def read(content: bytes) -> Documents:
        found = (html_text(text) for text in _values(json.loads(_decoded(content)), frozenset(keys)))
        yield "", "\n\n".join(dict.fromkeys(text for text in found if len(text) >= shortest))

    return read


_ANSIBLE = re.compile(r"^(DOCUMENTATION|RETURN) *= *r?(\"\"\"|''')(.*?)\2", re.DOTALL | re.MULTILINE)
_YAML_KEY = re.compile(r"^(\s*)(?:- )?([\w-]+):(?:\s+(.*))?$")
_ANSIBLE_MARK = re.compile(r"\b[A-Z]{1,3}\(([^(),]*)(?:,[^()]*)?\)")


def _ansible(content: bytes) -> Documents:
    """Descriptions and notes in the YAML documentation of a module, read line by line; the YAML is not loaded."""
    paragraphs: list[str] = []
    for block in _ANSIBLE.finditer(_decoded(content)):
        depth, inside = 0, False
        for line in block[3].split("\n"):
            key = _YAML_KEY.match(line)
            if key:
                inside = key[2] in ("description", "notes", "short_description")
                depth = len(key[1])
                if inside and key[3] and key[3] not in ("|", ">", "|-", ">-"):
                    paragraphs.append(key[3])
            elif inside and line.strip() and len(line) - len(line.lstrip()) >= depth:
                text = line.strip()
                if text.startswith("- ") or not paragraphs:
                    paragraphs.append(text.removeprefix("- "))
                else:
                    paragraphs[-1] += " " + text
    texts = (_ANSIBLE_MARK.sub(r"\1", text.strip("\"' ")) for text in paragraphs)
    yield "", "\n\n".join(text for text in texts if len(text) >= 40)


_GLOSS = 200  # synonym sets per document of WordNet


def _wordnet(content: bytes) -> Documents:
    """One line per set of synonyms: its words, then the gloss with its examples; 200 consecutive sets per document."""
    lines = []
    for line in _decoded(content).splitlines():
        if " | " in line and not line.startswith("  "):
            fields, gloss = line.split(" | ", 1)
            parts = fields.split(" ")
            words = (parts[4 + 2 * i].replace("_", " ") for i in range(int(parts[3], 16)))
            lines.append(f"{', '.join(words)}: {gloss.strip()}")
    for i in range(0, len(lines), _GLOSS):
        yield f"#{i // _GLOSS:04d}", "\n".join(lines[i : i + _GLOSS])


def _dictionary(content: bytes) -> Documents:
    """A dictd database: headwords at the margin with indented text below; about 100 kB per document."""
    text = re.sub(r"\n[ \t]+(?=\S)", "\n", _decoded(gzip.decompress(content)))
    text = re.sub(r"[{}\\]|\[(?:1913 Webster|PJC|[^\]\n]{0,12}\+?[^\]\n]{0,12})\]", "", text)
    start, number = 0, 0
    while start < len(text):
        end = text.find("\n\n", start + 100_000)
        end = len(text) if end < 0 else end
        yield f"#{number:04d}", text[start:end]
        start, number = end, number + 1


READERS: dict[str, Callable[[bytes], Documents]] = {
    "plain": _plain,
    "speech": _speech,
    "bible": _bible,
    "rst": _rst,
    "markdown": _markdown,
    "html": _html,
    "python": _python,
    "aws": _json("documentation", shortest=80),
    "discovery": _json("description", shortest=80),
    "factbook": _json("text", shortest=30),
    "ansible": _ansible,
    "wordnet": _wordnet,
    "dictionary": _dictionary,
}


def read_text(kind: str, name: str, content: bytes) -> Documents:
    """Documents (id, text) of the file `name`, read by the reader `kind` of `READERS`; only English prose is kept.

    Documents below 200 characters are dropped.
    """
    for suffix, text in READERS[kind](content):
        paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n"))
        kept = "\n\n".join(paragraph for paragraph in paragraphs if paragraph.strip() and is_prose(paragraph)).strip()
        if len(kept) >= _SHORTEST and is_english(kept):
            yield name + suffix, kept
