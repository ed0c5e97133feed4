"""Any causal LM loads through one path, ready to unlearn; whatever cannot be used says so in one line."""

import copy
import importlib
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from icu_nb.config import ICUConfig
from icu_nb.data.pile import gpt2_tokenizer
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds
from icu_nb.metrics import memorization_accuracy
from icu_nb.models.loading import add_lora, load_model, merge_lora, parameter_counts, source_of
from icu_nb.models.memory import _without_weights, estimate_memory
from icu_nb.objective import ICU
from icu_nb.pairs import Task
from icu_nb.plumbing import peak_memory
from icu_nb.run import Run
from icu_nb.text import pad_id, real_tokens, tokenize
from icu_nb.unlearn import unlearn

peft = pytest.importorskip("peft")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = dict(SMALL, intermediate_size=64, num_key_value_heads=1, head_dim=16)
FAMILIES = {  # name: (model type, sizes, a tokenizer that adds BOS)
    "gpt_neo": (
        "gpt_neo",
        dict(SMALL, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=16),
        False,
    ),
    "opt": ("opt", dict(SMALL, ffn_dim=64, word_embed_proj_dim=32), True),
    "gpt2": ("gpt2", SMALL, False),
    "pythia": ("gpt_neox", dict(SMALL, intermediate_size=64), False),
    "llama": ("llama", dict(GROUPED, tie_word_embeddings=False), True),
    "llama tied": ("llama", dict(GROUPED, tie_word_embeddings=True), True),
    "qwen2": ("qwen2", GROUPED, False),
    "qwen3": ("qwen3", GROUPED, False),
    "gemma2": ("gemma2", GROUPED, True),
    "gemma3": ("gemma3_text", GROUPED, True),
}
families = pytest.mark.parametrize("family", FAMILIES)


def one_line(message):
    ends = message.startswith("`") and ". " in message and message.endswith(".")
    return ends and "\n" not in message and len(message) < 500


def build(family, vocab_size):
    kind, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=vocab_size, **sizes)).eval()


@pytest.fixture(scope="session")
def saved(tiny, bos_tokenizer, tmp_path_factory):
    """A folder per family, made when it is first asked for; never write into it."""
    folders = {}

    def folder(family):
        if family not in folders:
            path = folders[family] = tmp_path_factory.mktemp("models") / family.replace(" ", "_")
            tokenizer = bos_tokenizer if FAMILIES[family][2] else tiny.tokenizer
            build(family, 320).save_pretrained(path)  # more rows than tokens, as Pythia and Qwen have
            tokenizer.save_pretrained(path)
        return folders[family]

    return folder


@pytest.fixture
def own(saved, tmp_path):
    """A copy of GPT-Neo's folder, to be spoiled."""
    return shutil.copytree(saved("gpt_neo"), tmp_path / "own")


def refused(name, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        load_model(name, device="cpu", **options)
    assert one_line(str(caught.value)), str(caught.value)
    return str(caught.value)


# ---- every family, through the same path ----


@families
def test_loads_as_it_was_saved(family, saved, tiny, bos_tokenizer):
    model, tokenizer = load_model(saved(family), device="cpu")
    expected = build(family, 320)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(
        p.requires_grad for p in model.parameters()
    )
    assert not any(module.training for module in model.modules()), "dropout is off"
    ids = tiny.sequences.input_ids
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    given = bos_tokenizer if FAMILIES[family][2] else tiny.tokenizer
    if (
        family != "qwen2"
    ):  # to these, transformers gives Qwen's own way of splitting words, whatever the file says
        assert tokenizer(tiny.forget).input_ids == given(tiny.forget).input_ids
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in ("gpt_neo", "opt", "gpt2", "llama tied", "gemma2", "gemma3"))
    assert parameter_counts(model) == dict.fromkeys(("total", "trainable"), expected.num_parameters())


@families
@pytest.mark.parametrize("lora", [None, True], ids=["full", "LoRA"])
def test_unlearns(family, lora, saved, tiny, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("icu_nb.unlearn"), "thresholds_met", lambda scores, thresholds: False
    )  # random weights meet any threshold at once
    model, tokenizer = load_model(saved(family), device="cpu", lora=lora)
    before = tiny.weights(model)
    result = unlearn(
        model, tokenizer, tiny.forget, tiny.retain, tiny.config(learning_rate=1e-3), refinement=None
    )
    assert (
        result.history.epoch.tolist() == [0, 1, 2]
        and np.isfinite(result.history.loss[1:]).all()
        and result.stop_reason == "max_epochs"
    )
    assert not any(module.training for module in result.model.modules())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    if lora:
        assert moved and all("lora_" in name for name in moved) and result.reference == "adapter off, 0.0 MB"
    else:
        assert len(moved) > len(before) / 2 and result.reference.startswith(
            "copy" if family == "gemma2" else "hidden states"
        )


