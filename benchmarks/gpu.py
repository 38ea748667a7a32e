"""Measure the GPU kernels and the decode step beside their peers, in one run, interleaved, checked.

    python benchmarks/gpu.py bandwidth kernels
    python benchmarks/gpu.py kernels --published CHECKOUT_OF_FasterDecoding/TEAL
    python benchmarks/gpu.py llama-2-7b --gpt-fast CHECKOUT_OF_gpt-fast --json llama-2-7b.json
    python benchmarks/gpu.py llama-3-8b --gpt-fast CHECKOUT_OF_gpt-fast

Parts run in the order given; each takes a few minutes, and ratios are always of one part. Weights are random, in
real shapes; thresholds are quantiles of the inputs that the random weights give, so sparsity and speed are real and
the text is not. Kernels are timed in replayed graphs over copies of the weights that exceed the L2 cache many times;
a model decodes whole tokens (embedding to choice of the next token), all of them sparse, greedily.
Times are medians with the lowest and highest; a row fails if its result differs from the reference.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.artifacts import write_json
from teal.engine.config import EngineConfig
from teal.engine.cuda_step import CudaDecodeStep
from teal.engine.generate import DecodeState, decode_one_token
from teal.engine.model import DecoderModel
from teal.engine.sampling import Sampler, SamplingConfig
from teal.linear import sparse_layers
from teal.ops import nvrtc, reference
from teal.ops.cuda_projection import Operands, Projection
from teal.shapes import shape_config
from teal.sparsity_meter import SparsityMeter

KERNELS = {  # outputs N x inputs K
    "Llama-2-7B gate, up": (11008, 4096),
    "Llama-2-7B down": (4096, 11008),
    "Llama-3-8B q, k, v": (6144, 4096),
    "Llama-3-8B o": (4096, 4096),
    "Llama-3-8B gate, up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-70B gate, up": (28672, 8192),
    "Llama-3-70B down": (8192, 28672),
}
LEVELS = (0.0, 0.25, 0.4, 0.5, 0.65)
MODELS = {
    "llama-2-7b": {"dtype": torch.float16, "contexts": (128, 2048, 4032), "gpt-fast": "7B"},
    "llama-3-8b": {"dtype": torch.bfloat16, "contexts": (128, 2048, 8128), "gpt-fast": "llama-3-8b"},
}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative error of a product
COPIES_BYTES = 1.2e9
STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["bandwidth", "kernels", *MODELS])
    parser.add_argument("--published", type=Path, metavar="DIR", help="checkout of the published implementation")
    parser.add_argument("--gpt-fast", type=Path, metavar="DIR", help="checkout of gpt-fast")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of a model (default: 5)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    arguments = parser.parse_args()
    if reason := nvrtc.unavailable():
        sys.exit(f"gpu.py: the CUDA kernels cannot run here: {reason}")
    device = torch.cuda.get_device_properties(0)
    results: dict[str, Any] = {"GPU": device.name, "torch": torch.__version__, "CUDA": torch.version.cuda}
    print(", ".join(f"{name} {value}" for name, value in results.items()))
    bandwidth = copy_bandwidth()
    results["bandwidth"] = bandwidth
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s, bytes read and bytes written counted")
    for part in arguments.parts:
        torch.manual_seed(0)
        if part == "kernels":
            results[part] = measure_kernels(bandwidth, arguments.published)
        elif part != "bandwidth":
            results[part] = measure_model(part, bandwidth, arguments.gpt_fast, arguments.rounds)
    if arguments.json:
        write_json(arguments.json, results)


def copy_bandwidth(size: int = 2 << 30) -> float:
    """Bytes per second of a device-to-device copy, counting bytes read and bytes written."""
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / (statistics.median(elapsed(lambda: target.copy_(source)) for _ in range(10)) * 1e-6)


def times(calls: Sequence[Callable[[], object]], repeats: int = 20) -> list[float]:
    """Microseconds per call of all `calls` captured in one graph, of each replay."""
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
    for _ in range(3):
        graph.replay()
    return [elapsed(graph.replay) / len(calls) for _ in range(repeats)]


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


# ---- kernels ------------------------------------------------------------------------------------------------------


def measure_kernels(bandwidth: float, published: Path | None) -> dict[str, Any]:
    """Each shape: cuBLAS, ours at every level, and the published kernel, bfloat16 (the published one in float16)."""
    kernel = published_kernel(published) if published else None
    table: dict[str, Any] = {}
    print(f"\n{'N x K':<40}{'level':>6}{'cuBLAS us':>22}{'ours us':>22}{'speed-up':>9}{'of floor':>9}{'error':>9}")
    for name, (n, k) in KERNELS.items():
        copies = max(2, int(COPIES_BYTES // (2 * n * k)) + 1)
        weights = [torch.randn(k, n, device="cuda", dtype=torch.bfloat16).mul_(0.02) for _ in range(copies)]
        x, y = torch.randn(k, device="cuda", dtype=torch.bfloat16), torch.empty(n, device="cuda", dtype=torch.bfloat16)
        rows = [weight.t().contiguous() for weight in weights]
        cublas = times([lambda x=x, w=w: F.linear(x[None], w) for w in rows])
        del rows
        projection = Projection(k, (n,), torch.bfloat16)
        table[name] = {"N": n, "K": k, "cuBLAS": cublas, "ours": {}, "published": {}}
        for level in LEVELS:
            threshold = x.float().abs().quantile(level) if level else torch.tensor(-1.0, device="cuda")
            launches = [projection.prepared(x, [Operands(w, threshold, y)], dependent=True) for w in weights]
            ours = times([lambda one=one: one.start(torch.cuda.current_stream().cuda_stream) for one in launches])
            error = relative_error(y, reference.sparse_gemv(x[None].float(), weights[-1].t().float(), threshold, None))
            kept = float((x.float().abs() > threshold).float().mean())
            table[name]["ours"][level] = {"us": ours, "error": error, "sparsity": 1 - kept}
            check(name, level, error, torch.bfloat16)
            floor = kept * 2 * n * k / bandwidth * 1e6
            print(
                f"{name + f' {n} x {k}':<40}{level:>6}{spread(cublas):>22}{spread(ours):>22}"
                f"{statistics.median(cublas) / statistics.median(ours):>8.2f}x"
                f"{floor / statistics.median(ours):>9.0%}{error:>9.1e}",
                flush=True,
            )
        if kernel:
            table[name]["published"] = measure_published(kernel, [w.half().t() for w in weights], x.half(), name)
    return table


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.flatten().double() - want.flatten().double()).norm() / want.double().norm())


def check(name: str, level: float, error: float, dtype: torch.dtype) -> None:
    if not error <= TOLERANCE[dtype]:
        sys.exit(f"gpu.py: {name} at {level}: the result differs from the reference by {error:.2g}")


def published_kernel(checkout: Path) -> Any:
    """`splitk_sparse_gemv` of FasterDecoding/TEAL."""
    import types

    if "msgspec" not in sys.modules:  # its only use there is a base class
        import dataclasses

        class Struct:
            def __init_subclass__(cls, **_: Any) -> None:
                dataclasses.dataclass(cls)

        sys.modules["msgspec"] = types.SimpleNamespace(Struct=Struct)  # pyright: ignore[reportArgumentType]
    sys.path[:0] = [str(checkout), str(checkout / "kernels")]
    from kernels.sparse_gemv import splitk_sparse_gemv  # pyright: ignore[reportMissingImports]

    return splitk_sparse_gemv


def measure_published(kernel: Any, weights: list[Tensor], x: Tensor, name: str) -> dict[float, Any]:
    """Levels that the published kernel has a configuration for; microseconds and error."""
    results: dict[float, Any] = {}
    for level in LEVELS:
        threshold = float(x.float().abs().quantile(level)) if level else -1.0
        bin_ = int(100 * level)
        got = kernel(x[None, None], weights[0], threshold, bin_)
        want = reference.sparse_gemv(x[None].float(), weights[0].float(), torch.tensor(threshold, device="cuda"), None)
        us = times([lambda w=w, t=threshold, b=bin_: kernel(x[None, None], w, t, b) for w in weights])
        results[level] = {"us": us, "error": relative_error(got, want)}
        print(f"{name + ' published kernel, fp16':<40}{level:>6}{'':>22}{spread(us):>22}", flush=True)
    return results


# ---- whole models -------------------------------------------------------------------------------------------------


def measure_model(name: str, bandwidth: float, gpt_fast: Path | None, rounds: int) -> dict[str, Any]:
    """Tokens per second at each context: ours dense and at each level, and gpt-fast dense, in turn."""
    dtype, contexts = MODELS[name]["dtype"], MODELS[name]["contexts"]
    engine = random_engine(name, dtype, max(contexts) + STEPS)
    if not isinstance(engine.decode_step, CudaDecodeStep):
        sys.exit(f"gpu.py: {name} does not run on the CUDA decode step")
    state = DecodeState.of(engine)
    sampler = Sampler(SamplingConfig(), torch.zeros((1, 1), dtype=torch.int64, device="cuda"), engine.config.vocab_size)
    error = check_step(engine)
    print(f"\n{name}, {str(dtype).removeprefix('torch.')}: one step differs from the reference by {error:.1e} (dense)")

    def ours(thresholds: list[float], context: int) -> Callable[[], float]:
        def run() -> float:
            set_thresholds(engine, thresholds)
            state.position.fill_(context)
            decode_one_token(engine, state, sampler, state.cache)  # captures, if it must
            state.position.fill_(context)
            us = elapsed(lambda: [decode_one_token(engine, state, sampler, state.cache) for _ in range(STEPS)])
            return STEPS / us * 1e6

        return run

    # Its attention reads the whole cache, so it gets one that just suffices, and is compared at the first context.
    peer = GptFast(gpt_fast, MODELS[name]["gpt-fast"], dtype, contexts[0] + STEPS) if gpt_fast else None
    result: dict[str, Any] = {"dtype": str(dtype), "error": error, "contexts": {}}
    for context in contexts:
        thresholds = quantiles(engine, state, context)
        runs: dict[str, Callable[[], float]] = {
            f"ours {level:.0%}": ours(thresholds[level], context) for level in LEVELS
        }
        if peer and context == contexts[0]:
            runs["gpt-fast dense"] = lambda context=context: peer.tokens_per_second(context)
        speeds: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(rounds):
            for label, run in runs.items():
                speeds[label].append(run())
        result["contexts"][context] = speeds
        realised = {level: realised_sparsity(engine, state, thresholds[level], context) for level in LEVELS}
        result.setdefault("sparsity", {})[context] = realised
        report(engine, context, speeds, realised, bandwidth)
    return result


def report(
    engine: DecoderModel, context: int, speeds: dict[str, list[float]], realised: dict[float, float], bandwidth: float
) -> None:
    print(f"context {context}: {'tokens/s':>40}{'of gpt-fast':>13}{'of our dense':>13}{'of floor':>10}")
    dense = statistics.median(speeds["ours 0%"])
    peer = statistics.median(speeds.get("gpt-fast dense", [float("nan")]))
    blocks = sum(layer.packed.channel_bytes * layer.in_features for layer in sparse_layers(engine).values())
    config, element = engine.config, 2
    cache = 2 * config.blocks * config.kv_heads * config.head_dim * context
    rest = element * (config.vocab_size * config.hidden_size + cache)
    for label, values in speeds.items():
        level = float(label.split()[1].rstrip("%")) / 100 if label.startswith("ours") else 0.0
        median, floor = statistics.median(values), bandwidth / (blocks * (1 - realised[level]) + rest)
        title = f"  {label} (realised {realised[level]:.1%})" if label.startswith("ours") else f"  {label}"
        print(
            f"{title:<32}{spread(values):>25}{median / peer:>12.2f}x{median / dense:>12.2f}x{median / floor:>10.0%}",
            flush=True,
        )


def random_engine(name: str, dtype: torch.dtype, context: int) -> DecoderModel:
    """The engine on random weights of standard deviation 0.02, made on the GPU."""
    config = EngineConfig.of(shape_config(name))

    def take(tensor: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in tensor:
            return torch.ones(shape, device="cuda", dtype=dtype)
        return torch.randn(shape, device="cuda", dtype=dtype).mul_(0.02)

    return DecoderModel(config, take, context).eval()


@torch.inference_mode()
def quantiles(engine: DecoderModel, state: DecodeState, context: int, tokens: int = 8) -> dict[float, list[float]]:
    """For each level a threshold per projection: the quantile of |x| on a few tokens decoded at `context`."""
    layers = list(sparse_layers(engine).values())
    seen: list[list[Tensor]] = [[] for _ in layers]
    for layer, inputs in zip(layers, seen, strict=True):
        layer.observer = lambda x, inputs=inputs: inputs.append(x.float().abs().flatten())
    for index in range(tokens):
        decode_at(engine, state, token=97 * index + 5, position=context + index)
    for layer in layers:
        layer.observer = None
    flat = [torch.cat(inputs) for inputs in seen]
    return {level: [float(x.quantile(level)) if level else -1.0 for x in flat] for level in LEVELS}


@torch.inference_mode()
def decode_at(engine: DecoderModel, state: DecodeState, token: int, position: int) -> Tensor:
    at = torch.tensor([position], device="cuda")
    return engine.decode(torch.tensor([token], device="cuda"), at, state.cache)


def set_thresholds(engine: DecoderModel, thresholds: list[float]) -> None:
    for layer, threshold in zip(sparse_layers(engine).values(), thresholds, strict=True):
        layer.set_threshold(threshold)


def realised_sparsity(engine: DecoderModel, state: DecodeState, thresholds: list[float], context: int) -> float:
    set_thresholds(engine, thresholds)
    meter = SparsityMeter(engine)
    with meter.measuring():
        for index in range(4):
            decode_at(engine, state, token=101 * index + 11, position=context + index)
    return meter.sparsity()


@torch.inference_mode()
def check_step(engine: DecoderModel) -> float:
    """The CUDA step against the reference's, dense, on the first blocks; exits if they differ."""
    from teal.engine.cache import KVCache
    from teal.engine.decode_step import TokenPosition, reference_decode_step

    set_thresholds(engine, [-1.0] * len(sparse_layers(engine)))
    blocks = engine.blocks[:2]
    caches = [KVCache(engine.new_cache(1, 512).blocks[:2], 512) for _ in range(2)]
    for ours, theirs in zip(*(cache.blocks for cache in caches), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine.normal_())
    worst = 0.0
    for position in (0, 1, 127, 500):
        at = torch.tensor([position], device="cuda")
        where = TokenPosition(at, engine.cos[at], engine.sin[at])
        hidden = torch.randn(1, engine.config.hidden_size, device="cuda", dtype=engine.dtype)
        got = engine.decode_step(blocks, hidden, caches[0], where)
        worst = max(worst, relative_error(got, reference_decode_step(blocks, hidden, caches[1], where)))
    check("one decode step", 0.0, worst, engine.dtype)
    return worst


