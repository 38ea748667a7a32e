"""The report states what was measured, with the rule and the errors."""

from dataclasses import replace
from typing import Any

from helpers import random_tokens, tiny_model, tiny_plan

from teal import report
from teal.benchmark import Benchmark, LevelSpeed
from teal.evaluation import Evaluation, Measurement, evaluate
from teal.structure import identify


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line below its head."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table() -> None:
    text = report.markdown_table(["a", "b"], [["1", "2"], ["3", "4"]])
    assert text == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"


def evaluation() -> Evaluation:
    rule: dict[str, Any] = {
        "sparse": "all from 8 on", "counted": "8 to 510", "tokens_counted": 1006, "sequences": 2,
        "sequence_length": 512, "dtype": "bfloat16",
    }  # fmt: skip
    figures = (0.5, 0.5, 0.5042, 24.817, 1.942, 20.74, 2.38, 0.2171, 0.0144, 0.7391, 0.0111)
    measured = Measurement("greedy", *figures, {}, [])
    return Evaluation(20.554, 1.408, [], [measured], rule, identify(tiny_model()))


def test_quality() -> None:
    text = report.quality_section(evaluation())
    head, dense, sparse = rows(text)
    assert head[:3] == ["plan", "nominal", "realised"]
    assert dense == ["dense", "0", "0", "20.554 ± 1.408", "", "", ""]
    figures = ["24.817 ± 1.942", "+20.74 ± 2.38", "0.2171 ± 0.0144", "73.91 ± 1.11"]
    assert sparse == ["greedy", "0.5", "0.5042", *figures]
    assert "1006 predictions in 2 sequences of 512 tokens, bfloat16; sparse: all from 8 on" in text
    assert "± is one standard error" in text


def test_quality_of_a_single_sequence() -> None:
    """Which has no standard error: better none than ± 0."""
    several = evaluation()
    text = report.quality_section(replace(several, rule={**several.rule, "sequences": 1}))
    _, dense, sparse = rows(text)
    assert dense[3] == "20.554"
    assert sparse[3:] == ["24.817", "+20.74", "0.2171", "73.91"]
    assert "in 1 sequence of 512 tokens" in text
    assert "±" not in text


def test_loss_by_position() -> None:
    model = tiny_model()
    result = evaluate(model, random_tokens(2, 40), tiny_plan(model), (0.25, 0.5))
    columns, cells = report.position_table(result)
    assert columns == ["positions", "dense (nats)", "uniform 0.25, increase %", "uniform 0.5, increase %"]
    assert [row[0] for row in cells] == ["8-15", "16-31", "32-38"]
    found = result.measurements[1].positions[2]
    assert cells[2][1] == f"{found.dense:.3f}"
    assert cells[2][3] == f"{found.increase:+.2f} ± {found.increase_error:.2f}"
    alone = replace(result, rule={**result.rule, "sequences": 1})
    assert "±" not in str(report.position_table(alone))


def test_texts() -> None:
    columns, cells = report.texts_table({"wiki": evaluation(), "code": evaluation()})
    assert columns[:3] == ["text", "plan", "nominal"]
    assert [row[:2] for row in cells] == [["wiki", "dense"], ["", "greedy"], ["code", "dense"], ["", "greedy"]]


def test_quality_of_a_real_run() -> None:
    model = tiny_model()
    result = evaluate(model, random_tokens(2, 16), tiny_plan(model), (0.25, 0.5))
    assert len(rows(report.quality_section(result))) == 4


def test_speed() -> None:
    speeds = [
        LevelSpeed(level, level, 100 + level, 90, 110, 1 + level, 1, 2, 17_700_000, 30_200_000, 0.09)
        for level in (0.0, 0.5)
    ]
    details = {
        "model": "tiny", "dtype": "bfloat16", "device": "cpu", "layout": "row_major", "threads": 2, "torch": "2.13",
        "repeats": 5, "new_tokens": 32, "prompt_tokens": 64, "rule": "decode only",
        "largest_relative_error": 0.0036, "tolerance": 0.016,
    }  # fmt: skip
    text = report.speed_section(Benchmark(speeds, 24.2e9, details))
    _, dense, sparse = rows(text)
    assert dense[:3] == ["dense", "0.0000", "100.00 (90.00-110.00)"]
    assert sparse == ["0.5", "0.5000", "100.50 (90.00-110.00)", "1.50 (1.00-2.00)", "17.7", "30.2", "9"]
    assert "tiny, bfloat16 on cpu, layout row_major, 2 threads, torch 2.13; 5 repeats of 32 tokens after 64" in text
    assert "read bandwidth 24.2 GB/s, measured in the same run; decode only" in text
    assert "at most 3.6e-03 of the largest output (allowed 1.6e-02)" in text
    assert "reads every weight: right, but not faster" in text
    skipping = [replace(speed, bytes_read=speed.bytes_needed) for speed in speeds]
    assert "every weight" not in report.speed_section(Benchmark(skipping, 24.2e9, details))


def test_allocation() -> None:
    text = report.allocation_section(tiny_plan(tiny_model()), 0.5)
    head, first, second = rows(text)
    assert head == ["block", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert first == ["0", *["0.50"] * 7]
    assert second[0] == "1"


def test_samples() -> None:
    text = report.samples_section(
        [{"level": 0.0, "prompt": "The city", "text": " of\nlight "}, {"level": 0.5, "prompt": "The city", "text": "!"}]
    )
    assert "**dense**\n\n> The city of\n> light" in text
    assert "**sparsity 0.5**\n\n> The city!" in text
