"""Do later answers feel and speak better than earlier ones? Judges compare them in pairs, blind (Fig. 3, Tables 9 and 11).

    python evaluate.py judge RUN --early 0-9 --late 10-19 --judge URL --judge_name NAME
    python evaluate.py judge --early DIR --late DIR --data meld=data/meld --judge DIR --out verdicts.jsonl

Which answers make a pair is in analysis/pairing.py. Every judge is asked two questions about a pair, sees it in both orders
and, as a control, one of its answers against itself. Every verdict is kept with the judge's own words.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import data
from analysis.compare import interval, sign_test
from analysis.pairing import Pair, Said, answered, recorded
from common.draws import first_shuffled
from common.errors import UserError
from common.files import Record, jsonl, write_atomically
from common.flags import Pairs, pairs
from common.text import clean
from corpora import loading
from data import Failure, Sample
from experts.asking import Chat, Expert, Settings, ask, beside, open_experts
from experts.cache import Cache, open_cache
from experts.contracts import whole_text
from experts.responses import Reply, Unanswered

# What is asked: the contract of Table 9 in our words (D16)

QUESTIONS = {
    "self_emotion": "Whose inner state is truer to the role: do the thoughts and the feelings named fit who this person is, "
    "and what was just said?",
    "expression": "Whose line is the better one: does it voice the feelings named beside it, in this person's manner, as a "
    "natural next turn of the conversation?",
}
STEPS = (
    "Work through five points, in writing: the personality, the conversation, answer A, answer B, and how the two compare. "
    "Their order means nothing, and neither does their length. Close with one last line, exactly one of these:\n"
    "Verdict: A\nVerdict: B\nVerdict: tie"
)
Side = Literal["early", "late"]
VERDICT = re.compile(r"[\W_]*verdict[\W_]*(?:answer[\W_]*)?(a|b|tie)[\W_]*", re.IGNORECASE)


@dataclass(frozen=True)
class Trial:
    """One request to a judge: which side stands as answer A and which as answer B; the same side twice is the control."""

    question: str
    number: int
    pair: Pair
    sides: tuple[Side, Side]

    @property
    def shown(self) -> tuple[Said, Said]:
        """Answer A and answer B."""
        first, second = (self.pair.early if side == "early" else self.pair.late for side in self.sides)
        return first, second


def scene(sample: Sample, control: Sequence[str]) -> str:
    """Who answers and what was said before."""
    who = sample.responder
    persona = data.safe(who.persona or "not described", control)
    name = data.safe(who.name or data.DEFAULT.listener, control)
    return f"Person: {name}\nPersonality: {persona}\nConversation:\n{data.history(sample.context, control)}"


def judge_chat(trial: Trial, control: Sequence[str] = ()) -> Chat:
    """The prompt of a trial. Nothing in it tells the sides apart."""
    told = [scene(said.sample, control) for said in trial.shown]
    apart = [f"Situation of answer {letter}\n{text}" for letter, text in zip("AB", told, strict=True)]
    parts = told[:1] if told[0] == told[1] else apart
    for letter, said in zip("AB", trial.shown, strict=True):
        feels = ", ".join(f"{emotion} {weight:g}" for emotion, weight in said.output.my_emotions.items())
        shown = f"Thoughts: {said.output.reasoning.strip()}\nFeels: {feels}\nSays: {said.output.my_output}"
        parts.append(f"Answer {letter}\n{data.safe(shown, control)}")
    system = "You compare how two answers play a role in a conversation. You go by what they say, not by what you would say."
    return data.chat(system, "\n\n".join([*parts, QUESTIONS[trial.question], STEPS]))


def parse_verdict(reply: Reply | Unanswered) -> str | Failure:
    """A, B or tie, from the last line. Never raises. Reasons: unanswered, unfinished, verdict."""
    text = whole_text(reply)
    if isinstance(text, Failure):
        return text
    last = text.rstrip().rpartition("\n")[2]
    match = VERDICT.fullmatch(last)
    if match is None:
        return Failure("verdict", f"the last line is {clean(last)[:60]!r}")
    return {"a": "A", "b": "B"}.get(match[1].lower(), "tie")


SIDES: tuple[tuple[Side, Side], ...] = (("early", "late"), ("late", "early"))
SAME: tuple[tuple[Side, Side], ...] = (("late", "late"), ("early", "early"))


def trials(found: Sequence[Pair]) -> list[Trial]:
    """For each question and pair both orders, and the control, which shows late and early answers in turn."""
    return [Trial(q, i, pair, x) for q in QUESTIONS for i, pair in enumerate(found) for x in (*SIDES, SAME[i % 2])]


def asked(judges: Sequence[Expert], found: Sequence[Pair], settings: Settings, cache: Cache) -> Iterator[Record]:
    """Every verdict of every judge."""
    for judge in judges:
        made = trials(found)
        replies = ask(judge, [judge_chat(trial, judge.control) for trial in made], settings, cache)
        for trial, reply in zip(made, replies, strict=True):
            yield verdict_row(judge.name, trial, reply)


def verdict_row(judge: str, trial: Trial, reply: Reply | Unanswered) -> Record:
    """What the file keeps of a verdict. `prefers`: early, late or tie; null for an invalid verdict and in the control."""
    read, pair, (a, b) = parse_verdict(reply), trial.pair, trial.sides
    verdict, reason = (None, f"{read.reason}: {read.detail}") if isinstance(read, Failure) else (read, None)
    prefers = None if a == b or verdict is None else {"A": a, "B": b}.get(verdict, "tie")
    return {
        "judge": judge, "question": trial.question, "pair": trial.number, "match": pair.match, "early": pair.early.where,
        "late": pair.late.where, "a": a, "b": b, "verdict": verdict, "reason": reason, "prefers": prefers,
        "text": "" if isinstance(reply, Unanswered) else reply.text,
    }  # fmt: skip


# Counting


def outcome(first: str | None, second: str | None) -> str:
    """What a pair says of the late answer, from the side preferred in either order; None is an invalid verdict."""
    if first is None or second is None:
        return "invalid"
    return {"late": "win", "early": "loss", "tie": "tie"}[first] if first == second else "flip"


def tally(rows: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Counts of one judge's verdicts on one question, with test and interval; `control` counts those on equal answers."""
    orders: defaultdict[int, dict[str, str | None]] = defaultdict(dict)
    for row in rows:
        if row["a"] != row["b"]:
            orders[row["pair"]][row["a"]] = row["prefers"]
    counts = Counter(outcome(found["early"], found["late"]) for found in orders.values())
    wins, losses, valid = counts["win"], counts["loss"], counts.total() - counts["invalid"]
    control = Counter(row["verdict"] or "invalid" for row in rows if row["a"] == row["b"])
    named = {name: counts[name] for name in ("win", "loss", "tie", "flip", "invalid")}
    low, high = interval(wins, losses, valid - wins - losses, seed=seed) if valid else (None, None)
    difference = (wins - losses) / valid if valid else None
    numbers = {"difference": difference, "low": low, "high": high, "p": sign_test(wins, losses)}
    return {"pairs": counts.total(), **named, **numbers, "control": {x: control[x] for x in ("A", "B", "tie", "invalid")}}


