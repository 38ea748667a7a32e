"""from_pretrained with TealConfig, saving and reloading, and the traps of transformers and torch.compile."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import decode_logits, generate, random_plan, random_tokens, save_tiny, tiny_model, tiny_plan
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, StaticCache

import teal
from teal.checkpoint import EMBEDDED_MODEL, Checkpoint
from teal.data import EVALUATION_TEXT
from teal.errors import TealError
from teal.linear import SparseLinear, sparse_layers
from teal.plan import SparsityPlan
from teal.sparse_model import set_sparsity, sparsify
from teal.structure import identify

IDS = random_tokens(rows=2, length=5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SparsityPlan]:
    """A tiny Llama on disk and its plan."""
    directory = save_tiny(tmp_path_factory.mktemp("model"))
    return directory, tiny_plan(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def load_sparse(directory: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32, **options})


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


class TestImport:
    def test_is_cheap(self) -> None:
        heavy = "{'torch', 'transformers', 'numpy', 'safetensors', 'rich'}"
        assert run_python(f"import sys, teal; print({heavy} & set(sys.modules))") == "set()"

    @pytest.mark.parametrize(
        "imports",
        [
            pytest.param("import teal, transformers.quantizers.auto", id="teal-first"),
            pytest.param("import transformers.quantizers.auto, teal", id="transformers-first"),
            pytest.param("import teal; teal.TealConfig", id="config-only"),
        ],
    )
    def test_registers_once_in_any_order(self, imports: str) -> None:
        code = f"""{imports}
import sys
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZATION_CONFIG_MAPPING["teal"] is teal.TealConfig
assert AUTO_QUANTIZER_MAPPING["teal"].__name__ == "TealQuantizer"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("teal.")]
"""
        run_python(code)

    def test_offers_at_most_twelve_names_and_all_of_them_exist(self) -> None:
        assert len(teal.__all__) <= 12
        assert all(callable(getattr(teal, name)) for name in teal.__all__)
        assert set(teal.__all__) <= set(dir(teal))

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'sparsity'"):
            teal.sparsity  # noqa: B018


class TestTealConfig:
    def test_loads_what_sparsify_makes(self, saved: tuple[Path, SparsityPlan]) -> None:
        directory, plan = saved
        loaded = load_sparse(directory, quantization_config=teal.TealConfig(plan=plan, level=0.5))
        expected = sparsify(load_sparse(directory), plan, 0.5)
        assert torch.equal(decode_logits(loaded, IDS, 2), decode_logits(expected, IDS, 2))

    def test_knows_the_stored_weights_under_another_dtype(self, saved: tuple[Path, SparsityPlan]) -> None:
        """Without the warning that the plan may not belong to the model."""
        directory, plan = saved
        loaded = load_sparse(directory, quantization_config=teal.TealConfig(plan=plan), dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        assert identify(loaded) == plan.identity

    @pytest.mark.parametrize("layout", ["row_major", "channel_major"])
    def test_saves_standard_weights_with_the_plan_and_reloads(
        self, saved: tuple[Path, SparsityPlan], tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", layout)
        directory, plan = saved
        model = load_sparse(directory, quantization_config=teal.TealConfig(plan=plan, level=0.5))
        set_sparsity(model, 0.25)
        model.save_pretrained(tmp_path)
        original, written = Checkpoint(directory), Checkpoint(tmp_path)
        assert sorted(written.names()) == sorted(original.names())
        assert all(torch.equal(written.tensor(name), original.tensor(name)) for name in original.names())
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert config == {"quant_method": "teal", "plan": plan.to_json(), "level": 0.25}

        reloaded = load_sparse(tmp_path)
        assert reloaded.sparsity_level == 0.25
        thresholds = [float(layer.threshold) for layer in sparse_layers(reloaded).values()]
        settings = [setting.threshold for block in plan.settings(0.25) for setting in block.values()]
        assert thresholds == pytest.approx(settings)
        assert torch.equal(generate(reloaded, IDS), generate(model, IDS))

    def test_a_saved_model_reloads_in_a_fresh_process(self, saved: tuple[Path, SparsityPlan], tmp_path: Path) -> None:
        directory, plan = saved
        model = load_sparse(directory, quantization_config=teal.TealConfig(plan=plan, level=0.5))
        model.save_pretrained(tmp_path)
        code = f"""
