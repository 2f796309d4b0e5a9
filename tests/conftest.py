"""A tiny world of three emotions and a base model taught for seconds: whole runs of Algorithm 1 in a few seconds."""

import contextlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import data
import selfemo
from common.hub import quiet_transformers
from data import Prompts, Sample
from model import ATTENTION, Group, Policy

torch.set_num_threads(1)
quiet_transformers()

Called = tuple[Any, str, str]  # exit status, stdout and stderr of a command
LABELS = ("joy", "anger", "neutral")
LINES = {
    "joy": ("I won the race.", "We got the house!", "What a lovely day."),
    "anger": ("You broke my bike.", "He lied to us again!", "Get out of my room."),
    "neutral": ("The bus is late.", "It is Monday.", "I will call you."),
}
SPEAKERS = ("Ann", "Bo", "Cy")
PERSONAS = {"Ann": "calm", "Bo": "loud"}
PROMPTS = {"system": "You are {name}.{persona} Emotions: {labels}", "persona": " {persona}", "user": "{history}\nAnswer."}
SIZES = {"train": 8, "dev": 3, "test": 3}  # dialogues of four turns, three of them labelled
PIECES = (
    "<|im_start|>", "<|im_end|>", "<unk>", "system\n", "user\n", "assistant\n", "You are ", ".", " Emotions: ", ", ", "\n",
    "Answer.", ": ", "a listener", " ", "<think>", " feels ", ".</think>\n", "{'last_emotions': {'", "': ", ", '",
    "}, 'my_emotions': {'", "}, 'my_output': '", "'}", "1.0", "0.8", "0.75", "0.3", "0.25",
    "The last speaker shows ", " and ", ". I feel ", " and say so.", "</think>\n",
    *SPEAKERS, *LABELS, *PERSONAS.values(),
    *(line for lines in LINES.values() for line in lines),
)  # fmt: skip


def dialogue(rng: random.Random, name: str) -> dict[str, Any]:
    """Two people in turn; a line tells its emotion, the second turn has no label, the third is in two minds."""
    speakers = rng.sample(SPEAKERS, 2)
    turns: list[dict[str, Any]] = []
    for i in range(4):
        label = rng.choice(LABELS)
        turns.append({"speaker": speakers[i % 2], "text": rng.choice(LINES[label]), "label": label})
    turns[1]["label"] = None
    turns[2]["label"] = {turns[2]["label"]: 0.75, "neutral": 0.25} if turns[2]["label"] != "neutral" else "neutral"
    return {"id": name, "turns": turns, "personas": PERSONAS}


def write_world(root: Path, seed: int = 0) -> None:
    rng = random.Random(seed)
    root.mkdir()
    for split, size in SIZES.items():
        rows = [dialogue(rng, f"d{i}") for i in range(size)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "labels.json").write_text(json.dumps(LABELS), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per piece; text out of other pieces is lost, so answers decode to what was encoded."""
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    longest = "|".join(re.escape(piece) for piece in sorted(PIECES, key=len, reverse=True))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(longest), behavior="isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>",
        extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def lesson(rng: random.Random, sample: Sample) -> str:
    """The format with one slip in ten, the right emotion in six of ten."""
    first = data.heaviest(sample.gold) if rng.random() < 0.6 else rng.choice(LABELS)
    last = {first: 1.0} if rng.random() < 0.5 else {first: 0.8, rng.choice([x for x in LABELS if x != first]): 0.3}
    mine = rng.choice(LABELS)
    text = data.format_output(f"{sample.context[-1].speaker} feels {first}.", last, {mine: 1.0}, rng.choice(LINES[mine]))
    return text.replace("<think>", "", 1) if rng.random() < 0.1 else text


def teach(lm: Any, tokenizer: Any, samples: Sequence[Sample], prompts: Prompts, steps: int = 170) -> None:
    policy, rng, end = Policy(lm), random.Random(0), tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    prompt_ids = [data.encode(tokenizer, sample, prompts)[0] for sample in samples]
    for _ in range(steps):
        chosen = [rng.randrange(len(samples)) for _ in range(12)]
        texts = [lesson(rng, samples[i]) for i in chosen]
        answers = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
        logp_BT, _ = policy([Group(prompt_ids[i], [ids]) for i, ids in zip(chosen, answers, strict=True)])
        (-logp_BT.sum() / sum(map(len, answers))).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Place:
    """Folders of the tiny world and of the base model, and runs of selfemo on them."""

    root: Path

    def argv(self, out: str | Path, *more: Any) -> list[str]:
        """A command line of two iterations; a flag in `more` replaces the one given here."""
        flags = {
            "--model": self.root / "base", "--data": f"tiny={self.root / 'world'}", "--prompts": self.root / "prompts.json",
            "--iterations": 2, "--steps": 3, "--batch_prompts": 5, "--n": 3, "--mini_batch_prompts": 3, "--micro_batch": 5,
            "--max_prompt_tokens": 80, "--max_new_tokens": 24, "--lr": 1e-3, "--cold_start_lr": 3e-4, "--sft_lr": 3e-4,
            "--sft_batch": 6, "--eval_every": 2, "--save_every": 2, "--keep_reward": 0.5, "--eval_limit": 4,
            "--test_limit": 2, "--out": out,
        }  # fmt: skip
        given = dict(zip(more[::2], more[1::2], strict=True))
        return [str(x) for pair in {**flags, **given}.items() for x in pair]

    def run(self, out: str | Path, *more: Any, resume: bool = False) -> Called:
        """(exit status, stdout, stderr) of main()."""
        return call([*self.argv(out, *more), *(["--resume"] if resume else [])])


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(out: Path) -> dict[str, Any]:
    """What a run that was stopped must share with one that was not: everything but clocks and folder names."""
    clocks = re.compile(r"time/|memory/|rollout/tokens_per_s")
    files = [p for p in (*out.rglob("*.jsonl"), *out.rglob("*.safetensors")) if p.name != "metrics.jsonl"]
    found: dict[str, Any] = {str(p.relative_to(out)): p.read_bytes() for p in files}
    found["metrics"] = [{k: v for k, v in m.items() if not clocks.match(k)} for m in lines(out / "metrics.jsonl")]
    return found


def status_of(main: Callable[[], Any]) -> Any:
    """The exit status of a command: what it returns, or what the parser of its flags ends with."""
    try:
        return main()
    except SystemExit as stopped:
        return stopped.code


def call(argv: Sequence[str]) -> Called:
    """main() on the CPU, also where there is a GPU: what repeats bit by bit is promised there."""
    said, complained = io.StringIO(), io.StringIO()
    cpu = mock.patch("torch.cuda.is_available", return_value=False)
    with cpu, contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = status_of(lambda: selfemo.main(argv))
    return status, said.getvalue(), complained.getvalue()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The tiny world and a base model that keeps the rule in about nine of ten answers."""
    root = tmp_path_factory.mktemp("place")
    write_world(root / "world")
    (root / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=len(PIECES), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05,
        eos_token_id=end, pad_token_id=end, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    prompts = data.read_prompts(root / "prompts.json")
    samples = data.read_samples("tiny", root / "world", "train")
    teach(lm, tokenizer, samples, prompts)
    Policy(lm).export(root / "base", tokenizer)
    os.utime(root / "base" / "model.safetensors", (0, 0))  # a local expert's answers depend on it: always the same
    return Place(root)


@pytest.fixture(scope="session")
def finished(place: Place) -> Path:
    """The folder of a run that was never stopped."""
    out = place.root / "finished"
    status, _, complained = place.run(out)
    assert (status, complained) == (0, "")
    return out
