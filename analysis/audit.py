"""The audit of a run: everything that follows from its answers and its config, computed again from the text upwards.

It reads RUN/config.json, RUN/rollouts/iteration-K.jsonl and RUN/buffer.jsonl, uses the functions of grpo.py and data.py
that training used, and compares exactly. Where RUN/model holds a tokenizer, token ids are decoded too, and where the data is
still there, prompts are rendered again. `show` works a group out line by line. The command is
`python evaluate.py audit RUN [--show SAMPLE_ID]`.
"""

import math
import re
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import data
from analysis import sheet
from analysis.totals import UNREADABLE, Scoring, Totals, against_data, rl_step
from common.errors import UserError, reason
from common.files import Record, numbered, read_json
from common.flags import pairs
from common.hub import eos_ids, load_tokenizer
from corpora.dialogue import Turn
from data import Output, Responder, Sample
from grpo import RULE_BONUS, STD_EPS, advantages, consistency, core_emotions, iou, lam, normalised, reward
from training.config import of_run
from training.folder import damage
from training.records import digest, parse_record, parted, sample_from_record, sample_record
from training.task import read_samples

STRANGERS = (Turn("a stranger", "-"), Turn("another stranger", "-"))  # for a context that the run did not keep

Check = Callable[[Record], Iterator[str]]


@dataclass(frozen=True)
class Findings:
    """One line per difference (file, line, field), and what was checked."""

    problems: tuple[str, ...]
    summary: str


def audit(run: Path, *, data_at: Mapping[str, str] | None = None, score: Scoring | None = None) -> Findings:
    """Check a run folder. `data_at`: dataset -> folder, where the data is not where the run found it; `score` scores the
    answers of an evaluation. Raises `UserError` where it is no run, has no rollouts, or a line is not JSON."""
    config, records = read_json(run / "config.json"), rollouts(run)
    check_settings(run, config)
    kept, damaged, totals = BufferFile(run), damage(run), Totals(run, score)
    samples, unread = originals(config, data_at or {})
    (rendered, silent), decoded = renderer(run, config, kept, samples, unread), decoder(run)
    checks = [check for check in (decoded, rendered, partial(against_data, samples=samples) if samples else None) if check]
    problems, heads = list(damaged or []), list[tuple[str, Record]]()
    # One step at a time: all of them may be larger than memory.
    for step, part in groupby(records, key=lambda found: found[1].get("step")):
        group = list(part)
        for where, record in group:
            problems += [f"{where}: {problem}" for problem in examine(record, config, kept, checks)]
            heads.append((where, {name: record.get(name) for name in ("step", "weights_version", "iteration", "why")}))
        problems += totals.step(step, [record for _, record in group], lambda t: expected_lam(t, config))
    problems += [*order(heads, config), *kept.left(), *totals.end(kept.children, samples)]
    text = f"{len(heads)} groups of {config['n']} answers, {kept.used} kept: {len(problems)} differences"
    text += f"; {totals.compared} numbers of metrics.jsonl compared" if totals.compared else ""
    trusted = sum(head["why"] in ("responder", "length") for _, head in heads)
    text += f"; not recomputed: {trusted} refusals for prompt length or want of a responder" if trusted else ""
    text += "".join(f"; {line}" for line in totals.silent)
    text += "" if damaged is not None else "; files not compared with a checkpoint (none that knows their SHA-256)"
    text += "" if samples else f"; gold not compared with data ({unread})"
    text += "" if decoded else f"; token ids not decoded (no tokenizer in {run / 'model'})"
    return Findings(tuple(problems), text if rendered else f"{text}; prompts not rendered again ({silent})")


def originals(config: Record, data_at: Mapping[str, str]) -> tuple[dict[str, Sample] | None, str]:
    """The samples of the run's data by id, or None and why not. Raises `UserError` where the user gave its folder."""
    cfg = of_run(config)
    try:
        roots = pairs("data", cfg.data)
        if unknown := set(data_at) - set(roots):
            raise UserError(f"--data names {', '.join(sorted(unknown))}: the run learned from {', '.join(roots) or 'none'}")
        splits = read_samples(cfg, {**roots, **data_at})
    except (UserError, OSError) as error:
        if data_at:
            raise
        return None, reason(error)
    found = {sample.id: sample for samples in splits.values() for sample in samples}
    return found or None, "config.json names none"


# Reading a run


