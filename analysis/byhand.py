"""One group of a run worked by hand, from the text of its answers to the gradient, as a chapter in Markdown.

`python evaluate.py audit RUN --show SAMPLE --markdown true` prints it; docs/by-hand.md is what it prints for the group in
docs/by-hand. The update (Eq. 14) needs RUN/update.json, which `python -m tools.replay` measures. Every number is computed
from the record; sums are exact, what is shown is rounded.
"""

import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import audit
from analysis.table1 import markdown
from analysis.totals import rl_step
from common.errors import UserError
from common.files import Record, read_json
from grpo import CORE_SIZE, K3_MAX, RULE_BONUS, STD_EPS, core_emotions, iou, normalised


def chapter(run: Path, sample_id: str) -> str:
    """The chapter on the first group of one sample.

    Raises `UserError` where there is none or it is damaged, and for a run with sequence ratios, sequence means or another
    temperature than 1.
    """
    with audit.readable(run, sample_id):
        config, record = read_json(run / "config.json"), audit.groups_of(run, sample_id)[0]
        if config["ratio"] != "token" or config["loss_mean"] != "token" or config["temperature"] != 1:
            raise UserError("the chapter is written for --ratio token, --loss_mean token and --temperature 1")
        parts = [opening(run, record, config), texts(record), rewards(record), consensus(record), advantages(record)]
        if (path := run / "update.json").exists():
            update = read_json(path)
            parts.insert(1, prompt(record, update))
            parts += [policies(record, update, config), tokens(record, update, config), logits(record, update, config)]
        else:
            how = f"python -m tools.replay {run.as_posix()} {sample_id} --out DIR"
            parts.append(iter(["The update (Eq. 14) is not here. This measures it:", f"```\n{how}\n```"]))
        return "\n\n".join(itertools.chain(*parts, choice(record))) + "\n"


# Blocks: paragraphs, lists, tables. Each section below yields some, and an empty line will stand between two.


def para(*texts: str) -> str:
    """A paragraph, or the items of a list, wrapped."""
    wrapped = (textwrap.fill(x, 120, subsequent_indent="  " * x.startswith("- "), break_on_hyphens=False) for x in texts)
    return "\n".join(wrapped)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its floats with six decimals; columns that hold no words are set to the right."""
    cells = [[number(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    left = {i for row in cells for i, cell in enumerate(row) if cell.strip("*")[:1].isalpha() or "`" in cell}
    return markdown([[cell.replace("|", r"\|") for cell in row] for row in (head, *cells)], left)


def fenced(text: str) -> str:
    """A block of text as it is; no fence in the text closes it."""
    return "\n".join([f"{fence(text, 3)}text", text.strip(), fence(text, 3)])


def number(value: float) -> str:
    """A number with six decimals."""
    return f"{value:.6f}"


def summed(values: Sequence[float]) -> str:
    """The sum a + b + c = d, of values without signs."""
    return f"{' + '.join(map(number, values))} = {number(math.fsum(values))}"


def named(weights: Mapping[str, float]) -> str:
    """Emotions with weights."""
    return ", ".join(f"{emotion} {weight:.2f}" for emotion, weight in weights.items())


def shown(piece: str) -> str:
    """What a model wrote, within a line or a table: as code, so that nothing in it becomes markup."""
    text = piece.replace("\n", "\\n") if piece.strip() else repr(piece)
    return f"{fence(text, 1)}{text}{fence(text, 1)}" if "`" not in text else f"{fence(text, 1)} {text} {fence(text, 1)}"


def fence(text: str, least: int) -> str:
    """As many backticks as open a block that the text cannot close, at least `least`."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def predictions(record: Record) -> list[Mapping[str, float] | None]:
    """What each answer recognised; None where the rule failed."""
    return [answer["parse"].get("last_emotions") for answer in record["answers"]]


# From text to advantage


