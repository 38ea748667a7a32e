"""The page shows every figure of the files, says what is missing, and is whole, harmless and accessible HTML."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, random_plan, random_tokens, tiny_model, tiny_plan

from teal import report
from teal.artifact_directory import Artifacts
from teal.artifacts import write_json
from teal.benchmark import Benchmark, LevelSpeed
from teal.calibration import calibrate
from teal.errors import TealError
from teal.evaluation import evaluate, texts_to_json
from teal.plan import DROP_ALL
from teal.report_page import write_report
from teal.samples import write_samples
from teal.structure import identify
from teal.task_evaluation import evaluate_tasks
from teal.tasks import CHOICE, Item, Task
from teal.tuning import tune

VOID = {"meta", "br", "img", "link", "hr"}
EVIL = '<script>alert("1")</script> & $x^2$ \'"'
DETAILS = {
    "model": EVIL, "plan": "uniform", "dtype": "bfloat16", "device": "cpu", "layout": "cpu", "threads": 2,
    "torch": "2.13", "repeats": 5, "new_tokens": 32, "prompt_tokens": 64, "rule": "decode only",
    "largest_relative_error": 0.0036, "tolerance": 0.016,
}  # fmt: skip


class Page(HTMLParser):
    """Reads a page and checks that its elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of each kind, with hostile names."""
    out = tmp_path_factory.mktemp("results")
    plan = tiny_plan(tiny_model())
    statistics = calibrate(tiny_model(), random_tokens(4, 32))
    replace(statistics, details={"text": [EVIL]}).save(out / "statistics.safetensors")
    plan.save(out / "uniform.json")
    random_plan(plan.identity, vectors=True).save(out / "channels.json")
    result = evaluate(tiny_model(), random_tokens(3, 20), {"uniform": plan, EVIL: plan}, (0.25, 0.5, 0.7))
    write_json(out / "evaluation.json", replace(result, details={"text": [EVIL]}).to_json())
    write_json(out / "texts.json", texts_to_json({"wiki": result, EVIL: result}))
    items = Task(EVIL, CHOICE, tuple(Item((("The fox", " runs."), ("The fox", " sits."))) for _ in range(4)))
    asked = evaluate_tasks(tiny_model(), byte_tokenizer(), [items], plan, [0.5])
    write_json(out / "tasks.json", asked.to_json())
    tuned = tune(tiny_model(), random_tokens(16, 20), plan, "0.02nats", metric="kl")
    write_json(out / "tuning.json", replace(tuned, notes=[EVIL]).to_json())
    many = replace(items, items=items.items * 10)
    of_tasks = tune(tiny_model(), [many], plan, "50%", metric="accuracy", tokenizer=byte_tokenizer())
    write_json(out / "accuracy.json", of_tasks.to_json())
    speeds = [LevelSpeed(s, s, 100 + s, 90, 110, 1 + s, 1, 2, 17_700_000, 17_700_000, 0.09) for s in (0.0, 0.25, 0.5)]
    write_json(out / "bench.json", Benchmark(speeds, 24.2e9, DETAILS).to_json())
    write_samples(out / "samples.json", [{"level": 0.5, "prompt": "The city", "text": EVIL}], "one draw")
    write_json(out / "config.json", {"model_type": "llama"})  # not ours
    return out


@pytest.fixture(scope="module")
def text(directory: Path) -> str:
    output = directory.parent / "page.html"
    write_report(directory, output, f"title {EVIL}")
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_needs_nothing_else(page: Page, text: str) -> None:
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    assert not re.findall(r"@import|url\((?!#)", text)
    outside = [value for _, attributes in page.elements for name, value in attributes.items() if "//" in (value or "")]
    assert set(outside) <= {"http://www.w3.org/1999/xlink"}, "a namespace, which is not fetched"
    assert len(text) < 400_000


def test_hostile_names_are_text(page: Page, text: str) -> None:
    assert "<script" not in text
    said = "".join(page.text)
    assert said.count(EVIL) >= 6
    assert not any("alert" in (name or "") for _, attributes in page.elements for name in attributes)


def test_ids_are_unique_and_links_lead_to_them(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes.get("href") or attributes.get("xlink:href") for _, attributes in page.elements]
    used = [link for link in links if link and not link.startswith("data:image/png;base64")]  # colour scales
    assert used
    assert {link.removeprefix("#") for link in used} <= set(ids)
    assert {attributes["aria-labelledby"] for attributes in page.all("section")} <= set(ids)


def test_it_can_be_read_without_seeing_it(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    pictures = [index for index, (tag, _) in enumerate(page.elements) if tag == "svg"]
    assert len(pictures) == 14  # quality 2, texts, tuning 2, heat maps 2, channels, distributions 4, speed 2
    for index in pictures:
        assert page.elements[index][1]["role"] == "img"
        assert [tag for tag, _ in page.elements[index + 1 : index + 3]] == ["title", "desc"]
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in attributes for attributes in page.all("th"))


def test_it_fits_every_screen_and_both_colour_schemes(page: Page, text: str) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in text
    assert all("width" not in attributes and "viewbox" in attributes for attributes in page.all("svg"))
    assert "#010203" not in text, "stand-in colours are replaced"
    assert "currentColor" in text


def test_every_number_is_there(directory: Path, page: Page) -> None:
    found = Artifacts.of(directory)
    tables = [table[1:] for table in page.tables]
    for expected in (
        report.evaluation_table(found.evaluations[0].content),
        report.position_table(found.evaluations[0].content),
        report.texts_table(found.texts[0].content),
        report.tasks_table(found.tasks[0].content),
        report.tuning_table(found.tunings[0].content),
        report.plan_table(found.plans[0].content, found.tunings[0].content.level),
        report.threshold_table(found.statistics[0].content, (0.25, 0.5, 0.65)),
        report.speed_table(found.benchmarks[0].content),
    ):
        assert expected[1] in tables
    files = [row[0] for row in page.tables[-1][1:]]
    beside = ("config.json", "channels.vectors.safetensors")  # not ours; part of channels.json
    assert sorted(files) == sorted(path.name for path in directory.iterdir() if path.name not in beside)


def test_thresholds_of_channels(text: str) -> None:
    assert set(re.findall(r"Thresholds of channels by projection at level [\d.]+, (\w+)", text)) == {"channels"}


def test_channels_always_and_never_read() -> None:
    thresholds = torch.tensor([-1.0, 0.0, 0.5, 1.0, 1.5, DROP_ALL / 4])
    (row,) = report.channel_table({"q_proj": thresholds})[1]
    assert row == ["q_proj", "6", "33.3", "16.7", "0.55", "1", "1.45"]
    assert report.channel_table({"q_proj": thresholds[:1]})[1] == [["q_proj", "1", "100.0", "0.0", "", "", ""]]


def test_the_same_files_give_the_same_page(directory: Path, text: str, tmp_path: Path) -> None:
    write_report(directory, tmp_path / "again.html", f"title {EVIL}")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_what_is_missing_is_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes((directory / "bench.json").read_bytes())
    write_report(tmp_path, tmp_path / "page.html", "bench alone")
    said = "".join(Page((tmp_path / "page.html").read_text(encoding="utf-8")).text)
    assert "Not here: no statistics (`teal calibrate`), no plans (`teal allocate`), no evaluations" in said
    assert "No file here names its model" in said


def test_several_models_are_told_apart(directory: Path, tmp_path: Path) -> None:
    tiny_plan(tiny_model()).save(tmp_path / "one.json")
    random_plan(identify(tiny_model(intermediate_size=64)), vectors=True).save(tmp_path / "two.json")
    write_report(tmp_path, tmp_path / "page.html", "two models")
    said = "".join(Page((tmp_path / "page.html").read_text(encoding="utf-8")).text)
    assert "Results of 2 different models stand side by side" in said


def edit_measurement(payload: Any) -> None:
    payload["measurements"][0]["perplexity"] = "many"


def edit_rule(payload: Any) -> None:
    payload["rule"]["sequences"] = None


def edit_details(payload: Any) -> None:
    del payload["details"]["model"]


@pytest.mark.parametrize(
    ("name", "edit"),
    [("evaluation.json", edit_measurement), ("evaluation.json", edit_rule), ("bench.json", edit_details)],
)
def test_values_that_are_none(directory: Path, tmp_path: Path, name: str, edit: Any) -> None:
    payload = json.loads((directory / name).read_text())
    edit(payload)
    (tmp_path / name).write_text(json.dumps(payload))
    with pytest.raises(TealError, match=f"{name} is damaged"):
        write_report(tmp_path, tmp_path / "page.html", "damaged")
    assert not (tmp_path / "page.html").exists()


def test_a_tuning_on_tasks(page: Page) -> None:
    said = "".join(page.text)
    assert "accuracy lost: at most 50 points" in said
    assert "40 items, multiple choice); 20 items to search, 20 to confirm" in said
    assert any(table[0][-1] == "items" for table in page.tables)


def test_little_to_show(tmp_path: Path) -> None:
    """A single sequence, level 0 alone, and a tuning whose answer is dense."""
    plan, tokens = tiny_plan(tiny_model()), random_tokens(16, 20)
    write_json(tmp_path / "one.json", evaluate(tiny_model(), tokens[:1], plan, (0.25,)).to_json())
    write_json(tmp_path / "dense.json", evaluate(tiny_model(), tokens[:2], plan, (0.0,)).to_json())
    write_json(tmp_path / "tuning.json", tune(tiny_model(), tokens, plan, "0.0000001nats", metric="kl").to_json())
    write_report(tmp_path, tmp_path / "page.html", "little")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.all("svg")) == 3
    assert "dense is the answer" in "".join(page.text).lower()
