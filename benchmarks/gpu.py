"""Measure the GPU kernels and the decode step beside their peers, in one run, interleaved, checked.

    python benchmarks/gpu.py bandwidth kernels rows prefill triton
    python benchmarks/gpu.py kernels --published CHECKOUT_OF_FasterDecoding/TEAL
    python benchmarks/gpu.py llama-2-7b --gpt-fast CHECKOUT_OF_gpt-fast --published CHECKOUT_OF_FasterDecoding/TEAL
    python benchmarks/gpu.py llama-3-8b --gpt-fast CHECKOUT_OF_gpt-fast
    python benchmarks/gpu.py llama-3-8b --contexts 8128 --gpt-fast CHECKOUT_OF_gpt-fast

Parts run in the order given; each takes a few minutes, and ratios are always of one part. Weights are random, in
real shapes; thresholds are quantiles of the inputs that the random weights give at the context that is timed, so
sparsity and speed are real and the text is not. Kernels are timed in replayed graphs over copies of the weights that
exceed the L2 cache many times; a model decodes whole tokens (embedding to choice of the next token), all of them
sparse, greedily. Times are medians with the lowest and highest. A product, a step or a peer's model that differs from
what it should compute ends the run.
"""

import argparse
import copy
import datetime
import importlib.util
import statistics
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.artifacts import check_writable, write_json
from teal.benchmark import check_products, plan_of_activations
from teal.commands.doctor import versions
from teal.engine.block import DecoderBlock
from teal.engine.config import EngineConfig
from teal.engine.cuda_step import CudaDecodeStep
from teal.engine.generate import DecodeState, decode_one_token
from teal.engine.model import DecoderModel
from teal.engine.sampling import Sampler, SamplingConfig
from teal.errors import TealError
from teal.linear import sparse_layers
from teal.ops import cuda_greedy, nvrtc, reference
from teal.ops.cuda_projection import Operands, Projection, limits_here
from teal.ops.cuda_rows import RowsProjection, choose_rows_tuning, rows_compiled
from teal.ops.cuda_weight import CudaWeight
from teal.shapes import random_engine
from teal.sparse_model import set_sparsity, sparsify
from teal.sparsity_meter import SparsityMeter

KERNELS = {  # outputs N x inputs K, as the decode step puts them together
    "Llama-2-7B q, k, v": (12288, 4096),
    "Llama-2-7B gate, up": (11008, 4096),
    "Llama-2-7B down": (4096, 11008),
    "Llama-3-8B q, k, v": (6144, 4096),
    "Llama-2-7B, 3-8B o": (4096, 4096),
    "Llama-3-8B gate, up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-70B q, k, v": (10240, 8192),
    "Llama-3-70B o": (8192, 8192),
    "Llama-3-70B gate, up": (28672, 8192),
    "Llama-3-70B down": (8192, 28672),
}
PROJECTIONS = {  # each by itself, as prompts and several tokens at once are multiplied
    "Llama-2-7B, 3-8B q, o": (4096, 4096),  # and k and v of the former
    "Llama-2-7B gate, up": (11008, 4096),
    "Llama-2-7B down": (4096, 11008),
    "Llama-3-8B k, v": (1024, 4096),
    "Llama-3-8B gate, up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-70B q, o": (8192, 8192),
    "Llama-3-70B k, v": (1024, 8192),
    "Llama-3-70B gate, up": (28672, 8192),
    "Llama-3-70B down": (8192, 28672),
}
LEVELS = (0.0, 0.25, 0.4, 0.5, 0.65)
# Tokens at once, and the share of channels that they keep together at 50 %; None is of independent masks. Four
# consecutive tokens of text keep 0.93 of the inputs of q, k, v, gate, up and down, 0.85 of those of o (docs/log.md).
ROWS = ((2, None), (4, 0.93), (4, 0.85), (8, None))
MODELS = {
    "llama-2-7b": {"dtype": torch.float16, "contexts": (128, 2048, 4032), "gpt-fast": "7B"},
    "llama-3-8b": {"dtype": torch.bfloat16, "contexts": (128, 2048, 8128), "gpt-fast": "llama-3-8b"},
}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative error of a product
PUBLISHED_TOLERANCE = 1e-2  # of the published kernel, which adds its partial sums in float16
# Of whole steps: times as far from float32 as the reference is in the model's dtype. Where inputs are dropped, rounding
# decides about those at their thresholds, and so about a tenth of the result.
CLOSE = 1.5
PUBLISHED_LEVELS = (0.4, 0.5)  # of the published decode loop, which compiles anew for each
COPIES_BYTES = 1.2e9
PREFILL_TOKENS = (96, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048)
STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["bandwidth", "kernels", "rows", "prefill", "triton", *MODELS])
    parser.add_argument("--published", type=Path, metavar="DIR", help="checkout of the published implementation")
    parser.add_argument("--gpt-fast", type=Path, metavar="DIR", help="checkout of gpt-fast")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of a model (default: 5)")
    parser.add_argument(
        "--contexts", type=int, nargs="+", metavar="TOKENS",
        help="of models, instead of 128 and longer ones; peers are measured at the first",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or min(arguments.contexts or [1]) < 1:
        parser.error("--rounds and --contexts must be positive")
    for option, checkout, file in (
        ("--gpt-fast", arguments.gpt_fast, "model.py"),
        ("--published", arguments.published, "kernels/sparse_gemv.py"),
    ):
        if checkout and not (checkout / file).is_file():
            parser.error(f"{option}: {checkout} holds no {file}")
    if arguments.json:
        try:
            check_writable(arguments.json)
        except TealError as error:
            parser.error(f"--json: {error}")
    if reason := nvrtc.unavailable():
        sys.exit(f"gpu.py: the CUDA kernels cannot run here: {reason}")
    device = torch.cuda.get_device_properties(0)
    results: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "GPU": device.name, "driver": driver(),
        "CUDA": torch.version.cuda, "torch": torch.__version__, "Triton": versions()["triton"],
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in results.items()))
    bandwidth = copy_bandwidth()
    results["bandwidth"] = bandwidth
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s, bytes read and bytes written counted")
    for part in arguments.parts:
        torch.manual_seed(0)
        if part == "kernels":
            results[part] = measure_kernels(bandwidth, arguments.published)
        elif part == "rows":
            results[part] = measure_rows(bandwidth)
        elif part == "prefill":
            results[part] = measure_prefill()
        elif part == "triton":
            results[part] = measure_triton(bandwidth)
        elif part != "bandwidth":
            results[part] = measure_model(
                part,
                bandwidth,
                arguments.gpt_fast,
                arguments.published,
                arguments.rounds,
                arguments.contexts or MODELS[part]["contexts"],
            )
        if arguments.json:
            write_json(arguments.json, results)


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def copy_bandwidth(size: int = 2 << 30) -> float:
    """Bytes per second of a device-to-device copy, counting bytes read and bytes written."""
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / (statistics.median(elapsed(lambda: target.copy_(source)) for _ in range(10)) * 1e-6)