def table(rows: Sequence[Record], seed: int) -> tuple[str, list[dict[str, Any]]]:
    """Counts by judge, question and match, as text and as numbers; a row `all` where pairs were matched in several ways."""
    columns = ("pairs", "win", "loss", "tie", "flip", "invalid")
    lines = [f"{'judge':20} {'question':12} {'matched by':10}" + "".join(f" {x:>7}" for x in columns)
             + f" {'late-early %':>12} {'95 %':>16} {'p':>8}   A/A: A, B, tie, invalid"]  # fmt: skip
    numbers = []
    for judge, question in dict.fromkeys((row["judge"], row["question"]) for row in rows):
        mine = [row for row in rows if (row["judge"], row["question"]) == (judge, question)]
        matches = list(dict.fromkeys(row["match"] for row in mine))
        for match in (["all"] if len(matches) > 1 else []) + matches:
            counts = tally([row for row in mine if match in ("all", row["match"])], seed)
            numbers.append({"judge": judge, "question": question, "match": match, **counts})
            known = counts["difference"] is not None
            gain = f"{100 * counts['difference']:+.1f}" if known else "-"
            between = f"{100 * counts['low']:+.1f} to {100 * counts['high']:+.1f}" if known else "-"
            line = f"{judge[:20]:20} {question:12} {match:10}" + "".join(f" {counts[x]:7d}" for x in columns)
            same = ", ".join(str(n) for n in counts["control"].values())
            lines.append(f"{line} {gain:>12} {between:>16} {counts['p']:8.4f}   {same}")
    return "\n".join(lines), numbers