import teal, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32)
ids = torch.tensor({IDS.tolist()})
options = dict(do_sample=False, min_new_tokens=6, max_new_tokens=6)
print(model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist())
"""
        expected = torch.cat([IDS, generate(model, IDS, 6)], dim=1)
        assert json.loads(run_python(code).splitlines()[-1]) == expected.tolist()

    @pytest.mark.parametrize("as_path", [str, Path], ids=["str", "Path"])
    def test_reads_a_plan_file(self, saved: tuple[Path, SparsityPlan], tmp_path: Path, as_path: type) -> None:
        saved[1].save(tmp_path / "plan.json")
        config = teal.TealConfig(plan=as_path(tmp_path / "plan.json"))
        assert config.plan == saved[1]
        assert config.level == 0.5

    def test_a_plan_with_vectors_loads_from_its_file_and_is_refused_in_a_config(
        self, saved: tuple[Path, SparsityPlan], tmp_path: Path
    ) -> None:
        directory, plan = saved
        random_plan(plan.identity, vectors=True).save(tmp_path / "plan.json")
        config = teal.TealConfig(plan=tmp_path / "plan.json", level=0.5)
        model = load_sparse(directory, quantization_config=config)
        assert sparse_layers(model)["model.layers.0.mlp.down_proj"].threshold.shape == (56,)
        assert "teal" in repr(model.config)
        with pytest.raises(TealError, match=r"holds vectors and does not fit into a config; use teal\.save"):
            model.save_pretrained(tmp_path / "saved")
        assert not list((tmp_path / "saved").glob("*"))
        with pytest.raises(TealError, match="give the path of the plan file"):
            teal.TealConfig(plan=json.loads((tmp_path / "plan.json").read_text()))

        teal.save(model, tmp_path / "side")
        again = teal.load(load_sparse(directory), tmp_path / "side")
        assert torch.equal(generate(again, IDS), generate(model, IDS))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param({"plan": "nowhere.json"}, "nowhere.json does not exist", id="no-file"),
            pytest.param({"plan": {"format": "x"}}, "quantization config has format 'x'", id="no-plan"),
            pytest.param({"plan": None}, "needs a SparsityPlan, a plan file or its JSON object, got None", id="none"),
        ],
    )
    def test_bad_plan(self, arguments: dict, message: str) -> None:
        with pytest.raises(TealError, match=message):
            teal.TealConfig(**arguments)

    def test_level_outside_the_plan(self, saved: tuple[Path, SparsityPlan]) -> None:
        with pytest.raises(TealError, match=r"covers sparsity 0\.0 to 0\.75, got 0\.9"):
            teal.TealConfig(plan=saved[1], level=0.9)

    def test_plan_of_another_model(self, saved: tuple[Path, SparsityPlan]) -> None:
        other = tiny_plan(tiny_model(intermediate_size=40))
        with pytest.raises(TealError, match=r"block 0 mlp\.down_proj has weight 32 x 40 .* and 32 x 56"):
            load_sparse(saved[0], quantization_config=teal.TealConfig(plan=other))

    def test_unknown_key_in_a_config(self, saved: tuple[Path, SparsityPlan]) -> None:
        config = teal.TealConfig(plan=saved[1]).to_dict() | {"levle": 0.5}
        with pytest.raises(TealError, match=r"unknown keys \['levle'\]"):
            teal.TealConfig.from_dict(config)

    def test_casts_are_allowed(self, saved: tuple[Path, SparsityPlan]) -> None:
        model = load_sparse(saved[0], quantization_config=teal.TealConfig(plan=saved[1])).half()
        assert model.dtype == torch.float16
        assert {layer.threshold.dtype for layer in sparse_layers(model).values()} == {torch.float32}

    def test_offloaded_models_are_refused(self, saved: tuple[Path, SparsityPlan]) -> None:
        from teal.integrations.transformers import TealQuantizer

        with torch.device("meta"):
            model = tiny_model()
        quantizer = TealQuantizer(teal.TealConfig(plan=saved[1]))
        with pytest.raises(TealError, match="load it without offloading"):
            quantizer.postprocess_model(model)


class TestGenerate:
    """The branch between prefill and decode, eager and compiled."""

    @pytest.fixture
    def model(self) -> torch.nn.Module:
        model = tiny_model(num_hidden_layers=1)
        return sparsify(model, tiny_plan(model), 0.5)

    def test_prompts_are_dense_and_single_tokens_sparse(self) -> None:
        dense, sparse = tiny_model(), tiny_model()
        sparsify(sparse, tiny_plan(dense), 0.75)
        with torch.no_grad():
            assert torch.equal(sparse(IDS).logits, dense(IDS).logits)
            assert not torch.equal(sparse(IDS[:, :1]).logits, dense(IDS[:, :1]).logits)

    def test_rows_of_a_batch_have_their_own_masks(self, model: torch.nn.Module) -> None:
        together = generate(model, IDS)
        apart = torch.cat([generate(model, IDS[row : row + 1]) for row in range(2)])
        assert torch.equal(together, apart)

    def test_static_cache_gives_the_tokens_of_the_dynamic_one(self, model: torch.nn.Module) -> None:
        assert torch.equal(generate(model, IDS, 6, cache_implementation="static"), generate(model, IDS, 6))

    def check_compiled(self, model: torch.nn.Module, backend: str) -> None:
        eager, levels = {}, (0.5, 0.0, 0.3)
        for level in levels:
            set_sparsity(model, level)
            eager[level] = generate(model, IDS, 6, cache_implementation="static")
        assert len({str(tokens) for tokens in eager.values()}) == len(levels)  # the level shows in the tokens

        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
        set_sparsity(model, 0.5)
        assert torch.equal(generate(model, IDS, 6, cache_implementation="static"), eager[0.5])
        with torch.compiler.set_stance("fail_on_recompile"):
            for level in levels[1:]:
                set_sparsity(model, level)
                assert torch.equal(generate(model, IDS, 6, cache_implementation="static"), eager[level])

    def test_compiled_without_breaks_follows_the_level(self, model: torch.nn.Module) -> None:
        self.check_compiled(model, "aot_eager")

    def test_compiled_plan_with_vectors_follows_the_level(self) -> None:
        model = tiny_model(num_hidden_layers=1)
        sparsify(model, random_plan(identify(model), vectors=True), 0.5)
        self.check_compiled(model, "aot_eager")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
    def test_compiled_by_inductor(self, model: torch.nn.Module) -> None:
        self.check_compiled(model, "inductor")

    def test_generates_own_compilation(self, saved: tuple[Path, SparsityPlan]) -> None:
        model = load_sparse(saved[0], quantization_config=teal.TealConfig(plan=saved[1], level=0.5))
        eager = generate(model, IDS, 6, cache_implementation="static")
        torch._dynamo.reset()
        compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        compiled._compile_all_devices = True  # compilation is for GPUs unless asked for
        captured = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        tokens = generate(model, IDS, 6, cache_implementation="static", compile_config=compiled)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > captured
        assert torch.equal(tokens, eager)


def forced_logits(model: torch.nn.Module, ids: torch.Tensor, prompt: int = 16) -> torch.Tensor:
    """Of every token after the prompt, decoded one by one over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    logits = []
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache, cache_position=torch.arange(prompt, device=ids.device))
        for at in range(prompt, ids.shape[1]):
            position = torch.tensor([at], device=ids.device)
            output = model(input_ids=ids[:, at : at + 1], past_key_values=cache, cache_position=position)
            logits.append(output.logits[0, -1].float().clone())
    return torch.stack(logits)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_compiled_in_bfloat16_is_as_near_to_float32_as_eager(device: str) -> None:
    """The compiler rounds elsewhere, so tokens may part, the more so where masks flip; neither side is the better."""
    text = EVALUATION_TEXT.read_text(encoding="utf-8")[:4000]
    ids = torch.tensor([AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(text)["input_ids"][:96]], device=device)
    exact, model = (
        AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=dtype).to(device).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    plan = teal.allocate(teal.calibrate(exact, ids), "uniform")
    for level in (None, 0.5):
        if level is not None:
            for of in (exact, model):
                sparsify(of, plan, level)
        want, eager = forced_logits(exact, ids), forced_logits(model, ids)
        torch._dynamo.reset()
        interpreted = model.forward
        model.forward = torch.compile(interpreted, fullgraph=True)
        compiled = forced_logits(model, ids)
        model.forward = interpreted
        errors = [((got - want).norm(dim=-1) / want.norm(dim=-1)).median() for got in (eager, compiled)]
        assert errors[1] <= 1.25 * errors[0]


@pytest.mark.parametrize(
    "cast",
    [
        pytest.param(lambda model: model.half(), id="half"),
        pytest.param(lambda model: model.to(torch.bfloat16), id="to-bfloat16"),
        pytest.param(lambda model: model.double(), id="double"),
        pytest.param(lambda model: model.to("cpu"), id="to-device"),
    ],
)
def test_thresholds_survive_casts(cast: object) -> None:
    model = tiny_model()
    sparsify(model, tiny_plan(model), 0.5)
    before = {name: layer.threshold.clone() for name, layer in sparse_layers(model).items()}
    for name, layer in sparse_layers(cast(model)).items():
        assert layer.threshold.dtype == torch.float32
        assert torch.equal(layer.threshold, before[name]), name


def test_no_garbage_after_to_empty() -> None:
    layer = SparseLinear(torch.randn(3, 4))
    layer.set_threshold(torch.full((4,), 0.25), torch.full((3,), 0.5))
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.threshold, torch.full((4,), -1.0))
    assert torch.equal(layer.sparse_bias, torch.zeros(3))
