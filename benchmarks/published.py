"""Does a teacher that transformers trained teach a student that transformers reads, on real text?

A GPT-NeoX of about 10M parameters is trained in transformers' model and a plain loop, with a tokenizer that tokenizers trained on
the same text, and saved at a few steps as `save_pretrained` does. `megapd distil` makes of it a llama student, which is
exported; the held-out loss of the exported folder in plain transformers stands against that of `megapd evaluate`.

    python benchmarks/published.py --data data/wikipedia.parquet data/books.parquet --folder /tmp/published
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
import transformers
from common import write_result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megapd.cli import main as megapd
from megapd.config import load
from megapd.tasks import build_task

LENGTH, BATCH, VOCABULARY = 128, 8, 8192
SAVED = (0.1, 0.3, 1.0)  # of the teacher's steps


def teacher(folder: Path, texts: list[str], steps: int) -> list[float]:
    """Train and save it at folder/step_N; the losses of its steps."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 50, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    end = tokenizer.eos_token_id
    stream = [token for text in texts for token in (*tokenizer(text)["input_ids"], end)]
    blocks = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024}
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=end, eos_token_id=end, **sizes
    )
    model = transformers.GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses, saved = [], {round(share * steps) for share in SAVED}
    for step in range(1, steps + 1):
        rows = blocks[torch.randint(len(blocks), (BATCH,))]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in saved:
            model.save_pretrained(folder / f"step_{step}")
            tokenizer.save_pretrained(folder / f"step_{step}")
    return losses


@torch.no_grad()
def plain_loss(model: Path, config: Path, samples: int) -> float:
    """Cross entropy of the exported folder over the first held-out samples, by transformers alone."""
    task, network = build_task(load(config)), transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    total = count = 0.0
    for first in range(0, samples, BATCH):
        ids = task.heldout(range(first, min(samples, first + BATCH))).ids
        logits = network(input_ids=ids).logits[:, :-1].double()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--student-steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "published.json")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    texts = [text for path in arguments.data for text in pq.read_table(path, columns=["text"]).column(0).to_pylist()]
    began = time.perf_counter()
    losses = teacher(arguments.folder / "teacher", texts, arguments.teacher_steps)
    trained = time.perf_counter()
    out, spec = arguments.folder / "out", f"{arguments.folder}/teacher/step_{{step}}"
    command = ["distil", spec, "--student", "4x4x128", "--output", str(out), "--data", *map(str, arguments.data)]
    settings = [
        "--model={mlp: swiglu, norm: rms, parallel: false, biases: false, rotary_share: 1.0}",  # Llama's, not its teacher's
        f"--training.steps={arguments.student_steps}",
        "--training.global_batch=16",
        "--telemetry={wandb: disabled, progress: false}",
        "--corpus.heldout_fraction=0.1",
        f"--trajectory.every={arguments.student_steps}",
    ]
    assert megapd([*command, *settings]) == 0
    assert megapd(["evaluate", str(out / "run")]) == 0
    (*_, evaluated) = json.loads((out / "run" / "evaluation.json").read_text())
    exported = plain_loss(out / "model", out / "distil.yaml", int(evaluated["samples"]))
    values = {
        "teacher_loss": {"first": losses[0], "last_20": sum(losses[-20:]) / 20},
        "teacher_seconds": trained - began,
        "student": {"evaluate": evaluated["loss"], "exported": exported},
        "perplexity": {"evaluate": math.exp(evaluated["loss"]), "exported": math.exp(exported)},
        "relative_difference": abs(math.exp(exported - evaluated["loss"]) - 1.0),
        "config": json.loads((out / "model" / "config.json").read_text()),
    }
    question = "a student of a teacher that transformers trained, exported: its perplexity by megapd evaluate and by transformers"
    named = argparse.Namespace(**{**vars(arguments), "data": [path.name for path in arguments.data], "folder": "FOLDER"})
    write_result(arguments.output, question, named, ("torch", "transformers", "tokenizers", "deepspeed"), **values)
    print(json.dumps(values["perplexity"]))


if __name__ == "__main__":
    main()