class GptFast:
    """gpt-fast's model and decode loop, compiled as its generate.py does it, on random weights."""

    def __init__(self, checkout: Path, name: str, dtype: torch.dtype, context: int) -> None:
        import torch._inductor.config

        torch._inductor.config.coordinate_descent_tuning = True
        torch._inductor.config.triton.unique_kernel_names = True
        sys.path.insert(0, str(checkout))
        from model import ModelArgs, Transformer  # pyright: ignore[reportMissingImports]

        with torch.device("meta"):
            self.model: Any = Transformer(ModelArgs.from_name(name)).to(dtype)
        self.model = self.model.to_empty(device="cuda").eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
        with torch.device("cuda"):
            self.model.setup_caches(1, context)

        def decode_one(model: Any, token: Tensor, position: Tensor) -> Tensor:
            logits = model(token, position)
            return logits[:, -1].argmax(dim=-1, keepdim=True).to(torch.int)

        self._decode = torch.compile(decode_one, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def tokens_per_second(self, context: int) -> float:
        def steps(count: int) -> None:
            token = torch.tensor([[7]], device="cuda", dtype=torch.int)
            position = torch.tensor([context], device="cuda")
            for _ in range(count):
                with _math_attention():
                    token = self._decode(self.model, token, position).clone()
                position += 1

        steps(3)
        return STEPS / elapsed(lambda: steps(STEPS)) * 1e6


@contextmanager
def _math_attention() -> Iterator[None]:
    """gpt-fast leaves attention to the compiler."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


if __name__ == "__main__":
    main()
