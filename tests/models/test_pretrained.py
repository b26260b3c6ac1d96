"""Models of transformers as teachers: hidden states, heads, documents, and reading their files by parts."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from megapd.batch import Batch
from megapd.errors import UserError
from megapd.models import pretrained
from megapd.models.pretrained import Pretrained, build_pretrained, check_head, logit_form, read_pretrained
from megapd.models.sharding import plan_for, shard
from megapd.slices import Flat, Ranges

VOCAB, LENGTH = 37, 12
CPU, META = torch.device("cpu"), torch.device("meta")
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
KINDS = {
    "gpt_neox": SIZES,
    "bert": SIZES | {"architectures": ["BertForMaskedLM"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "llama": SIZES | {"num_key_value_heads": 2},
}
SOFT_CAPPED = {"model_type": "gemma2", **SPECIAL, **SIZES, "num_key_value_heads": 2, "head_dim": 8}


def settings(kind):
    return {"model_type": kind, **SPECIAL, **KINDS[kind]}


@torch.no_grad()
def fill(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shift = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + shift)
    return model


def theirs(kind, seed=0):
    """Built by transformers alone."""
    config = transformers.AutoConfig.for_model(**settings(kind))
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    return fill(auto.from_config(config), seed).eval()


def make_batch(segments=None):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCAB, (2, LENGTH), generator=generator)
    positions = torch.tensor([0, 4, 5, 11, 12, 20, 23])
    return Batch(ids, segments, positions, ids.flatten()[positions], torch.arange(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each kind: transformers' model and the folder that it was saved to."""
    models = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        models[kind] = (theirs(kind), folder)
        models[kind][0].save_pretrained(folder)
    return models