def opening(run: Path, record: Record, config: Record) -> Iterator[str]:
    """Where the group comes from."""
    yield f"# Worked by hand: one group of {config['n']} answers, from text to gradient"
    yield para(
        f"The group of `{record['sample_id']}` in {rl_step(record['step'])} of a run with the preset "
        f"`{config['preset']}`, seed {config['seed']}. Every number follows from what that run wrote. A pocket "
        "calculator with ln and exp is enough to check it; the last digit may differ, because rounded numbers are "
        "shown and exact ones carried on. This page is what the following command prints:"
    )
    yield f"```\npython evaluate.py audit {run.as_posix()} --show {record['sample_id']} --markdown true\n```"


def prompt(record: Record, update: Record) -> Iterator[str]:
    """The prompt as the model saw it (Eq. 5)."""
    yield "## 1. The prompt (Eq. 5)"
    yield para(f"{len(record['prompt_ids'])} tokens, as the chat template of the model writes them:")
    yield fenced(update["prompt"])
    yield para(f"Gold, the emotions that the data has for the last line, hidden from the model: {named(record['gold'])}.")


def texts(record: Record) -> Iterator[str]:
    """The answers and the rule (Eq. 6)."""
    yield "## 2. The answers and the rule (Eq. 6)"
    yield para(
        "The rule is the form that an answer must have to earn anything: a think block with text, then one dictionary "
        "with exactly three keys, then the end, and nothing else (D8). Of the dictionary, `last_emotions` is what is "
        "compared with gold; the rest of an answer is never compared with anything."
    )
    for answer in record["answers"]:
        reason = answer["parse"]["reason"]
        broken = reason and f"**breaks the rule** ({reason}: {shown(answer['parse']['detail'])})"
        yield para(f"A{answer['index']}, {len(answer['ids'])} tokens, {broken or 'keeps the rule'}:")
        yield fenced(answer["text"])


def rewards(record: Record) -> Iterator[str]:
    """The first reward of every answer (Eqs. 8-10)."""
    found, gold = predictions(record), record["gold"]
    yield "## 3. The first reward (Eqs. 8-10)"
    yield para(
        "It says how much the recognised emotions overlap with gold. Weights become shares that sum to 1 (Eq. 9). The "
        "IOU, intersection over union, is the sum of the smaller shares over the sum of the larger ones, over all "
        f"emotions that the answer or gold names (Eq. 10). An answer that keeps the rule earns {RULE_BONUS} more (Eq. 8)."
    )
    for i, raw in enumerate(found):
        if raw is not None and raw not in found[:i]:
            same = [f"A{j}" for j, other in enumerate(found) if other == raw]
            yield para(f"{', '.join(same)} {'say' if len(same) > 1 else 'says'} {named(raw)}:")
            yield from overlap(raw, gold)
    if failed := [f"A{i}" for i, raw in enumerate(found) if raw is None]:
        yield para(f"{', '.join(failed)} broke the rule: r = **0**, whatever the text says (Eq. 8).")


def overlap(raw: Mapping[str, float], gold: Mapping[str, float]) -> Iterator[str]:
    """The reward of one prediction (Eqs. 9, 10)."""
    p, q = normalised(raw), normalised(gold)
    rows = [(e, p.get(e, 0.0), q.get(e, 0.0)) for e in dict.fromkeys([*p, *q])]
    low, high = (math.fsum(pick(a, b) for _, a, b in rows) for pick in (min, max))
    sums = ("sum", math.fsum(p.values()), math.fsum(q.values()), low, high)
    head = ["emotion", "share in the answer", "share in gold", "smaller", "larger"]
    yield table(head, [*((e, a, b, min(a, b), max(a, b)) for e, a, b in rows), sums])
    value, r = number(iou(raw, gold)), number(iou(raw, gold) + RULE_BONUS)
    yield f"IOU = {number(low)} / {number(high)} = {value}; r = {value} + {RULE_BONUS} = **{r}**."


