"""Hugging Face in and out: equal logits both ways, and clear refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, GPT2Config, GPT2LMHeadModel, GPT2Model

from megapd.batch import Batch
from megapd.config import MLPConfig
from megapd.errors import UserError
from megapd.models import load_hugging_face, save_hugging_face
from megapd.models.hub import folder as hub
from megapd_kernels import LossOptions

from .test_transformer import KINDS, LENGTH, VOCAB, build, config

IDS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
EVERYWHERE = Batch(IDS, None, torch.arange(IDS.numel()), IDS.flatten(), torch.arange(2))


def theirs(kind, tied=True, cls=None, **changes):
    """A random tiny model; its weights are spread widely, so that no bias or norm is at its neutral value."""
    common = {"vocab_size": VOCAB, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "n_inner": 40}
        model = (cls or GPT2LMHeadModel)(GPT2Config(**{**common, **sizes, **changes}))
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
        model = (cls or BertForMaskedLM)(BertConfig(**{**common, **sizes, "max_position_embeddings": 20, **changes}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def spread(learner):
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return learner


def assert_equal_logits(learner, model):
    with torch.no_grad():
        ours, expected = learner(EVERYWHERE, mode="logits"), model(IDS).logits.flatten(0, 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["one file", "sharded"])
def test_their_model_becomes_ours(tmp_path, kind, tied, shards):
    model = theirs(kind, tied)
    model.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if shards == "sharded" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    model_config, learner = load_hugging_face(tmp_path, LossOptions(alpha=0.5))
    assert model_config == config(kind, max_length=20, tied=tied)
    assert learner.head.options.alpha == 0.5
    assert (learner.head.weight is learner.body.tokens.weight) == tied
    assert_equal_logits(learner, model)


@pytest.mark.parametrize("index", [False, True])
def test_bin_files_are_read(tmp_path, index):
    model = theirs("gpt")
    model.config.save_pretrained(tmp_path)
    tensors = model.state_dict()
    if index:
        names = sorted(tensors)
        files = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in files.items():
            torch.save({name: tensors[name] for name in part}, tmp_path / file)
        weight_map = {name: file for file, part in files.items() for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_equal_logits(load_hugging_face(tmp_path)[1], model)


def test_bin_files_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    theirs("gpt").config.save_pretrained(tmp_path)
    torch.save({"transformer.wte.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged"):
        load_hugging_face(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_published_layouts_are_read(tmp_path):
    """GPT-2's files come from the bare body, with mask buffers; BERT's with TensorFlow's names and the other heads."""
    model = theirs("gpt")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 20, 20), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    model.config.save_pretrained(tmp_path / "gpt")
    save_file(tensors, tmp_path / "gpt" / "model.safetensors")
    assert_equal_logits(load_hugging_face(tmp_path / "gpt")[1], model)

    model = theirs("bert", cls=BertForPreTraining)
    tensors = {"bert.embeddings.position_ids": torch.arange(20)[None]}
    for name, tensor in model.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[name] = tensor.clone()
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.weight", "cls.predictions.decoder.bias"} < tensors.keys()
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    model.config.save_pretrained(tmp_path / "bert")
    save_file(tensors, tmp_path / "bert" / "model.safetensors")
    learner = load_hugging_face(tmp_path / "bert")[1]
    with torch.no_grad():
        expected = model(IDS).prediction_logits.flatten(0, 1)
        torch.testing.assert_close(learner(EVERYWHERE, mode="logits"), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("stored", ["decoder.bias", "bias"])
def test_either_name_of_an_untied_bias_is_enough(tmp_path, stored):
    model = theirs("bert", tied=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = model.cls.predictions.decoder.bias.detach().clone()
    for name in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
        tensors.pop(name, None)
    save_file({**tensors, f"cls.predictions.{stored}": bias}, tmp_path / "model.safetensors")
    assert_equal_logits(load_hugging_face(tmp_path)[1], model)


def test_half_precision_files_become_fp32(tmp_path):
    model = theirs("gpt").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    learner = load_hugging_face(tmp_path)[1]
    assert learner.head.weight.dtype == torch.float32
    assert_equal_logits(learner, model.float())


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 4096])
def test_our_model_becomes_theirs(tmp_path, kind, tied, shard_bytes):
    model_config = config(kind, tied=tied)
    learner = spread(build(model_config))
    folder = tmp_path / "deep" / "export"
    save_hugging_face(learner, model_config, folder, shard_bytes=shard_bytes, special_tokens={"pad_token_id": 3})
    model, report = (GPT2LMHeadModel if kind == "gpt" else BertForMaskedLM).from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.pad_token_id == 3
    assert model.config.eos_token_id is None
    assert_equal_logits(learner, model.eval())
    files = sorted(file.name for file in folder.iterdir())
    assert [file for file in files if file.endswith(".index.json")] == (
        ["model.safetensors.index.json"] if shard_bytes == 4096 else []
    )
    # Alone, a tensor may be larger than a shard.
    tensors = {file: load_file(folder / file) for file in files if file.endswith(".safetensors")}
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= shard_bytes for part in tensors.values())
    assert [path.name for path in folder.parent.iterdir()] == ["export"]

    read_config, again = load_hugging_face(folder)
    assert read_config == config(kind, tied=tied, max_length=LENGTH)
    for (name, ours), (_, parameter) in zip(learner.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, parameter), name