def read(folder, dtype=torch.float32):
    """A Pretrained from a folder's config.json and weights."""
    model = build_pretrained(json.loads((folder / "config.json").read_text()), dtype, CPU)
    tensors = read_pretrained(model, folder, dict.fromkeys(name for name, _ in model.named_parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model


# ----------------------------------------------------------------------------------------------------- hidden states, heads


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states_and_head_make_their_logits(saved, kind, monkeypatch):
    reference, folder = saved[kind]
    model, batch = read(folder), make_batch()
    wanted = reference(batch.ids).logits.flatten(0, 1)[batch.positions]
    assert wanted.std() > 0.1
    torch.testing.assert_close(model(batch, mode="logits"), wanted, atol=2e-5, rtol=2e-5)
    hidden = model(batch, mode="hidden")
    assert hidden.shape == (7, 32)
    assert (model.head.bias is not None) == (kind == "bert")
    bias = 0.0 if model.head.bias is None else model.head.bias
    torch.testing.assert_close(hidden @ model.head.weight.T + bias, wanted, atol=2e-5, rtol=2e-5)
    check_head(model, batch)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    # No logits in hidden mode, and none of unlabelled positions in logits mode.
    rows = []
    monkeypatch.setattr(pretrained, "F", SimpleNamespace(linear=lambda hidden, weight, bias: rows.append(hidden.shape) or hidden))
    model(batch, mode="hidden")
    model(batch, mode="logits")
    assert rows == [(7, 32)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_documents_are_kept_apart(saved, kind):
    """As one document a row by itself, at the same positions."""
    reference, folder = saved[kind]
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * LENGTH])
    batch = make_batch(segments)
    found = read(folder)(batch, mode="logits")
    wanted = torch.empty(2, LENGTH, VOCAB)
    for row, (start, stop) in ((0, (0, 5)), (0, (5, 12)), (1, (0, 12))):
        places = torch.arange(start, stop)[None]
        wanted[row, start:stop] = reference(batch.ids[row : row + 1, start:stop], position_ids=places).logits[0]
    torch.testing.assert_close(found, wanted.flatten(0, 1)[batch.positions], atol=2e-5, rtol=2e-5)
    apart = reference(batch.ids).logits.flatten(0, 1)[batch.positions]
    assert (found - apart).abs().max() > 0.1


def test_architectures_without_document_masks_are_told(saved):
    segments = torch.zeros(2, LENGTH, dtype=torch.int64)
    model = read(saved["gpt_neox"][1])
    model.network.register_forward_pre_hook(lambda *call: (call[1], {**call[2], "attention_mask": None}), with_kwargs=True)
    with pytest.raises(UserError, match=r"^task\.document_mask: gpt_neox does not keep documents apart .*document_mask=false"):
        model(make_batch(segments))
    mistral = {**SPECIAL, **SIZES, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8}
    windowed = fill(build_pretrained(mistral, torch.float32, CPU))
    with pytest.raises(UserError, match=r"^task\.document_mask: mistral attends within 8 tokens"):
        windowed(make_batch(segments))
    assert windowed(make_batch()).shape == (7, 32)


SHAPED = {
    "gemma2": ({**SOFT_CAPPED, "final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "gemma2, its default": (SOFT_CAPPED, (1.0, 30.0)),
    "cohere": ({**SPECIAL, **SIZES, "model_type": "cohere", "num_key_value_heads": 2, "logit_scale": 0.25}, (0.25, None)),
    "granite": ({**SPECIAL, **SIZES, "model_type": "granite", "num_key_value_heads": 2, "logits_scaling": 3.0}, (1 / 3, None)),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caps_and_scales_are_known(name, dtype):
    """The logits are the architecture's own, and the check that they are passes."""
    described, form = SHAPED[name]
    assert logit_form(described) == form
    model = fill(build_pretrained(described, dtype, CPU))
    batch = make_batch()
    with torch.no_grad():
        model.head.weight.mul_(4.0)  # so large that the cap does something to them
        plain = model.head(model(batch, mode="hidden"), mode="logits").float()
        found = model(batch, mode="logits").float()
        wanted = model._network_logits(batch.ids, None, "logits").flatten(0, 1)[batch.positions].float()
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6 * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-5)
    assert (found - plain).abs().max() > 0.01 * plain.abs().max()
    check_head(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_change_otherwise_are_told(dtype):
    model = fill(build_pretrained(SOFT_CAPPED, dtype, CPU))
    model.soft_cap = None  # as if config.json did not say it
    with torch.no_grad():
        model.head.weight.mul_(0.01)  # logits so small that a cap of 30 does nothing to them
    with pytest.raises(UserError, match=r"^teacher\.trajectory: gemma2 changes its logits after the head otherwise"):
        check_head(model, make_batch())


def test_a_head_that_is_passed_by_is_told(saved):
    model = read(saved["gpt2"][1])
    model.network.lm_head.forward = lambda hidden: hidden
    with pytest.raises(UserError, match="does not give every position to its output layer"):
        model(make_batch())


def test_samples_longer_than_the_positions_are_told(saved):
    ids = torch.zeros(1, 17, dtype=torch.int64)
    batch = Batch(ids, None, torch.arange(17), ids[0], torch.arange(1))
    with pytest.raises(UserError, match="gpt2 has 16 positions, but samples have 17 tokens"):
        read(saved["gpt2"][1])(batch)


# ------------------------------------------------------------------------------------------------------------------ building


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta(kind):
    model, reference = build_pretrained(settings(kind), torch.bfloat16, META), theirs(kind)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    own, wanted = dict(model.network.named_buffers()), dict(reference.named_buffers())
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in own)
    assert [name for name, _ in model.network.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert nn.Linear(2, 2).weight.device == CPU  # what building hooks into is let go


def test_casts_leave_rotary_frequencies_alone():
    model = fill(build_pretrained(settings("gpt_neox"), torch.float32, CPU))
    before = model.network.gpt_neox.rotary_emb.inv_freq.clone()
    for cast in (model.bfloat16(), model.to(torch.float16), model.to(CPU, torch.bfloat16)):
        assert cast.head.weight.dtype != torch.float32
        assert torch.equal(cast.network.gpt_neox.rotary_emb.inv_freq, before)
    assert model(make_batch(), mode="logits").dtype == torch.bfloat16


def test_buffers_that_files_hold_become_parameters():
    network = nn.Module()
    network.norm = nn.BatchNorm1d(3)
    pretrained._promote_buffers(network)
    assert {name for name, _ in network.named_parameters()} == {
        f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")
    }
    assert [name for name, _ in network.named_buffers()] == ["norm.num_batches_tracked"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt9"}, "has no model_type 'gpt9'; upgrade"),
        ({"model_type": "vit"}, "no language model of model_type 'vit'"),
        ({"quantization_config": {"bits": 4}}, "gpt_neox with quantized weights is not supported"),
        ({"num_attention_heads": "four"}, r"config\.json of gpt_neox"),
        ({"model_type": "t5"}, "t5 with an encoder and a decoder|no language model of model_type 't5'"),
    ],
)
def test_what_cannot_be_built_is_told(changes, message):
    with pytest.raises(UserError, match=f"^teacher\\.trajectory: .*({message})") as raised:
        build_pretrained(settings("gpt_neox") | changes, torch.float32, META)
    assert "\n" not in str(raised.value)


def test_published_bert_is_a_masked_model_whatever_its_head():
    for named, causal in (("BertForPreTraining", False), ("BertModel", False), ("BertLMHeadModel", True)):
        model = build_pretrained(settings("bert") | {"architectures": [named]}, torch.float32, META)
        assert (type(model.network).__name__, model.causal) == ("BertLMHeadModel" if causal else "BertForMaskedLM", causal)
    embedding = transformers.BertModel(transformers.BertConfig(**SIZES, **SPECIAL))
    with pytest.raises(UserError, match="bert has no output layer"):
        Pretrained(embedding, False)


# ------------------------------------------------------------------------------------------------------------------- reading


class Reader:
    """A safetensors file that counts the values read from it."""

    def __init__(self, slices, log):
        self.slices, self.log = slices, log

    def get_shape(self):
        return self.slices.get_shape()

    def __getitem__(self, place):
        tensor = self.slices[place]
        self.log.append(tensor.numel())
        return tensor


@pytest.mark.parametrize("kind", ["gpt_neox", "bert"])
def test_only_a_ranks_parts_are_read(saved, kind, monkeypatch):
    reference, folder = saved[kind]
    stored = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr(pretrained, "_read_renamed", None)
    log, plain = [], pretrained.stored_tensors
    monkeypatch.setattr(
        pretrained, "stored_tensors", lambda folder: ((path, name, Reader(source, log)) for path, name, source in plain(folder))
    )
    model = build_pretrained(settings(kind), torch.float32, META)
    parts = shard(model, plan_for(model), 1, 2, None)
    tensors = read_pretrained(model, folder, parts)
    held = sum(p.numel() for p in model.parameters())
    assert sum(log) == held < 0.6 * stored
    whole = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        part, original = parts[name], whole[name.removeprefix("network.")].detach()
        assert tensors[name].shape == parameter.shape
        wanted = original if part is None else original.narrow(part.dim, part.ranges[0][0], parameter.shape[part.dim])
        assert torch.equal(tensors[name], wanted)
    assert any(isinstance(part, Ranges) and part.dim == 1 for part in parts.values())


def test_flat_parts_of_zero(saved):
    reference, folder = saved["gpt2"]
    model = build_pretrained(settings("gpt2"), torch.float32, META)
    wanted = {name: Flat(7, 7 + p.numel() // 2) for name, p in model.named_parameters()}
    found = read_pretrained(model, folder, wanted)
    for name, parameter in reference.named_parameters():
        part = wanted[f"network.{name}"]
        assert torch.equal(found[f"network.{name}"], parameter.detach().flatten()[part.start : part.stop])


def layouts(tensors, kind):
    """The same weights as files of other origins name and format them."""
    if kind == "gpt2":
        yield "bare", {name.removeprefix("transformer."): t for name, t in tensors.items()}
        yield "tied head", tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
        yield "mask buffers", tensors | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    if kind == "gpt_neox":
        assert "embed_out.weight" in tensors or "lm_head.weight" in tensors
        head = next(tensors[name] for name in ("embed_out.weight", "lm_head.weight") if name in tensors)
        rest = {name: t for name, t in tensors.items() if name not in ("embed_out.weight", "lm_head.weight")}
        yield "pythia", rest | {"embed_out.weight": head}
    if kind == "bert":
        old = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()
        }
        yield "tensorflow", old | {"bert.pooler.dense.weight": torch.ones(32, 32)}
        yield "untied copy", tensors | {"cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone()}


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "bert"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "sharded bin"])
def test_files_of_other_origins(saved, tmp_path, kind, form, monkeypatch):
    monkeypatch.setattr(pretrained, "_read_renamed", None)
    reference, folder = saved[kind]
    for name, tensors in layouts(load_file(folder / "model.safetensors"), kind):
        target = tmp_path / name
        target.mkdir()
        (target / "config.json").write_bytes((folder / "config.json").read_bytes())
        if form == "safetensors":
            save_file(tensors, target / "model.safetensors")
        elif form == "sharded bin":
            halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
            files = [f"pytorch_model-{i + 1:05}-of-00002.bin" for i in range(2)]
            for half, file in zip(halves, files, strict=True):
                torch.save(half, target / file)
            index = {"weight_map": {name: file for half, file in zip(halves, files, strict=True) for name in half}}
            (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(tensors, target / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
        model = read(target)
        for own, wanted in reference.named_parameters():
            assert torch.equal(model.network.get_parameter(own), wanted), (name, own)


def test_names_of_other_releases_are_left_to_transformers(saved, tmp_path, monkeypatch):
    reference, folder = saved["gpt_neox"]
    monkeypatch.setattr(pretrained, "_RENAMED", {})
    tensors = load_file(folder / "model.safetensors")
    head = next(name for name in ("embed_out.weight", "lm_head.weight") if name in tensors)
    save_file({("embed_out.weight" if name == head else name): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = build_pretrained(settings("gpt_neox"), torch.float32, META)
    parts = shard(model, plan_for(model), 0, 2, None)
    found = read_pretrained(model, tmp_path, parts)
    for name, parameter in reference.named_parameters():
        whole, part = parameter.detach(), parts[f"network.{name}"]
        wanted = whole if part is None else whole.narrow(part.dim, 0, part.ranges[0][1])
        assert torch.equal(found[f"network.{name}"], wanted)


def test_damaged_folders_are_told(saved, tmp_path):
    folder = saved["gpt2"][1]
    model = build_pretrained(settings("gpt2"), torch.float32, META)
    wanted = dict.fromkeys(name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match=r"no weights; expected model\.safetensors"):
        read_pretrained(model, tmp_path, wanted)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    weights = tmp_path / "model.safetensors"
    save_file({name: t for name, t in tensors.items() if "h.1.ln_2" not in name}, weights)
    with pytest.raises(UserError, match=r"2 tensors are missing, e\.g\. transformer\.h\.1\.ln_2"):
        read_pretrained(model, tmp_path, wanted)
    save_file(tensors | {"transformer.wpe.weight": torch.zeros(15, 32)}, weights)
    with pytest.raises(UserError, match=r"wpe\.weight has shape \(15, 32\), but config\.json asks for \(16, 32\)"):
        read_pretrained(model, tmp_path, wanted)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, weights)
    with pytest.raises(UserError, match=r"differs from the tensor it is tied to"):
        read_pretrained(model, tmp_path, wanted)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        read_pretrained(model, tmp_path, wanted)


def test_bin_files_run_no_code(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"transformer.wte.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    model = build_pretrained(settings("gpt2"), torch.float32, META)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged"):
        read_pretrained(model, tmp_path, dict.fromkeys(name for name, _ in model.named_parameters()))
    assert not (tmp_path / "exploded").exists()