def consensus(record: Record) -> Iterator[str]:
    """The core emotions and the second reward of every answer (Eqs. 11, 12)."""
    found = predictions(record)
    votes, core = [(i, normalised(raw)) for i, raw in enumerate(found) if raw is not None], core_emotions(found)
    by = {e: [(i, vote[e]) for i, vote in votes if e in vote] for e in dict.fromkeys(e for _, vote in votes for e in vote)}
    sums = {e: math.fsum(share for _, share in shares) for e, shares in by.items()}
    order = sorted(by, key=lambda e: (e not in core, -sums[e], -len(by[e]), e))
    yield "## 4. The consensus and the second reward (Eqs. 11, 12)"
    yield para(
        "The second reward is for naming what the group names, right or wrong: gold plays no part in it. Every valid "
        "answer has one vote, which it divides by its shares. The sums over the group:"
    )
    rows = [(e, ", ".join(f"A{i} {share:.4f}" for i, share in by[e]), sums[e], core.get(e, "—")) for e in order]
    yield table(["emotion", "shares", "sum", "p*"], rows)
    tied = [e for e in order if e not in core and sums[e] == min((sums[x] for x in core), default=0.0)]
    yield para(
        f"The core is the {len(core)} heaviest: {', '.join(core)}. {summed([sums[e] for e in core])}; each sum over "
        "that is p* (Eq. 11). Ties go to the emotion that more answers name, then to the alphabet"
        + (f": {', '.join(tied)} has the same sum as the last of the core here, and loses by that." if tied else ".")
    )
    yield para(f"The second reward is how many core emotions an answer names, with whatever weight, over {CORE_SIZE}:")
    hits = [[e for e in core if e in (raw or {})] for raw in found]
    each = zip(record["answers"], hits, strict=True)
    counted = [(f"A{a['index']}", ", ".join(h) or "none", f"{len(h)}/{CORE_SIZE}", a["consistency"]) for a, h in each]
    yield table(["answer", "core emotions that it names", "of three", "r2"], counted)


def advantages(record: Record) -> Iterator[str]:
    """The advantages (Eq. 13)."""
    answers = record["answers"]
    r, r2, A = ([answer[name] for answer in answers] for name in ("reward", "consistency", "advantage"))
    z, z2 = standardised(r), standardised(r2)
    yield "## 5. The advantages (Eq. 13)"
    yield para(
        "An advantage says how much better an answer is than the others of its group. Each of the two rewards enters as "
        "its distance from the mean of the group, in sample standard deviations of the group (D5):"
    )
    yield para(*(f"- {symbol}: {deviation(values)}" for symbol, values in (("r", r), ("r2", r2))))
    yield para(
        f"The second reward weighs lambda = t/T = **{number(record['lam'])}** at this step; t counts the RL steps done "
        f"before it (D7). {STD_EPS:f} is added to both deviations; where all values of a group are equal the term is "
        "exactly 0."
    )
    head = ["answer", "r", "(r - mean) / deviation", "r2", "(r2 - mean) / deviation", "A"]
    names, bold = [f"A{i}" for i in range(len(answers))], [f"**{number(a)}**" for a in A]
    yield table(head, list(zip(names, r, z, r2, z2, bold, strict=True)))
    yield para(
        f"A0 = {number(z[0])} + {number(record['lam'])} * {number(z2[0])} = {number(A[0])}. The "
        "advantages of a group sum to 0: answers are ranked against each other, not against the world."
    )


def deviation(values: Sequence[float]) -> str:
    """How mean and standard deviation of a group's rewards come about."""
    mean = statistics.fmean(values)
    squares = number(sum((x - mean) ** 2 for x in values))
    return (
        f"mean {number(math.fsum(values))} / {len(values)} = {number(mean)}; squared distances from it sum to {squares}; "
        f"the root of {squares} / {len(values) - 1} is {number(statistics.stdev(values))}."
    )


