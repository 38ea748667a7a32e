"""`teal VERB ...`: the table of verbs and the exit codes; each verb is a module of `teal.commands`."""

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from teal.commands.common import check_json
from teal.errors import TealError, UsageError
from teal.interrupts import noting_interrupts

VERBS = {
    "demo": "run the whole pipeline on the embedded model and write a report",
    "rotate": "write a model in other axes, in which sparsity costs it less",
    "calibrate": "measure the activations of a model on a little text",
    "allocate": "decide how sparse each projection is at each level",
    "import-published": "make a plan of the TEAL repository's published artifacts",
    "evaluate": "measure what sparsity costs in quality",
    "tune": "find the level that reads the fewest bytes within a loss that you set",
    "tasks": "measure what sparsity costs in tasks",
    "generate": "generate text",
    "chat": "talk to a model",
    "bench": "measure decode speed, dense and sparse",
    "report": "write a page about everything that was measured into a directory",
    "inspect": "show what an artifact or a model holds",
    "doctor": "show versions, devices and which kernels work here",
}
EXAMPLES = """
example, on the model that comes with teal:
  teal calibrate && teal allocate && teal generate --prompt "The city of"

teal VERB --help shows a verb's options and examples.
"""


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed or interrupted, 2 wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what the user must know, our own lines say
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text of a model may have characters that a terminal has not
    parsed = argparse.Namespace(interrupted="interrupted")
    with noting_interrupts() as interrupts:
        try:
            _parse(arguments, parsed)
            parsed.interrupts = interrupts
            check_json(parsed)
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                parsed.run(parsed)
            sys.stdout.flush()
            return 0
        except SystemExit as exit_:  # after --help
            return int(exit_.code or 0)
        except BrokenPipeError:  # the reader of our output has gone, as in `teal inspect ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (Exception, KeyboardInterrupt) as error:
            if interrupts.caused(error):
                print(f"\nteal: {parsed.interrupted}", file=sys.stderr)
                return 1
            if isinstance(error, TealError):
                print(f"teal: {error}", file=sys.stderr)
                return error.exit_code
            if _is_out_of_memory(error):
                print(f"teal: {str(error).splitlines()[0]} Ask for less context, or use --device cpu.", file=sys.stderr)
                return 1
            raise


def _is_out_of_memory(error: BaseException) -> bool:
    """On a GPU; torch, which is not loaded for every verb, has an exception for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _parse(arguments: Sequence[str], parsed: argparse.Namespace) -> None:
    """Put the verb's options into `parsed`, with `run`, its function. Raises UsageError; exits after --help."""
    parser = _Parser(
        prog="teal",
        description="Training-free activation sparsity for language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    chosen = parser
    for name, summary in VERBS.items():
        subparser = verbs.add_parser(
            name, help=summary, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == next(iter(arguments), None):  # only the chosen verb is imported
            command = importlib.import_module(f"teal.commands.{name.replace('-', '_')}")
            subparser.usage = f"%(prog)s {getattr(command, 'OPERANDS', '[MODEL] ')}[options]"
            subparser.description = command.__doc__
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
            parsed.interrupted = getattr(command, "INTERRUPTED", parsed.interrupted)
            chosen = subparser
    _, unknown = parser.parse_known_args(arguments, parsed)
    if unknown:
        chosen.error(f"unknown arguments: {' '.join(unknown)}")


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"teal: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