def times(calls: Mapping[Any, Sequence[Callable[[], object]]], repeats: int = 20) -> dict[Any, list[float]]:
    """Microseconds per call of each list of `calls`, captured in a graph of its own; the graphs replay in turn."""
    graphs = {label: captured(each) for label, each in calls.items()}
    results: dict[Any, list[float]] = {label: [] for label in calls}
    for repeat in range(-3, repeats):  # the first three warm up
        for label, graph in graphs.items():
            us = elapsed(graph.replay) / len(calls[label])
            if repeat >= 0:
                results[label].append(us)
    return results


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def started(launches: Sequence[nvrtc.Launch]) -> list[Callable[[], object]]:
    """Calls that start them on the current stream."""
    return [lambda launch=launch: launch.start(torch.cuda.current_stream().cuda_stream) for launch in launches]


def elapsed(run: Callable[[], object]) -> float:
    """Microseconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def spread(values: Sequence[float], form: str = ".1f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def floor_us(n: int, k: int, kept: float, bandwidth: float) -> float:
    """In which the kept share of 16-bit weights is read."""
    return 1e6 * kept * 2 * n * k / bandwidth


def compared(cublas: Sequence[float], us: Sequence[float], floor: float) -> str:
    """The speed-up over cuBLAS, and the share that reading the bytes, `floor` microseconds, is of the time."""
    median = statistics.median(us)
    return f"{statistics.median(cublas) / median:>8.2f}x{floor / median:>9.0%}"


# ---- kernels ------------------------------------------------------------------------------------------------------


def measure_kernels(bandwidth: float, published: Path | None) -> dict[str, Any]:
    """Each shape: cuBLAS, ours at every level, and the published kernel, bfloat16 (the published one in float16)."""
    kernel = published_kernels(published).splitk_sparse_gemv if published else None
    table: dict[str, Any] = {}
    print(f"\n{'N x K':<40}{'level':>6}{'cuBLAS us':>22}{'ours us':>22}{'speed-up':>9}{'of floor':>9}{'error':>9}")
    for name, (n, k) in KERNELS.items():
        weights = copies_of(n, k)
        x, y = torch.randn(k, device="cuda", dtype=torch.bfloat16), torch.empty(n, device="cuda", dtype=torch.bfloat16)
        row_major = [weight.t().contiguous() for weight in weights]
        calls: dict[Any, Any] = {"cuBLAS": [lambda x=x, w=w: F.linear(x[None], w) for w in row_major]}
        projection = Projection(k, (n,), torch.bfloat16)
        table[name] = {"N": n, "K": k, "ours": {}, "published": {}}
        thresholds = {level: threshold_of(x, level) for level in LEVELS}
        for level, threshold in thresholds.items():
            launches = [projection.prepared(x, [Operands(w, threshold, y)], dependent=True) for w in weights]
            calls[level] = started(launches)
            calls[level][-1]()
            error = relative_error(y, reference.sparse_gemv(x[None].float(), row_major[-1].float(), threshold, None))
            check(name, level, error, TOLERANCE[torch.bfloat16])
            kept = float((x.float().abs() > threshold).float().mean())
            table[name]["ours"][level] = {"error": error, "sparsity": 1 - kept}
        if kernel:
            theirs, errors = published_calls(kernel, [with_room(w.half()).t() for w in weights], x.half(), name)
            calls |= {("published", level): theirs.pop(level) for level in LEVELS}
            table[name]["published"] = {level: {"error": error} for level, error in errors.items()}
        measured = times(calls)
        del calls, row_major
        for level, row in table[name]["published"].items():
            row["us"] = measured.pop(("published", level))
        table[name]["cuBLAS"] = cublas = measured.pop("cuBLAS")
        for level, us in measured.items():
            row = table[name]["ours"][level]
            row |= {"us": us, "floor us": floor_us(n, k, 1 - row["sparsity"], bandwidth)}
            print(
                f"{name + f' {n} x {k}':<40}{level:>6}{spread(cublas):>22}{spread(us):>22}"
                f"{compared(cublas, us, row['floor us'])}{row['error']:>9.1e}",
                flush=True,
            )
        for level, row in table[name]["published"].items():
            print(
                f"{name + ' published kernel, fp16':<40}{level:>6}{'':>22}{spread(row['us']):>22}{'':>18}"
                f"{row['error']:>9.1e}",
                flush=True,
            )
    return table


def threshold_of(x: Tensor, level: float) -> Tensor:
    return x.float().abs().quantile(level) if level else torch.tensor(-1.0, device="cuda")


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.flatten().double() - want.flatten().double()).norm() / want.double().norm())


def check(name: str, level: float, error: float, tolerance: float) -> None:
    if not error <= tolerance:
        sys.exit(f"gpu.py: {name} at {level}: the result differs from the reference by {error:.2g}")


def published_kernels(checkout: Path) -> Any:
    """The module `kernels.sparse_gemv` of FasterDecoding/TEAL."""
    if "msgspec" not in sys.modules:  # its only use there is a base class
        import dataclasses

        class Struct:
            def __init_subclass__(cls, **_: Any) -> None:
                dataclasses.dataclass(cls)

        sys.modules["msgspec"] = types.SimpleNamespace(Struct=Struct)  # pyright: ignore[reportArgumentType]
    sys.path[:0] = [str(checkout), str(checkout / "kernels")]
    return importlib.import_module("kernels.sparse_gemv")


def with_room(weight: Tensor, room: int = 4096) -> Tensor:
    """A contiguous copy, with as many elements after it: the published kernel reads up to a whole block of outputs."""
    copy = torch.zeros(weight.numel() + room, device=weight.device, dtype=weight.dtype)[: weight.numel()]
    return copy.view(weight.shape).copy_(weight)


def published_calls(
    kernel: Any, weights: list[Tensor], x: Tensor, name: str
) -> tuple[dict[float, list[Callable[[], object]]], dict[float, float]]:
    """Of the published kernel, by level: the calls, and the relative error of their results."""
    calls: dict[float, list[Callable[[], object]]] = {}
    errors: dict[float, float] = {}
    for level in LEVELS:
        at, bin_ = threshold_of(x, level), round(100 * level)
        threshold = float(at)
        got = kernel(x[None, None], weights[0], threshold, bin_)
        want = reference.sparse_gemv(x[None].float(), weights[0].float(), at, None)
        errors[level] = relative_error(got, want)
        check(f"{name}, published kernel", level, errors[level], PUBLISHED_TOLERANCE)
        calls[level] = [lambda w=w, t=threshold, b=bin_: kernel(x[None, None], w, t, b) for w in weights]
    return calls, errors


# ---- several tokens -----------------------------------------------------------------------------------------------


def measure_rows(bandwidth: float) -> dict[str, Any]:
    """Each shape for several tokens at 50 %, bfloat16: ours beside cuBLAS on all inputs and on masked ones.

    Masks are independent, or overlap so that their union is the share of the channels that four consecutive tokens of
    real text keep together.
    """
    table: dict[str, Any] = {}
    threshold = torch.tensor(0.5, device="cuda")
    print(
        f"\n{'N x K, several tokens':<40}{'rows':>6}{'union':>7}{'cuBLAS us':>22}{'masked':>9}{'ours us':>22}", end=""
    )
    print(f"{'speed-up':>9}{'of floor':>9}{'error':>9}")
    for name, (n, k) in PROJECTIONS.items():
        weights = copies_of(n, k)
        row_major = [weight.t().contiguous() for weight in weights]
        table[name] = []
        for rows, overlap in ROWS:
            tuning = choose_rows_tuning(k, n, rows_compiled(rows), *limits_here())
            if tuning is None:
                continue
            kernel = RowsProjection(k, n, rows_compiled(rows), torch.bfloat16, tuning)
            x = overlapping_inputs(rows, k, overlap)
            y = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
            measured = times(
                {
                    "cuBLAS": [lambda w=w, x=x: F.linear(x, w) for w in row_major],
                    "masked": [lambda w=w, x=x: F.linear(reference.drop_small(x, threshold), w) for w in row_major],
                    "ours": started([kernel.prepared(x, w, threshold, y, None, dependent=True) for w in weights]),
                }
            )
            cublas, masked, ours = measured["cuBLAS"], measured["masked"], measured["ours"]
            error = relative_error(y, reference.sparse_gemv(x.float(), weights[-1].t().float(), threshold, None))
            check(f"{name}, {rows} rows", 0.5, error, TOLERANCE[torch.bfloat16])
            union = float((x != 0).any(dim=0).float().mean())
            floor = floor_us(n, k, union, bandwidth)
            table[name].append({"rows": rows, "union": union, "error": error, "floor us": floor, **measured})
            print(
                f"{name + f' {n} x {k}':<40}{rows:>6}{union:>7.3f}{spread(cublas):>22}{statistics.median(masked):>9.1f}"
                f"{spread(ours):>22}{compared(cublas, ours, floor)}{error:>9.1e}",
                flush=True,
            )
    return table


def copies_of(n: int, k: int) -> list[Tensor]:
    """Random weights [K, N], together far larger than the cache."""
    count = max(2, int(COPIES_BYTES // (2 * n * k)) + 1)
    return [torch.randn(k, n, device="cuda", dtype=torch.bfloat16).mul_(0.02) for _ in range(count)]


def overlapping_inputs(rows: int, k: int, union: float | None) -> Tensor:
    """[rows, K]: half of each row is zero, the rest above 1; all rows together keep about the share `union`."""
    pool = 1.0  # the share of the channels that rows draw theirs from
    if union is not None:
        least, most = 0.5, 1.0
        for _ in range(40):
            pool = (least + most) / 2
            least, most = (pool, most) if pool * (1 - (1 - 0.5 / pool) ** rows) < union else (least, pool)
    drawn = torch.rand(k, device="cuda") < pool
    kept = drawn & (torch.rand(rows, k, device="cuda") < 0.5 / pool)
    return torch.where(kept, 1 + torch.rand(rows, k, device="cuda"), 0).to(torch.bfloat16)


def measure_prefill() -> dict[str, Any]:
    """Dense products of many tokens on the storage of the sparse kernels, beside cuBLAS on row-major weights.

    "untuned" is cuBLAS on that storage without a choice among its algorithms.
    """
    table: dict[str, Any] = {}
    print(
        f"\n{'N x K, prefill':<40}{'tokens':>8}{'row-major us':>25}{'untuned us':>11}{'ours us':>25}{'time':>9}", end=""
    )
    print(f"{'untuned':>9}{'error':>9}")
    for name, (n, k) in PROJECTIONS.items():
        weights = [CudaWeight((weight,)) for weight in copies_of(n, k)]
        row_major = [weight.unpack().contiguous() for weight in weights]
        table[name] = {}
        for tokens in PREFILL_TOKENS:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
            error = relative_error(weights[-1].dense_gemm(x, None), F.linear(x.float(), row_major[-1].float()))
            check(f"{name}, prefill of {tokens}", 0.0, error, TOLERANCE[torch.bfloat16])
            measured = times(
                {
                    "row-major": [lambda w=w, x=x: F.linear(x, w) for w in row_major],
                    "untuned": [lambda w=w, x=x: F.linear(x, w.unpack()) for w in weights],
                    "ours": [lambda w=w, x=x: w.dense_gemm(x, None) for w in weights],
                }
            )
            table[name][tokens] = {"error": error, **measured}
            theirs, untuned, ours = (statistics.median(us) for us in measured.values())
            print(
                f"{name + f' {n} x {k}':<40}{tokens:>8}{spread(measured['row-major']):>25}{untuned:>11.1f}"
                f"{spread(measured['ours']):>25}{ours / theirs:>8.2f}x{untuned / theirs:>8.2f}x{error:>9.1e}",
                flush=True,
            )
    return table


# ---- Triton -------------------------------------------------------------------------------------------------------


def measure_triton(bandwidth: float) -> dict[str, Any]:
    """Each shape, bfloat16: cuBLAS, Triton's product of kept inputs at every level, and that of picked outputs."""
    from teal.ops.triton_gemv import triton_gemv
    from teal.ops.triton_outputs import output_sparse_gemv

    table: dict[str, Any] = {}
    print(f"\n{'N x K, Triton':<40}{'level':>12}{'cuBLAS us':>22}{'ours us':>22}{'speed-up':>9}{'of floor':>9}", end="")
    print(f"{'error':>9}")
    for name, (n, k) in KERNELS.items():
        weights = copies_of(n, k)
        row_major = [weight.t().contiguous() for weight in weights]
        x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        calls: dict[Any, Any] = {"cuBLAS": [lambda x=x, w=w: F.linear(x, w) for w in row_major]}
        table[name] = {"N": n, "K": k, "inputs": {}, "outputs": {}}
        for level, of in [*((level, "inputs") for level in LEVELS), (0.5, "outputs")]:
            if of == "inputs":
                threshold = threshold_of(x, level)
                kept = float((x.float().abs() > threshold).float().mean())
                calls[of, level] = [lambda x=x, w=w, t=threshold: triton_gemv(x, w, t) for w in weights]
                want = reference.sparse_gemv(x.float(), row_major[-1].float(), threshold)
            else:
                keep = torch.rand(n, device="cuda") < 1 - level
                kept = float(keep.float().mean())
                calls[of, level] = [lambda x=x, w=w, keep=keep: output_sparse_gemv(x[0], w, keep) for w in row_major]
                want = reference.output_sparse_gemv(x[0].float(), row_major[-1].float(), keep)
            error = relative_error(calls[of, level][-1](), want)
            check(f"{name}, Triton", level, error, TOLERANCE[torch.bfloat16])
            table[name][of][level] = {"error": error, "sparsity": 1 - kept}
        measured = times(calls)
        del calls
        table[name]["cuBLAS"] = cublas = measured.pop("cuBLAS")
        for (of, level), us in measured.items():
            row = table[name][of][level]
            row |= {"us": us, "floor us": floor_us(n, k, 1 - row["sparsity"], bandwidth)}
            print(
                f"{name + f' {n} x {k}':<40}{of:>8}{level:>4}{spread(cublas):>22}{spread(us):>22}"
                f"{compared(cublas, us, row['floor us'])}{row['error']:>9.1e}",
                flush=True,
            )
    return table