def standardised(values: Sequence[float]) -> list[float]:
    """One term of Eq. 13 for every answer; exactly 0 for equal values."""
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [0.0 if min(values) == max(values) else (value - mean) / (std + STD_EPS) for value in values]


# From advantage to gradient


@dataclass(frozen=True)
class Token:
    """One token of the group in the middle of its update."""

    answer: int
    A: float
    piece: str
    old: float
    new: float
    ref: float
    measured: float  # slope of the loss that autograd found

    @property
    def ratio(self) -> float:
        """New over old probability (Eq. 14, D2)."""
        return math.exp(self.new - self.old)

    def held(self, eps: float) -> float:
        """The ratio kept within the clip range."""
        return min(max(self.ratio, 1 - eps), 1 + eps)

    def clipped(self, eps: float) -> bool:
        """Whether the clipped product is the smaller one, so that nothing flows."""
        return self.held(eps) * self.A < self.ratio * self.A

    def gain(self, eps: float) -> float:
        """The minimum of Eq. 14."""
        return min(self.ratio * self.A, self.held(eps) * self.A)

    @property
    def d(self) -> float:
        """Log of reference over policy."""
        return self.ref - self.new

    @property
    def k3(self) -> float:
        """The KL estimate of Table 12."""
        return min(math.exp(self.d) - self.d - 1, K3_MAX)

    def slopes(self, eps: float, beta: float) -> tuple[float, float]:
        """Slopes of minus Eq. 14 and of beta times k3 in this token's log-prob, before its weight."""
        return 0.0 if self.clipped(eps) else -self.A * self.ratio, beta * (1 - math.exp(self.d)) * (self.k3 < K3_MAX)


def rows_of(record: Record, update: Record) -> list[list[Token]]:
    """The tokens of every answer."""
    columns = zip(record["answers"], *(update[n] for n in ("pieces", "old", "new", "ref", "gradient")), strict=True)
    return [
        [Token(answer["index"], answer["advantage"], *place) for place in zip(*rest, strict=True)]
        for answer, *rest in columns
    ]


def policies(record: Record, update: Record, config: Record) -> Iterator[str]:
    """What old, new and reference policy are (D6), and what a token weighs (D3)."""
    own, parts = sum(len(a["ids"]) for a in record["answers"]), config["batch_prompts"] // config["mini_batch_prompts"]
    yield "## 6. Three policies, and the weight of a token"
    yield para(
        f"The group is learned in mini-batch {update['mini_batch'] + 1} of {parts} of its step: {update['answers']} "
        f"answers, {update['tokens']} tokens, {own} of them here. Each token has three log-probs, one per policy:"
    )
    yield para(
        "- *old*, under the policy that sampled the answers. It stays the same for the whole step.",
        f"- *new*, under the policy of this moment, {update['mini_batch']} optimizer steps later. In the first "
        "mini-batch it would be the old one.",
        "- *ref*, under the model at the start of the iteration's RL stage (D6).",
    )
    yield para(
        f"Every token of the mini-batch has the weight w = 1/{update['tokens']} = {1 / update['tokens']:.8f} (D3). "
        f"Below, terms stand before that weight, so that they are easy to read: divided by {update['tokens']} they "
        "are what is in the loss."
    )


def tokens(record: Record, update: Record, config: Record) -> Iterator[str]:
    """Eq. 14 and k3 at the fork, their slopes, and the sums over the group."""
    eps, answers = config["clip_eps"], rows_of(record, update)
    forked = [row[update["fork"]["token"]] for row in answers]
    yield "## 7. Eq. 14 and the KL, token by token"
    yield from objective(forked, update, eps)
    yield from slopes_at(forked, eps, config["kl_coef"], update["tokens"])
    yield from whole_answers(answers, update, eps)


