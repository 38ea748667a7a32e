import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from engine_models import random_model
from helpers import random_checkpoint, tiny_config, tiny_plan
from safetensors.torch import load_file, save_file

from teal.checkpoint import check_memory, load_model
from teal.engine import load_engine
from teal.engine.config import EngineConfig
from teal.engine.load import DEFAULT_CONTEXT
from teal.engine.model import DecoderModel
from teal.errors import TealError, UsageError
from teal.ops import native
from teal.structure import identify


@pytest.fixture
def directory(tmp_path):
    """An unsharded checkpoint that a test may damage."""
    random_model("qwen2-tied").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(directory, edit):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file, **changes):
    payload = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(payload | changes))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {}, "only llama, mistral, qwen2, qwen3"),
        ("phi3", {}, "model type 'phi3'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer type 'linear_attention'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value and "=" not in value else "",
)
def test_what_the_engine_would_compute_differently_is_refused(family, changes, message):
    config = tiny_config(family)
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(TealError, match=r"teal\.sparsify") as error:
        EngineConfig.of(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_end_of_text_comes_from_the_generation_settings_first(directory):
    (directory / "generation_config.json").unlink(missing_ok=True)
    assert load_engine(directory).config.eos_token_ids == (1,)
    edit_json(directory / "generation_config.json", eos_token_id=[1, 7])
    assert load_engine(directory).config.eos_token_ids == (1, 7)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(TealError, match=r"generation_config\.json"):
        load_engine(directory)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj.weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(56)}),
            "up_proj.bias has no place",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "model.norm.weight has shape [31]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "stored as int8"),
    ],
    ids=["missing", "unexpected", "wrong-shape", "integers"],
)
def test_tensors_that_do_not_match_the_config_are_named(edit, message, directory):
    edit_tensors(directory, edit)
    with pytest.raises(TealError) as error:
        load_engine(directory)
    assert message in str(error.value)


def test_stored_rope_frequencies_and_a_tied_head_are_no_surprise(directory):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(directory, edit)
    engine = load_engine(directory)
    assert torch.equal(engine.lm_head.weight, engine.embed_tokens.weight)


def test_a_head_of_its_own_is_used_whatever_the_config_says(directory):
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": torch.ones(258, 32)}))
    assert torch.equal(load_engine(directory).lm_head.weight, torch.ones(258, 32))


def test_dtype_is_the_stored_one_unless_asked(directory):
    assert load_engine(directory).dtype == torch.float32
    engine = load_engine(directory, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in engine.parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="not in float64"):
        load_engine(directory, dtype=torch.float64)


def test_a_device_that_is_not_there_is_a_usage_error(directory):
    with pytest.raises(UsageError, match="no device nonsense"):
        load_engine(directory, device="nonsense")


def test_context_is_bounded_by_the_model(directory):
    edit_json(directory / "config.json", max_position_embeddings=2 * DEFAULT_CONTEXT)
    assert load_engine(directory).context == DEFAULT_CONTEXT
    assert load_engine(directory, context=DEFAULT_CONTEXT + 1).context == DEFAULT_CONTEXT + 1
    for context in (0, 2 * DEFAULT_CONTEXT + 1):
        with pytest.raises(TealError, match=f"{2 * DEFAULT_CONTEXT}, got {context}"):
            load_engine(directory, context=context)


def test_yarn_stretches_the_context():
    config = tiny_config("llama", max_position_embeddings=64)
    config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64
    }  # fmt: skip
    assert EngineConfig.of(config).max_positions == 256


def test_plans_are_checked_as_sparsify_checks_them(directory, checkpoint):
    plan = tiny_plan(random_model("qwen2-tied"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = load_engine(directory, plan=plan)
    assert (engine.sparsity_plan, engine.sparsity_level) == (plan, 0.5)
    assert identify(engine) == plan.identity
    with pytest.raises(TealError, match="cannot be of this model"):
        load_engine(checkpoint("qwen3-wide-heads"), plan=plan)
    other = replace(plan, identity=replace(plan.identity, weights="0" * 64))
    with pytest.warns(UserWarning, match="other weights"):
        load_engine(directory, plan=other)
    with pytest.raises(TealError, match="other weights"):
        load_engine(directory, plan=other, strict=True)


def test_a_directory_without_a_model_is_a_clear_error(tmp_path, directory):
    with pytest.raises(TealError, match=r"no config\.json"):
        load_engine(tmp_path)
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(TealError, match="no weights"):
        load_engine(tmp_path)


class TestAGpuThatIsTooSmall:
    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2**30))
        for name in ("memory_reserved", "memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device: 0)

    @pytest.mark.parametrize("load", [load_model, load_engine], ids=["transformers", "engine"])
    def test_is_refused_before_weights_are_moved(self, load, directory, monkeypatch):
        monkeypatch.setattr("teal.engine.load._device", torch.device)
        with pytest.raises(
            TealError, match=r"weights take 0\.0 GiB, cuda has 0\.0 of 1\.0 GiB free; use a dtype of 16"
        ):
            load(directory, device="cuda")

    def test_memory_that_torch_holds_counts_as_free(self, monkeypatch):
        check_memory(1000, "cuda")
        check_memory(1 << 40, "cpu")
        with pytest.raises(TealError):
            check_memory(1500, "cuda")
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
        check_memory(1500, "cuda")


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_that_are_counted_are_those_of_the_model(tied, monkeypatch):
    config = EngineConfig.of(tiny_config("qwen3", tie_word_embeddings=tied))
    monkeypatch.setenv("TEAL_LAYOUT", "channel_major")  # which copies
    model = DecoderModel(config, lambda name, shape: torch.zeros(shape), 8)
    assert config.weights == sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


# Of the memory that is not a mapped file, which the system may drop: the most while the engine is loaded.
MEASURE = """
import re, sys, threading, torch
from teal.engine import load_engine

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1))

loaded, peak, before = threading.Event(), [0], anonymous()

def watch():
    while not loaded.wait(0.002):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
quantization = sys.argv[2] if len(sys.argv) > 2 else None
engine = load_engine(sys.argv[1], quantization=quantization, head_quantization=quantization, context=64)
loaded.set()
watcher.join()
print(peak[0] - before, anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not native.available() or sys.platform != "linux", reason="measures the packed weights on Linux")
def test_packing_holds_no_second_copy(tmp_path):
    """At Llama-3.2-1B's shape: rounded or not, loading takes at most the checkpoint's size and a quarter."""
    size = random_checkpoint(tmp_path / "model", "llama-3.2-1b")
    for quantization in (None, "int8", "int4"):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), *([quantization] if quantization else [])]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, stays = map(int, process.stdout.split())
        print(f"checkpoint {size / 1e6:.0f} MB, {quantization}: peak {peak / 1e6:.0f} MB, stays {stays / 1e6:.0f} MB")
        assert peak < 1.25 * size
    shutil.rmtree(tmp_path / "model")
