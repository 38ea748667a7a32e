"""Scoring: log-likelihoods are those of decoding token by token, in batches as alone; writing is real decode."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import BEGIN, END, byte_tokenizer, decode_logits, generate, random_plan, tiny_model, tiny_plan
from torch import Tensor

from teal.errors import TealError
from teal.linear import sparse_from
from teal.scoring import TokenRequest, continue_greedily, encode_request, score, shorten
from teal.sparse_model import sparsify
from teal.sparsity_meter import SparsityMeter
from teal.structure import identify

DENSE_TOKENS = 4


def requests() -> list[TokenRequest]:
    texts = [("The city of", " Rome"), ("It rained, so she took", " an umbrella along"), ("A", "nd")]
    return [encode_request(byte_tokenizer(), *pair) for pair in texts]


def decoded(model: Any, request: TokenRequest) -> tuple[Tensor, Tensor]:
    """Log-probabilities [scored, V] of a sparse model that decodes a request, and its scored tokens."""
    ids = torch.tensor([request.ids])
    first = min(DENSE_TOKENS, len(request.ids) - request.scored)
    logits = decode_logits(model, ids, first)[0, :-1]
    if first < DENSE_TOKENS:  # a dense position is among those that predict
        logits = torch.cat([model(input_ids=ids[:, :first]).logits[0, -1:].float(), logits])
    return logits[-request.scored :].log_softmax(-1).detach(), ids[0, -request.scored :]


class TestScore:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3"])
    def test_scores_are_those_of_decoding(self, family: str) -> None:
        model = tiny_model(family)
        sparsify(model, tiny_plan(model), 0.6)
        long = requests()[:2]
        with sparse_from(model, DENSE_TOKENS):
            found = score(model, long, DENSE_TOKENS)
        for request, scored in zip(long, found, strict=True):
            log_p, targets = decoded(model, request)
            expected = log_p.gather(1, targets[:, None]).sum().item()
            assert scored.log_likelihood == pytest.approx(expected, abs=2e-3)
            assert scored.is_greedy == bool((log_p.argmax(-1) == targets).all())

    def test_batches_change_nothing(self) -> None:
        model = tiny_model()
        sparsify(model, random_plan(identify(model), vectors=True), 0.5)
        with sparse_from(model, DENSE_TOKENS):
            together = score(model, requests(), DENSE_TOKENS)
            alone = [score(model, [request], DENSE_TOKENS)[0] for request in requests()]
        assert [found.log_likelihood for found in together] == pytest.approx([one.log_likelihood for one in alone])
        assert [found.is_greedy for found in together] == [one.is_greedy for one in alone]

    def test_a_greedy_continuation_is_known_as_one(self) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.0)
        prompt = torch.tensor([[BEGIN, 70, 80, 90]])
        written = generate(model, prompt, 5)[0].tolist()
        greedy = TokenRequest((*prompt[0].tolist(), *written), 5)
        other = TokenRequest((*greedy.ids[:-1], written[-1] - 1), 5)
        assert [found.is_greedy for found in score(model, [greedy, other])] == [True, False]

    def test_only_sparse_tokens_that_predict_scored_ones_are_counted(self) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.6)
        request = requests()[1]
        ids, first = torch.tensor([request.ids]), len(request.ids) - request.scored - 1
        meter, expected = SparsityMeter(model), SparsityMeter(model)
        with sparse_from(model, DENSE_TOKENS):
            score(model, [request, requests()[2]], DENSE_TOKENS, meter.measuring)  # the other's are all dense
        with torch.no_grad():
            cache = model(input_ids=ids[:, :DENSE_TOKENS], use_cache=True).past_key_values
            for position in range(DENSE_TOKENS, len(request.ids) - 1):
                step = ids[:, position : position + 1]
                if position < first:
                    model(input_ids=step, past_key_values=cache, use_cache=True)
                else:
                    with expected.measuring():
                        model(input_ids=step, past_key_values=cache, use_cache=True)
        assert meter.projections() == pytest.approx(expected.projections(), abs=5e-3)
        assert meter.sparsity() > 0.4

    def test_nan(self) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.0)
        model.lm_head.weight.data[3, 3] = float("nan")
        with pytest.raises(TealError, match="logits are NaN or infinite"):
            score(model, requests())


class TestRequests:
    def test_the_space_belongs_to_the_continuation(self) -> None:
        tokenizer = byte_tokenizer()
        assert encode_request(tokenizer, "one ", "two") == encode_request(tokenizer, "one", " two")
        request = encode_request(tokenizer, "one", " two")
        assert (len(request.ids), request.ids[0], request.scored) == (8, BEGIN, 4)

    def test_nothing_to_score(self) -> None:
        with pytest.raises(TealError, match="the continuation '' adds no token"):
            encode_request(byte_tokenizer(), "one", "")

    def test_nothing_before(self) -> None:
        tokenizer = byte_tokenizer()
        assert encode_request(tokenizer, "", "two").scored == 3
        tokenizer.bos_token = None
        with pytest.raises(TealError, match="the context is empty"):
            encode_request(tokenizer, "", "two")

    def test_shortened_from_the_left(self) -> None:
        request = TokenRequest((0, 1, 2, 3, 4, 5, 6), 2)
        assert shorten(request, 7, [0]) == request
        assert shorten(request, 5, [0]) == TokenRequest((0, 3, 4, 5, 6), 2)
        assert shorten(request, 5, []) == TokenRequest((2, 3, 4, 5, 6), 2)
        assert shorten(request, 4, [0]) == TokenRequest((0, 4, 5, 6), 2)
        with pytest.raises(TealError, match="room for 3 tokens of a text, too little for 2 to score and one before"):
            shorten(request, 3, [0])


PROMPTS = [[BEGIN, 70, 80, 90], [BEGIN, 75, 85, 95, 105, 66, 77]]


class TestWriting:
    def write(
        self, model: Any, prompts: Sequence[Sequence[int]], stop: Sequence[str] = (), **options: Any
    ) -> list[str]:
        return continue_greedily(model, byte_tokenizer(), prompts, stop, 12, **options)

    def test_it_is_what_generate_gives(self) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.5)
        model.generation_config.eos_token_id = None
        expected = [byte_tokenizer().decode(generate(model, torch.tensor([prompt]))[0]) for prompt in PROMPTS]
        assert [self.write(model, [prompt])[0] for prompt in PROMPTS] == expected
        assert self.write(model, PROMPTS) == expected

    def test_stop_strings_end_a_row_and_are_cut(self) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.5)
        whole = self.write(model, PROMPTS)
        stop = whole[0][4:6]
        assert self.write(model, PROMPTS, [stop]) == [text.partition(stop)[0] for text in whole]

    def test_rows_that_have_ended_are_not_counted(self) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.6)
        stop = self.write(model, PROMPTS)[0][1:3]
        together, apart = SparsityMeter(model), SparsityMeter(model)
        self.write(model, PROMPTS, [stop], counting=together.measuring)
        for prompt in PROMPTS:
            self.write(model, [prompt], [stop], counting=apart.measuring)
        assert together.projections() == pytest.approx(apart.projections(), abs=2e-3)
        assert together._total == apart._total

    def test_end_of_text_ends_a_row(self) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.0)
        first = generate(model, torch.tensor(PROMPTS[:1]), 1)[0, 0].item()
        model.generation_config.eos_token_id = [END, first]
        (text,) = self.write(model, PROMPTS[:1])
        assert text == byte_tokenizer().decode([first])

    def test_no_room(self) -> None:
        model = tiny_model()
        with pytest.raises(TealError, match="a prompt of 60 tokens leaves no room for 12 in a context of 64"):
            self.write(model, [[BEGIN] * 60])
