"""bench: decode speed dense and at each level, interleaved, with the bytes behind it and a correctness check."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal.artifacts import check_header, check_keys
from teal.engine.generate import DecodeState, decode_tokens
from teal.engine.model import DecoderModel
from teal.errors import TealError, UsageError
from teal.linear import always_dense, observing, sparse_layers
from teal.ops import native, reference
from teal.ops.reference import KEEP_ALL
from teal.ops.sparse_gemv import sparse_gemv
from teal.plan import ProjectionPlan, SparsityPlan
from teal.progress import track
from teal.sparse_model import set_sparsity, sparsify
from teal.sparsity_meter import SparsityMeter
from teal.structure import ModelStructure, identify

FORMAT = "teal.benchmark"
VERSION = 1
READ_BYTES = 1 << 28  # several times any last-level cache
COPIES = 8  # on a GPU, so that their start does not count
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest output


@dataclass(frozen=True)
class LevelSpeed:
    """Decode at one level: medians over the repeats, and the spread from the slowest to the fastest.

    `sparsity` is realised on the decoded tokens; `bytes_needed` per token counts the weights of kept channels,
    LM head, norms and the KV cache, `bytes_read` what the weight layout really reads;
    `bandwidth_share` is bytes_read per second over the bandwidth measured in the same run.
    """

    level: float
    sparsity: float
    tokens_per_second: float
    slowest: float
    fastest: float
    speedup: float
    speedup_slowest: float
    speedup_fastest: float
    bytes_needed: int
    bytes_read: int
    bandwidth_share: float


@dataclass(frozen=True)
class Benchmark:
    """`speeds` by level, dense first. `bandwidth` in bytes per second is the median of a read, on a GPU of a copy."""

    speeds: list[LevelSpeed]
    bandwidth: float
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return speeds_to_json(FORMAT, VERSION, self.speeds, self.bandwidth, self.details)

    @classmethod
    def from_json(cls, payload: dict[str, Any], where: object) -> "Benchmark":
        """Read what `to_json` gave. Raises TealError naming `where` for anything that does not belong."""
        return cls(*speeds_from_json(FORMAT, VERSION, LevelSpeed, payload, where))


def speeds_to_json(
    format_name: str, version: int, speeds: Sequence[Any], bandwidth: float, details: dict[str, Any]
) -> dict[str, Any]:
    """A result file's content: `speeds` are dataclasses, `bandwidth` is in bytes per second."""
    return {
        "format": format_name, "version": version, "bandwidth": bandwidth, "details": details,
        "speeds": [vars(speed) for speed in speeds],
    }  # fmt: skip


def speeds_from_json(
    format_name: str, version: int, kind: Callable[..., Any], payload: dict[str, Any], where: object
) -> tuple[list[Any], float, dict[str, Any]]:
    """Speeds of this `kind`, bandwidth and details of what `speeds_to_json` gave."""
    check_header(payload, format_name, version, where)
    keys = ("format", "version", "bandwidth", "details", "speeds")
    check_keys(payload, keys, where, keys)
    try:
        return [kind(**speed) for speed in payload["speeds"]], payload["bandwidth"], payload["details"]
    except TypeError as error:
        raise TealError(f"{where} is damaged ({error}); measure again") from error


