"""CudaDecodeStep, with both kernels, against the reference step on tiny models of every family."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from emulation import EmulatedDevice, needs_compiler
from helpers import tiny_config, tiny_model
from torch import Tensor

from teal.engine.config import EngineConfig
from teal.engine.cuda_step import CudaDecodeStep
from teal.engine.decode_step import TokenPosition, reference_decode_step
from teal.engine.model import DecoderModel
from teal.ops import cuda_attention
from teal.ops.cuda_weight import CudaWeight

pytestmark = needs_compiler
HALF, BRAIN = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 4e-3, BRAIN: 3e-2}  # of the largest output of a whole model
PROMPT = 5
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_size": 48, "head_dim": 16, "vocab_size": 264},
    ),
    "mistral-window": ("mistral", {"sliding_window": 4, "head_dim": 16}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4, "head_dim": 16}),
    "qwen3-one-key-head": ("qwen3", {"num_key_value_heads": 1, "head_dim": 16}),
}


def engine_of(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> DecoderModel:
    monkeypatch.setenv("TEAL_LAYOUT", "channel_major")
    family, changes = MODELS[name]
    changes = {"num_hidden_layers": 2, "max_position_embeddings": 512, **changes}
    weights = {
        name.removeprefix("model."): tensor.to(dtype)
        for name, tensor in tiny_model(family, **changes).state_dict().items()
    }
    for name, tensor in weights.items():
        if "norm" in name or name.endswith("bias"):
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.25)
    config = EngineConfig.of(tiny_config(family, **changes))
    return DecoderModel(config, lambda name, shape: weights[name], 512)


class Both:
    """The two steps side by side, each with its own cache."""

    def __init__(self, engine: DecoderModel) -> None:
        self.engine, self.step = engine, CudaDecodeStep(engine.config, engine.dtype, torch.device("cpu"))
        self.caches = [engine.new_cache(), engine.new_cache()]
        prompt = torch.randint(256, (1, PROMPT))
        for cache in self.caches:
            engine.prefill(prompt, cache)
        self.view = self.caches[1].up_to(32)

    def token(self, position: int, before: Callable[[], None] = lambda: None) -> None:
        """One random token through both, `before` in between, and compare hidden states and caches."""
        engine, at = self.engine, torch.tensor([position])
        hidden = torch.randn(1, engine.config.hidden_size).to(engine.dtype)
        where = TokenPosition(at, engine.cos[at], engine.sin[at])
        with torch.inference_mode():
            want = reference_decode_step(engine.blocks, hidden, self.caches[0], where)
            before()
            got = self.step(engine.blocks, hidden, self.view, where)
        self.check(got, want)
        for own, reference in zip(self.caches[1].blocks, self.caches[0].blocks, strict=True):
            for kept, expected in zip(own, reference, strict=True):
                self.check(kept[:, :, position], expected[:, :, position])
                assert not kept[:, :, position + 1 :].any()

    def check(self, got: Tensor, want: Tensor) -> None:
        assert (got.float() - want.float()).abs().max() <= TOLERANCE[want.dtype] * want.float().abs().max()


@pytest.fixture(autouse=True)
def _device(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "UNDIVIDED", 6)
    monkeypatch.setattr(cuda_attention, "POSITIONS_PER_SHARE", 2)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_dense(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(engine_of(name, dtype, monkeypatch))
    for position in range(PROMPT, PROMPT + 3):
        both.token(position)


@pytest.mark.parametrize(
    ("dtype", "head"), [(HALF, 0.0), (BRAIN, 0.0), (HALF, 0.5), (BRAIN, 0.9), (HALF, 0.001)], ids=str
)
def test_logits(dtype: torch.dtype, head: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaWeight, "layout", "channel_major")
    both = Both(engine_of("llama-biases", dtype, monkeypatch))
    engine = both.engine
    engine.lm_head.set_sparsity(head)
    for position in range(PROMPT, PROMPT + 3):
        token, at = torch.tensor([17 * position]), torch.tensor([position])
        with torch.inference_mode():
            want = engine.decode(token, at, both.caches[0])
            got = both.step.logits(engine, token, at, both.view)
        assert got is not None
        assert got.shape == want.shape
        both.check(got, want)


@pytest.mark.parametrize("head", [0.0, 0.5])
def test_a_hidden_state_that_is_not_finite_shows_in_the_logits(head: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaWeight, "layout", "channel_major")
    both = Both(engine_of("llama-biases", HALF, monkeypatch))
    both.engine.lm_head.set_sparsity(head)
    both.engine.embed_tokens.weight.data[7, 3] = float("nan")
    token, at = torch.tensor([7]), torch.tensor([PROMPT])
    with torch.inference_mode():
        assert both.engine.decode(token, at, both.caches[0]).isnan().all()
        logits = both.step.logits(both.engine, token, at, both.view)
    assert logits is not None
    assert logits.isnan().all()


def test_other_steps_give_the_logits_of_several_sequences_and_of_watched_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = Both(engine_of("llama-biases", HALF, monkeypatch))
    engine, one, two = both.engine, torch.tensor([1]), torch.tensor([1, 2])
    assert both.step.logits(engine, two, two, engine.new_cache(2)) is None
    assert both.step.logits(engine, one.int(), one, both.view) is None
    engine.blocks[0].mlp.up_proj.observer = lambda x: None
    assert both.step.logits(engine, one, one, both.view) is None


def test_without_clusters(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    device.install(monkeypatch, clusters=False)
    both = Both(engine_of("llama-biases", HALF, monkeypatch))
    both.token(PROMPT)
    both.token(PROMPT + 1)


def threshold_between(x: Tensor, sparsity: float) -> float:
    """In the widest gap of the |x| around a quantile: the two steps round differently and still keep the same."""
    magnitudes = x.abs().float().flatten().sort().values
    at = int(sparsity * len(magnitudes))
    some = magnitudes[at - 4 : at + 5]
    widest = int(some.diff().argmax())
    return float(some[widest] + some[widest + 1]) / 2


@pytest.mark.parametrize("name", MODELS)
def test_sparse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token has thresholds of its own, set in place, some per channel, some with a compensation."""
    engine = engine_of(name, HALF, monkeypatch)
    both = Both(engine)
    layers = [layer for block in engine.blocks for layer in block.projections]

    def observe(index: int) -> Callable[[Tensor], None]:
        layer = layers[index]
        compensation = torch.randn(layer.out_features).to(HALF) if index % 3 == 0 else None

        def observer(x: Tensor) -> None:
            threshold: float | Tensor = threshold_between(x, 0.5)
            if index % 2:
                threshold = torch.full((layer.in_features,), threshold)
                threshold[::7], threshold[1::7] = -1.0, float("inf")
            layer.set_threshold(threshold, compensation)

        return observer

    def stop() -> None:
        for layer in layers:
            layer.observer = None

    for position in range(PROMPT, PROMPT + 3):
        for index, layer in enumerate(layers):
            layer.observer = observe(index)
        both.token(position, stop)


