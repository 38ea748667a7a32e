"""What `generate` and `chat` share: sampling options, loading, and one way to stream text from any model."""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.commands import common
from teal.errors import TealError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    import torch

    from teal.engine.generate import Generation
    from teal.engine.model import DecoderModel
    from teal.engine.sampling import SamplingConfig
    from teal.plan import SparsityPlan


def add_generation(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    common.add_plan(parser)
    parser.add_argument(
        "--level", type=common.level, help="sparsity of decode, 0 is dense (default: as tuned, else 0.5)"
    )
    parser.add_argument("--dense", action="store_true", help="no sparsity; needs no plan")
    parser.add_argument(
        "--max-new-tokens", type=common.positive, default=max_new_tokens, metavar="N",
        help=f"at most, and as the context has room (default: {max_new_tokens})",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=common.positive, metavar="N",
        help="room for prompt and new tokens (default: the model's context, at most 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 is greedy (default: {temperature:g})"
    )
    parser.add_argument("--top-k", type=common.positive, help="sample among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens that reach this probability")
    parser.add_argument("--min-p", type=float, help="drop tokens less likely than this share of the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages repetition")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be given several times)"
    )
    parser.add_argument(
        "--log-sparsity", action="store_true",
        help="log the realised sparsity of each token, and warn of text unlike the calibration text; costs one more "
        "prefill after each answer, decoding is as fast as without",
    )  # fmt: skip
    common.add_dtype(parser)
    common.add_weights(parser)
    common.add_head(parser)
    common.add_device(parser)


@dataclass
class TextStream:
    """A generation under way: iterate over pieces of text, then read `statistics`."""

    pieces: Iterator[str]
    statistics: dict[str, Any]

    def __iter__(self) -> Iterator[str]:
        return self.pieces


