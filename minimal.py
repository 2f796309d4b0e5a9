"""SELF-EMO (arXiv:2604.18003v1): the whole of Algorithm 1 in one file, plainly.

    python minimal.py        some steps on a small invented world, offline, in about a minute on a CPU

Read `self_emo` first, near the end: the functions above it are its lines. grpo.py has Eqs. 8-14, data.py Eqs. 6 and 7,
PAPER.md the decisions D1-D28. Everything is slow here; selfemo.py does the same fast, as tests/test_minimal.py checks.

A tensor with more than one dimension carries its shape as a suffix: B answers (P prompts, n answers to each, so B = P * n,
prompt by prompt), T tokens of an answer, Z tokens of a prompt and its answer (both padded on the right), V vocabulary.
"""

import common  # noqa: F401  # isort: skip  its check of Python comes first
import copy
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

import data
from common.draws import Key, distinct, first_shuffled, shuffled, uniform
from common.errors import command
from common.hub import quiet_transformers, user_errors
from data import Completion, Output, Sample, Selection
from grpo import advantages, consistency, core_emotions, lam, low_var_kl, policy_loss, reward, token_weights

Pair = tuple[list[int], tuple[int, ...]]  # token ids of a prompt, and of an answer with its end-of-sequence token
COLD_START = -3  # stands for the step in the random streams of the cold start's answers


@dataclass(frozen=True)
class Settings:
    """What Algorithm 1 needs to know. The defaults are for the toy world."""

    seed: int = 0
    iterations: int = 2  # K
    steps: int = 4  # S: RL steps per iteration (D7)
    batch_prompts: int = 4  # P: prompts per RL step
    mini_batch_prompts: int = 2  # prompts per optimizer step
    n: int = 4  # answers to each prompt
    max_prompt_tokens: int = 256  # longer prompts are left out
    max_new_tokens: int = 80  # a longer answer is cut off
    temperature: float = 1.0  # of sampling, and of every log-prob in the RL loss (D19)
    lr: float = 3e-4  # of the RL stages
    cold_start_lr: float = 5e-4
    sft_lr: float = 1e-4  # of the retraining
    sft_batch: int = 8  # answers per optimizer step of supervised fine-tuning
    clip_eps: float = 0.2  # epsilon of Eq. (14)
    kl_coef: float = 0.001  # beta, the weight of the KL to the reference
    keep_reward: float = 0.6  # least reward of an answer that becomes a new sample (D11)


@dataclass(frozen=True)
class Group:
    """A sample, its prompt, the n answers to it, and what the equations say about them. Advantages compare within it."""

    sample: Sample
    prompt_ids: list[int]
    answers: list[Completion]
    rewards: list[float]
    core: dict[str, float]
    consistencies: list[float]
    advantages: list[float]


