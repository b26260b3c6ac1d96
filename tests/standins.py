"""Published teachers in small: made by transformers and tokenizers, laid out as the hub's cache lays them, so that what loads the
real ones loads these without a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.corpus import corpora

ENVIRONMENT = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
PYTHIA, OLMO, LLAMA, BERT = "EleutherAI/pythia-14m", "allenai/OLMo-2-tiny", "meta/llama-tiny", "google/multiberts-seed_0"
STEPS = (1000, 2000, 3000)
PADDED = 384  # rows of Pythia's embedding, as 50,304 for 50,277 tokens
LENGTH = 32


def environment(home: Path) -> dict[str, str]:
    """Of a process that finds the stand-ins under `home` and no network."""
    return {**os.environ, "HF_HOME": str(home), **dict.fromkeys(ENVIRONMENT, "1")}


def place(home: Path, repository: str, revision: str, files: Path) -> None:
    """Put a folder's files into the hub's cache as one revision of a repository."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for file in files.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        if not blob.exists():
            blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path(os.path.relpath(blob, snapshot)))


# --------------------------------------------------------------------------------------------------------------- tokenizers


def byte_level_bpe(texts: list[str], size: int = 340) -> tokenizers.Tokenizer:
    """As GPT-NeoX's: byte-level BPE over NFC, two special tokens, and runs of blanks that are added and not special."""
    own = tokenizers.Tokenizer(models.BPE())
    own.normalizer, own.decoder = normalizers.NFC(), decoders.ByteLevel()
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator(texts, trainer)
    own.add_tokens([tokenizers.AddedToken(" " * count, normalized=True) for count in range(2, 8)])
    return own


def save_neox_tokenizer(folder: Path, texts: list[str]) -> None:
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(texts), **named).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPTNeoXTokenizer"}))


def save_llama_tokenizer(folder: Path, texts: list[str], size: int = 400) -> None:
    """Llama's own tokenizer.model, sentencepiece BPE with bytes for the rest, and no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
        model_writer=output,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(output.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_wordpiece(folder: Path, texts: list[str], size: int = 320) -> None:
    """BERT's vocab.txt alone, as MultiBERTs have it."""
    folder.mkdir(parents=True, exist_ok=True)
    own = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    own.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    words = sorted(own.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")


SAVE_TOKENIZER = {
    "pythia": save_neox_tokenizer,
    "olmo": save_neox_tokenizer,
    "llama": save_llama_tokenizer,
    "bert": save_wordpiece,
}
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}
MODELS = {
    "pythia": ("gpt_neox", PADDED, {"tie_word_embeddings": False}),
    "olmo": ("olmo2", 346, {"num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None}),
    "llama": ("llama", 400, {"num_key_value_heads": 1}),
    "bert": ("bert", 320, {}),
}


@torch.no_grad()
def save_model(folder: Path, family: str, step: int) -> None:
    """Random weights, large enough that the steps disagree; as pickles where the real ones are."""
    kind, vocabulary, more = MODELS[family]
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **SIZES, **more)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(step)
    model = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    if family == "bert":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def specification(family: str) -> str:
    """What teacher.trajectory says."""
    names = {"pythia": f"{PYTHIA}@step{{step}}", "olmo": f"{OLMO}@stage1-step{{step}}", "llama": f"{LLAMA}@step-{{step}}"}
    return "hf:" + names.get(family, f"{BERT}-step_{{kstep}}k")


def build(home: Path, scratch: Path, family: str, texts: list[str] | None = None) -> str:
    """A trajectory of STEPS in the hub's cache under `home`; what teacher.trajectory says of it."""
    spec, tokenizer = specification(family), scratch / family / "tokenizer"
    SAVE_TOKENIZER[family](tokenizer, corpora.documents(200) if texts is None else texts)
    for step in STEPS:
        folder = scratch / family / str(step)
        shutil.copytree(tokenizer, folder)
        save_model(folder, family, step)
        name = spec.removeprefix("hf:").replace("{step}", str(step)).replace("{kstep}", str(step // 1000))
        repository, _, revision = name.partition("@")
        place(home, repository, revision or "main", folder)
    return spec
