"""Run tasks of lm-evaluation-harness on a sparse model.

examples:
  python -m teal.integrations.lm_eval --model ./Llama-3.2-1B --plan plan.json --level 0 0.5 --tasks arc_easy hellaswag
  python -m teal.integrations.lm_eval --model ./Llama-3.2-1B --tasks my_task --include-path ./tasks

Importing this module registers the model "teal" with the harness. The rules are those of `teal tasks`: texts that are
scored are computed as if decoded from position --dense-tokens on, and what is generated is decoded, greedily, after a
dense prompt. Level 0 is dense.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from teal.calibration import DENSE_TOKENS
from teal.checkpoint import load_tokenizer, resolve_model
from teal.commands import common
from teal.data import opening_tokens
from teal.errors import TealError, UsageError
from teal.linear import sparse_from
from teal.plan import SparsityPlan
from teal.progress import track
from teal.scoring import (
    Score,
    TokenRequest,
    batches,
    context_of,
    continue_greedily,
    encode,
    score,
    shorten,
)
from teal.sparse_model import set_sparsity, sparsify
from teal.sparsity_meter import SparsityMeter

BOOTSTRAPS = 1000  # for the standard errors that have no formula
NEW_TOKENS = 256  # where a task names no number
SAMPLING = ("do_sample", "temperature", "top_p", "top_k")

try:
    harness: Any = import_module("lm_eval")
    TemplateLM: Any = import_module("lm_eval.api.model").TemplateLM
    register_model: Any = import_module("lm_eval.api.registry").register_model
    harness_utils: Any = import_module("lm_eval.utils")
    TaskManager: Any = import_module("lm_eval.tasks").TaskManager
except ImportError as error:
    needed = f"lm-evaluation-harness cannot be imported ({error}): pip install 'teal-llm[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"teal: {needed}")
    raise TealError(needed) from error


@register_model("teal")
class TealLM(TemplateLM):
    """The harness's view of a transformers model, sparse by `plan` at `level`, or dense without a plan.

    `pretrained` is a model directory or hub name; `sparsity()` what was realised on the tokens that counted.
    Raises TealError for what cannot be loaded, a plan that does not fit, and requests that are no greedy decoding.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str | None = None,
        level: float | None = None,
        dense_tokens: int = DENSE_TOKENS,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 16,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in common.DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}; choose from {', '.join(common.DTYPES)}")
        if plan is None and level:
            raise UsageError("a level needs a plan")
        if not str(batch_size or 1).isdigit():
            raise UsageError(f"the batch size must be a number, got {batch_size!r}")
        directory = resolve_model(pretrained)
        self.tokenizer = load_tokenizer(directory)
        device = common.check_device(device or "cpu")
        self.model = common.load_model(directory, common.dtype_of(argparse.Namespace(dtype=dtype)), device)
        self.dense_tokens, self.batch = dense_tokens, int(batch_size or 1)
        self._meter: SparsityMeter | None = None
        if plan is not None:
            sparsify(self.model, SparsityPlan.load(plan), level)
            self._meter = SparsityMeter(self.model)

    def set_level(self, level: float) -> None:
        """Turn a model with a plan to another level, and count its sparsity anew."""
        set_sparsity(self.model, level)
        self._meter = SparsityMeter(self.model)

    def sparsity(self) -> float:
        """Share of the block weights' bytes not read, on the tokens that counted since the level was set."""
        return 0.0 if self._meter is None else self._meter.sparsity()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return next(iter(opening_tokens(self.tokenizer)), self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = encode(self.tokenizer, string)
        return ids[len(opening_tokens(self.tokenizer)) :] if add_special_tokens is False else ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for request in requests:
            (text,) = request.args
            found = harness_utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, context_of(self.model), 1
            )
            pairs = [("", *harness_utils.make_disjoint_window(window)) for window in found]
            windows += pairs
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        wanted = [TokenRequest((*context, *scored), len(scored)) for _, context, scored in requests]
        room, opening = context_of(self.model) + 1, opening_tokens(self.tokenizer)  # the last token is not read
        fitting = [shorten(request, room, opening) for request in wanted]

        def ask(some: list[TokenRequest]) -> list[Score]:
            with nullcontext() if self._meter is None else sparse_from(self.model, self.dense_tokens):
                return score(self.model, some, self.dense_tokens, self._counting())

        found = self._in_batches(fitting, ask, "scoring", disable_tqdm)
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts: dict[int, str] = {}
        by_options: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(_generation_options(request.args[1]), []).append(index)
        for (stop, new_tokens), indices in by_options.items():
            room, opening = context_of(self.model) - new_tokens, opening_tokens(self.tokenizer)
            prompts = [
                shorten(TokenRequest(tuple(self.tok_encode(requests[index].args[0])), 0), room, opening)
                for index in indices
            ]

            def ask(some: list[TokenRequest], stop: Any = stop, new_tokens: int = new_tokens) -> list[str]:
                ids = [request.ids for request in some]
                return continue_greedily(self.model, self.tokenizer, ids, stop, new_tokens, self._counting())

            texts.update(zip(indices, self._in_batches(prompts, ask, "generating", disable_tqdm), strict=True))
        return [texts[index] for index in range(len(requests))]

    def _counting(self) -> Any:
        return None if self._meter is None else self._meter.measuring

    def _in_batches(
        self, requests: list[TokenRequest], ask: Callable[[list[TokenRequest]], list[Any]], what: str, quiet: bool
    ) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        parts = list(batches([len(request.ids) for request in requests], self.batch))
        for indices in track(parts, what, len(parts), not quiet):
            for index, answer in zip(indices, ask([requests[index] for index in indices]), strict=True):
                answers[index] = answer
        return answers


