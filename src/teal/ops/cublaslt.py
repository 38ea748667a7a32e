"""Dense products of several tokens with weights [K, N], by the fastest of cuBLASLt's algorithms.

What it proposes first for weights in this order takes up to 1.6 times as long as cuBLAS with row-major weights. As fast
as that or faster are tiles of a size that gives every multiprocessor the same number of them, which it has but seldom
proposes (docs/log.md). The fastest is measured once for a shape and a range of tokens and kept in the cache directory,
so that later runs give the same bits.

The library is that of torch's version of CUDA; its C interface: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

import ctypes
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teal.artifacts import cached

MOST_TOKENS = 4096  # of more, products are long, and the first proposal is as good as any
MOST_PROPOSALS = 8  # cuBLASLt makes no more
MOST_WAVES, FULL = 4, 0.85  # of blocks, with tiles that are not proposed, and the share of their places that is taken
MOST_VARIANTS = 96  # with such tiles
TRIES, FINALISTS, REPEATS = 2, 8, 5  # how often all are measured, how many of them again, and how often
READS = 3  # of a buffer larger than the cache; together longer than the host takes to start a product
GAIN = 0.97  # of the time of the first proposal, at most, for another to be taken
MOST_WORKSPACE = 32 << 20
SAME = 1e-2  # relative, of two products of the same inputs
ALIGNMENT = 256  # bytes, which cuBLASLt takes for granted

# Of cublas_api.h, cublasLt.h and library_types.h.
REAL_16F, REAL_16BF, REAL_32F, COMPUTE_32F = 2, 14, 0, 68
MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK, IN_COMPUTE_TYPE = 1, 3, 2
ALGO_CAP_TILE_IDS, ALGO_CONFIG_TILE_ID = 6, 1
TYPES = {torch.float16: REAL_16F, torch.bfloat16: REAL_16BF}


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x [..., K] @ weight [K, N] + bias [N], float16 or bfloat16 with float32 sums, on the current CUDA device.

    None where torch's product must serve: for other dtypes, more than MOST_TOKENS rows, strided or unaligned weights,
    gradients, while torch compiles, where cuBLASLt is missing or fails, and while a CUDA graph is captured, which
    forbids to measure, unless there was such a product of as many rows before.
    """
    (k, n), tokens = weight.shape, x.numel() // x.shape[-1]
    if not 0 < tokens <= MOST_TOKENS or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return None
    if x.dtype not in TYPES or weight.dtype != x.dtype or not weight.is_contiguous() or weight.data_ptr() % ALIGNMENT:
        return None
    rows = x.reshape(tokens, k).contiguous()
    if rows.data_ptr() % ALIGNMENT:
        rows = rows.clone()
    key = (tokens, k, n, x.dtype, torch.cuda.current_device())
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return None
        _chosen[key] = _choose(rows, weight)
    if (chosen := _chosen[key]) is None:
        return None
    y = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if bias is not None:
        y.copy_(bias)  # the product is added to it, in float32
    try:
        chosen.product.run(chosen.algorithm, rows, weight, y, add=bias is not None)
    except _Failure:
        _chosen[key] = None
        return None
    return y.view(*x.shape[:-1], n)


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("opaque", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class Candidate(NamedTuple):
    """The proposal of a place with the tile of a number of cuBLASLt's, or with its own if that is 0."""

    place: int
    tile: int
    algorithm: Algorithm


class Product:
    """y [T, N] = x [T, K] @ weight [K, N], of fixed sizes and dtype, on the current device."""

    def __init__(self, tokens: int, channels: int, outputs: int, dtype: torch.dtype) -> None:
        # cuBLASLt counts down columns: to it, this is y' [N, T] = weight' [N, K] @ x' [K, T].
        self._operation = _created("MatmulDesc", COMPUTE_32F, REAL_32F)
        self._weight, self._x, self._y = (
            _created(
                "MatrixLayout", TYPES[dtype], ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
            )
            for rows, columns in ((outputs, channels), (channels, tokens), (outputs, tokens))
        )
        self._problem = (self._operation, self._weight, self._x, self._y, self._y)

    def proposals(self) -> list[Algorithm]:
        """The best first, as cuBLASLt estimates."""
        results, count = (Algorithm * MOST_PROPOSALS)(), ctypes.c_int()
        _call("MatmulAlgoGetHeuristic", _handle(), *self._problem, _preference(), MOST_PROPOSALS, results, _to(count))
        if not (proposals := [result for result in results[: count.value] if result.state == 0]):
            raise _Failure("it proposes nothing")
        return proposals

    def candidates(self, proposals: Sequence[Algorithm]) -> list[Candidate]:
        """The proposals, and what they become with other tiles: those of the fewest and fullest waves of blocks."""
        known = {bytes(proposal.opaque) for proposal in proposals}
        variants: list[Candidate] = []
        for place, proposal in enumerate(proposals):
            for tile in tiles_of(proposal):
                try:
                    algorithm = self.accepted(with_tile(proposal, tile))
                except _Failure:
                    continue
                if are_full(algorithm.waves) and bytes(algorithm.opaque) not in known:
                    known.add(bytes(algorithm.opaque))
                    variants.append(Candidate(place, tile, algorithm))
        variants.sort(key=lambda variant: (math.ceil(variant.algorithm.waves), -variant.algorithm.waves))
        proposed = [Candidate(place, 0, proposal) for place, proposal in enumerate(proposals)]
        return proposed + variants[:MOST_VARIANTS]

    def accepted(self, algorithm: Algorithm) -> Algorithm:
        """One with another tile, or that was proposed for another number of tokens, as this product needs it."""
        result = Algorithm()
        _call("MatmulAlgoCheck", _handle(), *self._problem, _to(algorithm.opaque), _to(result))
        if result.state != 0 or result.workspace_bytes > MOST_WORKSPACE:
            raise _Failure("it is not supported, or needs too much memory")
        result.opaque = algorithm.opaque
        return result

    def run(self, algorithm: Algorithm, x: Tensor, weight: Tensor, y: Tensor, add: bool = False) -> None:
        """`add`: to what `y` holds."""
        workspace = torch.empty(algorithm.workspace_bytes, dtype=torch.uint8, device=y.device)
        one, kept = ctypes.c_float(1), ctypes.c_float(add)
        _call(
            "Matmul", _handle(), self._operation, _to(one), _at(weight), self._weight, _at(x), self._x, _to(kept),
            _at(y), self._y, _at(y), self._y, _to(algorithm.opaque), _at(workspace),
            ctypes.c_size_t(algorithm.workspace_bytes), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip


def are_full(waves: float) -> bool:
    """Whether so many waves of blocks keep the multiprocessors busy."""
    return 0 < waves <= MOST_WAVES and waves >= FULL * math.ceil(waves)


def tiles_of(algorithm: Algorithm) -> list[int]:
    """The numbers of the tiles that it is documented to come with; a product may refuse them nevertheless."""
    size, attribute = ctypes.c_size_t(), ctypes.c_int(ALGO_CAP_TILE_IDS)
    try:
        _call("MatmulAlgoCapGetAttribute", _to(algorithm.opaque), attribute, None, ctypes.c_size_t(0), _to(size))
        tiles = (ctypes.c_int * (size.value // ctypes.sizeof(ctypes.c_int)))()
        _call("MatmulAlgoCapGetAttribute", _to(algorithm.opaque), attribute, tiles, size, _to(size))
    except _Failure:  # it does not tell
        return []
    return [tile for tile in tiles if tile > 0]


def with_tile(algorithm: Algorithm, tile: int) -> Algorithm:
    other = Algorithm.from_buffer_copy(algorithm)
    number = ctypes.c_uint32(tile)
    size = ctypes.c_size_t(ctypes.sizeof(number))
    _call("MatmulAlgoConfigSetAttribute", _to(other.opaque), ctypes.c_int(ALGO_CONFIG_TILE_ID), _to(number), size)
    return other


def measured_tokens(tokens: int) -> int:
    """The number of tokens at which the algorithm for `tokens` of them is chosen."""
    step = 32 if tokens <= 512 else 64 if tokens <= 1024 else 256  # what suits 128 can be slow with 96
    return -(-tokens // step) * step


def fastest(times: Sequence[Sequence[float]]) -> int:
    """The index of the candidate to take, by three or more times of each: the first, unless another is clearly faster.

    That is by its median, and all but its longest time are below all but the shortest of the first.
    """
    medians = [statistics.median(each) for each in times]
    best = min(range(len(medians)), key=medians.__getitem__)
    if math.isinf(medians[best]):
        raise _Failure("all algorithms fail")
    clearly = sorted(times[best])[-2] < sorted(times[0])[1]
    return best if clearly and medians[best] <= GAIN * medians[0] else 0


class _Failure(Exception):
    """cuBLASLt is missing, or refuses."""


class _Chosen(NamedTuple):
    product: Product
    algorithm: Algorithm


_chosen: dict[tuple[Any, ...], _Chosen | None] = {}  # by tokens, K, N, dtype and device
_fastest: dict[tuple[Any, ...], Algorithm] = {}  # by measured tokens and the same


def _choose(x: Tensor, weight: Tensor) -> _Chosen | None:
    """For products like x [T, K] @ weight [K, N]."""
    tokens, (k, n) = measured_tokens(x.shape[0]), weight.shape
    key = (tokens, k, n, x.dtype, torch.cuda.current_device())
    try:
        if key not in _fastest:
            _fastest[key] = _fastest_algorithm(tokens, weight)
        product = Product(x.shape[0], k, n, x.dtype)
        try:
            return _Chosen(product, product.accepted(_fastest[key]))
        except _Failure:  # not for fewer tokens than were measured
            return _Chosen(product, product.proposals()[0])
    except _Failure:
        return None


def _fastest_algorithm(tokens: int, weight: Tensor) -> Algorithm:
    """For x [tokens, K] @ weight [K, N]."""
    k, n = weight.shape
    product = Product(tokens, k, n, weight.dtype)
    proposals = product.proposals()
    about = (
        torch.cuda.get_device_name(weight.device), _library().cublasLtGetVersion(), tokens, k, n, weight.dtype,
        MOST_WORKSPACE, MOST_WAVES, FULL, MOST_VARIANTS,
    )  # fmt: skip

    def algorithm_of(content: bytes) -> Algorithm | None:
        """Of what is kept: place and tile; None if they mean nothing."""
        if not (words := re.fullmatch(rb"(\d{1,3}) (\d{1,6})", content)):
            return None
        place, tile = map(int, words.groups())
        if place >= len(proposals) or (tile and tile not in tiles_of(proposals[place])):
            return None
        with suppress(_Failure):
            return product.accepted(with_tile(proposals[place], tile) if tile else proposals[place])
        return None

    try:
        measured = partial(_measured, product, proposals, weight, tokens)
        kept = cached("gemm", about, measured, lambda it: bool(algorithm_of(it)))
    except torch.OutOfMemoryError:  # nothing can be measured now
        return proposals[0]
    return algorithm_of(kept) or proposals[0]


def _measured(product: Product, proposals: Sequence[Algorithm], weight: Tensor, tokens: int) -> bytes:
    """Place and tile of the fastest."""
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(tokens, weight.shape[0], device=weight.device, dtype=weight.dtype, generator=generator)
    candidates = product.candidates(proposals)
    first, tried = candidates[0], _times(product, candidates, x, weight, TRIES)
    quickest = sorted(range(1, len(candidates)), key=lambda index: min(tried[index]))
    finalists = [first, *(candidates[index] for index in quickest[: FINALISTS - 1])]
    chosen = finalists[fastest(_times(product, finalists, x, weight, REPEATS))]
    if chosen is not first and not _is_right(product, chosen.algorithm, x, weight):
        chosen = first
    return b"%d %d" % (chosen.place, chosen.tile)


def _is_right(product: Product, algorithm: Algorithm, x: Tensor, weight: Tensor) -> bool:
    """Whether it gives torch's product, but for its rounding."""
    want = x @ weight
    if not (size := torch.linalg.vector_norm(want, dtype=torch.float32)).isfinite():
        raise _Failure("the weights are not finite")
    got = torch.full_like(want, math.nan)
    product.run(algorithm, x, weight, got)
    return bool(torch.linalg.vector_norm(got.sub_(want), dtype=torch.float32) <= SAME * size)


def _times(
    product: Product, candidates: Sequence[Candidate], x: Tensor, weight: Tensor, repeats: int
) -> list[list[float]]:
    """Milliseconds of each, `repeats` times in turn, infinite if it fails.

    The weights come from memory, and nothing is left to be written back there: the cache was filled by reading.
    """
    y = torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device)
    size = 2 * torch.cuda.get_device_properties(x.device).L2_cache_size
    other = torch.zeros(size // 4, dtype=torch.float32, device=x.device)
    times: list[list[float]] = [[] for _ in candidates]
    for repeat in range(-1, repeats):  # the first warms up
        for candidate, its_times in zip(candidates, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(READS):
                other.sum()
            start.record()
            try:
                product.run(candidate.algorithm, x, weight, y)
            except _Failure:
                its_times.append(math.inf)
                continue
            end.record()
            end.synchronize()
            if repeat >= 0:
                its_times.append(start.elapsed_time(end))
    return times


@cache
def _library() -> Any:
    major = (torch.version.cuda or "0").split(".")[0]
    for name in (f"libcublasLt.so.{major}", f"cublasLt64_{major}.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cublasLtGetVersion.restype = ctypes.c_size_t
        return library
    raise _Failure("it is missing")


def _handle() -> ctypes.c_void_p:
    return _handle_of(torch.cuda.current_device())


@cache
def _handle_of(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _call("Create", _to(handle))
    return handle


@cache
def _preference() -> ctypes.c_void_p:
    """Little workspace, and sums of parts of the channels in float32, not in the outputs' dtype."""
    preference = _created("MatmulPreference")
    for attribute, value in (
        (MAX_WORKSPACE_BYTES, ctypes.c_uint64(MOST_WORKSPACE)),
        (REDUCTION_SCHEME_MASK, ctypes.c_uint32(IN_COMPUTE_TYPE)),
    ):
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _call("MatmulPreferenceSetAttribute", preference, attribute, _to(value), size)
    return preference


def _created(kind: str, *arguments: Any) -> ctypes.c_void_p:
    """A descriptor that lives as long as the process: a few for each shape and number of tokens that occur."""
    descriptor = ctypes.c_void_p()
    _call(f"{kind}Create", _to(descriptor), *arguments)
    return descriptor


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_library(), f"cublasLt{function}")(*arguments)
    if status != 0:
        raise _Failure(f"cublasLt{function} returned {status}")


def _to(value: Any) -> Any:
    return ctypes.byref(value)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
