"""report: what a run of the pipeline found, as one Markdown page."""

from collections.abc import Sequence
from typing import Any

from teal.benchmark import Benchmark
from teal.evaluation import Evaluation
from teal.plan import SparsityPlan


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def evaluation_section(result: Evaluation) -> str:
    """Quality against sparsity, with the token rule."""
    rows = [
        [
            "dense",
            "0",
            "0",
            f"{result.dense_perplexity:.2f} ± {result.dense_perplexity_error:.2f}",
            "",
            "",
            "",
        ]
    ]
    rows += [
        [
            m.plan, f"{m.level:g}", f"{m.sparsity:.3f}", f"{m.perplexity:.2f} ± {m.perplexity_error:.2f}",
            f"{m.increase:+.2f} % ± {m.increase_error:.2f}", f"{m.kl:.4f} ± {m.kl_error:.4f}",
            f"{100 * m.top1_agreement:.1f} % ± {100 * m.top1_error:.1f}",
        ]
        for m in result.measurements
    ]  # fmt: skip
    rule = result.rule
    columns = ["plan", "nominal", "realised", "perplexity", "increase", "KL (nats)", "top-1 agreement"]
    return "\n\n".join(
        [
            "## Quality",
            markdown_table(columns, rows),
            f"Rule: {rule['sparse']}; counted: {rule['counted']} ({rule['tokens_counted']} predictions, "
            f"{rule['dtype']}). ± is one standard error over sequences; of the increase, of the paired difference.",
        ]
    )


def speed_section(result: Benchmark) -> str:
    """Decode speed, bytes and bandwidth."""
    rows = [
        [
            "dense" if s.level == 0 else f"{s.level:g}", f"{s.sparsity:.3f}",
            f"{s.tokens_per_second:.1f} ({s.slowest:.1f} to {s.fastest:.1f})",
            f"{s.speedup:.2f} ({s.speedup_slowest:.2f} to {s.speedup_fastest:.2f})",
            f"{s.bytes_needed / 1e6:.1f}", f"{s.bytes_read / 1e6:.1f}", f"{100 * s.bandwidth_share:.0f} %",
        ]
        for s in result.speeds
    ]  # fmt: skip
    columns = [
        "level",
        "realised",
        "tokens/s (spread)",
        "x dense (spread)",
        "MB needed",
        "MB read",
        "of bandwidth",
    ]
    d = result.details
    return "\n\n".join(
        [
            "## Decode speed",
            markdown_table(columns, rows),
            f"{d['dtype']} on {d['device']}, layout {d['layout']}, {d['threads']} threads; medians of {d['repeats']} "
            f"interleaved repeats; read bandwidth {result.bandwidth / 1e9:.1f} GB/s in the same run. "
            f"Rule: {d['rule']}. "
            "Layout `row_major` computes with zeroed inputs and reads every weight: right, but not faster.",
        ]
    )


def allocation_section(plan: SparsityPlan, level: float) -> str:
    """The sparsity of every projection at one level."""
    names = list(plan.blocks[0])
    rows = [
        [str(index), *(f"{block[name].sparsity:.2f}" for name in names)]
        for index, block in enumerate(plan.settings(level))
    ]
    columns = ["block", *(name.rpartition(".")[2] for name in names)]
    return f"## Sparsity of each projection at {level:g} ({plan.method})\n\n" + markdown_table(columns, rows)


def samples_section(samples: Sequence[dict[str, Any]]) -> str:
    """Generated text, dense and sparse."""
    parts = ["## Generated text", "One draw each, temperature 0.7, top-p 0.95, the same seed."]
    for sample in samples:
        title = "dense" if sample["level"] == 0 else f"sparsity {sample['level']:g}"
        text = (sample["prompt"] + sample["text"]).strip().replace("\n", "\n> ")
        parts.append(f"**{title}**\n\n> {text}")
    return "\n\n".join(parts)