def _generation_options(given: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and the number of new tokens. Raises TealError for anything but greedy decoding."""
    options = dict(given)
    until = options.pop("until", None) or ()
    new_tokens = int(options.pop("max_gen_toks", NEW_TOKENS))
    sampling = {name: options.pop(name) for name in SAMPLING if name in options}
    if sampling.get("do_sample") or (sampling.get("do_sample") is None and sampling.get("temperature")):
        raise TealError(f"the task samples ({sampling}); only greedy decoding is measured")
    if options:
        raise TealError(f"the task asks for generation options that are not known: {', '.join(sorted(options))}")
    return ((until,) if isinstance(until, str) else tuple(until)), new_tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the harness at each level and print its tables. Returns the exit code, as `teal.cli.main` does."""
    parser = argparse.ArgumentParser(
        prog="python -m teal.integrations.lm_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="local directory or hub name")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="sparsity plan (default: none, dense)")
    parser.add_argument("--level", type=common.level, nargs="+", metavar="S", help="sparsities; 0 is dense")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="tasks as the harness names them")
    parser.add_argument("--include-path", metavar="DIR", help="a directory with tasks of your own (YAML)")
    parser.add_argument("--num-fewshot", type=common.natural, metavar="N", help="examples (default: the task's)")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--dense-tokens", type=common.natural, default=DENSE_TOKENS, help="default: 8")
    parser.add_argument("--batch", type=common.positive, default=16, metavar="N", help="texts at a time (default: 16)")
    common.add_dtype(parser)
    common.add_device(parser)
    common.add_json(parser)
    given = parser.parse_args(arguments)
    try:
        if given.level and given.plan is None:
            raise UsageError("--level needs --plan")
        results = _run(given)
        common.write_result(given, results)
        return 0
    except TealError as error:
        print(f"teal: {error}", file=sys.stderr)
        return error.exit_code


def _run(given: argparse.Namespace) -> dict[str, Any]:
    manager = TaskManager(include_path=given.include_path)
    if unknown := [name for name in given.tasks if not manager.match_tasks([name])]:
        raise UsageError(f"the harness knows no task {', '.join(unknown)}; pass --include-path for tasks of your own")
    model = TealLM(given.model, given.plan, None, given.dense_tokens, given.dtype, given.device, given.batch)
    levels = [0.0] if given.plan is None else given.level or [model.model.sparsity_level]
    results = {}
    for level in levels:
        if given.plan is not None:
            model.set_level(level)
        found = harness.simple_evaluate(
            model, tasks=given.tasks, num_fewshot=given.num_fewshot, limit=given.limit, task_manager=manager,
            log_samples=False, bootstrap_iters=BOOTSTRAPS,
        )  # fmt: skip
        common.say(given, f"level {level:g}, realised sparsity {model.sparsity():.4f}", harness_utils.make_table(found))
        results[f"{level:g}"] = {"sparsity": model.sparsity(), "results": found["results"]}
    return {"format": "teal.lm_eval", "version": 1, "dense_tokens": given.dense_tokens, "levels": results}


if __name__ == "__main__":
    sys.exit(main())
