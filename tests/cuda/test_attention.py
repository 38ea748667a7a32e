"""ops/cuda/attention.cu against attention in float64."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product

import pytest
import torch
from emulation import EmulatedDevice, needs_compiler
from torch import Tensor

from teal.engine.block import RMSNorm, rotate
from teal.ops.cuda_attention import THREADS, AttentionKernel, Heads, shared_bytes, threads_fitting

pytestmark = needs_compiler
HALF, BRAIN = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 2e-3, BRAIN: 1.6e-2}  # of the largest output
EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """A kernel: what it is compiled for."""

    heads: Heads
    threads: int
    shares: int
    dtype: torch.dtype = HALF


def heads(*sizes: int, dtype: torch.dtype = HALF, qk_norm: bool = False):
    """sizes: heads, kv_heads, head_dim, threads, shares"""
    name = [*map(str, sizes), str(dtype).removeprefix("torch."), *(["norm"] if qk_norm else [])]
    return pytest.param(Case(Heads(*sizes[:3], qk_norm), *sizes[3:], dtype), id="-".join(name))


HEADS = [
    heads(3, 3, 16, 64, 1),
    heads(4, 2, 16, 64, 3, qk_norm=True),
    heads(6, 2, 32, 96, 5, dtype=BRAIN),
    heads(8, 2, 64, 128, 2, qk_norm=True),
    heads(5, 1, 48, 192, 4, dtype=BRAIN),
    heads(6, 1, 16, 128, 3),
    heads(7, 1, 128, 256, 3),
    heads(16, 2, 256, 128, 2, dtype=BRAIN, qk_norm=True),
    heads(12, 1, 80, 512, 40),
    heads(9, 1, 240, 64, 3, qk_norm=True),
    heads(16, 1, 256, 384, 2),
]


@pytest.fixture(autouse=True)
def _device(device: EmulatedDevice) -> None: ...


def check(
    of: Case,
    position: int,
    window: int,
    per_share: int,
    monkeypatch: pytest.MonkeyPatch,
    size: float = 1.0,
    undivided: int = 0,
    orders: Sequence[int] = (0, 1, 2, 3),
) -> None:
    """One token at `position`; what it must not see is NaN."""
    kernel = AttentionKernel(of.heads, of.dtype, shares=of.shares, threads=of.threads)
    heads, kv_heads, dim, qk_norm = astuple(of.heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(of.dtype)

    group, capacity = heads // kv_heads, position + 5
    oldest = max(0, position + 1 - window) if window else 0
    q, k, v = size * normal(heads, dim), normal(kv_heads, dim), normal(kv_heads, dim)
    norms = [normal(dim) + 1, normal(dim) + 1]
    angles = torch.rand(dim // 2).repeat(2) * 6
    cosine, sine = angles.cos().to(of.dtype), angles.sin().to(of.dtype)
    before = [normal(kv_heads, capacity, dim) for _ in range(2)]
    for cache in before:
        cache[:, :oldest], cache[:, position:] = float("nan"), float("nan")

    if qk_norm:
        q_in, k_in = (RMSNorm(norm, EPS)(x) for norm, x in zip(norms, (q, k), strict=True))
    else:
        q_in, k_in = q, k
    query, key = (rotate(x.float(), cosine.float(), sine.float()).to(of.dtype) for x in (q_in, k_in))
    every_key, every_value = (cache[:, oldest : position + 1].double() for cache in before)
    every_key[:, -1], every_value[:, -1] = key, v
    scores = query.double().unflatten(0, (kv_heads, group)) @ every_key.transpose(1, 2) / dim**0.5
    want = (scores.softmax(-1) @ every_value).flatten(0, 1)

    first: list[Tensor] = []
    for order in orders:
        keys, values = (cache.clone() for cache in before)
        attended = torch.full((heads * dim + 32,), float("nan"), dtype=of.dtype)
        partial = torch.full((kernel.partial_floats + 8,), float("nan"))
        arrivals = torch.zeros(kv_heads, dtype=torch.int32)
        index, qkv = torch.tensor([position]), torch.cat((q.flatten(), k.flatten(), v.flatten()))
        kernel.prepared(
            qkv, (norms[0], norms[1]), (cosine, sine), index, (keys, values), attended[16:], (partial, arrivals),
            window=window, eps=EPS, undivided=undivided, positions_per_share=per_share,
        ).start(order)  # fmt: skip

        assert attended[:16].isnan().all()
        assert attended[-16:].isnan().all()
        assert partial[-8:].isnan().all()
        assert not arrivals.any()
        assert torch.equal(values[:, position], v)
        torch.testing.assert_close(keys[:, position], key, rtol=2 * torch.finfo(of.dtype).eps, atol=1e-3)
        for cache, old in zip((keys, values), before, strict=True):
            old = old.clone()
            old[:, position] = cache[:, position]
            assert torch.equal(cache.view(torch.int16), old.view(torch.int16))
        got = attended[16:-16].view(heads, dim)
        assert (got.double() - want).abs().max() <= TOLERANCE[of.dtype] * want.abs().max()
        first = first or [keys, got]
        assert torch.equal(first[1].view(torch.int16), got.view(torch.int16))


@pytest.mark.parametrize("of", HEADS)
class TestAttention:
    @pytest.mark.parametrize("per_share", [1, 8, 1000])
    @pytest.mark.parametrize("position", [0, 1, 5, 37, 130])
    def test_positions(self, of: Case, position: int, per_share: int, monkeypatch: pytest.MonkeyPatch) -> None:
        check(of, position, 0, per_share, monkeypatch)

    @pytest.mark.parametrize(("position", "window"), [(0, 1), (9, 1), (2, 4), (3, 4), (4, 4), (70, 33)])
    def test_windows(self, of: Case, position: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
        check(of, position, window, 7, monkeypatch)


@pytest.mark.parametrize("undivided", [129, 130, 131])
@pytest.mark.parametrize("of", HEADS[2:4])
def test_one_block_up_to_some_positions(of: Case, undivided: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(of, 129, 0, 40, monkeypatch, undivided=undivided)


@pytest.mark.parametrize("per_share", [100, 5000])
@pytest.mark.parametrize("of", [HEADS[1], HEADS[5]])
def test_several_tiles_of_positions(of: Case, per_share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(of, 2100, 0, per_share, monkeypatch)


def test_large_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    check(HEADS[1].values[0], 60, 0, 4, monkeypatch, size=100.0)  # pyright: ignore
    check(HEADS[2].values[0], 60, 0, 4, monkeypatch, size=100.0)  # pyright: ignore


@pytest.mark.parametrize("of", [HEADS[1], HEADS[5], HEADS[6]])
def test_many_orders_of_the_shares(of: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(of, 2, 0, 1, monkeypatch, orders=range(80))


@pytest.mark.parametrize("most", [99 << 10, 163 << 10, 227 << 10])
def test_every_layout_fits_into_shared_memory(most: int) -> None:
    for group, head_dim, shares in product(range(1, 17), range(16, 257, 16), (1, 16, 132)):
        of = Heads(group, 1, head_dim)
        threads = threads_fitting(of, shares, most)
        assert 32 < threads <= THREADS
        assert shared_bytes(of, shares, threads) <= most
        if most == 227 << 10:
            assert threads == THREADS
