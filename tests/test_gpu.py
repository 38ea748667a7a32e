"""What only a GPU can show; run with -m gpu. The kernels' source is tested on CPUs too, in tests/cuda."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import teal
from teal.checkpoint import EMBEDDED_MODEL
from teal.data import CALIBRATION_TEXT, token_blocks
from teal.engine import DecodeState, SamplingConfig, decode_tokens
from teal.engine.config import EngineConfig
from teal.engine.cuda_step import CudaDecodeStep
from teal.engine.model import DecoderModel
from teal.linear import sparse_layers
from teal.ops import cublaslt, cuda_greedy, nvrtc, reference
from teal.ops.cuda_weight import CudaWeight
from teal.ops.sparse_gemv import pack, sparse_gemv
from teal.sparse_model import set_sparsity, sparsify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(nvrtc.unavailable() is not None, reason=f"CUDA kernels: {nvrtc.unavailable()}"),
]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "k"), [(8, 8), (64, 4096), (4096, 64), (1000, 1104), (14336, 4096), (4096, 14336)])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.9, 1.0])
def test_the_kernel_equals_the_reference(n, k, sparsity, dtype):
    torch.manual_seed(n + k)
    weight, x, bias = normal(n, k, dtype=dtype), normal(1, k, dtype=dtype), normal(n, dtype=dtype)
    packed = pack(weight)
    assert isinstance(packed, CudaWeight)
    for threshold in (x.float().abs().quantile(sparsity), torch.rand(k, device="cuda") * 2 * sparsity):
        got = sparse_gemv(x, packed, threshold, bias)
        want = reference.sparse_gemv(x.float(), weight.float(), threshold, bias.float())
        assert (got.float() - want).norm() <= TOLERANCE[dtype] * want.norm()
        assert torch.equal(got, sparse_gemv(x, packed, threshold, bias))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "k"), [(96, 64), (1000, 1104), (14336, 4096), (4096, 14336), (11008, 4096)])
@pytest.mark.parametrize("rows", [0, 2, 5, 8, 9])
def test_several_rows_keep_their_own_masks(rows, n, k, dtype):
    weight, x, bias = normal(n, k, dtype=dtype), normal(rows, k, dtype=dtype), normal(n, dtype=dtype)
    for threshold in (torch.tensor(0.5), torch.rand(k)):
        threshold = threshold.cuda()
        got = sparse_gemv(x, pack(weight), threshold, bias)
        want = reference.sparse_gemv(x.float(), weight.float(), threshold, bias.float())
        assert (got.float() - want).norm() <= TOLERANCE[dtype] * want.norm()
        assert torch.equal(got, sparse_gemv(x, pack(weight), threshold, bias))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "k"), [(8, 8), (1000, 1104), (4096, 14336)])
@pytest.mark.parametrize("tokens", [2, 9, 65, 384, 1100, 4097])
def test_dense_products_of_several_tokens(tokens, n, k, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TEAL_CACHE", str(tmp_path))
    monkeypatch.setattr(cublaslt, "_chosen", {})
    monkeypatch.setattr(cublaslt, "_fastest", {})
    weight, x, bias = normal(n, k, dtype=dtype), normal(tokens, k, dtype=dtype), normal(n, dtype=dtype)
    packed = pack(weight)
    for own in (None, bias):
        got = packed.dense_gemm(x, own)
        want = F.linear(x.float(), weight.float(), None if own is None else own.float())
        assert (got.float() - want).norm() <= TOLERANCE[dtype] * want.norm()
        if tokens <= cublaslt.MOST_TOKENS:
            assert len(list(tmp_path.glob("*.gemm"))) == 1, "cuBLASLt did not serve"
            cublaslt._chosen.clear()  # as a new process
            cublaslt._fastest.clear()
        assert torch.equal(got, packed.dense_gemm(x, own))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_first_of_the_most_likely_tokens_is_chosen(dtype):
    logits = normal(1, 128256, dtype=dtype)
    best = int((logits[0] == logits.max()).nonzero()[0])
    token = torch.zeros(1, dtype=torch.int64, device="cuda")
    assert int(cuda_greedy.choose(logits, token, -1)) == int(token) == best
    logits[0, 77777] = float("nan")
    assert int(cuda_greedy.choose(logits, token, -1)) == -1


def test_nan_is_kept():
    weight, x = normal(64, 64, dtype=torch.bfloat16), normal(1, 64, dtype=torch.bfloat16)
    x[0, 3] = float("nan")
    assert sparse_gemv(x, pack(weight), torch.tensor(10.0, device="cuda")).isnan().all()


def tiny_engine(family: str, layout: str | None, monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> DecoderModel:
    if layout:
        monkeypatch.setenv("TEAL_LAYOUT", layout)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 256}
    config = tiny_config(family, **sizes)
    generator = torch.Generator(device).manual_seed(0)

    def take(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        scale = 0.1 if len(shape) > 1 else 0.2
        values = torch.randn(shape, device=device, generator=generator) * scale + ("norm" in name)
        return values.to(torch.float16)

    engine = DecoderModel(EngineConfig.of(config), take, 256).eval()
    monkeypatch.delenv("TEAL_LAYOUT", raising=False)
    return engine


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_captured_steps_follow_the_reference(family, monkeypatch):
    ours, theirs = (tiny_engine(family, layout, monkeypatch) for layout in (None, "row_major"))
    assert isinstance(ours.decode_step, CudaDecodeStep)
    assert not isinstance(theirs.decode_step, CudaDecodeStep)
    for threshold in (-1.0, 0.3):
        logits = []
        for engine in (ours, theirs):
            for layer in sparse_layers(engine).values():
                layer.set_threshold(threshold)
            cache = engine.new_cache()
            engine.prefill(torch.arange(5, 25, device="cuda")[None], cache)
            at = torch.tensor([20], device="cuda")
            logits.append(engine.decode(torch.tensor([7], device="cuda"), at, cache).float())
        error = (logits[0] - logits[1]).norm() / logits[1].norm()
        assert error < (5e-3 if threshold < 0 else 0.2)  # masks flip where rounding differs


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.8, top_k=20, seed=3)], ids=str)
def test_a_state_generates_the_same_again_and_follows_a_new_level(sampling, monkeypatch):
    engine = tiny_engine("llama", None, monkeypatch)
    state = DecodeState.of(engine)
    first = list(decode_tokens(engine, [5, 6, 7], 40, sampling, ignore_eos=True, state=state))
    assert first == list(decode_tokens(engine, [5, 6, 7], 40, sampling, ignore_eos=True, state=state))
    graphs = {name: captured._graph for name, captured in state.captured.items()}
    for threshold in (0.5, torch.full((128,), 0.5)):  # in place, then of another shape: captured anew
        for name, layer in sparse_layers(engine).items():
            if layer.in_features == 128 and "o_proj" not in name:
                layer.set_threshold(threshold)
        changed = list(decode_tokens(engine, [5, 6, 7], 40, sampling, ignore_eos=True, state=state))
        same = all(captured._graph is graphs[name] for name, captured in state.captured.items())
        assert same == isinstance(threshold, float)
        fresh = list(decode_tokens(engine, [5, 6, 7], 40, sampling, ignore_eos=True))
        assert changed == fresh
    assert changed != first


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current(monkeypatch):
    texts = []
    for device in ("cuda:0", "cuda:1"):
        engine = tiny_engine("llama", None, monkeypatch, device)
        assert isinstance(engine.decode_step, CudaDecodeStep)
        engine.lm_head.set_sparsity(0.5)
        for layer in sparse_layers(engine).values():
            layer.set_threshold(0.3)
        texts.append(list(decode_tokens(engine, list(range(5, 25)), 40, ignore_eos=True, state=DecodeState.of(engine))))
    assert texts[0] == texts[1]


def test_a_sparse_head(monkeypatch):
    engine = tiny_engine("llama", None, monkeypatch)
    state = DecodeState.of(engine)
    dense = list(decode_tokens(engine, [5, 6, 7], 40, ignore_eos=True, state=state))
    engine.lm_head.set_sparsity(0.9)
    sparse = list(decode_tokens(engine, [5, 6, 7], 40, ignore_eos=True, state=state))
    assert sparse != dense
    assert sparse == list(decode_tokens(engine, [5, 6, 7], 40, ignore_eos=True))
    engine.lm_head.set_sparsity(0.0)
    assert dense == list(decode_tokens(engine, [5, 6, 7], 40, ignore_eos=True, state=state))


@pytest.mark.filterwarnings("ignore")  # the compiler gives some of its own
def test_transformers_generates_alike_compiled_over_a_static_cache():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).to("cuda")
    blocks = token_blocks([CALIBRATION_TEXT], tokenizer, length=256, count=4, seed=0)
    sparsify(model, teal.allocate(teal.calibrate(model, blocks), "uniform"), 0.4)
    prompt = tokenizer("The city of", return_tensors="pt").to("cuda")
    options = {"max_new_tokens": 24, "do_sample": False}
    texts = []
    for level in (0.4, 0.0):
        set_sparsity(model, level)
        eager = model.generate(**prompt, **options).tolist()
        assert model.generate(**prompt, **options, cache_implementation="static").tolist() == eager  # which compiles
        texts.append(eager)
    assert texts[0] != texts[1]
