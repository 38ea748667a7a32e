"""Talk to a model. A model without a chat template gets a plain transcript.

examples:
  teal chat ./Llama-3.2-1B-Instruct
  teal chat ./Llama-3.2-1B-Instruct --level 0.4 --system "Answer briefly."

Type /level 0.5 to turn the sparsity, /clear to start anew, /exit (or Ctrl-D) to leave. Ctrl-C ends an answer.
"""

import argparse
import sys

from teal.commands import common
from teal.commands.generation import TextModel, add_generation, conclude
from teal.errors import TealError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("--system", help="the system message")
    add_generation(parser, max_new_tokens=512, temperature=0.7)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    model = TextModel(arguments)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(opening)
    turns: list[dict[str, object]] = []
    print("/level S, /clear, /exit; Ctrl-C ends an answer", file=sys.stderr)
    while (line := _ask()) is not None:
        try:
            command, _, operand = line.partition(" ")
            if line == "/clear":
                messages = list(opening)
            elif command == "/level":
                _turn_level(model, operand.strip())
            elif command in ("/clear", "/exit") or (line.startswith("/") and line[1:].isalpha()):
                raise UsageError(f"{line} is not a command: there are /level S, /clear and /exit")
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                answer = _answer(model, asked, arguments)
                messages = [*asked, {"role": "assistant", "content": str(answer["text"]).strip()}]
                turns.append({"user": line, **answer})
        except (Exception, KeyboardInterrupt) as error:  # a turn that fails ends the turn, not the chat
            if arguments.interrupts.caused(error):
                arguments.interrupts.forget()
                print("\n(ended and forgotten)", file=sys.stderr)
            elif isinstance(error, TealError):
                print(f"teal: {error}", file=sys.stderr)
            else:
                raise
    common.write_result(arguments, {"turns": turns})


def _ask() -> str | None:
    """The next line, None at the end of the chat."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape")  # what is no UTF-8 fails as a prompt
    except KeyboardInterrupt:
        print(file=sys.stderr)
        line = ""
    return None if not line or line.strip() == "/exit" else line.strip()


def _turn_level(model: TextModel, level_text: str) -> None:
    from teal.sparse_model import set_sparsity

    if model.plan is None:
        raise UsageError("this chat is dense; start it without --dense to turn the level")
    try:
        level = common.level(level_text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from None
    set_sparsity(model.engine or model.model, level)
    model.level = level
    print(common.level_name(level), file=sys.stderr)


def _answer(model: TextModel, messages: list[dict[str, str]], arguments: argparse.Namespace) -> dict[str, object]:
    from teal.engine.text import encode_chat

    prompt_ids, stop = encode_chat(model.tokenizer, messages)
    generation = model.stream(prompt_ids, arguments.max_new_tokens, [*stop, *arguments.stop])
    stream = common.human_stream(arguments)
    for piece in generation:
        print(piece, end="", file=stream, flush=True)
    print(file=stream)
    conclude(generation.statistics)
    return generation.statistics
