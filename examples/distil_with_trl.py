"""Distil with TRL's GKD trainer, its loss computed by megapd_kernels: no logits of either model are formed.

    pip install trl ./kernels
    python examples/distil_with_trl.py [--steps 60] [--plain]

A teacher is trained on the characters of a text for as many steps, then a student half as wide learns from it. --plain leaves
TRL's own loss in place: the figures are the same to rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from megapd_kernels.compat.transformers import causal_lm_loss
from megapd_kernels.compat.trl import use_in

TEXT = Path(__file__).parents[1] / "kernels" / "README.md"
LENGTH = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plain", action="store_true", help="TRL's own loss")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: must be at least 1, got {arguments.steps}")
    torch.manual_seed(0)
    text = TEXT.read_text()
    tokenizer = characters(text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    teacher = train_teacher(model(len(tokenizer), 64), rows, arguments.steps)
    student = model(len(tokenizer), 32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                beta=0.5,
                lmbda=0.0,  # the text's own positions; above 0 the student's samples as well
                logging_steps=max(1, arguments.steps // 6),
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
            ),
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
            processing_class=tokenizer,
        )
        if not arguments.plain:
            use_in(trainer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"jsd of the student from the teacher: {losses[0]:.4f} at first, {losses[-1]:.4f} at the end")
    return 0


def characters(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the text's characters."""
    alphabet = {character: i for i, character in enumerate(["<pad>", "<unk>", *sorted(set(text))])}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>")


def model(classes: int, width: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=classes,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
        )
    )


def train_teacher(teacher: LlamaForCausalLM, rows: torch.Tensor, steps: int) -> LlamaForCausalLM:
    """By transformers' own interface, with the loss of megapd_kernels."""
    teacher.loss_function = causal_lm_loss
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (16,), generator=torch.Generator().manual_seed(step))]
        loss = teacher(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"teacher: cross entropy {loss.item():.3f}", flush=True)
    return teacher.eval()


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


if __name__ == "__main__":
    sys.exit(main())