def test_a_cast_learner_keeps_its_dtype(tmp_path):
    learner = build(config("bert")).bfloat16()
    save_hugging_face(learner, config("bert"), tmp_path / "export")
    model = BertForMaskedLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, learner.body.tokens.weight)


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    learner = build(config())

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_hugging_face(learner, config(), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_nothing(tmp_path):
    learner = build(config())
    (tmp_path / "empty").mkdir()
    save_hugging_face(learner, config(), tmp_path / "empty")
    before = (tmp_path / "empty" / "config.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_hugging_face(learner, config(), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").read_bytes() == before


def test_what_has_no_layout_is_refused(tmp_path):
    mlp = MLPConfig(width=3)
    with pytest.raises(UserError, match="no Hugging Face layout"):
        save_hugging_face(build(mlp, vocab=2), mlp, tmp_path / "export")
    untied = config(tied=False)
    with pytest.raises(UserError, match=f"8 classes over {VOCAB} tokens"):
        save_hugging_face(build(untied, classes=8), untied, tmp_path / "export")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        theirs(kind).save_pretrained(made[kind])
    return made


def copied(folder, target):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt", {"activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ("gpt", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ("gpt", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt", {"n_head": 3}, "hidden 16 is not a multiple of heads 3"),
        ("gpt", {"n_layer": None}, "n_layer is missing"),
        ("gpt", {"vocab_size": "many"}, "vocab_size must be a positive integer"),
        ("gpt", {"model_type": "t5"}, "model_type 't5' is not supported"),
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"type_vocab_size": 3}, "type_vocab_size"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"intermediate_size": 41}, r"intermediate.dense.bias has shape \(40,\).*\(41,\)"),
        ("bert", {"num_hidden_layers": 1}, "layer.1.* has no place"),
        ("bert", {"num_hidden_layers": 3}, "16 tensors are missing, e.g. bert.encoder.layer.2"),
    ],
)
def test_unsupported_options_are_named(folders, tmp_path, kind, changes, message):
    path = copied(folders[kind], tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message) as raised:
        load_hugging_face(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_damaged_folders_are_named(folders, tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_hugging_face(tmp_path)
    copied(folders["gpt"], tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load_hugging_face(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no weights"):
        load_hugging_face(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in (
        ({"transformer.wte.weight": "gone.safetensors"}, r"gone\.safetensors: missing"),
        ({"transformer.wte.weight": "../gone.safetensors"}, "not the name of a file"),
        (None, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            load_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        load_hugging_face(tmp_path)


@pytest.mark.parametrize("cls", [BertModel, GPT2Model])
def test_a_model_saved_without_its_head(tmp_path, cls):
    """A tied GPT needs none; BERT's transform cannot be made up."""
    kind = "bert" if cls is BertModel else "gpt"
    model = theirs(kind, cls=cls)
    model.save_pretrained(tmp_path)
    if kind == "gpt":
        learner = load_hugging_face(tmp_path)[1]
        with torch.no_grad():
            expected = model(IDS).last_hidden_state.flatten(0, 1)
            torch.testing.assert_close(learner(EVERYWHERE, mode="hidden"), expected, atol=2e-5, rtol=2e-5)
    else:
        with pytest.raises(UserError, match=r"5 tensors are missing, e\.g\. cls\.predictions"):
            load_hugging_face(tmp_path)


def test_a_tied_copy_must_be_equal(folders, tmp_path):
    weights = copied(folders["gpt"], tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    copy = tensors["transformer.wte.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, weights)
    load_hugging_face(tmp_path)
    copy[3, 2] += 1
    save_file({**tensors, "lm_head.weight": copy}, weights)
    with pytest.raises(UserError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        load_hugging_face(tmp_path)
