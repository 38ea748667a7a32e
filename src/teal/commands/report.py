"""Write one self-contained HTML page about everything that was measured into a directory.

examples:
  teal report teal-Llama-3.2-1B                    writes teal-Llama-3.2-1B/report.html
  teal report results --output page.html --level 0.4

Whatever lies there is shown: statistics, plans, evaluations, tunings, benchmarks (`--json FILE` writes the results into
the directory); what is missing is named. The page needs no network and no other file.
"""

import argparse
from pathlib import Path

from teal.commands import common
from teal.errors import TealError, UsageError

OPERANDS = "DIR "
REPORT = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory with the results")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"where to write (default: DIR/{REPORT})")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page")
    parser.add_argument("--title", help="of the page (default: the directory's name)")
    parser.add_argument("--level", type=common.level, help="of the heat maps (default: as tuned, else 0.5)")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.artifacts import check_writable
    from teal.report_page import write_report

    output = arguments.output or arguments.directory / REPORT
    if arguments.directory.is_dir():
        check_writable(output)
        if output.exists() and not arguments.overwrite:
            raise TealError(f"{output} exists; name another --output or pass --overwrite")
        if output.exists() and not output.read_bytes().lstrip().lower().startswith(b"<!doctype html"):
            raise UsageError(f"{output} is not a page, and would be lost; name another --output")
    title = arguments.title or f"teal: {arguments.directory.resolve().name}"
    artifacts = write_report(arguments.directory, output, title, arguments.level)
    shown = {kind: [artifact.name for artifact in found] for kind, found in vars(artifacts).items()}
    counted = ", ".join(f"{kind} {len(names)}" for kind, names in shown.items() if names)
    common.say(arguments, f"{output} ({output.stat().st_size / 1024:.0f} KiB): {counted}")
    common.write_result(arguments, {"output": str(output), "shown": shown})
