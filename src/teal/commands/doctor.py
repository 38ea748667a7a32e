"""Show versions, processor features, GPUs, and which kernel backends work here and why others do not.

example:
  teal doctor
"""

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from teal.commands import common

OPERANDS = ""
PACKAGES = ("teal-llm", "torch", "transformers", "tokenizers", "safetensors", "triton", "datasets")
# What the CPU kernels of the field care about, as Linux names them.
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    findings = examine()
    for title, entries in findings.items():
        common.say(arguments, f"{title}")
        for name, value in entries.items():
            common.say(arguments, f"  {name:<22} {value}")
    common.write_result(arguments, findings)


def examine() -> dict[str, dict[str, Any]]:
    """What there is on this machine, section by section."""
    return {"versions": versions(), "processor": _processor(), "GPUs": _gpus(), "backends": _backends()}


def versions() -> dict[str, str]:
    """Of Python and the packages that matter here."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> dict[str, str]:
    import torch

    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
    present = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "features": " ".join(name for name in FEATURES if name in present) or "not known",
    }


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return {
            "none": f"torch is built for CUDA {built} but finds no device"
            if built
            else "this torch is built for CPU only"
        }
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        found[f"cuda:{index}"] = f"{properties.name}, {size:.0f} GiB, capability {properties.major}.{properties.minor}"
    return found


def _backends() -> dict[str, str]:
    """Each layout's sparse product is tried on a small weight; what is not there is named."""
    import torch

    from teal.ops import native, reference
    from teal.ops.layouts import LAYOUTS, triton_serves

    found = {}
    generator = torch.Generator().manual_seed(0)
    wide, row = torch.randn(48, 64, generator=generator), torch.randn(1, 64, generator=generator)
    for name, layout in LAYOUTS.items():
        tried = ([wide.cuda().bfloat16()] if torch.cuda.is_available() else []) + [wide]
        reasons = [layout.refusal(weight) for weight in tried]
        if name == "triton" and not triton_serves(tried[0]):
            found[name] = "not here: its kernels are for GPUs"
            continue
        if None not in reasons:
            found[name] = f"not here: {reasons[0]}"
            continue
        try:
            weight = tried[reasons.index(None)]
            x, threshold = row.to(weight), torch.tensor(0.5, device=weight.device)
            packed = layout.pack(weight)
            expected = reference.sparse_gemv(x, packed.unpack(), threshold)
            same = torch.allclose(
                packed.sparse_gemv(x, threshold, None), expected, atol=1e-4 if weight is wide else 0.1
            )
            note = "reads only the kept channels" if packed.skips_channels else "zeroes inputs, reads every weight"
            found[name] = f"works ({note})" if same else "WRONG RESULT: please report this"
        except Exception as error:  # a diagnosis must not fail with what it diagnoses
            found[name] = f"fails: {error}"
    try:
        found["native CPU kernels"] = native.describe()
    except Exception as error:
        found["native CPU kernels"] = f"fails: {error}"
    return found
