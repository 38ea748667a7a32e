"""The tables state what was measured, with the rule and the errors."""

from dataclasses import replace
from typing import Any

from helpers import random_tokens, tiny_model, tiny_plan

from teal import report
from teal.benchmark import Benchmark, LevelSpeed
from teal.calibration import calibrate
from teal.evaluation import Evaluation, Measurement, evaluate
from teal.structure import identify


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
    head, (dense, sparse) = report.evaluation_table(evaluation())
    text = report.evaluation_rule(evaluation())
    assert head[:3] == ["plan", "nominal", "realised"]
    assert dense == ["dense", "0", "0", "20.554 ± 1.408", "", "", ""]
    figures = ["24.817 ± 1.942", "+20.74 ± 2.38", "0.2171 ± 0.0144", "73.91 ± 1.11"]
    assert sparse == ["greedy", "0.5", "0.5042", *figures]
    assert "1006 predictions in 2 sequences of 512 tokens, bfloat16; sparse: all from 8 on" in text
    assert "± is one standard error" in text


def test_quality_of_a_single_sequence() -> None:
    """Which has no standard error: better none than ± 0."""
    several = evaluation()
    single = replace(several, rule={**several.rule, "sequences": 1})
    _, (dense, sparse) = report.evaluation_table(single)
    text = report.evaluation_rule(single)
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
    assert len(report.evaluation_table(result)[1]) == 3


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
    result = Benchmark(speeds, 24.2e9, details)
    _, (dense, sparse) = report.speed_table(result)
    text = "; ".join(report.speed_rule(result))
    assert dense[:3] == ["dense", "0.0000", "100.00 (90.00-110.00)"]
    assert sparse == ["0.5", "0.5000", "100.50 (90.00-110.00)", "1.50 (1.00-2.00)", "17.7", "30.2", "9"]
    assert "tiny, bfloat16 on cpu, layout row_major, 2 threads, torch 2.13; 5 repeats of 32 tokens after 64" in text
    assert "read bandwidth 24.2 GB/s, measured in the same run; decode only" in text
    assert "at most 3.6e-03 of the largest output (allowed 1.6e-02)" in text
    assert "reads every weight: right, but not faster" in (report.reads_every_weight(result) or "")
    skipping = [replace(speed, bytes_read=speed.bytes_needed) for speed in speeds]
    assert report.reads_every_weight(replace(result, speeds=skipping)) is None


def test_plan() -> None:
    head, (first, second) = report.plan_table(tiny_plan(tiny_model()), 0.5)
    assert head == ["block", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert first == ["0", *["0.500"] * 7]
    assert second[0] == "1"


def test_thresholds() -> None:
    statistics = calibrate(tiny_model(), random_tokens(4, 32))
    head, rows = report.threshold_table(statistics, [0.25, 0.5])
    assert head == ["block", "input", "tokens", "|x| dropped at 0.25", "|x| dropped at 0.5"]
    assert len(rows) == 8
    expected = statistics.blocks[1]["mlp_input"].threshold(0.5)
    assert rows[6] == ["1", "mlp input", "96", rows[6][3], f"{expected:.4g}"]