def draw(logits_BV: Tensor, temperature: float, uniform_B: Sequence[float]) -> tuple[list[int], list[float]]:
    """Draw one token per row, and give its log-prob (nats) under the distribution that it was drawn from (D19).

    `uniform_B` holds a random number in [0, 1) per row. Temperature 0 takes the likeliest token; its log-prob is the one at
    temperature 1. Raises FloatingPointError for logits that are NaN or infinite.
    """
    if not logits_BV.amax(-1).isfinite().all():
        raise FloatingPointError("a logit is NaN or infinite")
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logp_BV = (logits_BV / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token_B1 = logp_BV.argmax(-1, keepdim=True)
    else:
        # Inverse CDF: the first token whose cumulated probability lies above the random number.
        cdf_BV = logp_BV.exp().cumsum(-1)
        end_B1 = cdf_BV[:, -1:]  # 1, but for rounding
        aim_B1 = cdf_BV.new_tensor(uniform_B)[:, None] * end_B1
        aim_B1 = torch.minimum(aim_B1, torch.nextafter(end_B1, torch.zeros_like(end_B1)))  # below the end in any case
        token_B1 = torch.searchsorted(cdf_BV, aim_B1, right=True)
    return token_B1[:, 0].tolist(), logp_BV.gather(1, token_B1)[:, 0].tolist()


@torch.no_grad()
def generate_naive(
    model: nn.Module, prompts: Sequence[Sequence[int]], *,
    n: int, max_new_tokens: int, temperature: float, eos_ids: Collection[int], keys: Sequence[Key],
) -> list[list[Completion]]:  # fmt: skip
    """Sample n answers to each prompt, one after the other; every token runs the model over the whole sequence.

    `model` is a causal LM of transformers, or holds one as `lm`. A key names the random streams of a prompt. An answer ends
    with the first token of `eos_ids`, or unfinished after `max_new_tokens`.
    """
    lm: Any = getattr(model, "lm", model)
    groups = []
    for prompt, key in zip(prompts, keys, strict=True):
        group = []
        for answer in range(n):
            ids: list[int] = []
            logprobs: list[float] = []
            while len(ids) < max_new_tokens and not (ids and ids[-1] in eos_ids):
                logits_1ZV = lm(torch.tensor([[*prompt, *ids]], device=lm.device), use_cache=False).logits
                token, logp = draw(logits_1ZV[:, -1], temperature, [uniform(key, answer, len(ids))])
                ids, logprobs = ids + token, logprobs + logp
            group.append(Completion(tuple(ids), tuple(logprobs), ids[-1] in eos_ids))
        groups.append(group)
    return groups


def rollout(
    lm: nn.Module, tokenizer: Tokenizer, samples: Sequence[Sample], cfg: Settings, *, n: int, step: int
) -> tuple[list[list[int]], list[list[Completion]]]:
    """Line 7: the prompt of each sample, and n answers to it, sampled and read. `step` names the random streams."""
    # Eq. (5): one prompt asks for all three parts. Some chat templates open the answer's think block themselves.
    prompts, opened = zip(*[data.encode(tokenizer, sample, data.DEFAULT) for sample in samples], strict=True)
    keys = [(cfg.seed, step, name) for name in distinct([sample.id for sample in samples])]
    stop, most = {tokenizer.eos_token_id}, cfg.max_new_tokens
    sampled = generate_naive(lm, prompts, n=n, max_new_tokens=most, temperature=cfg.temperature, eos_ids=stop, keys=keys)
    groups = []
    for sample, start, group in zip(samples, opened, sampled, strict=True):
        texts = [data.answer_text(tokenizer, c.ids, stop, start) for c in group]
        # Eq. (6): what the answer says; or why it breaks rule(.) of Eq. (8), the form that an answer must have (D8)
        parses = [data.parse_output(text, sample.labels, finished=c.finished) for text, c in zip(texts, group, strict=True)]
        groups.append([replace(c, text=x, parse=parse) for c, x, parse in zip(group, texts, parses, strict=True)])
    return list(prompts), groups


def score(
    samples: Sequence[Sample], prompts: Sequence[list[int]], answers: Sequence[list[Completion]], lambda_t: float
) -> list[Group]:
    """Line 8: rewards, core emotions, consistencies and advantages. `lambda_t`: see Eq. (13)."""
    groups = []
    for sample, prompt_ids, group in zip(samples, prompts, answers, strict=True):
        predictions = [a.parse.last_emotions if isinstance(a.parse, Output) else None for a in group]
        # Eqs. (8)-(10): r_i = 0 if the rule failed, else 0.1 + IOU, the overlap with gold, the emotions of the dataset
        rewards = [reward(prediction, sample.gold) for prediction in predictions]
        # Eq. (11): the three heaviest emotions of the group
        core = core_emotions(predictions)
        # Eq. (12): r2_i = how many of them the answer names, over 3
        consistencies = consistency(predictions)
        # Eq. (13): A_i = (r_i - mean r) / std r + lambda (r2_i - mean r2) / std r2
        [adv_n] = advantages([rewards], [consistencies], lambda_t).tolist()
        groups.append(Group(sample, prompt_ids, group, rewards, core, consistencies, adv_n))
    return groups


def token_logprobs(lm: nn.Module, pairs: Sequence[Pair], temperature: float) -> Tensor:
    """Log-probs (nats) of the tokens of each answer, given all tokens before them: logp_BT, 0 beyond an answer's end."""
    # Padded on the right: a causal model never looks to the right, so no answer sees padding and no mask is needed.
    ids_BZ = pad_sequence([torch.tensor([*prompt, *answer]) for prompt, answer in pairs], batch_first=True)
    logits_BZV = lm(ids_BZ, use_cache=False).logits / temperature
    logp_BZ = logits_BZV[:, :-1].log_softmax(-1).gather(-1, ids_BZ[:, 1:, None])[:, :, 0]
    # The logits of one position predict the next token, so an answer begins at the last position of its prompt.
    rows = [logp_Z[len(p) - 1 :][: len(a)] for logp_Z, (p, a) in zip(logp_BZ, pairs, strict=True)]
    return pad_sequence(rows, batch_first=True)


def adamw(lm: nn.Module, lr: float) -> AdamW:
    """A fresh optimizer; every stage has its own (D26)."""
    return AdamW(lm.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)


def descend(lm: nn.Module, optimizer: AdamW, loss: Tensor) -> None:
    """One optimizer step against the gradient of the loss, which is shortened to length 1 where it is longer."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(lm.parameters(), max_norm=1.0)
    optimizer.step()


def update(lm: nn.Module, reference: nn.Module, optimizer: AdamW, groups: Sequence[Group], cfg: Settings) -> None:
    """Line 9, one optimizer step per mini-batch of prompts: `lm` learns from the scored answers of an RL step.

    Old log-probs are those of the policy that sampled, so all of them are taken before the first optimizer step. In the
    first mini-batch every ratio is 1; from the second one on the policy has moved, and Eq. (14) may clip.
    """
    mini_batches = [groups[i : i + cfg.mini_batch_prompts] for i in range(0, len(groups), cfg.mini_batch_prompts)]
    batches = [[(group.prompt_ids, a.ids) for group in part for a in group.answers] for part in mini_batches]
    with torch.no_grad():
        olds = [token_logprobs(lm, batch, cfg.temperature) for batch in batches]
        refs = [token_logprobs(reference, batch, cfg.temperature) for batch in batches]
    for mini_batch, batch, old_BT, ref_BT in zip(mini_batches, batches, olds, refs, strict=True):
        adv_B = torch.tensor([a for group in mini_batch for a in group.advantages], dtype=torch.float64)
        # D3: every token of the mini-batch weighs the same, padding nothing; the weights sum to 1.
        weight_BT = token_weights([len(answer) for _, answer in batch], "token", old_BT.shape[1])
        logp_BT = token_logprobs(lm, batch, cfg.temperature)
        # Eq. (14), negated: loss = -sum of weight * min(ratio A, clip(ratio, 1-eps, 1+eps) A), one ratio per token (D1, D2)
        loss, _ = policy_loss(logp_BT, old_BT, adv_B, weight_BT, clip_eps=cfg.clip_eps)
        # KL(policy || reference), estimated by e^d - d - 1 with d = log(reference / policy)
        kl = (weight_BT * low_var_kl(logp_BT, ref_BT)).sum()
        descend(lm, optimizer, loss + cfg.kl_coef * kl)


def sft(lm: nn.Module, pairs: Sequence[Pair], lr: float, cfg: Settings, stage: int) -> None:
    """Lines 3 and 18, one epoch: the loss is the mean negative log-prob of answer tokens. `stage` names the shuffle."""
    optimizer = adamw(lm, lr)
    order = shuffled(pairs, f"{cfg.seed}/sft/{stage}")
    for first in range(0, len(order), cfg.sft_batch):
        batch = order[first : first + cfg.sft_batch]
        logp_BT = token_logprobs(lm, batch, temperature=1.0)
        descend(lm, optimizer, -logp_BT.sum() / sum(len(answer) for _, answer in batch))


def prompt_stream(samples: Sequence[Sample], k: int, seed: int) -> Iterator[Sample]:
    """Line 6: all samples in a seeded shuffle, then all again in another one, and so on without end (D7)."""
    for epoch in itertools.count():
        yield from shuffled(samples, f"{seed}/prompts/{k}/{epoch}")


def self_emo(
    lm: nn.Module, tokenizer: Tokenizer, originals: Sequence[Sample], cfg: Settings, watch: Callable[..., None]
) -> nn.Module:
    """Algorithm 1, its lines numbered on the right. `lm` learns in place; watch(t, groups, selections) sees each RL step."""

    def fits(sample: Sample) -> bool:
        return len(data.encode(tokenizer, sample, data.DEFAULT)[0]) <= cfg.max_prompt_tokens

    d0 = [sample for sample in originals if fits(sample)]
    children: dict[str, Sample] = {}  # id of a sample -> the newest sample made of it (D11)               # 1: B <- D0
    asked, own = rollout(lm, tokenizer, d0, cfg, n=1, step=COLD_START)
    valid = [(p, a.ids) for p, [a] in zip(asked, own, strict=True) if isinstance(a.parse, Output)]  # gold is not looked at
    sft(lm, valid, cfg.cold_start_lr, cfg, stage=0)                                                        # 3: D17
    for k in range(1, cfg.iterations + 1):                                                                 # 4
        buffer = d0 + sorted(children.values(), key=lambda child: (child.iteration, child.id))
        stream = prompt_stream(buffer, k, cfg.seed)
        reference, optimizer = copy.deepcopy(lm), adamw(lm, cfg.lr)                                        # D6
        kept: dict[str, Pair] = {}  # id of a sample -> the newest answer kept of it
        for t in range((k - 1) * cfg.steps, k * cfg.steps):                                                # 5
            x = list(itertools.islice(stream, cfg.batch_prompts))                                          # 6
            prompts, y = rollout(lm, tokenizer, x, cfg, n=cfg.n, step=t)                                   # 7
            groups = score(x, prompts, y, lam(t, cfg.iterations * cfg.steps))                              # 8: Eqs. 8-13
            update(lm, reference, optimizer, groups, cfg)                                                  # 9: Eq. 14
            selections = []
            for group in groups:                                                                           # 12
                parses = [answer.parse for answer in group.answers]
                best = data.select(group.sample, parses, group.rewards, k, keep_reward=cfg.keep_reward, fits=fits)  # 13-14
                if best.index is not None and best.child is not None:
                    children[group.sample.id] = best.child                                                 # 15: Eq. 7
                    kept[group.sample.id] = (group.prompt_ids, group.answers[best.index].ids)
                selections.append(best)
            watch(t, groups, selections)
        sft(lm, list(kept.values()), cfg.sft_lr, cfg, stage=2 * k)                                         # 17-18: D12, D13
    return lm                                                                                              # 20


def show(group: Group, best: Selection) -> None:
    """Print a group as one would write it on the blackboard."""
    print("\nA group of the last step. What does the last speaker feel?")
    for turn in group.sample.context[-3:]:
        print(f"    {turn.speaker}: {turn.text}")
    core = {emotion: round(share, 2) for emotion, share in group.core.items()}
    print(f"gold {group.sample.gold}, core emotions {core}\nreward  consistency  advantage  answer")
    rows = zip(group.answers, group.rewards, group.consistencies, group.advantages, strict=True)
    for i, (answer, r, r2, a) in enumerate(rows):
        said = answer.parse.last_emotions if isinstance(answer.parse, Output) else f"rule failed: {answer.parse.reason}"
        print(f"{r:6.3f}  {r2:11.3f}  {a:+9.3f}  {said}{'  <- kept' if i == best.index else ''}")
    if best.child is not None:
        turn = best.child.context[-1]
        print(f"New sample: what does this speaker feel? (gold {best.child.gold})\n    {turn.speaker}: {turn.text}")


def main(folder: Path, cfg: Settings) -> None:
    """Algorithm 1 on 24 samples of the toy world in `folder`."""
    quiet_transformers()
    torch.set_num_threads(1)  # the matrix products are too small for a second thread
    with user_errors(f"cannot open the model {folder / 'base'}"):
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        lm = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)

    def watch(t: int, groups: Sequence[Group], selections: Sequence[Selection]) -> None:
        mean = sum(sum(group.rewards) for group in groups) / (cfg.batch_prompts * cfg.n)
        kept = sum(best.index is not None for best in selections)
        print(f"RL step {t + 1}: mean reward {mean:.3f}, {kept} of {len(groups)} prompts give a new sample")
        if t + 1 == cfg.iterations * cfg.steps:  # of its groups, the one whose answers differ most
            show(*max(zip(groups, selections, strict=True), key=lambda pair: len(set(pair[0].advantages))))

    self_emo(lm, tokenizer, first_shuffled(data.read_samples("toy", folder / "world", "train"), 24, "minimal"), cfg, watch)


if __name__ == "__main__":
    from toy.base import build

    def _run() -> None:
        if not Path("data/toy/base").exists():
            build()
        main(Path("data/toy"), Settings())

    sys.exit(command(_run))