def objective(forked: Sequence[Token], update: Record, eps: float) -> Iterator[str]:
    """The terms of Eq. 14 and k3 of the tokens at the fork."""
    at = update["fork"]["token"]
    start = "".join(update["pieces"][0][:at])
    yield para(
        "Eq. 14 takes for every token the ratio of its probability now to the one that it was sampled with, times the "
        f"advantage of its answer. All answers begin with the same {at} tokens, {shown(start)}. "
        f"At token {at} (counted from 0) they part. "
        f"With epsilon {eps} the ratio is held within {1 - eps:g} and {1 + eps:g}, and the smaller of the two "
        "products counts (Eq. 14):"
    )
    head = ["answer", "token", "A", "old", "new", "ratio = e^(new - old)", "ratio * A", "held ratio * A", "smaller"]
    products = [(x.ratio * x.A, x.held(eps) * x.A, f"**{number(x.gain(eps))}**") for x in forked]
    terms = [(f"A{x.answer}", shown(x.piece), x.A, x.old, x.new, x.ratio) for x in forked]
    yield table(head, [(*t, *p) for t, p in zip(terms, products, strict=True)])
    yield para(
        "Whoever says the same token has the same ratio, but each answer its own advantage: the token is praised in "
        "one and blamed in another, and the sum decides. The KL of Table 12 is k3 = e^d - d - 1 with d = ref - new:"
    )
    said = {x.piece: (shown(x.piece), x.ref, x.new, x.d, math.exp(x.d), x.k3) for x in forked}
    yield table(["token", "ref", "new", "d", "e^d", "k3"], list(said.values()))


def slopes_at(forked: Sequence[Token], eps: float, beta: float, size: int) -> Iterator[str]:
    """The slopes of the tokens at the fork by hand beside autograd's; `size` tokens in the mini-batch."""
    yield para(
        f"The loss is the sum of w * (beta * k3 - smaller product) over all tokens of the mini-batch, beta = {beta} "
        "(D1). Its slope in one log-prob: the slope of e^(new - old) is the ratio itself, so the first term gives "
        "-A * ratio, or 0 where the held product is the smaller one; k3 gives beta * (1 - e^d). Beside it stands "
        f"what autograd found when this update was replayed, times {size}:"
    )
    rows = []
    for x in forked:
        first, second = x.slopes(eps, beta)
        terms = ("0, clipped" if x.clipped(eps) else first, second, f"**{number(first + second)}**")
        rows.append((f"A{x.answer}", shown(x.piece), *terms, x.measured * size))
    yield table(["answer", "token", "-A * ratio", "beta * (1 - e^d)", "slope over w", "autograd"], rows)
    yield para(
        "Downhill, a negative slope makes a token likelier. Clipping stops gain, not blame: a praised token gets no "
        f"more push above {1 + eps:g}, a blamed one none below {1 - eps:g}, but a blamed token that has become "
        "likelier keeps its whole slope."
    )


def whole_answers(answers: Sequence[Sequence[Token]], update: Record, eps: float) -> Iterator[str]:
    """The sums over all tokens of the group, and what they add to the loss."""
    size = update["tokens"]
    yield para(
        "Now the same sums over all tokens. Each token of an answer carries the answer's advantage, those of the reply too, "
        "which no reward has looked at:"
    )
    everything = [x for own in answers for x in own]
    rows: list[tuple[object, ...]] = [(f"A{own[0].answer}", len(own), own[0].A, *totals(own, eps, size)) for own in answers]
    rows.append(("all", len(everything), "—", *totals(everything, eps, size)))
    yield table(["answer", "tokens", "A", "sum of smaller products", "clipped", "sum of k3", "sum of slopes"], rows)
    gains, _, kls, _ = totals(everything, eps, size)
    yield para(
        f"So this group adds {number(-gains)} / {size} = {number(-gains / size)} to the policy loss of its "
        f"mini-batch, which was {number(update['loss'])}, and {number(kls)} / {size} = {number(kls / size)} to its "
        f"KL, which was {number(update['kl'])}."
    )


