"""The toy's tokenizer and base model, which stands for a pretrained one.

It mostly writes the format of Table 5, and six of ten of the answers that it has learnt come from `surface_reader`, which
looks at the last utterance alone and cannot know the tie.
"""

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import data
from common.files import jsonl
from model import ATTENTION, Group, Policy, few_threads
from toy.world import LABELS, surface_reader, target, thought, world

# The base model's lessons

SURFACE = 0.6  # share of lessons by the surface reader; the others are gold
SECOND = 0.2  # share of sure readings that get a doubtful second emotion: the format has room for it
SLIPS = 0.1  # share of lessons that break the format, as a pretrained model's answers do


def lesson(sample: data.Sample, rng: random.Random) -> str:
    """An answer to learn: mostly the surface reader's, else gold, now and then with a fault."""
    surface = rng.random() < SURFACE
    reading = dict(surface_reader(sample) if surface else sample.gold)
    if len(reading) == 1 and rng.random() < SECOND:
        reading = {emotion: 0.8 for emotion in reading} | {rng.choice([e for e in LABELS if e not in reading]): 0.3}
    text = target(sample, reading, "by the words" if surface else thought(sample))
    return slip(text, rng) if rng.random() < SLIPS else text


def slip(text: str, rng: random.Random) -> str:
    """An answer with one of four faults."""
    start = text.index("{")
    cut, unclosed = text.removesuffix("}"), text.replace("</think>", "", 1)
    return rng.choice((cut, f"{text[:start]}```\n{text[start:]}\n```", unclosed, f"{text}\nThat is all."))


# Tokenizer and model

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 900
STEPS, GROUPS, ANSWERS, LR = 540, 4, 2, 4e-3  # of the base model's training: groups per step, answers per group


def make_tokenizer(prompts: Sequence[str], answers: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that may merge across words; lines that stand in every prompt are one token each."""
    fixed = sorted(set.intersection(*(set(prompt.splitlines()) for prompt in prompts)) - {""})
    chunks = pre_tokenizers.Split(Regex(r"[A-Za-z_][A-Za-z_ ]*|[0-9.]+|[^A-Za-z0-9]+"), behavior="isolated")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([chunks, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(fixed), special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )
    known = re.compile("|".join(map(re.escape, fixed)))
    core.train_from_iterator([known.sub("", text) for text in (*prompts, *answers)], trainer)
    core.add_tokens([AddedToken(line, normalized=False) for line in fixed])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, extra_special_tokens=[START], chat_template=TEMPLATE
    )


def new_policy(tokenizer: PreTrainedTokenizerFast) -> Policy:
    """An untrained Qwen3 of half a million parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.09,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        attn_implementation=ATTENTION,  # type: ignore[call-arg]
    )
    return Policy(Qwen3ForCausalLM(config))


def teach(policy: Policy, lessons: Iterator[Group], steps: int) -> None:
    """Supervised training, the learning rate rising over a tenth of the steps and then falling to 0."""
    few_threads(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)))
    for _ in range(steps):
        learn(policy, optimizer, list(itertools.islice(lessons, GROUPS)))
        schedule.step()


def learn(policy: Policy, optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> None:
    """One supervised update: mean over the tokens of all answers."""
    logp_BT, _ = policy(groups)
    optimizer.zero_grad()
    (-logp_BT.sum() / sum(len(answer) for group in groups for answer in group.answers)).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def lessons(samples: Sequence[data.Sample], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Group]:
    """The base model's lessons in groups, without end: some answers to each sample's prompt."""
    prompts = {sample.id: data.encode(tokenizer, sample, data.DEFAULT)[0] for sample in samples}
    while True:
        for sample in rng.sample(samples, len(samples)):
            texts = [lesson(sample, rng) + END for _ in range(ANSWERS)]
            yield Group(prompts[sample.id], [tokenizer.encode(text) for text in texts])


# What `python -m toy build` writes


def write_world(folder: Path, seed: int) -> None:
    """The dialogues of every split and the labels as a folder of JSON lines."""
    folder.mkdir(parents=True)
    for split, rows in world(seed).items():
        (folder / f"{split}.jsonl").write_text(jsonl(rows), encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps(LABELS) + "\n", encoding="utf-8")


def write_base(folder: Path, samples: Sequence[data.Sample], seed: int, steps: int = STEPS) -> None:
    """The tokenizer and the base model as a Hugging Face folder."""
    rng = random.Random(seed)
    prompts = ["\n".join(m["content"] for m in data.messages(sample, data.DEFAULT)) for sample in samples]
    tokenizer = make_tokenizer(prompts, [lesson(sample, rng) for sample in samples])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = new_policy(tokenizer)
    teach(policy, lessons(samples, tokenizer, rng), steps)
    policy.export(folder, tokenizer)


def untaught(folder: Path) -> None:
    """Write a model of the toy world's size after one lesson: for work where only speed matters."""
    aside = folder.parent / "world"
    write_world(aside, 0)
    write_base(folder, data.read_samples("toy", aside, "train"), 0, steps=1)


def build(root: Path = Path("data/toy"), *, seed: int = 0) -> None:
    """Write root/world (JSONL dialogues) and root/base (Hugging Face folder), the same ones for the same seed.

    Takes about 40 s on one core. Written aside and renamed, so that what stands under these names is whole.
    """
    root.mkdir(parents=True, exist_ok=True)
    aside = root / f".building-{os.getpid()}"
    try:
        write_world(aside / "world", seed)
        write_base(aside / "base", data.read_samples("toy", aside / "world", "train"), seed)
        for name in ("world", "base"):
            shutil.rmtree(root / name, ignore_errors=True)
            os.replace(aside / name, root / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
