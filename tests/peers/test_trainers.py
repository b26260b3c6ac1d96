"""TRL's trainers with and without megapd_kernels: the same losses, step by step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distil_with_trl.py"


def run(*arguments: str) -> tuple[list[float], list[float]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TQDM_DISABLE": "1"}
    command = [sys.executable, str(EXAMPLE), "--steps", "12", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(value) for value in re.findall(r"'loss': '?([0-9.e-]+)", done.stdout)]
    norms = [float(value) for value in re.findall(r"'grad_norm': '?([0-9.e-]+)", done.stdout)]
    assert len(losses) == len(norms) == 6
    return losses, norms


def test_the_example_learns_as_trls_own_loss_does() -> None:
    pytest.importorskip("trl.experimental.gkd")
    losses, norms = run()
    assert losses[-1] < losses[0]
    plain, plain_norms = run("--plain")
    assert losses == pytest.approx(plain, rel=2e-3)  # printed with four digits
    assert norms == pytest.approx(plain_norms, rel=2e-3)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_distillation_trainers_loss(scaled: bool, tmp_path: Path) -> None:
    """DistillationTrainer from hidden states, of Cohere's kind with a scale: the loss of its own function and ours."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from megapd_kernels.compat.trl import use_in

    alphabet = {character: i for i, character in enumerate(["<pad>", "<unk>", *"abcdefgh "])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(alphabet, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)

    def model(width: int) -> Any:
        sizes = {"vocab_size": 11, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
        kind = "Cohere" if scaled else "Llama"
        config = getattr(transformers, f"{kind}Config")(**sizes, **({"logit_scale": 0.4} if scaled else {}))
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    def losses(ours: bool) -> list[float]:
        torch.manual_seed(0)
        student, teacher = model(8), model(16)
        args = trl.DistillationConfig(
            output_dir=str(tmp_path / str(ours)),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            max_completion_length=6,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            learning_rate=1e-2,
        )
        trainer = trl.DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["abc", "de fg", "ha", "bad"]}),
            processing_class=tokenizer,
        )
        if ours:
            use_in(trainer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    mine, theirs = losses(True), losses(False)
    assert len(mine) == 2
    assert mine == pytest.approx(theirs, rel=2e-3)


def test_another_trainer_is_refused() -> None:
    pytest.importorskip("trl")
    from megapd_kernels.compat.trl import use_in

    with pytest.raises(ValueError, match=r"^trainer: int is neither a GKDTrainer nor a DistillationTrainer"):
        use_in(3)