@families
def test_lora_trains_little_and_merges(family, saved, tiny):
    model, _ = load_model(saved(family), device="cpu", lora=4)
    counts = parameter_counts(model)
    assert 0 < counts["trainable"] < counts["total"] / 10
    assert all(
        p.dtype == torch.float32 and ("lora_" in name) == p.requires_grad
        for name, p in model.named_parameters()
    )
    original, ids = build(family, 320), tiny.sequences.input_ids
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        adapted = model(ids).logits
        merged = merge_lora(model)
        assert not torch.allclose(adapted, original(ids).logits, atol=1e-3)
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=0, atol=1e-5)
    assert (
        type(merged) is type(original)
        and not merged.training
        and all(p.requires_grad for p in merged.parameters())
    )
    assert set(merged.state_dict()) == set(original.state_dict())


# ---- what a checkpoint may be like ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_become_32(dtype, saved, own):
    model = build("gpt_neo", 320).to(dtype)
    model.save_pretrained(own)
    assert {tensor.dtype for tensor in load_file(own / "model.safetensors").values()} == {dtype}
    loaded, _ = load_model(own, device="cpu")
    assert all(
        p.dtype == torch.float32 and torch.equal(p, q.float())
        for p, q in zip(loaded.parameters(), model.parameters(), strict=False)
    )


def test_in_shards(own, tiny):
    (own / "model.safetensors").unlink()
    build("gpt_neo", 320).save_pretrained(own, max_shard_size="40KB")
    assert len(list(own.glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        load_model(own, device="cpu")[0](tiny.sequences.input_ids).logits,
        build("gpt_neo", 320)(tiny.sequences.input_ids).logits,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("has_pad", [True, False])
def test_padding_changes_nothing(side, has_pad, own, tiny):
    """Neither the side a tokenizer prefers nor a missing pad token: a text scores as it does alone."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    if not has_pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(own)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": side}))
    model, tokenizer = load_model(own, device="cpu")
    assert tokenizer.padding_side == side and pad_id(tokenizer) == (1 if has_pad else 0)
    texts = [tiny.forget[0], tiny.forget[1][:60]]
    together = tokenize(texts, tokenizer, 48)
    alone = [memorization_accuracy(model, tokenize([text], tokenizer, 48)).item() for text in texts]
    assert together.attention_mask.sum(1).tolist() == [48, len(tokenizer(texts[1]).input_ids)]
    assert memorization_accuracy(model, together).tolist() == pytest.approx(alone)


def test_special_tokens_that_no_text_makes_may_lie_beyond_the_table(own, tiny):
    """Gemma 3 1B: its token for images is number 262,144, and the model knows 262,144 tokens."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<image {i}>" for i in range(30)]})
    tokenizer.save_pretrained(own)
    loaded = load_model(own, device="cpu")[1]
    assert len(loaded) > 320 and loaded.vocab_size <= 320


def test_the_real_configuration_of_gpt_neo_125m(shared_data, tmp_path):
    sizes = {
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_heads": 12,
        "max_position_embeddings": 2048,
        "window_size": 256,
    }
    real = AutoConfig.for_model("gpt_neo", num_layers=12, attention_types=[[["global", "local"], 6]], **sizes)
    model = _without_weights(real)
    assert parameter_counts(model)["total"] == 125_198_592 and {
        p.device.type for p in model.parameters()
    } == {"meta"}
    assert parameter_counts(_without_weights(real, 8))["trainable"] == 12 * 2 * 8 * 2 * 768
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], **sizes)
    ).save_pretrained(tmp_path)
    gpt2_tokenizer(shared_data).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, device="cpu", lora=True)
    assert len(tokenizer) == 50257 and tokenizer.pad_token_id is None and pad_id(tokenizer) == 50256
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert (
        model(torch.tensor([[15496, 995]])).logits.shape == (1, 2, 50257)
        and parameter_counts(model)["trainable"] == 2 * 2 * 8 * 2 * 768
    )


