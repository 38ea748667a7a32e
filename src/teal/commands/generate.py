"""Generate text after a prompt: prefill is dense, every new token is decoded sparsely.

examples:
  teal generate --prompt "The city of"                       the embedded model
  teal generate ./Llama-3.2-1B --prompt "Once" --level 0.4
  echo "Once upon a time" | teal generate ./Llama-3.2-1B --dense --temperature 0.8 --top-p 0.95
"""

import argparse

from teal.commands import common
from teal.commands.generation import TextModel, add_generation, conclude
from teal.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("--prompt", help="the text to continue (default: standard input)")
    add_generation(parser, max_new_tokens=100, temperature=0.0)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.checkpoint import resolve_model
    from teal.data import read_stdin
    from teal.engine.text import encode_prompt

    if arguments.prompt is None:
        resolve_model(arguments.model)  # before standard input is awaited: the one operand may be meant as the prompt
    prompt = read_stdin().rstrip("\n") if arguments.prompt is None else arguments.prompt
    if not prompt.strip():
        raise UsageError("the prompt is empty; pass --prompt TEXT or pipe text in")
    model = TextModel(arguments)
    generation = model.stream(encode_prompt(model.tokenizer, prompt), arguments.max_new_tokens, arguments.stop)
    stream = common.human_stream(arguments)
    print(prompt, end="", file=stream, flush=True)
    for piece in generation:
        print(piece, end="", file=stream, flush=True)
    print(file=stream)
    conclude(generation.statistics)
    common.write_result(arguments, {"prompt": prompt, **generation.statistics})
