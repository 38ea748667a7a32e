"""Import of the original repository's artifacts: its rule, its lookups, and what must be refused."""

import csv
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shared_data, tiny_config, tiny_model
from torch import Tensor
from transformers import LlamaConfig

from teal.errors import TealError
from teal.ops.reference import KEEP_ALL
from teal.plan import SparsityPlan
from teal.published import HIGHEST, Histogram, import_published
from teal.sparse_model import sparsify
from teal.structure import ModelStructure

TOKENS, BINS = 30, 40
COLUMNS = ("q", "k", "v", "o", "gate", "up", "down")
STRUCTURE = ModelStructure.of(tiny_model())  # 2 blocks, inputs of 32, 32, 32 and 56 channels


def histogram(channels: int, seed: int, shift: float = 0.0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Counts and centers as published: the central 98 % in even bins, the tails in the outer two."""
    values = torch.randn(tokens * channels, generator=torch.Generator().manual_seed(seed)).add(shift).sort().values
    low, high = values[len(values) // 100], values[-(len(values) // 100)]
    edges = torch.cat([values[:1], torch.linspace(float(low), float(high), BINS - 1), values[-1:]])
    return torch.histogram(values, edges)[0], (edges[:-1] + edges[1:]) / 2


def write_histograms(directory: Path, layer: int, widths: dict[str, tuple[int, int]], **options: Any) -> None:
    for part, (h1, h2) in widths.items():
        content = {}
        for seed, (key, channels) in enumerate((("h1", h1), ("h2", h2))):
            content[key], content[f"{key}_centers"] = histogram(channels, 10 * layer + seed, **options)
        path = directory / "histograms" / f"layer-{layer}" / part / "histograms.pt"
        path.parent.mkdir(parents=True)
        torch.save(content | {"h1.5": torch.ones(2)}, path)


def write_lookup(directory: Path, layer: int, scale: float = 1.0) -> None:
    """Rows at 4 %, 8 %, ... ; `down` is spared, the others take what it leaves."""
    path = directory / "lookup" / f"layer-{layer}" / "results.csv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Effective Sparsity", "Activation Error", "Baseline Error", *COLUMNS])
        for step in range(1, 24):
            level = 0.04 * step
            writer.writerow([level, 0.1, 0.2, *[level * scale] * 6, level / 2])


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    for layer in range(2):
        write_histograms(tmp_path, layer, {"self_attn": (32, 32), "mlp": (32, 56)}, shift=0.1 * layer)
        write_lookup(tmp_path, layer)
    return tmp_path


def published_icdf(counts: Tensor, centers: Tensor, share: float) -> float:
    """The published rule as its code computes it: one value, float32."""
    cumulative = torch.cumsum(counts, dim=0)
    wanted = share * counts.sum()
    index = int(torch.searchsorted(cumulative, wanted))
    if index == 0:
        return float(centers[0])
    if index == len(centers):
        return float(centers[-1])
    below, above = cumulative[index - 1], cumulative[index]
    fraction = (wanted - below) / (above - below)
    return float(centers[index - 1] + fraction * (centers[index] - centers[index - 1]))


class TestHistogram:
    @pytest.mark.parametrize("share", [0.0, 0.004, 0.1, 0.5, 0.7, 0.75, 0.9, 0.999, 1.0, 1.3, 3.7])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_quantiles_follow_the_published_rule(self, seed: int, share: float) -> None:
        counts, centers = histogram(56, seed, shift=0.3)
        ours = Histogram(counts.double(), centers.double()).quantiles(torch.tensor([share])).item()
        assert ours == pytest.approx(published_icdf(counts, centers, share), abs=1e-5)

    def test_quantiles_by_hand(self) -> None:
        example = Histogram(torch.tensor([2.0, 0, 4, 2]).double(), torch.tensor([-3.0, -1, 1, 5]).double())
        shares = torch.tensor([0.1, 0.25, 0.375, 0.75, 0.875, 1.0, 1.2])
        assert example.quantiles(shares).tolist() == [-3, -3, -0.5, 1, 3, 5, 5]

    def test_share_within(self) -> None:
        example = Histogram(torch.tensor([2.0, 1, 4, 1]).double(), torch.tensor([-3.0, -1, 1, 5]).double())
        shares = example.share_within(torch.tensor([-1.0, 0.0, 0.9, 1.0, 2.9, 3.0, 5.0]))
        assert shares.tolist() == [0, 0, 0, 5 / 8, 5 / 8, 7 / 8, 1]


class TestImport:
    LEVELS = (0.2, 0.5, 0.8)

    def test_uniform_without_lookups(self, artifacts: Path) -> None:
        shutil.rmtree(artifacts / "lookup")
        plan, implied = import_published(artifacts, STRUCTURE, self.LEVELS)
        assert (plan.method, plan.levels) == ("published-uniform", (0.0, *self.LEVELS))
        assert [plan.expected_sparsity(level) for level in plan.levels] == pytest.approx(plan.levels)
        files = {
            part: torch.load(artifacts / f"histograms/layer-1/{part}/histograms.pt") for part in ("self_attn", "mlp")
        }
        for name, part, key in (
            ("self_attn.k_proj", "self_attn", "h1"), ("self_attn.o_proj", "self_attn", "h2"),
            ("mlp.up_proj", "mlp", "h1"), ("mlp.down_proj", "mlp", "h2"),
        ):  # fmt: skip
            counts, centers = files[part][key], files[part][f"{key}_centers"]
            expected = [published_icdf(counts, centers, 0.5 + level / 2) for level in self.LEVELS]
            assert plan.blocks[1][name].threshold == pytest.approx((KEEP_ALL, *expected), abs=1e-5)
        assert list(implied) == list(plan.levels)
        assert implied[0.0] == 0
        assert implied[0.5] == pytest.approx(0.5, abs=0.05)

    def test_implied_sparsity_weighs_histograms_by_weights(self, artifacts: Path) -> None:
        plan, implied = import_published(artifacts, STRUCTURE, (0.5,))
        dropped = 0.0
        for index, projection in STRUCTURE.projections():
            part = "self_attn" if projection.input.startswith("attention") else "mlp"
            key = "h2" if projection.name.endswith(("o_proj", "down_proj")) else "h1"
            file = torch.load(artifacts / f"histograms/layer-{index}/{part}/histograms.pt")
            within = file[f"{key}_centers"].abs() <= plan.blocks[index][projection.name].threshold[1]
            dropped += projection.size * float(file[key][within].sum() / file[key].sum())
        total = sum(projection.size for _, projection in STRUCTURE.projections())
        assert implied[0.5] == pytest.approx(dropped / total)
        assert plan.details["implied_sparsity"] == [[level, share] for level, share in implied.items()]

    def test_lookups_give_the_nearest_row(self, artifacts: Path) -> None:
        plan, _ = import_published(artifacts, STRUCTURE, (0.25, 0.39))
        assert plan.method == "published"
        assert plan.blocks[0]["self_attn.v_proj"].sparsity == pytest.approx((0.0, 0.24, 0.40))
        assert plan.blocks[0]["mlp.down_proj"].sparsity == pytest.approx((0.0, 0.12, 0.20))
        sizes = {p.name: p.size for p in STRUCTURE.blocks[0]}  # real shapes: k and v are half of q here
        spared = sizes["mlp.down_proj"] / sum(sizes.values())
        assert plan.expected_sparsity(0.39) == pytest.approx(0.40 * (1 - spared) + 0.20 * spared)

    def test_lookups_past_everything(self, artifacts: Path) -> None:
        shutil.rmtree(artifacts / "lookup")
        for layer in range(2):
            write_lookup(artifacts, layer, scale=6.0)
        plan, _ = import_published(artifacts, STRUCTURE, (0.8,))
        content = torch.load(artifacts / "histograms/layer-0/self_attn/histograms.pt")
        assert plan.blocks[0]["self_attn.q_proj"].sparsity == (0.0, HIGHEST)
        assert plan.blocks[0]["self_attn.q_proj"].threshold[1] == pytest.approx(content["h1_centers"][-1].item())

    def test_from_a_config_and_back_from_a_file(self, artifacts: Path, tmp_path: Path) -> None:
        tiny_config().save_pretrained(tmp_path / "model")
        plan, _ = import_published(artifacts, tmp_path / "model" / "config.json")
        assert plan.levels[-1] == 0.9
        plan.save(tmp_path / "plan.json")
        assert SparsityPlan.load(tmp_path / "plan.json") == plan
        with pytest.warns(UserWarning, match="the weights it was made for are not known"):
            sparsify(tiny_model(), plan, 0.5)

    def test_bins_beyond_float32_counting_have_slack(self, artifacts: Path) -> None:
        path = artifacts / "histograms/layer-0/self_attn/histograms.pt"
        content = torch.load(path)
        factor = 2.0**24
        for file in artifacts.glob("histograms/*/*/histograms.pt"):
            other = torch.load(file)
            torch.save({**other, "h1": other["h1"] * factor, "h2": other["h2"] * factor}, file)
        content["h1"] = content["h1"] * factor
        content["h1"][3] -= 1024  # a count that stopped growing one by one
        torch.save({**content, "h2": content["h2"] * factor}, path)
        import_published(artifacts, STRUCTURE)


class TestRefused:
    def check(self, directory: Path, message: str, structure: ModelStructure = STRUCTURE, **options: Any) -> None:
        with pytest.raises(TealError, match=message):
            import_published(directory, structure, **options)

    def structure(self, **changes: int) -> ModelStructure:
        return ModelStructure.of(tiny_model(**changes))

    def test_number_of_blocks(self, artifacts: Path) -> None:
        self.check(artifacts, "of a model with 2 blocks, this one has 3", self.structure(num_hidden_layers=3))

    @pytest.mark.parametrize("width", [40, 28], ids=["no-divisor", "divisor"])
    def test_width_of_an_input(self, artifacts: Path, width: int) -> None:
        tokens = f"{TOKENS * 56 / width:.6g}"
        message = (
            rf"layer-0 mlp_intermediate has 1680 counts, which is {tokens} tokens of this model's {width} "
            "channels, where other inputs have 30 tokens; its model has 56 channels there"
        )
        self.check(artifacts, message, self.structure(intermediate_size=width))

    def test_tokens_of_one_block(self, artifacts: Path) -> None:
        shutil.rmtree(artifacts / "histograms" / "layer-1")
        write_histograms(artifacts, 1, {"self_attn": (32, 32), "mlp": (32, 56)}, tokens=15)
        self.check(artifacts, "layer-1 attention_input has 480 counts, which is 15 tokens")

    def test_one_count_too_many(self, artifacts: Path) -> None:
        path = artifacts / "histograms/layer-1/mlp/histograms.pt"
        content = torch.load(path)
        content["h2"][5] += 1
        torch.save(content, path)
        self.check(artifacts, "layer-1 mlp_intermediate has 1681 counts")

    def test_levels_beyond_the_lookup(self, artifacts: Path) -> None:
        self.check(artifacts, r"ends at sparsity 0\.92; import levels up to that, not 0\.97", levels=(0.97,))
        self.check(artifacts, "at least 0 and below 1, got 1.5", levels=(1.5,))

    def test_no_directory(self, tmp_path: Path) -> None:
        self.check(tmp_path / "nowhere", "has no histograms/layer-0; name a directory like")

    @pytest.mark.parametrize("part", ["self_attn", "mlp"])
    def test_missing_histogram(self, artifacts: Path, part: str) -> None:
        (artifacts / "histograms" / "layer-1" / part / "histograms.pt").unlink()
        self.check(artifacts, f"layer-1/{part}/histograms.pt does not exist")

    @pytest.mark.parametrize("kept", [0, 10, -200])
    def test_truncated_histogram(self, artifacts: Path, kept: int) -> None:
        path = artifacts / "histograms/layer-1/mlp/histograms.pt"
        path.write_bytes(path.read_bytes()[:kept])
        self.check(artifacts, "layer-1/mlp/histograms.pt is truncated, corrupt or holds more than tensors")

    def test_pickle_that_runs_code(self, artifacts: Path) -> None:
        class Attack:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(artifacts / "attacked"),)

        (artifacts / "histograms/layer-0/mlp/histograms.pt").write_bytes(pickle.dumps(Attack()))
        self.check(artifacts, "holds more than tensors")
        assert not (artifacts / "attacked").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param([1, 2], "holds no histogram h1", id="no-object"),
            pytest.param({"h2": None}, "holds no histogram h2", id="no-counts"),
            pytest.param({"h2_centers": None}, "holds no histogram h2 with its h2_centers", id="no-centers"),
            pytest.param({"h2": torch.ones(3)}, "h2 has 3 counts for 40 bins", id="lengths"),
            pytest.param({"h2": torch.zeros(BINS)}, "h2 is no histogram", id="empty"),
            pytest.param({"h2": torch.full((BINS,), torch.nan)}, "h2 is no histogram", id="nan"),
            pytest.param({"h2": -torch.ones(BINS)}, "h2 is no histogram", id="negative"),
            pytest.param({"h2_centers": torch.ones(BINS)}, "bin centers must rise", id="flat-centers"),
        ],
    )
    def test_bad_histogram(self, artifacts: Path, change: Any, message: str) -> None:
        path = artifacts / "histograms/layer-1/mlp/histograms.pt"
        torch.save(torch.load(path) | change if isinstance(change, dict) else change, path)
        self.check(artifacts, message)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param("", "is no lookup of the greedy search", id="empty"),
            pytest.param("a,b\n1,2\n", "is no lookup of the greedy search .KeyError", id="columns"),
            pytest.param("Effective Sparsity,q,k,v,o,gate,up,down\n0.1,0.1,0.1\n", "is no lookup", id="truncated"),
            pytest.param("Effective Sparsity,q,k,v,o,gate,up,down\n0.1,x,1,1,1,1,1,1\n", "is no lookup", id="text"),
            pytest.param("Effective Sparsity,q,k,v,o,gate,up,down\n0.9,nan,0,0,0,0,0,0\n", "from 0 on", id="nan"),
            pytest.param("Effective Sparsity,q,k,v,o,gate,up,down\n0.9,-1,0,0,0,0,0,0\n", "from 0 on", id="negative"),
        ],
    )
    def test_bad_lookup(self, artifacts: Path, text: str, message: str) -> None:
        (artifacts / "lookup/layer-1/results.csv").write_text(text)
        self.check(artifacts, f"layer-1/results.csv .*{message}")

    def test_missing_lookup(self, artifacts: Path) -> None:
        (artifacts / "lookup/layer-1/results.csv").unlink()
        self.check(artifacts, "cannot read .*layer-1/results.csv: No such file")

    def test_lookups_of_a_model_that_fuses_projections(self, artifacts: Path) -> None:
        fused = ModelStructure.of(tiny_model("phi3"))
        self.check(artifacts, "the published lookups have no column for self_attn.qkv_proj", fused)


class TestLlama2:
    """The artifacts that the original repository publishes for Llama-2-7B."""

    @pytest.fixture
    def directory(self) -> Path:
        return shared_data("published", "Llama-2-7B")

    def config(self, directory: Path, **changes: int) -> Path:
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 128}
        LlamaConfig(**{**sizes, **changes}).save_pretrained(directory)
        return directory

    def test_thresholds_are_the_published_ones(self, directory: Path, tmp_path: Path) -> None:
        plan, implied = import_published(directory, self.config(tmp_path), (0.4, 0.5))
        rows = list(csv.DictReader((directory / "lookup/layer-15/results.csv").read_text().splitlines()))
        row = min(rows, key=lambda row: abs(float(row["Effective Sparsity"]) - 0.5))
        inputs = {
            "q": ("self_attn", "h1"),
            "o": ("self_attn", "h2"),
            "up": ("mlp", "h1"),
            "down": ("mlp", "h2"),
        }
        for name, (part, key) in inputs.items():
            file = torch.load(directory / f"histograms/layer-15/{part}/histograms.pt", weights_only=True)
            expected = published_icdf(file[key], file[f"{key}_centers"], 0.5 + float(row[name]) / 2)
            assert plan.blocks[15][f"{part}.{name}_proj"].threshold[2] == pytest.approx(expected, rel=1e-4)
        assert implied[0.4] == pytest.approx(0.4011, abs=1e-4)
        assert plan.expected_sparsity(0.5) == pytest.approx(0.5016, abs=1e-4)

    def test_does_not_pass_for_llama_3(self, directory: Path, tmp_path: Path) -> None:
        config = self.config(tmp_path, intermediate_size=14336, num_key_value_heads=8)
        with pytest.raises(
            TealError, match=r"43245.7 tokens of this model's 14336 channels.* has 11008 channels there"
        ):
            import_published(directory, config)