# ---- where it came from ----

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """The Hub's cache, as two downloads would have left it, and no network: nobody/tiny at two commits."""
    repo = tmp_path / "hub" / "models--nobody--tiny"
    for branch, commit in COMMITS.items():
        shutil.copytree(saved("gpt_neo"), repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    weights = repo / "snapshots" / COMMITS["v1"] / "model.safetensors"
    save_file(
        {name: tensor * 2 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"}
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "revision, commit",
    [
        (None, COMMITS["main"]),
        ("main", COMMITS["main"]),
        ("v1", COMMITS["v1"]),
        (COMMITS["v1"], COMMITS["v1"]),
    ],
)
@pytest.mark.parametrize("lora", [None, True])
def test_the_commit_is_recorded(hub, revision, commit, lora):
    model, _ = load_model("nobody/tiny", device="cpu", revision=revision, lora=lora)
    assert source_of(model) == {"name": "nobody/tiny", "commit": commit}
    expected = build("gpt_neo", 320).transformer.wte.weight * (2 if commit == COMMITS["v1"] else 1)
    assert torch.equal(model.get_input_embeddings().weight, expected)


def test_a_revision_that_is_not_there(hub):
    refused("nobody/tiny", "`model`.*network", revision="v2")


@pytest.mark.parametrize("lora", [None, True])
def test_no_path_is_published(saved, lora, monkeypatch):
    model, _ = load_model(saved("gpt2"), device="cpu", lora=lora)
    assert source_of(model) == {"name": "gpt2", "commit": None}
    monkeypatch.chdir(saved("gpt2"))
    assert source_of(load_model(".", device="cpu")[0])["name"] == "gpt2"
    assert source_of(build("gpt2", 320)) == {"name": None, "commit": None}


def test_the_commit_is_not_saved_with_the_model(hub, tmp_path):
    load_model("nobody/tiny", device="cpu")[0].save_pretrained(tmp_path / "saved")
    assert COMMITS["main"] not in (tmp_path / "saved" / "config.json").read_text()


# ---- what cannot be loaded ----

http = sys.modules[
    HTTPError.__module__.partition(".")[0]
]  # what the Hub's client stands on: httpx, or httpx2


def answer(kind, status):
    request = http.Request("GET", "https://huggingface.co/nobody/model/resolve/main/config.json")
    return kind(
        f"{status} Client Error.\n\nSome lines\nthat nobody reads.",
        response=http.Response(status, request=request),
    )


@pytest.mark.parametrize(
    "error, words",
    [
        (answer(RepositoryNotFoundError, 404), "neither a folder nor a repository.*spelling"),
        (answer(GatedRepoError, 403), "gated.*https://huggingface.co/nobody/model.*hf auth login"),
        (answer(RevisionNotFoundError, 404), "revision.*branch, tag or commit"),
        (OfflineModeIsEnabled("offline"), "network.*save_pretrained"),
        (http.ConnectError("no route"), "network.*save_pretrained"),
        (http.ReadTimeout("too slow"), "network.*save_pretrained"),
        (http.ProxyError("not here"), "network.*save_pretrained"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_says(error, words, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(
        "huggingface_hub.file_download.get_hf_file_metadata", fails
    )  # where the Hub's client asks first
    message = refused("nobody/model", f"`model`: 'nobody/model' .*{words}")
    assert "nobody reads" not in message


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c", "no folder"])
def test_a_folder_that_is_not_there(name):
    refused(name, "`model`: .*no folder that exists.*save_pretrained")


def test_code_that_comes_along_is_not_run(own, monkeypatch):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(
        json.dumps(
            {
                **config,
                "model_type": "mine",
                "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineLM"},
            }
        )
    )
    (own / "mine.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(own / "modules"))
    refused(own, "`model`: .*code of its own.*trust_remote_code=True")
    with pytest.raises(SystemExit, match="it ran"):
        load_model(own, device="cpu", trust_remote_code=True)


def test_pickled_weights_are_not_opened(own):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was opened",)

    (own / "model.safetensors").unlink()
    (own / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(own, "`model`: .*safetensors.*save_pretrained")


def test_half_a_file_of_weights(own):
    whole = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(own, "`model`: ")


@families
def test_a_folder_without_tokenizer(family, saved, tmp_path):
    """transformers makes up an empty one for most of them, without a word."""
    folder = shutil.copytree(
        saved(family), tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja")
    )
    refused(folder, "`model`: .*no tokenizer.*save_pretrained")


def test_a_tokenizer_of_another_model(own, tiny, bos_tokenizer):
    build("gpt_neo", 300).save_pretrained(own)
    load_model(own, device="cpu")
    bos_tokenizer.save_pretrained(own)  # its BOS is token 300
    refused(own, "`model`: .*tokens up to 300.* knows 300.*belongs to the model")
    build("gpt_neo", 200).save_pretrained(own)
    tiny.tokenizer.save_pretrained(own)
    refused(own, "`model`: .*tokens up to 299.* knows 200.*belongs to the model")


@pytest.mark.parametrize(
    "kind, auto, words",
    [
        ("t5", AutoModelForSeq2SeqLM, "type 't5'.*no causal"),
        ("bart", AutoModelForSeq2SeqLM, "type 'bart'.*no causal"),
        ("distilbert", None, "type 'distilbert'.*no causal"),
        ("bert", AutoModelForCausalLM, "BertLMHeadModel.*encoder"),
        ("roberta", AutoModelForCausalLM, "RobertaForCausalLM.*encoder"),
        ("llama", AutoModelForSequenceClassification, "lacks 1 .*lm_head.weight"),
    ],
)
def test_no_causal_language_model(kind, auto, words, tiny, tmp_path, capfd):
    sizes = {
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "bart": {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    }
    config = AutoConfig.for_model(
        kind, vocab_size=300, **sizes.get(kind, dict(SMALL, intermediate_size=32, pad_token_id=1))
    )
    if auto is None:
        config.save_pretrained(tmp_path)
    else:
        auto.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    refused(tmp_path, f"`model`: .*{words}")
    said = capfd.readouterr()
    assert "LOAD REPORT" not in said.err + said.out and "is_decoder" not in said.err


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", 3.5, ""])
def test_a_device_that_is_not_there(device, saved):
    with pytest.raises(InputError, match=r"`device`.*is not there") as caught:
        load_model(saved("gpt_neo"), device=device)
    assert one_line(str(caught.value))


# ---- LoRA, one argument ----


def adapter(model):
    return model.peft_config["default"]


@pytest.mark.parametrize("lora, rank, alpha", [(True, 8, 16), (1, 1, 2), (4, 4, 8)])
def test_the_rank(lora, rank, alpha):
    config = adapter(add_lora(build("gpt_neo", 300), lora))
    assert (config.r, config.lora_alpha, config.lora_dropout, set(config.target_modules)) == (
        rank,
        alpha,
        0.0,
        {"q_proj", "v_proj"},
    )


def test_a_config_of_ones_own():
    given = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.5, target_modules=["c_fc"])
    model = add_lora(build("gpt_neo", 300), given)
    assert (adapter(model).r, adapter(model).lora_alpha) == (2, 3) and not any(
        module.training for module in model.modules()
    )
    assert {
        name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    } == {"c_fc"}
    assert given.base_model_name_or_path is None and given.target_modules == {"c_fc"}, (
        "the config given stays as it was"
    )


def test_an_architecture_that_peft_has_no_default_for():
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    assert "olmo2" not in known
    model = add_lora(
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "olmo2", vocab_size=300, **{k: v for k, v in GROUPED.items() if k != "head_dim"}
            )
        )
    )
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("lora", [0, -1, False, 1.5, "q_proj", [8]])
def test_impossible_ranks(lora):
    with pytest.raises(InputError, match=r"`lora`.*whole number.*LoraConfig"):
        add_lora(build("gpt_neo", 300), lora)


@pytest.mark.parametrize(
    "targets, missing",
    [
        (["query_key_value"], "query_key_value"),
        (["q_proj", "nonsense"], "nonsense"),
        (r"h\.\d+\.query", "query"),
        (["proj"], "proj"),
    ],
)
def test_target_modules_that_are_not_there(targets, missing, tiny):
    model = build("gpt_neo", 300)
    before = tiny.weights(model)
    with pytest.raises(
        InputError, match=f"`lora`.*{missing}.*c_fc, c_proj, k_proj, out_proj, q_proj, v_proj"
    ) as caught:
        add_lora(model, peft.LoraConfig(target_modules=targets))
    assert one_line(str(caught.value))
    assert tiny.weights(model).keys() == before.keys() and all(p.requires_grad for p in model.parameters()), (
        "nothing was changed"
    )


def test_no_second_adapter():
    model = add_lora(build("gpt2", 300))
    for again in (model, model.get_base_model()):
        with pytest.raises(InputError, match=r"`model`.*adapter already.*merge_lora"):
            add_lora(again)
    assert parameter_counts(add_lora(merge_lora(model)))["trainable"] > 0


def test_merging_nothing():
    model = build("gpt2", 300)
    assert merge_lora(model) is model


def test_without_peft(monkeypatch, saved):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"`lora`.*pip install icu_nb\[paper\]") as caught:
        load_model(saved("gpt_neo"), device="cpu", lora=True)
    assert one_line(str(caught.value))
    assert parameter_counts(load_model(saved("gpt_neo"), device="cpu")[0])["trainable"] > 0


# ---- memory ----


def measured(model, n, max_length, batch_size, vocab_size):
    """Bytes at the peak of a step that is not the first: what stays, and what the step adds."""

    def sequences():
        ids = torch.randint(vocab_size, (n, max_length))
        return real_tokens(ids)

    run = Run(
        model,
        Task(sequences(), sequences(), np.arange(n)[:, None]),
        ICUConfig(batch_size=batch_size),
        ICU(),
        Thresholds(),
    )
    run.step(torch.arange(batch_size), 1)
    run.optimizer.zero_grad()
    stays = [
        *model.parameters(),
        *model.buffers(),
        *(tensor for state in run.optimizer.state.values() for tensor in state.values()),
    ]
    return (
        sum(tensor.nbytes for tensor in stays)
        + run.reference.bytes
        + peak_memory(lambda: run.step(torch.arange(batch_size), 2))
    )


@pytest.mark.parametrize("lora", [None, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("width, layers, vocab_size", [(64, 2, 2048), (128, 4, 4096), (64, 2, 50257)])
def test_the_estimate_is_near_the_measured_peak(width, layers, vocab_size, lora):
    config = AutoConfig.for_model(
        "gpt_neo",
        hidden_size=width,
        num_layers=layers,
        num_heads=4,
        vocab_size=vocab_size,
        attention_types=[[["global", "local"], layers // 2]],
        window_size=64,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model = add_lora(model, lora) if lora else model
    run = {"n_forget": 8, "max_length": 96, "batch_size": 4}
    estimate = estimate_memory(config, lora, device="cpu", **run)
    assert estimate == estimate_memory(model, device="cpu", **run), (
        "from shapes alone, or from the model itself"
    )
    assert estimate["total"] == pytest.approx(measured(model, *run.values(), vocab_size), rel=0.1)


def test_the_parts_of_an_estimate():
    config = AutoConfig.for_model(
        "gpt_neo",
        vocab_size=1000,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=256,
    )
    full, lora = estimate_memory(config), estimate_memory(config, True)
    parameters = parameter_counts(_without_weights(config))["total"]
    assert (
        full["optimizer"] == 8 * parameters
        and full["original"] == full["weights"]  # a copy is smaller than the hidden states
        and lora["original"] == 0
    )
    assert estimate_memory(config, n_forget=8)["original"] == 8 * 200 * 64 * 4 + 1000 * 64 * 4
    assert estimate_memory(config, n_pool=9)["original"] == 9 * 200 * 64 * 4 + 1000 * 64 * 4
    assert full["total"] == full["weights"] + full["optimizer"] + full["original"] + max(
        full["gradients"], full["activations"]
    )
    assert (
        lora["optimizer"] == 8 * 2 * 2 * 8 * 128
        and lora["activations"] < full["activations"]
        and lora["total"] < full["total"]
    )
    assert (
        estimate_memory(config, batch_size=4)["activations"] < full["activations"]
        and estimate_memory(config, n_neighbors=2)["activations"] > full["activations"]
    )


def test_below_an_adapter_a_gpu_keeps_the_16_bits_of_a_checkpoint(tiny, tmp_path, monkeypatch):
    """All else is loaded in 32 bits; no GPU is needed to see it."""
    tiny.copy().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    base = "base_model.model.transformer.wte.weight"
    on_cpu, _ = load_model(tmp_path, device="cpu", lora=4)
    assert dict(on_cpu.named_parameters())[base].dtype == torch.float32
    monkeypatch.setattr("icu_nb.models.loading._check_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr("transformers.PreTrainedModel.to", lambda model, device: model)
    on_gpu, _ = load_model(tmp_path, lora=4)
    for name, parameter in on_gpu.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert load_model(tmp_path)[0].dtype == torch.float32
    config = on_gpu.config
    by_device = [estimate_memory(config, 4, device=device)["weights"] for device in ("cuda", "cpu")]
    assert by_device[0] / by_device[1] == pytest.approx(0.5, abs=0.1)
    assert estimate_memory(on_gpu)["weights"] == by_device[0]
