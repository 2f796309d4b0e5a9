"""Folders that cannot be opened: one line that says why, status 2, and nothing is left behind, whatever the command."""

import contextlib
import io
import json
import shutil
import sys

import pytest
import torch
from conftest import call, make_tokenizer, status_of
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen3Config, T5Config

import evaluate
import minimal
from common.errors import UserError, command
from common.hub import check_folder, eos_ids, load_tokenizer, openable, read_config, unfit, user_errors
from experts import __main__ as experts
from model import Policy


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def newer_tokenizer(folder):
    """What an old library says of a newer one's file: a bare Exception out of Rust."""
    change(folder / "tokenizer.json", model={"type": "NotYetInvented", "vocab": {}})


def listed_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text("[]")  # an AttributeError


def quantised(folder):
    change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def windowed(folder):
    change(folder / "config.json", model_type="mistral", sliding_window=4, layer_types=None)


def learned_positions(folder):
    tiny_gpt2 = {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **tiny_gpt2}))


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def missing_shard(folder):
    (folder / "model.safetensors").unlink()
    shard = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard}))


def nested_config(folder):
    (folder / "config.json").write_text("[" * 50_000)  # a RecursionError


def adapter(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base-1B", "peft_type": "LORA"}')


def own_code(folder):
    """Never run, and nobody is asked at the terminal whether it may be."""
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.LM"})
    (folder / "mine.py").write_text("raise SystemExit('it ran')")


BROKEN = {
    newer_tokenizer: "untagged enum", listed_tokenizer: "AttributeError", quantised: "take the model that they were made of",
    windowed: "for sliding_window", learned_positions: "positions ends", empty_weights: "header too small",
    missing_shard: "model-00002-of-00002.safetensors", nested_config: "RecursionError", adapter: "adapter of org/base-1B",
    own_code: "never run here",
}  # fmt: skip


@pytest.fixture
def base(place, tmp_path):
    """A copy of the base model in a folder of its own."""
    return shutil.copytree(place.root / "base", tmp_path / "models" / "base")


def run(main, monkeypatch, *argv):
    """(exit status, stdout, stderr) of a command of another file than selfemo.py."""
    said, complained = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = status_of(main)
    return status, said.getvalue(), complained.getvalue()


@pytest.mark.parametrize("spoil", BROKEN)
def test_no_command_opens_it_and_none_leaves_anything(place, base, tmp_path, monkeypatch, spoil):
    spoil(base)
    out, data, prompts = tmp_path / "out", f"tiny={place.root / 'world'}", place.root / "prompts.json"
    out.mkdir()
    train = place.argv(out / "run", "--model", base)
    said = {
        "train": call(train), "plan": call([*train, "--plan"]),
        "score": run(evaluate.main, monkeypatch, "score", "--model", base, "--data", data, "--prompts", prompts,
                     "--out", out / "scores.jsonl"),
        "personas": run(experts.main, monkeypatch, "personas", "--data", data, "--expert", base, "--out", out / "p.jsonl"),
    }  # fmt: skip
    for name, (status, printed, complained) in said.items():
        assert (status, complained.count("\n")) == (2, 1), (name, complained)
        assert complained.startswith("error: ") and str(base) in complained, (name, complained)
        assert BROKEN[spoil] in complained, (name, complained)
        assert "fits" not in printed
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("opens", [Policy.load, read_config, load_tokenizer])
def test_code_of_a_folder_is_never_run_whoever_sits_at_the_terminal(base, monkeypatch, opens):
    """transformers asks by itself whether it may; a yes would run the file."""
    own_code(base)
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="T")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="never run here"):
        opens(base)


def test_what_shows_only_in_the_weights_is_said_before_a_run_is_begun(place, base, tmp_path, monkeypatch):
    """The final norm has 3 numbers in the file and 32 in config.json."""
    weights = load_file(base / "model.safetensors")
    save_file({k: v[:3] if k == "model.norm.weight" else v for k, v in weights.items()}, base / "model.safetensors")
    status, _, complained = place.run(tmp_path / "run", "--model", base)
    assert status == 2 and complained.count("\n") == 1
    assert "1 weights are missing or not of the size in config.json: model.norm.weight" in complained
    (tmp_path / "out").mkdir()
    argv = ("personas", "--data", f"tiny={place.root / 'world'}", "--expert", base, "--out", tmp_path / "out" / "p.jsonl")
    status, _, complained = run(experts.main, monkeypatch, *argv)
    assert status == 2 and "model.norm.weight" in complained
    assert [x.name for x in tmp_path.iterdir() if x.name != "models"] == ["out"] and not list((tmp_path / "out").iterdir())


def test_of_two_models_to_score_the_second_is_looked_at_before_the_first_answers(place, base, tmp_path, monkeypatch):
    empty_weights(base)
    models = ("--model", place.root / "base", "--model", base)
    shared = ("--data", f"tiny={place.root / 'world'}", "--prompts", place.root / "prompts.json", "--limit", 1)
    status, said, complained = run(evaluate.main, monkeypatch, "score", *models, *shared, "--out", tmp_path / "s.jsonl")
    assert (status, said, complained.count("\n")) == (2, "", 1)
    assert not list(tmp_path.glob("s*"))


def test_what_a_forward_raises_while_a_model_is_opened_is_said_of_that_model(base, monkeypatch):
    def strange(policy):
        raise ValueError("group attention knows no such thing")

    monkeypatch.setattr("model.check_sharing", strange)
    with pytest.raises(UserError, match="cannot open the model .*base: group attention knows no such thing; give"):
        Policy.load(base)