# ---- whole models -------------------------------------------------------------------------------------------------


def measure_model(
    name: str, bandwidth: float, gpt_fast: Path | None, published: Path | None, rounds: int, contexts: Sequence[int]
) -> dict[str, Any]:
    """Tokens per second at each context: ours dense and at each level, gpt-fast dense, the published code, in turn."""
    dtype = MODELS[name]["dtype"]
    engine = random_engine(name, max(contexts) + STEPS, dtype, "cuda")
    if not isinstance(engine.decode_step, CudaDecodeStep):
        sys.exit(f"gpu.py: {name} does not run on the CUDA decode step")
    state = DecodeState.of(engine)
    sampler = Sampler(SamplingConfig(), torch.zeros((1, 1), dtype=torch.int64, device="cuda"), engine.config.vocab_size)
    print(f"\n{name}, {str(dtype).removeprefix('torch.')}")

    def ours(level: float, head: float, context: int) -> Callable[[], float]:
        def run() -> float:
            set_sparsity(engine, level)
            engine.lm_head.set_sparsity(head)
            state.position.fill_(context)
            decode_one_token(engine, state, sampler, state.cache)  # captures, if it must
            state.position.fill_(context)
            us = elapsed(lambda: [decode_one_token(engine, state, sampler, state.cache) for _ in range(STEPS)])
            return STEPS / us * 1e6

        return run

    # Their attention reads the whole cache, so they get one that just suffices, and are compared at the first context.
    peers: dict[str, GptFast] = {}
    size = MODELS[name]["gpt-fast"], dtype, contexts[0]
    if gpt_fast:
        peers["gpt-fast dense"] = GptFast(gpt_fast, *size)
    if published and dtype != torch.float16:
        print("the published kernels return float16 only: their code is not measured")
    elif published:
        peers |= {f"published {level:.0%}": Published(published, *size, level) for level in PUBLISHED_LEVELS}
    result: dict[str, Any] = {"dtype": str(dtype), "contexts": {}, "sparsity": {}, "floor": {}}
    for context in contexts:
        prompt = torch.randint(engine.config.vocab_size, (context,)).tolist()
        sparsify(engine, plan_of_activations(engine, prompt, tokens=32))
        if context == contexts[0]:
            result["products"] = max(products_error(engine, level) for level in LEVELS)
            print(f"products at every level differ by at most {result['products']:.1e} of their largest output")
            result["errors"] = {level: check_step(engine, level) for level in (0.0, 0.5)}
            result["peers' errors"] = {label: peer.errors for label, peer in peers.items() if peer.errors}
            report_errors(result)
        engine.prefill(torch.tensor([prompt], device="cuda"), state.cache)
        realised = {level: realised_sparsity(engine, state, level, context) for level in LEVELS}
        rows = {f"ours {level:.0%}": (level, 0.0) for level in LEVELS} | {"ours 50%, head 50%": (0.5, 0.5)}
        runs = {label: ours(level, head, context) for label, (level, head) in rows.items()}
        if context == contexts[0]:
            runs |= {label: peer.tokens_per_second for label, peer in peers.items()}
        speeds: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(rounds):
            for label, run in runs.items():
                speeds[label].append(run())
        result["contexts"][context] = speeds
        result["sparsity"][context] = realised
        sparsity = {label: (realised[level], head) for label, (level, head) in rows.items()}
        sparsity |= {label: (peer.sparsity, 0.0) for label, peer in peers.items() if peer.sparsity}
        result["floor"][context] = report(engine, context, speeds, sparsity, bandwidth)
    return result


