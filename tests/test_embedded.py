"""The model that ships inside the package: it loads, it has learned, and sparsity costs what it should."""

import torch

from teal.allocation import allocate
from teal.calibration import calibrate
from teal.checkpoint import EMBEDDED, EMBEDDED_MODEL, Checkpoint, load_model, load_tokenizer
from teal.data import CALIBRATION_TEXT, EVALUATION_TEXT, token_blocks
from teal.engine import encode_prompt, generate, load_engine
from teal.evaluation import evaluate
from teal.structure import identify


def test_files_are_of_the_promised_size():
    assert Checkpoint(EMBEDDED_MODEL).bytes() <= 32 * 2**20
    texts = [path.read_bytes() for path in (CALIBRATION_TEXT, EVALUATION_TEXT)]
    assert 300_000 <= sum(map(len, texts)) <= 500_000
    documents = [set(text.decode().split("\n\n")) for text in texts]
    assert not documents[0] & documents[1]
    assert "WikiText-2" in (EMBEDDED / "README.md").read_text(encoding="utf-8")


def test_its_fingerprint_stays_what_artifacts_say():
    fingerprint = "504ae4b8e1b5eab1e56dca1a91de41283ad1bca701fb7b0fa72e40faf10299d8"
    loaded = (load_model(EMBEDDED_MODEL, dtype) for dtype in (None, torch.float32, torch.bfloat16))
    models = (*loaded, load_engine(EMBEDDED_MODEL, torch.bfloat16))
    assert {identify(model).weights for model in models} == {fingerprint}


def test_quality_dense_and_at_a_quarter():
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    statistics = calibrate(EMBEDDED_MODEL, token_blocks([CALIBRATION_TEXT], tokenizer, length=256, count=8, seed=0))
    text = token_blocks([EVALUATION_TEXT], tokenizer, length=256, count=8)
    model = load_model(EMBEDDED_MODEL, torch.float32)
    result = evaluate(model, text, allocate(statistics, "uniform"), [0.25, 0.5])
    quarter, half = result.measurements
    assert result.dense_perplexity < 30
    assert 0 < quarter.increase < 5 < half.increase < 40
    assert 0.22 < quarter.sparsity < 0.28
    assert 0.47 < half.sparsity < 0.53


def test_it_writes_words():
    engine = load_engine(EMBEDDED_MODEL)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    text = generate(engine, tokenizer, encode_prompt(tokenizer, "The city of"), 30).result.text
    words = [word.strip('.,"()') for word in text.split()]
    assert len(words) > 10
    assert sum(word.isalpha() for word in words) > len(words) / 2