def test_a_plan_whose_forward_fails_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.setattr("training.plan.kept_bytes", lambda *_: 1 // 0)
    status, said, complained = call([*place.argv(tmp_path / "run"), "--plan", "1x80"])
    assert (status, said, complained.count("\n")) == (2, "", 1)
    assert "base: integer division or modulo by zero" in complained


def test_minimal_says_which_folder_it_cannot_open(base, capsys):
    empty_weights(base)
    assert command(lambda: minimal.main(base.parent, minimal.Settings())) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot open the model {base}: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Exception("data did not match"), "m: data did not match; a newer version of tokenizers may have written it; give"),
        (ImportError("\nThis needs sentencepiece.\nSee the docs."), "m: This needs sentencepiece; give"),
        (RuntimeError("Error(s) in loading:\n\tbad size of w\n\tmore"), "m: Error(s) in loading: bad size of w; give"),
        (KeyError("added_tokens"), "m: KeyError 'added_tokens'; give"),
        (AssertionError(), "m: AssertionError; give"),
        (OSError(), "m: OSError; give"),
        (ValueError("x" * 1000), "m: " + "x" * 300 + "; give"),
    ],
)
def test_whatever_a_library_raises_is_one_useful_line(error, line):
    with pytest.raises(UserError) as told, user_errors("m"):
        raise error
    assert str(told.value).startswith(line) and "\n" not in str(told.value)


@pytest.mark.parametrize("error", [UserError("mine"), MemoryError(), torch.OutOfMemoryError("CUDA"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_folder_passes(error):
    with pytest.raises(type(error)) as told, user_errors("m"):
        raise error
    assert told.value is error


# Which configurations

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=9)
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Qwen3Config(**SMALL), ""),
        (LlamaConfig(**SMALL), ""),
        (MistralConfig(**SMALL, sliding_window=None), ""),
        (Qwen3Config(**SMALL, use_sliding_window=False, sliding_window=8), ""),
        (T5Config(vocab_size=9), "not a decoder of text alone"),
        (LlamaConfig(**SMALL, quantization_config={"quant_method": "fp8"}), "quantised"),
    ],
)  # fmt: skip
def test_a_configuration_tells_what_cannot_be_trained(config, why):
    assert why in unfit(config)
    assert bool(why) == bool(unfit(config))


def tokenizer_with(token, special):
    made = make_tokenizer()
    made.add_tokens([token], special_tokens=special)
    return made


def written(folder, tokenizer, vocabulary):
    """A model of a vocabulary with this tokenizer; its configuration is enough here."""
    LlamaConfig(**{**SMALL, "vocab_size": vocabulary}, eos_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_may_not_know_more_than_its_model(tmp_path):
    """Ids of V and above have no row in the embedding; a control token that nobody writes, a padding, does no harm."""
    V = len(make_tokenizer())
    word, padding = tokenizer_with("extra", False), tokenizer_with("[PAD]", True)
    with pytest.raises(UserError, match="has 1 tokens that the model does not know, one is 'extra'"):
        eos_ids(written(tmp_path / "word", word, V), word)
    assert eos_ids(written(tmp_path / "roomy", word, V + 1), word) == {1}
    assert eos_ids(written(tmp_path / "padding", padding, V), padding) == {1}
    padding.chat_template = f"[PAD]{padding.chat_template}"
    with pytest.raises(UserError, match=r"one is '\[PAD\]'"):
        eos_ids(written(tmp_path / "template", padding, V), padding)


# What a folder is instead of a model


def made(folder, **files):
    """A folder of these files; __ stands for a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


RUN = '{"preset": "toy", "model": "data/toy/base"}'
MODEL = '{"model_type": "qwen3"}'
ADAPTER = '{"base_model_name_or_path": "a/b"}'


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no model: give a Hugging Face folder"),
        ({"model_index.json": "{}"}, "diffusers"),
        ({"config.json": MODEL, "modules.json": "[]"}, "sentence-transformers"),
        ({"model-q4.gguf": ""}, "GGUF weights cannot be trained"),
        ({"0_0.distcp": ""}, "distributed checkpoint"),
        ({"config.json": RUN, "rollouts__iteration-1.jsonl": ""}, "has not ended: python -m tools.export {0} --out"),
        ({"config.json": RUN, "rollouts__1.jsonl": "", "model__config.json": MODEL}, "is a run, .*: give {0}/model"),
        ({"weights.safetensors": "", "state.json": "{}"}, "is a checkpoint of a run: python -m tools.export {0} --out"),
        ({"checkpoint-9__config.json": MODEL}, "give {0}/checkpoint-9"),
        ({"snapshots__a1__config.json": MODEL}, "give {0}/snapshots/a1"),
        ({"tokenizer.json": "{}"}, "holds a tokenizer and no model"),
        ({"config.json": MODEL, "adapter_config.json": ADAPTER}, "adapter of a/b, .*merge_and_unload"),
    ],
)
def test_a_folder_that_is_no_model_is_told_what_it_is(tmp_path, files, says):
    folder = tmp_path / "given"
    folder.mkdir()
    made(folder, **files)
    with pytest.raises(UserError, match=says.format(folder)) as told:
        Policy.load(folder)
    assert "\n" not in str(told.value)


def test_a_file_is_told_to_be_one(base, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="config.json is a file: give the Hugging Face folder that it belongs to$"):
        openable(base / "config.json")
    with pytest.raises(UserError, match="m.gguf is a file: .* GGUF weights cannot be trained"):
        openable(tmp_path / "m.gguf")


def test_models_and_hub_names_are_let_through(base):
    check_folder(base)
    check_folder("Qwen/Qwen3-8B")
    assert openable(base).chat_template