def products_error(engine: DecoderModel, level: float) -> float:
    set_sparsity(engine, level)
    try:
        return check_products(engine)
    except TealError as error:
        sys.exit(f"gpu.py: {error}")


def report_errors(result: Mapping[str, Any]) -> None:
    """To references in float32: of steps through the first blocks, by level, and of single blocks of peers."""
    print(f"{'error':<24}{'step':>9}{'reference':>11}{'logits':>9}")
    for level, error in result["errors"].items():
        print(f"{f'ours {level:.0%}':<24}{error['step']:>9.1e}{error['reference']:>11.1e}{error['logits']:>9.1e}")
    for label, error in result["peers' errors"].items():
        print(f"{label:<24}{error['kernels']:>9.1e}{error['reference']:>11.1e}")


def report(
    engine: DecoderModel,
    context: int,
    speeds: dict[str, list[float]],
    sparsity: dict[str, tuple[float, float]],
    bandwidth: float,
) -> dict[str, float]:
    """`sparsity`: of the blocks, realised, and of the head, of those that have any. Returns the tokens per second that
    the bandwidth allows.
    """
    floors: dict[str, float] = {}
    print(f"context {context}: {'tokens/s':>40}{'of gpt-fast':>13}{'of our dense':>13}{'of floor':>10}")
    dense = statistics.median(speeds["ours 0%"])
    peer = statistics.median(speeds["gpt-fast dense"]) if "gpt-fast dense" in speeds else None
    blocks = sum(layer.packed.bytes_read() for layer in sparse_layers(engine).values())
    head = engine.lm_head.packed.bytes_read()
    config = engine.config
    cache = 2 * 2 * config.blocks * config.kv_heads * config.head_dim * context
    for label, values in speeds.items():
        of_blocks, of_head = sparsity.get(label, (0.0, 0.0))
        floors[label] = bandwidth / (blocks * (1 - of_blocks) + head * (1 - of_head) + cache)
        median = statistics.median(values)
        title = f"  {label} (realised {of_blocks:.1%})" if label in sparsity else f"  {label}"
        print(
            f"{title:<40}{spread(values):>25}{f'{median / peer:.2f}x' if peer else '-':>13}{median / dense:>12.2f}x"
            f"{median / floors[label]:>10.0%}",
            flush=True,
        )
    return floors