def lines(path: Path) -> Iterator[tuple[str, Record]]:
    """("file:line", record) of a JSONL file; none where it does not exist. Raises `UserError` at a broken line."""
    for number, record in numbered(path):
        yield f"{path.name}:{number}", record


def rollouts(run: Path) -> Iterator[tuple[str, Record]]:
    """Every rollout record in the order of training. Raises `UserError` if there is none."""
    paths = rollout_files(run)
    if not paths:
        raise UserError(f"{run} holds no rollouts/iteration-K.jsonl: give the folder of a run after its first RL step")
    return (found for path in paths for found in lines(path))


def rollout_files(run: Path) -> list[Path]:
    """rollouts/iteration-K.jsonl in the order of K."""
    found = ((re.fullmatch(r"iteration-([0-9]+)\.jsonl", path.name), path) for path in (run / "rollouts").glob("*.jsonl"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


NEEDED = {
    "n": int, "batch_prompts": int, "S": int, "T": int, "max_prompt_tokens": int, "max_new_tokens": int,
    "keep_reward": float, "self_grpo": bool, "self_play": bool, "retrain_from": str,
}  # fmt: skip


def check_settings(run: Path, config: Record) -> None:
    """Raise `UserError` where config.json has not what an audit needs."""
    for name, kind in NEEDED.items():
        value = config.get(name)
        fits = type(value) in ({int, float} if kind is float else {kind})
        if not fits or (kind is int and isinstance(value, int) and value < 1):
            raise UserError(f"{run / 'config.json'}: {name} is {value!r}: it is not of a run of selfemo.py, or damaged")


class BufferFile:
    """buffer.jsonl: the kept answers and the samples made of them, handed out in the order of the rollouts."""

    def __init__(self, run: Path) -> None:
        self.rows: defaultdict[tuple[int, str], deque[Record]] = defaultdict(deque)
        self.made: dict[str, Sample] = {}
        self.children: list[tuple[int, Sample]] = []
        self.used = 0
        for where, row in lines(run / "buffer.jsonl"):
            try:
                child = sample_from_record(row["child"])
                self.rows[row["iteration"], row["sample_id"]].append({**row, "child": child})
            except (LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{run / where} is not a kept answer: {error}") from None
            self.made[child.id] = child
            self.children.append((row["iteration"], child))

    def take(self, record: Record) -> Record | None:
        """The line that belongs to a record with a selected answer."""
        rows = self.rows[record["iteration"], record["sample_id"]]
        self.used += bool(rows)
        return rows.popleft() if rows else None

    def left(self) -> Iterator[str]:
        """Lines that no rollout explains."""
        for (iteration, sample_id), rows in self.rows.items():
            if rows:
                yield f"buffer.jsonl: sample_id: {sample_id} of iteration {iteration} is kept without a selected answer"


def decoder(run: Path) -> Check | None:
    """The check of ids against text, once the run has written its model with the tokenizer."""
    folder = run / "model"
    if not (folder / "tokenizer_config.json").exists():
        return None
    tokenizer = load_tokenizer(folder)
    stops = eos_ids(folder, tokenizer)

    def check(record: Record) -> Iterator[str]:
        prompt = data.answer_text(tokenizer, record["prompt_ids"], (), "")
        for i, answer in enumerate(record["answers"]):
            text = data.answer_text(tokenizer, answer["ids"], stops, "")
            opened = answer["text"].removesuffix(text)  # the think block that the template opened
            if opened + text != answer["text"] or (opened and not (opened.strip() == "<think>" and prompt.endswith(opened))):
                yield f"answers[{i}].ids: they decode to {text!r}, text says {answer['text']!r}"
            if answer["finished"] != (answer["ids"][-1] in stops):
                yield f"answers[{i}].finished: {answer['finished']}, but the last id is {answer['ids'][-1]}"

    return check


def renderer(
    run: Path, config: Record, kept: BufferFile, samples: Mapping[str, Sample] | None, unread: str
) -> tuple[Check | None, str]:
    """The check of prompts against what the run's own tokenizer writes again, or None and why that cannot be."""
    cfg, folder = of_run(config), run / "model"
    if not (folder / "tokenizer_config.json").exists():
        return None, f"no tokenizer in {folder}"
    if not cfg.date:
        return None, "an earlier version kept no date"
    if samples is None:
        return None, unread
    try:
        prompts = data.read_prompts(Path(cfg.prompts)) if cfg.prompts else data.DEFAULT
    except (UserError, OSError) as error:
        return None, reason(error)
    tokenizer = load_tokenizer(folder)

    def check(record: Record) -> Iterator[str]:
        sample = samples.get(record["sample_id"]) or kept.made.get(record["sample_id"])
        if sample is None:
            yield f"sample_id: {record['sample_id']} is in no data of the run"
        elif said := parted(tokenizer, record["prompt_ids"], data.encode(tokenizer, sample, prompts, cfg.date)[0]):
            yield f"prompt_ids: {said}"

    return check, ""


# Checking a record


def examine(record: Record, config: Record, kept: BufferFile, checks: Sequence[Check]) -> Iterator[str]:
    """Every check of one record. Whatever a forger wrote, the audit says so and goes on."""
    try:
        yield from compare(record, {"sha256": digest(record)})
        yield from form(record, config)
        yield from differences(record, config, kept)
        for check in checks:
            yield from check(record)
    except UNREADABLE as error:
        yield f"record: a field is missing or not what it should be: {type(error).__name__} {error}"


def expected_lam(step: int, config: Record) -> float:
    """Lambda of a step (Eq. 13, D7): over the run, within the iteration if it retrains from base, or 0 (D27)."""
    if not config["self_grpo"]:
        return 0.0
    return lam(step % config["S"], config["S"]) if config["retrain_from"] == "base" else lam(step, config["T"])


def recompute(record: Record, config: Record) -> tuple[list[data.Output | data.Failure], Record]:
    """The answers of a record read again, and every field that follows from `text`, `gold`, `step` and the config."""
    answers, gold = record["answers"], record["gold"]
    parses = [data.parse_output(a["text"], record["labels"], finished=a["finished"]) for a in answers]
    predictions = [p.last_emotions if isinstance(p, Output) else None for p in parses]
    rewards, consistencies = [reward(p, gold) for p in predictions], consistency(predictions)
    weight = expected_lam(record["step"], config)
    adv = advantages([rewards], [consistencies], weight)[0].tolist()
    derived: Record = {"lam": weight, "core": core_emotions(predictions)}
    columns = {"parse": map(parse_record, parses), "reward": rewards, "consistency": consistencies, "advantage": adv}
    for name, values in columns.items():
        derived |= {f"answers[{i}].{name}": value for i, value in enumerate(values)}
    return parses, derived | {f"answers[{i}].index": i for i in range(len(answers))}


def differences(record: Record, config: Record, kept: BufferFile) -> Iterator[str]:
    """What a record, and its line of buffer.jsonl, say differently from what follows from its answers."""
    parses, derived = recompute(record, config)
    sample, row = sample_of(record, kept)
    rewards = [derived[f"answers[{i}].reward"] for i in range(len(parses))]
    choice = data.Selection(None, "off", None)
    if config["self_play"]:
        k, fits = record["iteration"], record["why"] != "length"
        choice = data.select(sample, parses, rewards, k, keep_reward=config["keep_reward"], fits=lambda child: fits)
    derived |= {"selected": choice.index, "why": choice.why}
    written = {**record, **{f"answers[{i}].{k}": v for i, a in enumerate(record["answers"]) for k, v in a.items()}}
    if sample.depth:
        own = sample_record(sample)
        derived |= {name: own[name] for name in ("dataset", "origin", "parent", "depth", "responder", "gold")}
        derived["labels"] = list(sample.labels)
    yield from compare(written, derived)
    if record["selected"] is not None:
        ids = record["answers"][record["selected"]]["ids"]
        same = {"prompt_ids": record["prompt_ids"], "ids": ids, "child": choice.child}
        yield from ([f"buffer.jsonl: {p}" for p in compare(row, same)] if row else ["selected: missing in buffer.jsonl"])


def compare(written: Record, derived: Record) -> Iterator[str]:
    """One line per field of `derived` that is written otherwise. Exact, and 1 is not true."""
    for name, value in derived.items():
        if name not in written:
            yield f"{name}: missing, it should be {value!r}"
        elif written[name] != value or type(written[name]) is not type(value):
            yield f"{name}: written {written[name]!r}, recomputed {value!r}"


def sample_of(record: Record, kept: BufferFile) -> tuple[Sample, Record | None]:
    """The sample that was answered, as far as the run kept it, and the line of its own kept answer."""
    row = kept.take(record) if record["selected"] is not None else None
    if record["depth"]:
        if record["sample_id"] not in kept.made:
            raise LookupError(f"sample_id: no kept answer made {record['sample_id']}")
        return kept.made[record["sample_id"]], row
    sample = Sample(
        id=record["sample_id"],
        dataset=record["dataset"],
        # A run keeps the context of an original sample only in its child.
        context=row["child"].context[:-1] if row else () if record["why"] == "responder" else STRANGERS,
        responder=Responder(**record["responder"]),
        labels=tuple(record["labels"]),
        gold=record["gold"],
        personas=row["child"].personas if row else {},
    )
    return sample, row


def form(record: Record, config: Record) -> Iterator[str]:
    """Lengths, origins and signs that hold for every record."""
    parent, _, made = record["sample_id"].rpartition("+")
    depth = record["sample_id"].count("+")
    yield from compare(record, {"depth": depth, "parent": parent or None, "origin": "synthetic" if depth else "original"})
    if depth and int(made) >= record["iteration"]:
        yield f"sample_id: made in iteration {made}, answered in {record['iteration']}"
    if not record["sample_id"].startswith(f"{record['dataset']}/train/"):
        yield f"sample_id: {record['sample_id']} does not descend from a train dialogue of {record['dataset']}"
    if not 0 < len(record["prompt_ids"]) <= config["max_prompt_tokens"]:
        yield f"prompt_ids: {len(record['prompt_ids'])} tokens, allowed 1 to {config['max_prompt_tokens']}"
    if len(record["answers"]) != config["n"]:
        yield f"answers: {len(record['answers'])}, the config says {config['n']}"
    for i, answer in enumerate(record["answers"]):
        size = len(answer["ids"])
        if not 0 < size <= config["max_new_tokens"] or not (answer["finished"] or size == config["max_new_tokens"]):
            yield f"answers[{i}].ids: {size} tokens of {config['max_new_tokens']}, finished {answer['finished']}"
        if size != len(answer["logprobs"]) or not all(-math.inf < x <= 0 for x in answer["logprobs"]):
            yield f"answers[{i}].logprobs: {len(answer['logprobs'])} for {size} tokens, or one of them not in (-inf, 0]"


def order(records: Iterable[tuple[str, Record]], config: Record) -> Iterator[str]:
    """Whether steps follow each other without gap or repeat, in the file of their iteration, with weights that advance."""
    last, groups = (-1, -1), Counter[int]()
    for where, record in records:
        step, version, iteration = (record.get(name) for name in ("step", "weights_version", "iteration"))
        if not (isinstance(step, int) and isinstance(version, int) and isinstance(iteration, int)):
            yield f"{where}: step: step, weights_version and iteration must be whole numbers"
            continue
        if step not in (last[0], last[0] + 1) or (step > last[0]) != (version > last[1]) or version < last[1]:
            after = f"follows {rl_step(last[0])} with weights {last[1]}" if last[0] >= 0 else "comes first"
            yield f"{where}: step: {rl_step(step)} with weights {version} {after}"
        if not where.startswith(f"iteration-{iteration}.jsonl:") or step // config["S"] != iteration - 1:
            home = f"iteration-{step // config['S'] + 1}.jsonl"
            yield f"{where}: iteration: {iteration}, but {rl_step(step)} belongs to {home}"
        last = (step, version)
        groups[step] += 1
    for step, found in groups.items():
        if found != config["batch_prompts"]:
            yield f"{rl_step(step)}: {found} groups, the config says {config['batch_prompts']}"


# Working a group out for --show


def show(run: Path, sample_id: str) -> str:
    """Every group of one sample, worked out number by number. Raises `UserError` if there is none."""
    with readable(run, sample_id):
        return "\n\n".join("\n".join(derivation(record)) for record in groups_of(run, sample_id))


def as_csv(run: Path, sample_id: str | None) -> str:
    """The groups of one sample, or all, as a CSV file. Raises `UserError` where there is none, or a record is damaged."""

    def records() -> Iterator[Record]:
        yield from groups_of(run, sample_id) if sample_id else (record for _, record in rollouts(run))

    with readable(run, sample_id or "the run"):
        return sheet.table(sheet.columns(records()), sheet.rows(records()))


def groups_of(run: Path, sample_id: str) -> list[Record]:
    """The records of one sample. Raises `UserError` if there is none."""
    found = [record for _, record in rollouts(run) if record.get("sample_id") == sample_id]
    if not found:
        raise UserError(f"{run} holds no answers to {sample_id!r}")
    return found


@contextmanager
def readable(run: Path, sample_id: str) -> Iterator[None]:
    """Whatever a damaged record of a sample does inside becomes one line. Raises `UserError`."""
    try:
        yield
    except UNREADABLE as error:
        why = f"{type(error).__name__} {error}"
        raise UserError(f"{run}: a record of {sample_id} is damaged ({why}): the audit without --show says more") from None


def weights(emotions: Mapping[str, float]) -> str:
    """Emotions with six decimals."""
    return ", ".join(f"{emotion} {weight:.6f}" for emotion, weight in emotions.items())


def derivation(record: Record) -> Iterator[str]:
    """The numbers of one group (Eqs. 8-13) as a teacher would write them down."""
    answers, gold = record["answers"], record["gold"]
    valid = {a["index"]: a["parse"]["last_emotions"] for a in answers if a["parse"]["reason"] is None}
    yield f"{record['sample_id']}, {rl_step(record['step'])}, iteration {record['iteration']}, {record['origin']}"
    yield f"gold {dict(gold)}; normalised (Eq. 9): {weights(normalised(gold))}"
    for answer in answers:
        yield f"answer {answer['index']}, {len(answer['ids'])} tokens"
        yield from reward_lines(answer, gold)
    yield "consensus (Eq. 11): the normalised weights of the valid answers, summed"
    votes = [normalised(prediction) for prediction in valid.values()]
    for emotion in sorted({e for vote in votes for e in vote}, key=lambda e: -math.fsum(v.get(e, 0.0) for v in votes)):
        shares = [vote[emotion] for vote in votes if emotion in vote]
        yield f"  {emotion}: {' + '.join(f'{s:.6f}' for s in shares)} = {math.fsum(shares):.6f}"
    yield f"  core: {weights(core_emotions(list(valid.values()))) or 'none, every answer failed'}"
    for answer in answers:
        named = [e for e in record["core"] if e in valid.get(answer["index"], {})]
        yield f"  answer {answer['index']} names {', '.join(named) or 'none'}: {len(named)}/3 (Eq. 12)"
    yield from advantage_lines(record)
    yield f"selected: {record['selected']} ({record['why']})"


def reward_lines(answer: Record, gold: Mapping[str, float]) -> Iterator[str]:
    """The reward of one answer (Eqs. 8-10)."""
    if answer["parse"]["reason"] is not None:
        yield f"  the rule fails ({answer['parse']['reason']}: {answer['parse']['detail']}): r = {answer['reward']} (Eq. 8)"
        return
    raw = answer["parse"]["last_emotions"]
    p, q = normalised(raw), normalised(gold)
    yield f"  last_emotions {raw}; normalised (Eq. 9): {weights(p)}"
    sums = []
    for title, pick in (("minima", min), ("maxima", max)):
        terms = {e: pick(p.get(e, 0.0), q.get(e, 0.0)) for e in dict.fromkeys([*p, *q])}
        sums.append(math.fsum(terms.values()))
        yield f"  {title}: {weights(terms)}; sum {sums[-1]:.6f}"
    yield f"  IOU = {sums[0]:.6f} / {sums[1]:.6f} = {iou(raw, gold):.6f} (Eq. 10)"
    yield f"  r = {iou(raw, gold):.6f} + {RULE_BONUS} = {answer['reward']:.6f} (Eq. 8)"


def advantage_lines(record: Record) -> Iterator[str]:
    """The advantages of one group (Eq. 13)."""
    terms = []
    for name, symbol in (("reward", "r"), ("consistency", "r2")):
        values = [answer[name] for answer in record["answers"]]
        mean, std = statistics.fmean(values), statistics.stdev(values)
        terms.append((values, mean, std))
        yield f"{symbol}: {', '.join(f'{v:.6f}' for v in values)}; mean {mean:.6f}, standard deviation {std:.6f}"
    yield f"advantages (Eq. 13), lambda {record['lam']:.6f}, {STD_EPS} added to both deviations; equal values give 0"
    for answer in record["answers"]:
        parts = [
            "0 (all equal, D5)" if min(values) == max(values) else f"({values[answer['index']]:.6f} - {mean:.6f})/{std:.6f}"
            for values, mean, std in terms
        ]
        yield f"  A{answer['index']} = {parts[0]} + {record['lam']:.6f} * {parts[1]} = {answer['advantage']:.6f}"
