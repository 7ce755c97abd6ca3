"""A folder that holds a cache: written whole or not at all, read only if every byte is the one that was written.

::

    folder/manifest.json             whose cache it is; of every file its facts, size and hash
    folder/layer_000.safetensors     tensors of one layer

A save is written to a sibling ``.folder.saving-*``, forced to disk and renamed. To replace an older save takes two renames:
between them that one lies in ``.folder.before``, where ``Saved.open`` finds it if the process ended there. ``.folder.lock`` keeps
others out meanwhile; the system releases it however the process ends. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sparse_attn.errors import ContractError, require, warn_once

VERSION = 1
_MANIFEST = "manifest.json"
_OURS = re.compile(r"manifest\.json|[a-z]+(_\d+)?\.safetensors")


def write(folder: str | Path, head: dict, pieces: Iterable[tuple[str, dict, dict[str, Tensor]]], overwrite: bool = False) -> None:
    """Make ``folder`` hold these pieces, one file each, readable by its owner only.

    Args:
        head: JSON values beside the pieces.
        pieces: name, facts (JSON values) and tensors of each; asked for one after the other, so that little exists twice.
        overwrite: replace the save that ``folder`` holds.

    Raises:
        ContractError: if something is there already, another save to it is under way, or it cannot be written. What was there
            is there still.
    """
    folder = Path(folder).resolve()
    require(folder.parent.is_dir(), f"{folder} cannot be made because {folder.parent} is no folder; make that one first")
    try:
        with _locked(folder):
            _tidy(folder)
            _require_place(folder, overwrite)
            draft = Path(tempfile.mkdtemp(prefix=_draft_prefix(folder), dir=folder.parent))
            try:
                files = {}
                for name, facts, tensors in pieces:
                    files[name] = {"facts": facts} | _put(draft / f"{name}.safetensors", save(_on_host(tensors)))
                manifest = {"version": VERSION, **head, "files": files}
                _put(draft / _MANIFEST, json.dumps(manifest | {"sha256": _own_hash(manifest)}, indent=1).encode())
                _force(draft)
                _move_in(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        why = f"the cache cannot be saved to {folder} ({error.strerror or error}), and what was there is kept"
        raise ContractError(f"{why}; see that there is room and the right to write, or give another folder") from error


@dataclass(frozen=True, eq=False)
class Saved:
    """What a folder holds.

    Attributes:
        folder: where it lies.
        head: what ``write`` was given.
        facts: of each piece by its name, in the order of writing.
    """

    folder: Path
    head: dict
    facts: dict[str, dict]
    _files: dict[str, dict]

    @classmethod
    def open(cls, folder: str | Path) -> Saved:
        """Read the manifest.

        Raises:
            ContractError: if there is no save, or its manifest was cut short, altered or is of another version.
        """
        folder = Path(folder).resolve()
        at = folder
        if not folder.exists() and _before(folder).is_dir():
            at = _before(folder)
            warn_once(f"a save to {folder} was cut off while it replaced an older one; this is the older one")
        path = at / _MANIFEST
        try:
            value = json.loads(path.read_bytes())
        except OSError as error:
            why = f"{folder} holds no saved cache ({path.name}: {error.strerror}); write one with cache.save(folder)"
            raise ContractError(why) from error
        except ValueError as error:
            raise ContractError(f"{path} was cut short or altered ({error}); save the cache again") from error
        require(isinstance(value, dict), f"{path} holds a {type(value).__name__}, which no save wrote; save the cache again")
        version = value.get("version")
        require(version == VERSION,
                f"the cache in {folder} has version {version!r} but this package reads {VERSION}; save it again")
        written = value.pop("sha256", None)
        require(written == _own_hash(value), f"{path} was altered since the save; save the cache again")
        files = value.pop("files")
        return cls(at, value, {name: entry["facts"] for name, entry in files.items()}, files)

    def tensors(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors of a piece, in memory of their own.

        Raises:
            ContractError: if its file is missing, cut short or altered.
        """
        path, entry = self.folder / f"{name}.safetensors", self._files[name]
        again = "save the cache again"
        try:
            size = path.stat().st_size
            require(size >= entry["bytes"], f"{path} was cut short: {size} bytes of {entry['bytes']}; {again}")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            require(found == entry["sha256"], f"{path} was altered since the save, or another save replaced it just now; {again}")
            # the file itself is mapped: what is changed in it later would change these
            with torch.inference_mode(False):
                return {key: t.to(device, copy=True) for key, t in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise ContractError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {again}") from error


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _own_hash(manifest: dict) -> str:
    as_read = json.loads(json.dumps(manifest))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


# -- places beside the folder -------------------------------------------------------------------------------------------------


def _draft_prefix(folder: Path) -> str:
    return f".{folder.name}.saving-"


def _before(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.before"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else saves to ``folder`` meanwhile; raises ContractError if somebody does."""
    path = folder.parent / f".{folder.name}.lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who held it before removes the file, and then this is nobody's lock
            mine = path.exists() and os.path.samestat(os.fstat(file), path.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        require(mine, f"another save to {folder} is under way; wait for its end, or give another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _tidy(folder: Path) -> None:
    """Remove what a save that was cut off left behind, and put back what it had moved away."""
    draft = re.compile(re.escape(_draft_prefix(folder)) + r"[a-z0-9_]{8}")
    for name in filter(draft.fullmatch, os.listdir(folder.parent)):
        shutil.rmtree(folder.parent / name, ignore_errors=True)
    before = _before(folder)
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
    elif before.is_dir():
        os.rename(before, folder)


def _require_place(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    require(folder.is_dir(), f"{folder} is a file; give a folder that is not there yet")
    require(overwrite, f"{folder} exists already; pass overwrite=True to replace the cache in it, or give another folder")
    strange = [name for name in sorted(os.listdir(folder)) if not _OURS.fullmatch(name)]
    require(not strange, f"{folder} holds {strange[0] if strange else ''!r}, which no save wrote and overwrite would delete; "
            "give another folder")


# -- writing ------------------------------------------------------------------------------------------------------------------


def _put(path: Path, data: bytes) -> dict:
    """Write a file and force it to disk; its size and hash."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _force(folder: Path) -> None:
    """Force the names in a folder to disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _move_in(draft: Path, folder: Path) -> None:
    """Rename ``draft`` to ``folder``; if that fails, what was there is there again."""
    before, replaces = _before(folder), folder.exists()
    if replaces:
        os.rename(folder, before)
    try:
        os.rename(draft, folder)
        _force(folder.parent)
    except OSError:
        if not draft.exists():
            os.rename(folder, draft)
        if replaces:
            os.rename(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)
