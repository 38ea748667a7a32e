"""Train the small Llama-architecture model that ships inside the package.

    python examples/train_embedded_model.py --corpus corpus.txt --out build/embedded

The corpus is plain text with one document per block, blocks separated by an empty line. The script
splits off held-out documents, trains a byte-level BPE tokenizer, trains the model on one GPU and
writes a Hugging Face directory, the held-out calibration and evaluation texts, and `training.json`
with the figures of the run. The defaults are those of the shipped model: the corpus is small, so it is
seen 24 times, and a weight decay far above the usual 0.1 with a little dropout keeps the model from
memorising it.
`--tokenizer-only` stops after the tokenizer; an existing tokenizer in --out is reused.
"""

import argparse
import json
import lzma
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 6144
CONTEXT = 1024
BEGIN, END = 0, 1  # ids of <|begin_of_text|> and <|end_of_text|>
UNCOUNTED = -100  # cross_entropy ignores such targets
HELD_OUT_DOCUMENTS = 120
EXCERPT_BYTES = 4000
OPTIONS = ("steps", "batch", "learning_rate", "weight_decay", "dropout", "seed")
PROMPTS = ("The city of", "In 1914,", "She was born in")


def read_documents(path: Path) -> list[str]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [document.strip() for document in file.read().split("\n\n") if document.strip()]


def split_documents(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Shuffle with a seed; the first HELD_OUT_DOCUMENTS are never trained on."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order[HELD_OUT_DOCUMENTS:], order[:HELD_OUT_DOCUMENTS]


def write_held_out_texts(held_out: list[str], out: Path) -> None:
    """Half of the held-out documents serve calibration, half evaluation; each gives its opening."""
    half = len(held_out) // 2
    for name, documents in (("calibration.txt", held_out[:half]), ("evaluation.txt", held_out[half:])):
        excerpts = []
        for document in documents:
            cut = document.encode()[:EXCERPT_BYTES].decode(errors="ignore")
            excerpts.append(cut.rsplit("\n", 1)[0] if len(cut) < len(document) and "\n" in cut else cut)
        (out / name).write_text("\n\n".join(excerpts) + "\n", encoding="utf-8")


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", BEGIN)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents in one row of ids, each starting with <|begin_of_text|>."""
    ids: list[int] = []
    for start in range(0, len(documents), 512):
        for encoding in tokenizer.encode_batch(documents[start : start + 512]):
            ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int32)


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:  # residual branches start small, as in GPT-2
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Dropout on the embeddings and on what every residual branch adds; inactive after model.eval()."""

    def drop(module, inputs, output):
        return F.dropout(output, probability, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_hook(drop)
        block.mlp.down_proj.register_forward_hook(drop)


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then cosine to zero; `progress` runs from 0 to 1."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, batch: int, peak: float, weight_decay: float, seed: int
) -> dict:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    data = tokens.cuda()
    generator = torch.Generator(device="cuda").manual_seed(seed)
    offsets = torch.arange(CONTEXT + 1, device="cuda")

    @torch.compile
    def loss_of(inputs, targets):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    model.train()
    started = time.time()
    curve = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, peak)
        starts = torch.randint(len(data) - CONTEXT, (batch, 1), device="cuda", generator=generator)
        rows = data[starts + offsets].long()
        rows[:, 0] = BEGIN  # every window opens as it will at inference
        loss = loss_of(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps:
            curve.append((step, round(loss.item(), 4)))
            print(f"step {step}/{steps} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
    model.eval()
    return {
        "tokens": steps * batch * CONTEXT,
        "epochs": round(steps * batch * CONTEXT / len(tokens), 1),
        "seconds": round(time.time() - started),
        "gpu": torch.cuda.get_device_name(),
        "training_loss": curve,
    }


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, context: int) -> dict:
    """Non-overlapping windows, each opened by <|begin_of_text|>; every token of the text counts."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, device="cuda")
    targets = F.pad(ids, (0, -len(ids) % (context - 1)), value=UNCOUNTED).view(-1, context - 1)
    inputs = F.pad(targets[:, :-1].clamp(min=0), (1, 0), value=BEGIN)
    nll = 0.0
    for rows, wanted in zip(inputs.split(32), targets.split(32), strict=True):
        logits = model(input_ids=rows, use_cache=False).logits.float()
        nll += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return {
        "perplexity": round(math.exp(nll / len(ids)), 3),
        "bits_per_byte": round(nll / math.log(2) / len(text.encode()), 4),
        "tokens": len(ids),
        "context": context,
    }


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: tuple[str, ...], seed: int) -> dict:
    """One continuation of each prompt, with the settings it was drawn with."""
    settings = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    torch.manual_seed(seed)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device="cuda")
        continuation = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=END, **settings)
        texts.append(tokenizer.decode(continuation[0].tolist()))
    return {"settings": settings, "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="plain text, or that as .xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, help="WikiText-2 test, tokenized, to be evaluated on")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=128, help=f"windows of {CONTEXT} tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="its peak")
    parser.add_argument("--weight-decay", type=float, default=1.5)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-only", action="store_true", help="stop before the training of the model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    training, held_out = split_documents(read_documents(args.corpus), args.seed)
    write_held_out_texts(held_out, args.out)
    tokenizer_path = args.out / "tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer(training)
        tokenizer.save(str(tokenizer_path))
    (args.out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "model_max_length": CONTEXT,
            },
            indent=1,
        )
        + "\n"
    )
    if args.tokenizer_only:
        return

    tokens = encode(tokenizer, training)
    model = build_model().cuda()
    add_dropout(model, args.dropout)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {
            "training_documents": len(training),
            "training_tokens": len(tokens),
            "held_out_documents": len(held_out),
        },
        "options": {name: getattr(args, name) for name in OPTIONS},
    }
    print(json.dumps(report), flush=True)
    report |= train(model, tokens, args.steps, args.batch, args.learning_rate, args.weight_decay, args.seed)
    model.bfloat16().save_pretrained(args.out)
    report["held_out"] = evaluate(model, tokenizer, "\n".join(held_out), CONTEXT)
    if args.wikitext:
        from teal.data import detokenize_wikitext

        wikitext = detokenize_wikitext(args.wikitext.read_text(encoding="utf-8"))
        report["wikitext2_test"] = evaluate(model, tokenizer, wikitext, 512)
    report["samples"] = sample(model, tokenizer, PROMPTS, args.seed)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "training_loss"}, indent=1))


if __name__ == "__main__":
    main()