def test_launches_are_kept_while_thresholds_change_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("qwen2", HALF, monkeypatch)
    both = Both(engine)
    both.token(PROMPT)
    layer = engine.blocks[0].mlp.down_proj
    revision = both.step.refresh(engine.blocks, both.view)
    layer.set_threshold(0.0)
    assert both.step.refresh(engine.blocks, both.view) == revision
    layer.set_threshold(torch.zeros(layer.in_features))
    assert both.step.refresh(engine.blocks, both.view) == revision + 1
    assert both.step.refresh(engine.blocks, both.view) == revision + 1  # for whoever else captured the old ones
    layer.always_dense = True
    both.token(PROMPT + 1)


def test_several_sequences_take_the_reference_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("qwen3-one-key-head", HALF, monkeypatch)
    step = CudaDecodeStep(engine.config, HALF, torch.device("cpu"))
    caches, at = [engine.new_cache(2), engine.new_cache(2)], torch.tensor([0, 0])
    hidden = torch.randn(2, engine.config.hidden_size).to(HALF)
    where = TokenPosition(at, engine.cos[at], engine.sin[at])
    got = step(engine.blocks, hidden, caches[0], where)
    assert torch.equal(got, reference_decode_step(engine.blocks, hidden, caches[1], where))


def test_each_projection_fetches_what_the_next_one_reads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("llama-biases", HALF, monkeypatch)
    both = Both(engine)
    both.step.refresh(engine.blocks, both.view)
    launches: list[Any] = [launch for index, launch in enumerate(both.step._launches) if index % 5 != 1]  # no attention
    for launch, following in pairwise(launches):
        arguments, wanted = launch.arguments, following.arguments
        fetched = {
            address: size for address, size in zip(arguments.next, arguments.next_bytes, strict=True) if size > 0
        }
        thresholds = {wanted.projections[index].threshold: 4 for index in range(wanted.count)}
        norm = {} if wanted.norm is None else {wanted.norm: 2 * engine.config.hidden_size}
        assert fetched == thresholds | norm
    assert not any(launches[-1].arguments.next_bytes)
