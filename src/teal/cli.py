"""`teal VERB ...`: the table of verbs and the exit codes; each verb is a module of `teal.commands`."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from teal.errors import TealError

VERBS = {
    "demo": "run the whole pipeline on the embedded model and write a report",
    "calibrate": "measure the activations of a model on a little text",
    "allocate": "decide how sparse each projection is at each level",
    "import-published": "make a plan of the TEAL repository's published artifacts",
    "evaluate": "measure what sparsity costs in quality",
    "generate": "generate text",
    "chat": "talk to a model",
    "bench": "measure decode speed, dense and sparse",
    "inspect": "show what an artifact or a model holds",
    "doctor": "show versions, devices and which kernels work here",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed or interrupted, 2 wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    parser = argparse.ArgumentParser(prog="teal", description="Training-free activation sparsity for language models.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        subparser = verbs.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == verb:  # only the chosen verb is imported
            command = importlib.import_module(f"teal.commands.{name.replace('-', '_')}")
            subparser.description = command.__doc__
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            parsed.run(parsed)
        sys.stdout.flush()
        return 0
    except TealError as error:
        print(f"teal: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nteal: interrupted; finished work is kept, repeat the command to continue", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone, as in `teal inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"teal: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