# The command


@dataclass(frozen=True)
class JudgeCommand:
    """What is compared, by whom, and where the verdicts go."""

    early: str  # Step, or FIRST-LAST, of RUN, from 0 as in rollouts/; without RUN, the folder of a model.
    late: str  # The later answers, named in the same way.
    judge: Pairs  # Endpoint (https://host/v1) or Hugging Face folder; repeatable. Judges are greedy.
    run: tyro.conf.Positional[Path | None] = None  # Folder of a run.
    judge_name: Pairs = ()  # Model name at an endpoint, one per URL, in order; keys as in `python -m experts`.
    price: Pairs = ()  # PROMPT,ANSWER: price of a million tokens, one per --judge, in order; the cost line then shows money.
    out: Path | None = None
    """File of all verdicts. Default: judge.jsonl in RUN. Answers are cached beside it, in FILE.cache."""
    limit: int = 100  # Pairs at most, those that share most first; 0 = all. Each costs a judge six requests.
    data: Pairs = ()  # NAME=DIR, repeatable: prompts for two models; with RUN only where its data has moved.
    split: Literal["train", "dev", "test"] = "test"  # Split that two models answer.
    personas: Path | None = None  # Personas that two models see (JSONL of `python -m experts`).
    persona_scope: Literal["none", "context", "dialogue"] = "none"  # Which of them dev and test show (D28).
    prompts: Path | None = None  # JSON that replaces the prompts of two models.
    temperature: float = 1.0  # Of the answers of two models.
    max_new_tokens: int = 2048  # Longest verdict, and longest answer of two models, in tokens.
    seed: int = 0  # Of the pairs, the answers and the bootstrap.
    date: str = ""  # That the chat template of a folder shows, YYYY-MM-DD; default: today. Endpoints have their own.
    concurrency: int = 8  # Requests under way at once.


def prompts_of(command: JudgeCommand) -> list[Sample]:
    """What two models answer: the first --limit of a seeded shuffle."""
    known = loading.read_personas(command.personas) if command.personas else None
    found = [
        sample
        for name, root in pairs("data", command.data).items()
        for sample in data.read_samples(name, root, command.split, personas=known, persona_scope=command.persona_scope)
    ]
    return first_shuffled(found, command.limit, f"{command.seed}/judge")


def judge_command(command: tyro.conf.OmitArgPrefixes[JudgeCommand]) -> int:
    """Let judges compare early with late answers, of a run or of two models, in both orders (Fig. 3).

    win: the late answer is preferred in both orders; loss: the early one; tie: a tie in both; flip: the order decides.
    """
    out = command.out or (command.run / "judge.jsonl" if command.run else None)
    if out is None or not (command.run or command.data):
        raise UserError("give RUN with steps, or two models with --data NAME=DIR and --out FILE")
    if min(command.limit, command.temperature) < 0 or min(command.max_new_tokens, command.concurrency) < 1:
        raise UserError("--limit and --temperature must be at least 0, --max_new_tokens and --concurrency at least 1")
    judges = open_experts(command.judge, command.judge_name, command.price, flags=("--judge", "--judge_name"))
    settings = Settings(0.0, command.max_new_tokens, command.seed, command.concurrency, date=command.date)
    if command.run:
        found, note = recorded(command.run, command.early, command.late, moved=command.data, seed=command.seed)
        found = found[: command.limit or None]
    with open_cache(beside(out, "cache")) as cache:
        if not command.run:
            prompts = data.read_prompts(command.prompts) if command.prompts else data.DEFAULT
            sampled = Settings(command.temperature, command.max_new_tokens, command.seed, date=settings.date)
            found, note = answered((command.early, command.late), prompts_of(command), prompts, sampled, cache)
        if not found:
            raise UserError(f"there is no pair to judge; {note}")
        rows = list(asked(judges, found, settings, cache))
    write_atomically(out, jsonl(rows))
    text, numbers = table(rows, command.seed)
    print(f"{text}\n{note}\nverdicts: {out}\n{json.dumps({'judged': numbers})}")
    return 0