def totals(own: Sequence[Token], eps: float, size: int) -> tuple[float, int, float, float]:
    """Over some tokens: smaller products, how many are clipped, k3, and slopes, which are autograd's."""
    gains, kls = math.fsum(x.gain(eps) for x in own), math.fsum(x.k3 for x in own)
    return gains, sum(x.clipped(eps) for x in own), kls, math.fsum(x.measured for x in own) * size


def logits(record: Record, update: Record, config: Record) -> Iterator[str]:
    """Softmax minus one-hot at the fork, summed over the answers."""
    place, size = update["fork"], update["tokens"]
    forked = [row[place["token"]] for row in rows_of(record, update)]
    slopes = [math.fsum(x.slopes(config["clip_eps"], config["kl_coef"])) for x in forked]
    own = [math.fsum(s for s, j in zip(slopes, place["said"], strict=True) if j == i) for i in range(len(place["pieces"]))]
    total, log_sum = math.fsum(slopes), place["logsumexp"]
    yield "## 8. From log-probs to the logits"
    yield para(
        f"At the fork the model has given each of its {place['vocabulary']} tokens a logit z, the same ones for all "
        f"answers, because so far they are the same. The log of the sum of all e^z is {number(log_sum)}, so a "
        f"token's log-prob is z - {number(log_sum)}: that is *new* above. The slope of a log-prob in the logits is "
        "1 - p for the token itself and -p for every other one. So a logit gets the slopes of the answers that said "
        f"its token, minus p times the slopes of all, S = {summed_signed(slopes)}:"
    )
    rows: list[tuple[object, ...]] = []
    chances = [math.exp(z - log_sum) for z in place["logits"]]
    for i, (piece, z, p, found) in enumerate(zip(place["pieces"], place["logits"], chances, place["gradient"], strict=True)):
        names = ", ".join(f"A{x.answer}" for x, j in zip(forked, place["said"], strict=True) if j == i) or "nobody"
        rows.append((shown(piece), names, z, p, own[i], -p * total, own[i] - p * total, found * size))
    rest, others = 1 - math.fsum(chances), f"the other {place['vocabulary'] - len(chances)}"
    rows.append((others, "nobody", "—", rest, 0.0, -rest * total, -rest * total, place["gradient_of_the_others"] * size))
    yield table(["token", "said by", "z", "p", "own slopes", "-p * S", "slope over w", "autograd"], rows)
    least = min(range(len(chances)), key=lambda i: own[i] - chances[i] * total)
    yield para(
        f"The column sums to 0: what one token gains the others lose. Downhill, {shown(place['pieces'][least])} "
        "gains most here. From the logits, backpropagation goes on into the weights; the gradient of the whole "
        "mini-batch is cut to a norm of 1, and AdamW takes its step."
    )


def summed_signed(values: Sequence[float]) -> str:
    """The sum a - b + c = d, of values with signs."""
    text = " ".join(f"{'+' if v >= 0 else '-'} {number(abs(v))}" for v in values)
    return f"{text.removeprefix('+ ')} = {number(math.fsum(values))}"


def choice(record: Record) -> Iterator[str]:
    """What becomes of the group (lines 12-15 of Algorithm 1)."""
    i = record["selected"]
    yield "## What becomes of the group (Eq. 7)"
    if i is None:
        yield para(f"Nothing is kept: {record['why']}.")
        return
    parse = record["answers"][i]["parse"]
    yield para(
        f"A{i} is the first of the highest reward, and {number(record['answers'][i]['reward'])} is enough to be kept (D11). "
        f"The dialogue goes on with its reply, {shown(parse['my_output'])}, said by {record['responder']['name']}, and the "
        f"label of this new turn is what the model said it felt: {named(parse['my_emotions'])}. The next iteration may draw "
        "it as a prompt; the fine-tuning of this one learns the answer."
    )
