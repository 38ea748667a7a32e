"""Samples: pieces of generated text in a file, for people to read beside the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teal.artifacts import check_header, check_keys, write_json

FORMAT = "teal.samples"
VERSION = 1


def write_samples(path: Path, samples: Sequence[dict[str, Any]], sampling: str) -> None:
    """Write generated text: pieces with `level`, `prompt` and `text`; `sampling` says how they were drawn."""
    write_json(path, {"format": FORMAT, "version": VERSION, "sampling": sampling, "samples": list(samples)})


def samples_from_json(payload: dict[str, Any], where: object) -> dict[str, Any]:
    """Check what `write_samples` wrote. Raises TealError naming `where` for anything that does not belong."""
    check_header(payload, FORMAT, VERSION, where)
    keys = ("format", "version", "sampling", "samples")
    check_keys(payload, keys, where, keys)
    for sample in payload["samples"]:
        check_keys(sample, ("level", "prompt", "text"), where, ("level", "prompt", "text"))
    return payload