@torch.inference_mode()
def realised_sparsity(engine: DecoderModel, state: DecodeState, level: float, context: int, tokens: int = 8) -> float:
    """On random tokens after `context`."""
    set_sparsity(engine, level)
    meter = SparsityMeter(engine)
    with meter.measuring():
        for index in range(tokens):
            token, at = (torch.tensor([value], device="cuda") for value in (101 * index + 11, context + index))
            engine.decode(token, at, state.cache)
    return meter.sparsity()


@torch.inference_mode()
def check_step(engine: DecoderModel, level: float) -> dict[str, float]:
    """The CUDA step on the first blocks, and what is timed with it: the kernels that start and end a token, and the
    choice of the next; exits if they are not right. Returns relative errors.

    A step may be CLOSE times as far from the reference in float32 as the reference in the engine's dtype is ("step" and
    "reference", means over random inputs), both on row-major weights, and a dense one no farther than TOLERANCE.
    "logits" is the largest error of the norm and LM head, dense and sparse, after the same step.
    """
    from teal.engine.cache import BlockCache, KVCache
    from teal.engine.decode_step import TokenPosition, reference_decode_step

    set_sparsity(engine, level)
    step, device = engine.decode_step, engine.device
    assert isinstance(step, CudaDecodeStep)
    blocks = engine.blocks[:2]
    wide_blocks, plain_blocks = (
        [on_row_major(block, engine.config, dtype) for block in blocks] for dtype in (torch.float32, engine.dtype)
    )
    short_engine: Any = types.SimpleNamespace(
        blocks=blocks, embed_tokens=engine.embed_tokens, cos=engine.cos, sin=engine.sin, norm=engine.norm,
        lm_head=engine.lm_head,
    )  # fmt: skip
    *caches, other_token = (KVCache(engine.new_cache(1, 512).blocks[:2], 512) for _ in range(3))
    wide_cache = KVCache(tuple(BlockCache(*(tensor.float() for tensor in each)) for each in caches[0].blocks), 512)
    for each in zip(*(cache.blocks for cache in (*caches, other_token, wide_cache)), strict=True):
        for first, *others in zip(*each, strict=True):
            first.normal_()
            for other in others:
                other.copy_(first)
    errors: dict[str, list[float]] = {"step": [], "reference": [], "logits": []}
    for position in (0, 1, 127, 500):
        at, token = torch.tensor([position], device=device), torch.tensor([3 * position + 7], device=device)
        cos, sin = engine.cos[at], engine.sin[at]
        where = TokenPosition(at, cos, sin)
        for _ in range(8):
            hidden = torch.randn(1, engine.config.hidden_size, device=device, dtype=engine.dtype)
            want = reference_decode_step(
                wide_blocks, hidden.float(), wide_cache, TokenPosition(at, cos.float(), sin.float())
            )
            errors["step"].append(relative_error(step(blocks, hidden, caches[0], where), want))
            plain = reference_decode_step(plain_blocks, hidden, caches[1], where)
            errors["reference"].append(relative_error(plain, want))
        for head in (0.0, 0.5):
            engine.lm_head.set_sparsity(head)
            want = engine.lm_head.decode(engine.norm(step(blocks, engine.embed_tokens(token), other_token, where)))
            logits = step.logits(short_engine, token, at, other_token)
            if logits is None or cuda_greedy.choose(logits, token.clone(), -1).item() != logits.argmax():
                sys.exit("gpu.py: the CUDA step does not end in the most likely token")
            errors["logits"].append(relative_error(logits, want))
    engine.lm_head.set_sparsity(0.0)
    result = {name: statistics.mean(errors[name]) for name in ("step", "reference")} | {"logits": max(errors["logits"])}
    check("a decode step", level, result["step"], CLOSE * result["reference"])
    if level == 0:
        check("a decode step", level, result["step"], TOLERANCE[engine.dtype])
    check("the logits of a decode step", level, result["logits"], TOLERANCE[engine.dtype])
    return result


