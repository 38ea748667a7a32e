"""bench --kernels: the native CPU product of each projection shape against a plain read and torch's linear."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.benchmark import TOLERANCE, read_bandwidth, speeds_from_json, speeds_to_json
from teal.errors import TealError
from teal.ops import native, reference
from teal.ops.cpu import TiledWeight
from teal.ops.packed import PackedWeight
from teal.ops.reference import KEEP_ALL
from teal.ops.sparse_gemv import pack
from teal.progress import track
from teal.structure import ModelStructure

FORMAT = "teal.kernel_benchmark"
VERSION = 1
CACHES = 4  # copies of a weight together exceed the last-level cache this many times
MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class KernelSpeed:
    """One product [N, K] at one level: medians over the repeats, [slowest, fastest] beside them.

    `bytes_read` of one call: runs of kept channels, and scales. `bandwidth_share` is bytes_read per second over the
    plain read of the same repeat; `over_dense` and `over_torch` are times of the kernel's own dense product and of
    torch's linear, in the dtype of the inputs, over this one's, of the same repeat.
    """

    name: str
    outputs: int
    inputs: int
    level: float
    sparsity: float
    microseconds: float
    bytes_read: int
    bandwidth_share: float
    bandwidth_share_spread: tuple[float, float]
    over_dense: float
    over_dense_spread: tuple[float, float]
    over_torch: float
    over_torch_spread: tuple[float, float]


@dataclass(frozen=True)
class KernelBenchmark:
    """`bandwidth` in bytes per second is the median of a plain read by all threads."""

    speeds: list[KernelSpeed]
    bandwidth: float
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return speeds_to_json(FORMAT, VERSION, self.speeds, self.bandwidth, self.details)

    @classmethod
    def from_json(cls, payload: dict[str, Any], where: object) -> "KernelBenchmark":
        """Read what `to_json` gave. Raises TealError naming `where` for anything that does not belong."""
        return cls(*speeds_from_json(FORMAT, VERSION, KernelSpeed, payload, where))


def projection_shapes(structure: ModelStructure) -> dict[str, tuple[int, int]]:
    """The distinct weight shapes (N, K) of a model's blocks, by the names of the projections that have them."""
    names: dict[tuple[int, int], list[str]] = {}
    for _, projection in structure.projections():
        found = names.setdefault((projection.out_features, projection.in_features), [])
        if (name := projection.name.rpartition(".")[2]) not in found:
            found.append(name)
    return {" ".join(found): shape for shape, found in names.items()}