def benchmark(
    engine: DecoderModel,
    plan: SparsityPlan,
    levels: Sequence[float],
    prompt_ids: Sequence[int],
    *,
    name: str = "",
    new_tokens: int = 32,
    repeats: int = 5,
    strict: bool = False,
    show_progress: bool = False,
) -> Benchmark:
    """Time greedy decoding of `new_tokens` after the prompt, dense and at each level in turn, `repeats` times.

    Prefill is not timed. Every level first decodes once untimed, which warms up and counts the sparsity that
    is realised. `name` is what to call the model in the result. Raises TealError if a sparse product differs
    from the reference, or for a plan that does not fit.
    """
    if new_tokens < 2 or repeats < 1:
        raise UsageError(
            f"2 new tokens (prefill gives the first) and 1 repeat are the least, got {new_tokens} and {repeats}"
        )
    levels = list(dict.fromkeys([0.0, *levels]))
    sparsify(engine, plan, 0.0, strict=strict)
    context = len(prompt_ids) + new_tokens
    state = DecodeState.of(engine, context=context)
    sparsity, checked = {}, 0.0
    for level in levels:
        set_sparsity(engine, level)
        checked = max(checked, check_products(engine))
        meter = SparsityMeter(engine)
        with meter.measuring():
            _decode_seconds(engine, state, prompt_ids, new_tokens)
        sparsity[level] = meter.sparsity()
    seconds: dict[float, list[float]] = {level: [] for level in levels}
    bandwidths, buffer = [], native.new_tensor((READ_BYTES // 4,), torch.float32).fill_(1).to(engine.device)
    read_bandwidth(buffer)  # warms up
    for _ in track(range(repeats), "decoding", repeats, show_progress):
        bandwidths.append(read_bandwidth(buffer))
        for level in levels:
            set_sparsity(engine, level)
            with always_dense(engine) if level == 0 else nullcontext():
                seconds[level].append(_decode_seconds(engine, state, prompt_ids, new_tokens))
    bandwidth = statistics.median(bandwidths)
    mean_position = len(prompt_ids) + new_tokens // 2
    speeds = [
        _speed(engine, level, sparsity[level], seconds[level], seconds[0.0], new_tokens, bandwidth, mean_position)
        for level in levels
    ]
    details = {
        "model": name, "plan": plan.method,
        "prompt_tokens": len(prompt_ids), "new_tokens": new_tokens, "repeats": repeats,
        "dtype": str(engine.dtype).removeprefix("torch."), "device": str(engine.device),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "layout": next(iter(sparse_layers(engine).values())).packed.layout,
        "weights": engine.config.quantization or "as loaded",
        "head": engine.config.head_quantization or "as loaded", "head_sparsity": engine.lm_head.sparsity,
        "largest_relative_error": checked, "tolerance": TOLERANCE[engine.dtype],
        "rule": "every decoded token is sparse, prefill is dense and not timed, the dense row runs the layout's dense "
        f"product; LM head in every row: {_head(engine)}",
    }  # fmt: skip
    return Benchmark(speeds, bandwidth, details)


def _head(engine: DecoderModel) -> str:
    share = engine.lm_head.sparsity
    return f"{share:g} of its inputs dropped" if share else "dense"


def plan_of_activations(engine: DecoderModel, prompt_ids: Sequence[int], tokens: int = 16) -> SparsityPlan:
    """A uniform plan from the engine's own activations on `tokens` random tokens decoded after a prompt.

    For weights that are random: speed needs thresholds that realise their level, and no text.
    """
    layers = sparse_layers(engine)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    cache = engine.new_cache()
    first = max(1, min(len(prompt_ids), engine.context - tokens))
    tokens = min(tokens, engine.context - first)
    with observing(layers, lambda name, x: seen[name].append(x.abs().float().flatten())):
        engine.prefill(torch.tensor([prompt_ids[:first]], device=engine.device), cache)
        generator = torch.Generator().manual_seed(1)
        for position in range(first, first + tokens):
            token = torch.randint(engine.config.vocab_size, (1,), generator=generator).to(engine.device)
            engine.decode(token, torch.full_like(token, position), cache)
    levels = tuple(step / 20 for step in range(19))
    structure = ModelStructure.of(engine)
    blocks: list[dict[str, ProjectionPlan]] = [{} for _ in structure.blocks]
    for index, projection in structure.projections():
        values = torch.cat(seen[structure.module_name(index, projection)]).sort().values
        thresholds = (KEEP_ALL, *(float(values[int(level * len(values)) - 1]) for level in levels[1:]))
        blocks[index][projection.name] = ProjectionPlan(levels, thresholds)
    return SparsityPlan(identify(engine, structure), "uniform", levels, tuple(blocks))


def check_products(engine: DecoderModel) -> float:
    """Compare the sparse product of every projection of the first and the last block with the reference.

    Returns the largest error relative to the largest output. Raises TealError beyond the dtype's rounding.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for block in {0, len(engine.blocks) - 1}:
        for name, layer in sparse_layers(engine.blocks[block]).items():
            x = torch.randn(1, layer.in_features, generator=generator).to(engine.device, engine.dtype)
            got = sparse_gemv(x, layer.packed, layer.threshold, layer.bias).float()
            want = reference.sparse_gemv(x.float(), layer.weight.float(), layer.threshold, layer.bias)
            error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
            if not error <= TOLERANCE[engine.dtype]:
                raise TealError(f"block {block} {name} differs from the reference by {error:.2g} of its largest output")
            worst = max(worst, error)
    return worst


def read_bandwidth(buffer: Tensor) -> float:
    """Bytes per second of a plain read of `buffer` by all threads; on a GPU of a copy of one half to the other."""
    size = buffer.numel() * buffer.element_size()
    if buffer.device.type == "cuda":
        half = buffer.numel() // 2
        one, other = buffer[:half], buffer[half : 2 * half]
        with torch.accelerator.device_index(buffer.device.index):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(COPIES):
                other.copy_(one)
            end.record()
            end.synchronize()
        return COPIES * size / (1e-3 * start.elapsed_time(end))
    started = time.perf_counter()
    if (library := native.library()) is not None:
        library.teal_read(buffer.data_ptr(), size)
    else:
        buffer.sum()
    return size / (time.perf_counter() - started)


def _decode_seconds(engine: DecoderModel, state: DecodeState, prompt_ids: Sequence[int], new_tokens: int) -> float:
    """Seconds from the first new token, which prefill gives, to the last.

    Nothing is waited for in between: on a GPU the second token's step is launched before the first token is read, and
    starts when that is there.
    """
    tokens = decode_tokens(engine, prompt_ids, new_tokens, ignore_eos=True, state=state)
    next(tokens)
    started = time.perf_counter()
    for _ in tokens:
        pass
    _synchronize(engine.device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(
    engine: DecoderModel,
    level: float,
    sparsity: float,
    seconds: list[float],
    dense_seconds: list[float],
    new_tokens: int,
    bandwidth: float,
    mean_position: int,
) -> LevelSpeed:
    steps = new_tokens - 1
    needed, read = bytes_per_token(engine, sparsity, mean_position)
    ratios = [dense / sparse for dense, sparse in zip(dense_seconds, seconds, strict=True)]
    median = statistics.median(seconds)
    return LevelSpeed(
        level=level,
        sparsity=sparsity,
        tokens_per_second=steps / median,
        slowest=steps / max(seconds),
        fastest=steps / min(seconds),
        speedup=statistics.median(ratios),
        speedup_slowest=min(ratios),
        speedup_fastest=max(ratios),
        bytes_needed=needed,
        bytes_read=read,
        bandwidth_share=read * steps / median / bandwidth,
    )


def bytes_per_token(engine: DecoderModel, sparsity: float, mean_position: int) -> tuple[int, int]:
    """Bytes that one decoded token makes necessary, and bytes that the weight layout reads."""
    weights = [layer.packed for layer in sparse_layers(engine).values()]
    head = engine.lm_head.packed.bytes_read(1 - engine.lm_head.sparsity)
    skipping = all(weight.skips_channels for weight in weights)
    element = engine.embed_tokens.weight.element_size()
    norms = sum(p.numel() * element for name, p in engine.named_parameters() if "norm" in name)
    cache = 2 * len(engine.blocks) * engine.config.kv_heads * engine.config.head_dim * mean_position * element
    fixed = head + norms + cache
    needed = round(sum(weight.bytes_read(1 - sparsity) for weight in weights) + fixed)
    return needed, needed if skipping else round(sum(weight.bytes_read() for weight in weights) + fixed)
