"""Files that cross stages: a format name, a version, atomic writes, no pickle."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from teal.errors import TealError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see all of it or nothing.

    The file has a hidden directory to itself, as libraries put temporary files of their own beside it; what a
    killed process left there is removed by the next write of the same file.
    Raises TealError if the place is a directory, is not writable, or the disk is full.
    """
    if path.is_dir():
        raise TealError(f"cannot write {path}: it is a directory; name a file")
    own = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        own = Path(mkdtemp(prefix=f"{_temporary_prefix(path)}{os.getpid()}-", suffix=".tmp", dir=path.parent))
        temporary = own / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors writes files that only their owner may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise TealError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if own is not None:
            rmtree(own, ignore_errors=True)


def cached(kind: str, about: object, make: Callable[[], bytes], valid: Callable[[bytes], bool] = bool) -> bytes:
    """What `make` returned when it was first asked, on this machine: a file of TEAL_CACHE (default ~/.cache/teal).

    It is found again by its kind and `about`, whose repr() tells all that it depends on. Content that is not `valid` is
    made anew. A cache that cannot be read or written only costs time.
    """

    def kept() -> bytes | None:
        with suppress(OSError):
            content = path.read_bytes()
            return content if valid(content) else None
        return None

    folder, name = os.environ.get("TEAL_CACHE"), f"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}.{kind}"
    try:
        path = (Path(folder) if folder else Path.home() / ".cache" / "teal") / name
    except RuntimeError:  # no home
        return make()
    if (content := kept()) is not None:
        return content
    made = make()
    if (content := kept()) is not None:  # another process was first
        return content
    with suppress(TealError, OSError):
        write_atomically(path, lambda temporary: temporary.write_bytes(made))
    return made


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}.{platform.node()}-"


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files for `path` whose writer no longer runs; only on the host that can tell."""
    if os.name != "posix":  # elsewhere asking for a process can end it
        return
    prefix = _temporary_prefix(path)
    for entry in path.parent.iterdir():
        writer = entry.name.removeprefix(prefix).partition("-")[0]
        if entry.name.startswith(prefix) and entry.name.endswith(".tmp") and writer.isdigit() and not _runs(writer):
            rmtree(entry, ignore_errors=True)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def check_writable(path: Path) -> None:
    """Fail before hours of work, not after, if `path` cannot be written."""
    try:
        is_directory = path.is_dir()
    except OSError as error:  # a name that is too long, say
        raise TealError(f"cannot write {path}: {error.strerror}") from error
    if is_directory:
        raise TealError(f"cannot write {path}: it is a directory; name a file")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise TealError(f"cannot write {path}: no permission to write in {parent}")


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` as JSON, atomically. NaN and infinity are refused."""
    text = json.dumps(payload, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; NaN and infinity are refused."""

    def refuse(constant: str) -> float:
        raise TealError(f"{path} holds {constant}; it is damaged, make it anew")

    try:
        payload = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise TealError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise TealError(f"{path} is a directory; name the file in it") from None
    except OSError as error:
        raise TealError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TealError(f"{path} is not JSON but binary; name a file that teal wrote as JSON") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise TealError(f"{path} is not valid JSON ({error}); it is damaged or not a file of ours") from error
    if not isinstance(payload, dict):
        raise TealError(f"{path} holds no JSON object; it is not a file of ours")
    return payload


def check_header(payload: dict[str, Any], format_name: str, version: int, where: object) -> None:
    """Check the `format` and `version` of a file of ours; raises TealError naming what was found."""
    if payload.get("format") != format_name:
        raise TealError(f"{where} has format {payload.get('format')!r}, expected {format_name!r}")
    found = payload.get("version")
    if not isinstance(found, int) or found < 1:
        raise TealError(f"{where} has version {found!r}, expected an integer up to {version}")
    if found > version:
        raise TealError(f"{where} has version {found}, this teal reads up to {version}; upgrade teal-llm")


def check_keys(payload: dict[str, Any], allowed: Iterable[str], where: object, required: Iterable[str] = ()) -> None:
    """Unknown keys are errors: a misspelt key must not be ignored silently. So are missing ones."""
    unknown = sorted(set(payload) - set(allowed))
    if unknown:
        raise TealError(f"{where} has unknown keys {unknown}; was it written by a newer teal or edited by hand?")
    missing = sorted(set(required) - set(payload))
    if missing:
        raise TealError(f"{where} lacks {missing}; it is damaged, make it anew")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Write tensors as safetensors, atomically, with `header` as JSON in its metadata."""
    metadata = {"teal": json.dumps(header, allow_nan=False)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors and the header."""
    if path.is_dir():
        raise TealError(f"{path} is a directory; name a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("teal", "{}"))
            if not isinstance(header, dict):
                raise TealError(f"the header of {path} is no JSON object; it is not a file of ours")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except FileNotFoundError:
        raise TealError(f"{path} does not exist") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise TealError(f"{path} is truncated, corrupt or not safetensors ({error}); make it anew") from error
