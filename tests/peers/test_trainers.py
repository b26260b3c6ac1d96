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


def characters(transformers: Any, tokenizers: Any) -> Any:
    alphabet = {character: i for i, character in enumerate(["<pad>", "<unk>", *"abcdefgh "])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(alphabet, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([example["input_ids"] for example in examples])
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def logits_trainer(name: str, folder: Path) -> Any:
    """A GKDTrainer or GOLDTrainer of two models of Gemma's kind, capped, which share one configuration object."""
    peer = pytest.importorskip(f"trl.experimental.{name.lower()}")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    datasets = pytest.importorskip("datasets")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=0.5)
    student, teacher = transformers.Gemma2ForCausalLM(config), transformers.Gemma2ForCausalLM(config)
    with torch.no_grad():  # logits that the cap bends
        for model in (student, teacher):
            model.get_output_embeddings().weight.mul_(30)
    args = getattr(peer, f"{name}Config")(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        lmbda=0.0,
        max_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        per_device_train_batch_size=2,
        beta=0.3,
    )
    return getattr(peer, f"{name}Trainer")(
        model=student,
        teacher_model=teacher,
        args=args,
        data_collator=collate,
        train_dataset=datasets.Dataset.from_dict({"input_ids": torch.randint(2, 11, (4, 6)).tolist()}),
        processing_class=characters(transformers, tokenizers),
    )


@pytest.mark.parametrize("name", ["GKD", "GOLD"])
@pytest.mark.parametrize("items", [None, 7])
def test_a_trainer_of_logits(name: str, items: int | None, tmp_path: Path) -> None:
    """Its loss and gradients without the logits, twice applied as once; with outputs its own loss and the logits."""
    from megapd_kernels.compat.trl import use_in

    trainer = logits_trainer(name, tmp_path)
    batch = collate(trainer.train_dataset.select(range(2)).to_list())
    parameters = list(trainer.model.parameters())
    wanted = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    expected = torch.autograd.grad(wanted, parameters)
    assert wanted > 1e-3
    assert use_in(use_in(trainer)) is trainer
    shapes = []
    hook = trainer.model.register_forward_hook(lambda module, given, out: shapes.append(out.logits.shape[-1]))
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    assert shapes == [8]  # hidden states
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for got, want in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True, num_items_in_batch=items)
    hook.remove()
    assert shapes == [8, 11]
    assert outputs.logits.shape[-1] == 11
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert trainer.model.config.final_logit_softcapping == 0.5


def test_trainers_that_read_the_logits_otherwise_are_refused(tmp_path: Path) -> None:
    peer = pytest.importorskip("trl.experimental.gkd")
    from trl.experimental.iw_opd import IWOPDTrainer
    from trl.experimental.server_distillation import ServerDistillationTrainer

    from megapd_kernels.compat.trl import use_in

    class Own(peer.GKDTrainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            return super().compute_loss(*arguments, **named)

    gold = logits_trainer("GOLD", tmp_path)
    gold.use_uld_loss = True
    served = ServerDistillationTrainer.__new__(ServerDistillationTrainer)
    served.teacher_model = None
    for trainer, message in (
        (gold, "GOLDTrainer with use_uld_loss compares logits of two tokenizers"),
        (Own.__new__(Own), "Own has a compute_loss of its own"),
        (IWOPDTrainer.__new__(IWOPDTrainer), "IWOPDTrainer is no GKDTrainer, GOLDTrainer or DistillationTrainer"),
        (served, "ServerDistillationTrainer has a teacher on a server"),
        (3, "int is no GKDTrainer"),
    ):
        with pytest.raises(ValueError, match=f"^trainer: {message}"):
            use_in(trainer)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_distillation_trainers_loss(scaled: bool, tmp_path: Path) -> None:
    """DistillationTrainer from hidden states, of Cohere's kind with a scale: the loss of its own function and ours."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from megapd_kernels.compat.trl import use_in

    tokenizer = characters(transformers, tokenizers)

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

        class Subclass(trl.DistillationTrainer):  # type: ignore[misc]
            """A user's, in a module of its own."""

        trainer = Subclass(
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
