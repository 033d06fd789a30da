"""``python -m orbitflow_sglang.patches apply|check|revert``: what hooks cannot do in SGLang.

Each patch names one file, and what it hashes to before and after. So a file is in one of
three states, and nothing else is trusted: original, patched, or changed by somebody else, which
is refused. Files are replaced one by one, each at once; a run that was killed in between
leaves some in either state, and the next ``apply`` or ``revert`` finishes it.

Exit status: 0, done, or for ``check`` all are applied; 1, ``check`` found some that are not;
2, refused.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orbitflow_sglang import SUPPORTED_SGLANG

State = Literal["original", "patched"]
TOKENIZER_WORKERS = "0002-tokenizer-workers"
TEMPORARY = ".orbitflow-tmp"
_PACKAGE = Path(__file__).resolve().parent
_SOURCES = (_PACKAGE / "_patches", _PACKAGE.parent / "patches")  # of a wheel, of a checkout
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")


class Refused(Exception):
    """The installed SGLang is not one that can be patched; the message says what to do."""


@dataclass(frozen=True)
class Hunk:
    """Lines of the original, and what takes their place; each from a line number (from 0)."""

    old_start: int
    old: tuple[str, ...]
    new_start: int
    new: tuple[str, ...]


@dataclass(frozen=True)
class Patch:
    """One patch of one file."""

    name: str
    title: str
    file: str  # relative to site-packages
    before: str  # SHA-256
    after: str
    hunks: tuple[Hunk, ...]

    def path(self, root: Path) -> Path:
        """The file in the installation whose ``sglang`` lies in ``root``."""
        return root / self.file

    def state(self, root: Path) -> State:
        """Raises ``Refused`` where the file is neither the original nor patched."""
        try:
            found = _hash(self.path(root).read_bytes())
        except OSError as error:
            raise Refused(f"{self.file}: {error.strerror}: reinstall {_wanted()}") from None
        if found == self.after:
            return "patched"
        if found == self.before:
            return "original"
        raise Refused(
            f"{self.file} is neither that of {_wanted()} nor patched by OrbitFlow: reinstall it "
            "(pip install --force-reinstall --no-deps), then apply the patches"
        )

    def other(self, root: Path) -> bytes:
        """The file as it is in the other of the two states."""
        original = self.state(root) == "original"
        lines = self.path(root).read_bytes().decode().splitlines(keepends=True)
        for hunk in reversed(self.hunks):  # from the last, so that lines before stay in place
            start, old, new = hunk.old_start, hunk.old, hunk.new
            if not original:
                start, old, new = hunk.new_start, hunk.new, hunk.old
            if tuple(lines[start : start + len(old)]) != old:
                raise Refused(f"{self.name} does not fit {self.file}")
            lines[start : start + len(old)] = new
        data = "".join(lines).encode()
        if _hash(data) != (self.after if original else self.before):
            raise Refused(f"{self.name} does not lead where it says it does")
        return data


def load(version: str = SUPPORTED_SGLANG) -> list[Patch]:
    """The patches for a version of SGLang, in order. Raises ``Refused`` if there are none."""
    for source in _SOURCES:
        files = sorted((source / f"sglang-{version}").glob("*.patch"))
        if files:
            return [parse(file.stem, file.read_text(encoding="utf-8")) for file in files]
    raise Refused(f"there are no patches for sglang {version}: install {_wanted()}")


def parse(name: str, text: str) -> Patch:
    """A patch from its file: a title and why, three headers, and a unified diff."""
    head, _, diff = text.partition("\n--- ")
    headers = dict(re.findall(r"^(file|before|after): (\S+)$", head, re.MULTILINE))
    hunks = []
    lines = diff.splitlines(keepends=True)
    position = next(i for i, line in enumerate(lines) if line.startswith("@@"))
    while position < len(lines):
        match = _HUNK.match(lines[position])
        if match is None:
            raise ValueError(f"{name}: {lines[position]!r} is not the head of a hunk")
        body = []
        position += 1
        while position < len(lines) and not lines[position].startswith("@@"):
            body.append(lines[position])
            position += 1
        old = tuple(line[1:] for line in body if line[0] in " -")
        new = tuple(line[1:] for line in body if line[0] in " +")
        hunks.append(Hunk(int(match[1]) - 1, old, int(match[2]) - 1, new))
    title = head.splitlines()[0]
    return Patch(name, title, headers["file"], headers["before"], headers["after"], tuple(hunks))


def installed() -> Path:
    """Where ``sglang`` is installed. Raises ``Refused`` for a version without patches."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise Refused(f"sglang is not installed: install {_wanted()}") from None
    if version != SUPPORTED_SGLANG:
        raise Refused(f"found sglang {version}: install {_wanted()}")
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise Refused(f"sglang has no files here: install {_wanted()}")
    return Path(next(iter(spec.submodule_search_locations))).parent


def change(patches: Sequence[Patch], root: Path, wanted: State, dry_run: bool = False) -> list[str]:
    """Bring every file into the ``wanted`` state; returns what was done, in words.

    All files are looked at, and all new ones are made, before the first is replaced. Raises
    ``Refused`` before anything has changed.
    """
    states = [patch.state(root) for patch in patches]
    pending = [
        (patch, patch.other(root))
        for patch, state in zip(patches, states, strict=True)
        if state != wanted
    ]
    done = []
    if pending and len(pending) < len(patches):
        done.append("some files were in either state, as a run that was cut off leaves them")
    if not dry_run:
        for patch in patches:  # what a run that was killed while it wrote has left
            _temporary(patch.path(root)).unlink(missing_ok=True)
    verb = "patched" if wanted == "patched" else "restored"
    for patch, data in pending:
        if not dry_run:
            _replace(patch.path(root), data)
        done.append(f"{'would be ' if dry_run else ''}{verb}: {patch.file} ({patch.title})")
    return done or [f"nothing to do: every file is {wanted}"]


def applied(name: str) -> bool:
    """Whether the patch of that name is in the installed SGLang."""
    try:
        root = installed()
        return any(patch.name == name and patch.state(root) == "patched" for patch in load())
    except Refused:
        return False


def report(patches: Sequence[Patch], root: Path) -> tuple[list[str], bool]:
    """The state of each patch in words, and whether all are applied."""
    states = [patch.state(root) for patch in patches]
    lines = [
        f"{'applied' if state == 'patched' else 'not applied'}: {patch.name} ({patch.title})"
        for patch, state in zip(patches, states, strict=True)
    ]
    return lines, all(state == "patched" for state in states)


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m orbitflow_sglang.patches",
        description="OrbitFlow's optional patches of the installed SGLang.",
    )
    parser.add_argument("command", choices=("apply", "check", "revert"))
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    options = parser.parse_args(argv)
    try:
        root = installed()
        patches = load()
        if options.command == "check":
            lines, applied = report(patches, root)
            print("\n".join(lines))
            return 0 if applied else 1
        wanted: State = "patched" if options.command == "apply" else "original"
        print("\n".join(change(patches, root, wanted, options.dry_run)))
    except (Refused, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


def _replace(path: Path, data: bytes) -> None:
    """Write ``path`` anew, all of it or nothing, with the permissions that it had."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _wanted() -> str:
    return f"sglang=={SUPPORTED_SGLANG}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