@torch.inference_mode(False)
@torch.no_grad()
def on_row_major(block: DecoderBlock, config: EngineConfig, dtype: torch.dtype) -> DecoderBlock:
    """With the same thresholds and, in `dtype`, weights."""

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        module, _, attribute = name.rpartition(".")
        return getattr(block.get_submodule(module), attribute).float()  # CUDA kernels have no float32

    other = DecoderBlock(config, block.self_attn.window, take).to(dtype)
    for its, mine in zip(other.projections, block.projections, strict=True):
        its.set_threshold(mine.threshold)
    return other


class GptFast:
    """gpt-fast's model and decode loop, compiled as its generate.py does it: random weights, after a random prompt."""

    sparsity = 0.0
    tolerance = 0.03  # of what a compiled step writes to the second block's cache
    errors: dict[str, float] | None = None  # as far as they are known

    def __init__(self, checkout: Path, name: str, dtype: torch.dtype, context: int) -> None:
        """`context` is that of the timed tokens, whose STEPS the cache just holds in addition."""
        import torch._inductor.config

        torch._inductor.config.coordinate_descent_tuning = True
        torch._inductor.config.triton.unique_kernel_names = True
        spec = importlib.util.spec_from_file_location(f"model_of_{type(self).__name__}", checkout / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where the compiler looks for it
        spec.loader.exec_module(module)
        sizes = module.ModelArgs.from_name(name)
        sizes.block_size = max(sizes.block_size, context + STEPS)  # positions that it has rotations for
        with torch.device("meta"):
            self.model: Any = module.Transformer(sizes).to(dtype)
        self.model = self.model.to_empty(device="cuda").eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
        with torch.device("cuda"):
            self.model.setup_caches(1, context + STEPS)
        self._context = context
        prompt = torch.randint(self.model.config.vocab_size, (1, context), device="cuda")
        with torch.no_grad():
            self.model(prompt, torch.arange(context, device="cuda"))

        def decode_one(model: Any, token: Tensor, position: Tensor) -> Tensor:
            logits = model(token, position)
            return logits[:, -1].argmax(dim=-1, keepdim=True).to(torch.int)

        self._decode = torch.compile(decode_one, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def tokens_per_second(self) -> float:
        def steps(count: int) -> Tensor:
            token = torch.tensor([[7]], device="cuda", dtype=torch.int)
            position = torch.tensor([self._context], device="cuda")
            for _ in range(count):
                with _math_attention():
                    token = self._decode(self.model, token, position).clone()
                position += 1
            return token

        steps(3)
        self._check(int(steps(1)))
        return STEPS / elapsed(lambda: steps(STEPS)) * 1e6

    def _check(self, choice: int) -> None:
        """The compiled step against the same done eagerly, by its choice and what it left in the first caches."""

        def written() -> list[Tensor]:
            caches = [layer.attention.kv_cache for layer in self.model.layers[:2]]
            return [
                values[:, :, self._context].clone() for cache in caches for values in (cache.k_cache, cache.v_cache)
            ]

        compiled = written()
        (logits,) = self.logits(self.model, [7])
        error = max(map(relative_error, compiled, written()))
        check(f"{type(self).__name__}, compiled", self.sparsity, error, self.tolerance)
        if self.sparsity == 0 and not logits[choice] >= 0.9 * logits.max():  # a random one is about 0
            sys.exit("gpu.py: gpt-fast, compiled, chooses another token than it does eagerly")

    @torch.no_grad()
    def logits(self, model: Any, tokens: Sequence[int]) -> Tensor:
        """Eagerly, of each of the tokens that follow the prompt, [T, vocabulary] in float32."""
        rows: list[Tensor] = []
        for after, token in enumerate(tokens):
            at = torch.tensor([self._context + after], device="cuda")
            rows.append(model(torch.tensor([[token]], device="cuda"), at)[0, -1].float())
        return torch.stack(rows)


class Published(GptFast):
    """The published decode loop: gpt-fast's, with the published kernels for the projections of its blocks.

    Thresholds are quantiles of the dense model's inputs at eight tokens after the prompt; `sparsity` is of eight more.
    Its choices are not checked: where inputs are dropped, rounding decides about every logit of a whole random model.
    """

    tolerance = 0.4  # fusion alone flips masks for 0.18

    def __init__(self, checkout: Path, name: str, dtype: torch.dtype, context: int, level: float) -> None:
        kernels = published_kernels(checkout)
        super().__init__(checkout / "gpt-fast", name, dtype, context)
        sizes = [linear.weight.numel() for linear in linears(self.model)]
        seen: list[list[Tensor]] = [[] for _ in sizes]
        with watching(linears(self.model), lambda index, x: seen[index].append(x.abs().float())):
            self.logits(self.model, range(7, 15))
        thresholds = [float(torch.cat(values).flatten().quantile(level)) for values in seen]
        dropped: list[float] = []

        def drop(index: int, x: Tensor) -> Tensor:
            small = x.abs() <= thresholds[index]
            dropped.append(float(small.float().mean()) * sizes[index])
            return x.masked_fill(small, 0)

        with watching(linears(self.model), drop):
            self.logits(self.model, range(15, 23))
            self.sparsity = sum(dropped) / 8 / sum(sizes)
            inputs: list[Any] = []
            with watching(self.model.layers, lambda _, *given: inputs.append(given)):
                self.logits(self.model, [15])
            reference = outputs_of_layers(self.model, inputs)
        exact = copy.deepcopy(self.model).float()
        with watching(linears(exact), drop):
            want = outputs_of_layers(exact, inputs)
        del exact
        one, three = (
            kind.initialize(kind.__name__, "cuda").operator(True)
            for kind in (kernels.SparseGEMV, kernels.SparseQKVGEMV)
        )
        of_layers = zip(*(thresholds[index::5] for index in range(5)), strict=True)
        for layer, (qkv, o, gate, up, down) in zip(self.model.layers, of_layers, strict=True):
            attention, mlp = layer.attention, layer.feed_forward
            attention.gemv1, attention.gemv2, mlp.gemv1, mlp.gemv2 = three, one, one, one
            attention.thresh_q = attention.thresh_k = attention.thresh_v = qkv
            attention.thresh_o, mlp.thresh_gate, mlp.thresh_up, mlp.thresh_down = o, gate, up, down
            attention.sparsity_bin = mlp.sparsity_bin = round(100 * level)  # what kernels are tuned for, once each
            attention.apply_monkeypatch()
            mlp.apply_monkeypatch()
        for linear in linears(self.model):
            linear.weight.data = with_room(linear.weight.data.T).T
        got = outputs_of_layers(self.model, inputs)
        self.errors = {
            side: statistics.mean(map(relative_error, outputs, want))
            for side, outputs in (("kernels", got), ("reference", reference))
        }
        check("a block of the published decode loop", level, self.errors["kernels"], CLOSE * self.errors["reference"])


@torch.no_grad()
def outputs_of_layers(model: Any, inputs: Sequence[Any]) -> list[Tensor]:
    """What gpt-fast's blocks add to their inputs, each by itself, in the model's dtype."""
    dtype = model.output.weight.dtype
    return [layer(x.to(dtype), *rest) - x.to(dtype) for layer, (x, *rest) in zip(model.layers, inputs, strict=True)]


@contextmanager
def watching(modules: Sequence[Any], watch: Callable[..., Tensor | None]) -> Iterator[None]:
    """`watch` gets the index of each module that runs and its inputs, the first of which it may replace."""
    hooks = [
        module.register_forward_pre_hook(lambda _, given, index=index: watch(index, *given))
        for index, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linears(model: Any) -> list[Any]:
    """The projections of gpt-fast's blocks: of each q, k and v in one, o, gate, up and down."""
    return [
        linear
        for layer in model.layers
        for linear in (
            layer.attention.wqkv, layer.attention.wo,
            layer.feed_forward.w1, layer.feed_forward.w3, layer.feed_forward.w2,
        )
    ]  # fmt: skip


@contextmanager
def _math_attention() -> Iterator[None]:
    """gpt-fast leaves attention to the compiler."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


if __name__ == "__main__":
    main()