def benchmark_kernels(
    shapes: Mapping[str, tuple[int, int]],
    levels: Sequence[float],
    *,
    quantization: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 7,
    show_progress: bool = False,
) -> KernelBenchmark:
    """Time one row of `dtype` inputs times random weights of each shape (N, K), dense and at each level, interleaved
    with a plain read and torch's linear. Calls rotate over copies of the weight that no cache holds.

    Raises TealError without the native library, or if a product differs from the reference.
    """
    library = native.library()
    if library is None:
        raise TealError(f"there are no native CPU kernels to measure: {native.describe()}")
    levels = list(dict.fromkeys([0.0, *levels]))
    cache = last_level_cache()
    buffer = native.new_tensor((max(1 << 28, CACHES * cache) // 4,), torch.float32).fill_(1)
    read_bandwidth(buffer)  # warms up
    speeds, bandwidths = [], []
    for name, (n, k) in track(shapes.items(), "measuring", len(shapes), show_progress):
        case = _Case(n, k, levels, quantization, dtype, cache)
        case.check()
        repeated = [case.measure(buffer) for _ in range(repeats + 1)][1:]
        bandwidths += [seconds["read"] for seconds in repeated]
        speeds += [_speed(name, case, level, repeated) for level in levels]
    details = {
        "weights": quantization or str(dtype).removeprefix("torch."), "inputs": str(dtype).removeprefix("torch."),
        "instruction_set": library.teal_chosen_instruction_set().decode(), "threads": torch.get_num_threads(),
        "repeats": repeats, "last_level_cache": cache, "torch": torch.__version__,
        "copies_bytes": min(case_bytes(n, k, quantization, dtype, cache) for n, k in shapes.values()),
    }  # fmt: skip
    return KernelBenchmark(speeds, statistics.median(bandwidths), details)


def last_level_cache() -> int:
    """Bytes of the last-level cache, 32 MiB if the system does not say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    return max((int(file.read_text().strip().removesuffix("K")) << 10 for file in files), default=32 << 20)


def _copies(size: int, cache: int) -> int:
    return max(2, min(MOST_BYTES, (CACHES + 1) * cache) // size + 1)


def case_bytes(n: int, k: int, quantization: str | None, dtype: torch.dtype, cache: int) -> int:
    """Bytes of all copies of one weight together."""
    bits = {"int8": 8, "int4": 4}.get(quantization or "", dtype.itemsize * 8)
    return n * k * bits // 8 * _copies(n * k * bits // 8, cache)


class _Case:
    """The copies of one weight, an input, and a threshold for each level."""

    def __init__(
        self, n: int, k: int, levels: Sequence[float], quantization: str | None, dtype: torch.dtype, cache: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(n, k, generator=generator).mul_(0.02).to(dtype)
        first = pack(weight, quantization)
        if not isinstance(first, TiledWeight):
            raise TealError(f"TEAL_LAYOUT={first.layout} has no native kernel to measure")
        self.shape = (n, k)
        self.weights = [first, *(_copy(first) for _ in range(_copies(int(first.bytes_read()), cache) - 1))]
        self.plain = [weight, *(weight.clone() for _ in range(_copies(weight.nbytes, cache) - 1))]
        self.x = torch.randn(1, k, generator=generator).to(dtype)
        ordered = self.x.abs().float().flatten().sort().values
        self.thresholds = {
            level: torch.tensor(KEEP_ALL) if level == 0 else ordered[max(0, int(level * k) - 1)] for level in levels
        }
        self.kept = {level: int(reference.keep_mask(self.x, value).sum()) for level, value in self.thresholds.items()}

    def check(self) -> None:
        for level, threshold in self.thresholds.items():
            got = self.weights[0].sparse_gemv(self.x, threshold, None).float()
            want = reference.sparse_gemv(self.x.float(), self.weights[0].unpack().float(), threshold)
            error = float((got - want).abs().max() / want.abs().max())
            if not error <= TOLERANCE[self.x.dtype]:
                raise TealError(
                    f"{self.shape} at {level:g} differs from the reference by {error:.2g} of its largest output"
                )

    def measure(self, buffer: Tensor) -> dict[Any, float]:
        """Seconds of one call at each level and of torch's linear; "read" in bytes per second."""
        result: dict[Any, float] = {"read": read_bandwidth(buffer)}
        result["torch"] = _seconds([lambda weight=weight: F.linear(self.x, weight) for weight in self.plain])
        for level, threshold in self.thresholds.items():
            result[level] = _seconds(_calls(self.weights, self.x, threshold))
        return result


def _copy(weight: PackedWeight) -> TiledWeight:
    copies = [native.new_tensor(tuple(tensor.shape), tensor.dtype).copy_(tensor) for tensor in weight.storage]
    copied = type(weight)(copies)
    assert isinstance(copied, TiledWeight)
    return copied


def _calls(weights: Sequence[TiledWeight], x: Tensor, threshold: Tensor) -> list[Callable[[], object]]:
    """The library's calls alone, as the decode step makes them: with arguments prepared before."""
    library = native.library()
    assert library is not None
    y = x.new_empty(1, weights[0].out_features)
    projections = [native.projection(weight.native_weight(), threshold, None) for weight in weights]

    def call(projection: native.Projection) -> Callable[[], object]:
        keep_alive = (x, y, threshold)
        arguments = (ctypes.byref(projection), native.ACTIVATIONS[x.dtype], x.data_ptr(), 1, x.shape[1], y.data_ptr())
        return lambda: (library.teal_sparse_gemv(*arguments), keep_alive)

    return [call(projection) for projection in projections]


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - started) / len(calls)


def _speed(name: str, case: _Case, level: float, repeated: Sequence[Mapping[Any, float]]) -> KernelSpeed:
    (n, k), packed = case.shape, case.weights[0]
    size = round(packed.bytes_read(case.kept[level] / k))
    shares = [size / seconds[level] / seconds["read"] for seconds in repeated]
    dense = [seconds[0.0] / seconds[level] for seconds in repeated]
    others = [seconds["torch"] / seconds[level] for seconds in repeated]
    return KernelSpeed(
        name=name, outputs=n, inputs=k, level=level, sparsity=1 - case.kept[level] / k,
        microseconds=1e6 * statistics.median(seconds[level] for seconds in repeated), bytes_read=size,
        bandwidth_share=statistics.median(shares), bandwidth_share_spread=(min(shares), max(shares)),
        over_dense=statistics.median(dense), over_dense_spread=(min(dense), max(dense)),
        over_torch=statistics.median(others), over_torch_spread=(min(others), max(others)),
    )  # fmt: skip


def kernel_table(result: KernelBenchmark) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people."""

    def spread(median: float, ends: tuple[float, float]) -> str:
        return f"{median:.2f} ({ends[0]:.2f}-{ends[1]:.2f})"

    rows = [
        [
            s.name, f"{s.inputs} -> {s.outputs}", f"{s.level:g}" if s.level else "dense", f"{s.microseconds:.0f}",
            f"{s.bytes_read / s.microseconds / 1e3:.1f}", spread(s.bandwidth_share, s.bandwidth_share_spread),
            spread(s.over_dense, s.over_dense_spread), spread(s.over_torch, s.over_torch_spread),
        ]
        for s in result.speeds
    ]  # fmt: skip
    columns = ["projection", "shape", "level", "us", "GB/s", "of read (spread)", "x dense (spread)", "x torch (spread)"]
    return columns, rows


def kernel_rule(result: KernelBenchmark) -> str:
    """What the table was measured on."""
    d = result.details
    return (
        f"{d['weights']} weights, one row of {d['inputs']}, {d['instruction_set']}, {d['threads']} threads, torch "
        f"{d['torch']}; plain read {result.bandwidth / 1e9:.1f} GB/s in the same run; weights rotated over copies of "
        f"at least {d['copies_bytes'] / 2**20:.0f} MiB, last-level cache {d['last_level_cache'] / 2**20:.0f} MiB; "
        f"medians of {d['repeats']} interleaved repeats; products equal the reference within rounding"
    )