class TextModel:
    """A loaded model with its tokenizer. The engine decodes the families it knows, transformers the others."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from teal.checkpoint import load_tokenizer, resolve_model
        from teal.sparse_model import default_level

        if arguments.dense and (arguments.plan is not None or arguments.level is not None):
            raise UsageError("--dense is without sparsity: leave out --plan and --level, or --dense")
        self.plan, level = (None, 0.0) if arguments.dense else common.chosen_plan(arguments)
        level = level if arguments.level is None else arguments.level
        self.level = default_level(self.plan) if level is None and self.plan is not None else level or 0.0
        self.log_sparsity = arguments.log_sparsity
        if self.log_sparsity and self.level == 0:
            raise UsageError("without sparsity, by --dense or a level of 0, there is none to log")
        directory = resolve_model(arguments.model)
        common.check_device(arguments.device)
        self.sampling = sampling_config(arguments)
        self.tokenizer = load_tokenizer(directory)
        self.engine: DecoderModel | None = None
        self.model: Any = None
        self.context = 0
        self._load(arguments, directory, self.plan)

    def _load(self, arguments: argparse.Namespace, directory: Path, plan: "SparsityPlan | None") -> None:
        from teal import checkpoint
        from teal.engine.load import DEFAULT_CONTEXT, load_engine
        from teal.sparse_model import set_sparsity, sparsify

        dtype, quantization = common.dtype_of(arguments), common.quantization_of(arguments)
        try:
            self.engine = load_engine(
                directory, dtype, arguments.device, plan, self.level, arguments.context,
                **quantization, strict=arguments.strict,
            )  # fmt: skip
            self.engine.lm_head.set_sparsity(arguments.head_sparsity)
            self.context = self.engine.context
        except UnsupportedModelError as reason:
            if any(quantization.values()) or arguments.head_sparsity:
                raise TealError(f"--weights and the --head options need the engine: {reason}") from reason
            why = str(reason).partition(";")[0]  # what follows says what is done here
            warnings.warn(f"decoding through transformers: {why}", stacklevel=2)
            self.model = common.load_model(directory, dtype, arguments.device)
            most = checkpoint.context_length(self.model.config)
            if arguments.context is not None and arguments.context > most:
                raise TealError(f"context must be between 1 and the model's {most}, got {arguments.context}") from None
            self.context = arguments.context or min(most, DEFAULT_CONTEXT)
            if plan is None and getattr(self.model, "sparsity_plan", None) is not None:
                set_sparsity(self.model, 0.0)  # the checkpoint brings a plan of its own; --dense means dense
            if plan is not None:
                sparsify(self.model, plan, self.level, strict=arguments.strict)

    def stream(self, prompt_ids: Sequence[int], max_new_tokens: int, stop: Sequence[str]) -> TextStream:
        """Generate after a prompt, as far as the context goes; the statistics fill in when the text has ended.

        Raises TealError for a prompt that fills the context.
        """
        from teal.engine.generate import generate

        room = self.context - len(prompt_ids)
        if room < 1:
            raise TealError(
                f"the prompt of {len(prompt_ids)} tokens leaves no room in a context of {self.context}; shorten it "
                "(in a chat: /clear), or pass a larger --context if the model has one"
            )
        max_new_tokens = min(max_new_tokens, room)
        statistics: dict[str, Any] = {"level": self.level, "prompt_tokens": len(prompt_ids)}
        if self.engine is None:
            return TextStream(self._transformers_pieces(prompt_ids, max_new_tokens, stop, statistics), statistics)
        generation = generate(self.engine, self.tokenizer, prompt_ids, max_new_tokens, self.sampling, stop)
        return TextStream(self._engine_pieces(generation, prompt_ids, statistics), statistics)

    def _engine_pieces(
        self, generation: "Generation", prompt_ids: Sequence[int], statistics: dict[str, Any]
    ) -> Iterator[str]:
        yield from generation
        result = generation.result
        statistics |= {
            "engine": "teal", "text": result.text, "finish_reason": result.finish_reason,
            "new_tokens": len(result.token_ids), "decode_tokens_per_second": round(result.decode_tokens_per_second, 2),
        }  # fmt: skip
        self._log_sparsity(prompt_ids, result.token_ids, statistics)

    def _log_sparsity(self, prompt_ids: Sequence[int], token_ids: Sequence[int], statistics: dict[str, Any]) -> None:
        """Add the realised sparsity to the statistics if that was asked for."""
        from teal.drift import log_sparsity

        if not self.log_sparsity or not self.level or len(token_ids) < 2:
            return
        statistics["sparsity"] = log_sparsity(self.engine or self.model, prompt_ids, token_ids).to_json()

    def _transformers_pieces(
        self, prompt_ids: Sequence[int], max_new_tokens: int, stop: Sequence[str], statistics: dict[str, Any]
    ) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteriaList

        from teal.data import check_tokens

        sampling = self.sampling
        ids = torch.tensor([list(prompt_ids)], device=self.model.device)
        check_tokens(ids, self.model)
        torch.manual_seed(sampling.seed)
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0, "max_new_tokens": max_new_tokens}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p}
            options |= {"top_k": sampling.top_k or 0}
        options |= {"repetition_penalty": sampling.repetition_penalty}
        reader = _Reader(self.tokenizer, prompt_ids, stop)
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([reader]), **options
        )
        tokens = output[0, len(prompt_ids) :]
        ended = reader.stopped or tokens[-1].item() in _end_tokens(self.model)
        statistics |= {
            "engine": "transformers", "text": reader.text(), "new_tokens": len(tokens),
            "finish_reason": "stop" if ended else "length",
            "decode_tokens_per_second": round(reader.decode_tokens_per_second(), 2),
        }  # fmt: skip
        yield statistics["text"]
        self._log_sparsity(prompt_ids, tokens.tolist(), statistics)


class _Reader:
    """A transformers stopping criterion that turns tokens into text as the engine does, and keeps the time."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        from teal.engine.text import Detokenizer, StopStrings

        self._detokenizer, self._stops = Detokenizer(tokenizer, prompt_ids), StopStrings(stop)
        self._pieces: list[str] = []
        self._times: list[float] = []
        self.stopped = False

    def __call__(self, input_ids: "torch.Tensor", scores: object, **_: object) -> "torch.Tensor":
        self._times.append(time.perf_counter())
        self._take(self._detokenizer.feed(int(input_ids[0, -1])))
        return input_ids.new_full((len(input_ids),), self.stopped).bool()

    def text(self) -> str:
        """All of it, without the stop string."""
        if not self.stopped:
            self._take(self._detokenizer.flush())
        if not self.stopped:
            self._pieces.append(self._stops.flush())
        return "".join(self._pieces)

    def decode_tokens_per_second(self) -> float:
        """Without prefill, which gives the first token."""
        first, *others = self._times
        return len(others) / (others[-1] - first) if others else 0.0

    def _take(self, text: str) -> None:
        given, self.stopped = self._stops.feed(text)
        self._pieces.append(given)


def _end_tokens(model: Any) -> tuple[int, ...]:
    ends = model.generation_config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def sampling_config(arguments: argparse.Namespace) -> "SamplingConfig":
    """The sampling that was asked for; refuses values out of range."""
    from teal.engine.sampling import SamplingConfig

    given = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return SamplingConfig(**{name: getattr(arguments, name) for name in given if getattr(arguments, name) is not None})


def conclude(statistics: dict[str, Any]) -> None:
    """Say in one line how a finished generation went, and warn of text unlike the calibration text."""
    sparse = common.level_name(statistics["level"])
    log = statistics.get("sparsity")
    if log:
        sparse += f", realised {log['realised']:.3f} where {log['expected']:.3f} was expected"
    print(
        f"{statistics['prompt_tokens']} prompt tokens, {statistics['new_tokens']} new, "
        f"{statistics['decode_tokens_per_second']} tokens/s ({sparse}, {statistics['engine']}), "
        f"ended by {statistics['finish_reason']}",
        file=sys.stderr,
    )
    if log and log["warning"]:
        warnings.warn(log["warning"], stacklevel=2)
