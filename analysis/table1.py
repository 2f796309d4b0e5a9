"""Table 1: the answers of folders and endpoints to score, mean and spread over several, and the table itself.

The command is `python evaluate.py score`.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import data
from common.errors import UserError
from common.hub import load_tokenizer
from data import Prompts, Sample
from experts.asking import Expert, Settings, Unanswered, ask, open_cache, open_experts, open_local

Metrics = Mapping[str, Mapping[str, float]]  # row (a dataset, `average`, ...) -> metric -> value
Answers = dict[str, list[tuple[str, bool]]]  # dataset -> (text, finished) a sample


def endpoints(models: Sequence[str], names: Sequence[str]) -> dict[str, Expert]:
    """Those of --model that are URLs, with the names of --model_name in order. Raises `UserError`."""
    urls = [place for place in models if re.match(r"https?://", place)]
    if not urls and not names:
        return {}
    return dict(zip(urls, open_experts(urls, names, flags=("--model", "--model_name")), strict=True))


def asked(
    model: Expert, datasets: Mapping[str, Sequence[Sample]], prompts: Prompts, settings: Settings, cache: Path
) -> Answers:
    """One answer of an endpoint a sample. Raises `UserError` if any is missing: what was not heard cannot be wrong."""
    chats = {name: [data.messages(s, prompts, model.control) for s in samples] for name, samples in datasets.items()}
    with open_cache(cache) as known:
        replies = {name: ask(model, part, settings, known) for name, part in chats.items()}
    missing = [reply.why for part in replies.values() for reply in part if isinstance(reply, Unanswered)]
    if missing:
        raise UserError(f"{len(missing)} samples have no answer ({missing[0]}): the same command asks for those again")
    heard = {name: [r for r in part if not isinstance(r, Unanswered)] for name, part in replies.items()}
    return {name: [(reply.text, reply.finished) for reply in part] for name, part in heard.items()}


def generated(
    folder: str, datasets: Mapping[str, Sequence[Sample]], prompts: Prompts, settings: Settings, kv_budget: int | None
) -> Answers:
    """One answer of a local model a sample, in one call a dataset.

    Raises `UserError` where the model cannot be opened or computes NaN.
    """

    tokenizer = load_tokenizer(folder)
    answer = open_local(folder, tokenizer, kv_budget=kv_budget, progress=True)
    answers: Answers = {}
    for name, samples in datasets.items():
        encoded = [data.encode(tokenizer, sample, prompts) for sample in samples]
        replies = answer(encoded, [sample.id for sample in samples], settings)
        answers[name] = [(reply.text, reply.finished) for reply in replies]
    return answers


def spread(runs: Sequence[Metrics]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Mean and sample standard deviation (n - 1) of every metric of every row that all runs have, over two or more runs."""
    common = [row for row in runs[0] if all(row in run for run in runs)]
    values = {row: {name: [run[row][name] for run in runs] for name in runs[0][row]} for row in common}
    means = {row: {name: statistics.fmean(x) for name, x in metrics.items()} for row, metrics in values.items()}
    stds = {row: {name: statistics.stdev(x) for name, x in metrics.items()} for row, metrics in values.items()}
    return means, stds


def cells(sets: Sequence[str], scores: Metrics, stds: Metrics | None = None, sign: str = "+-") -> list[str]:
    """Accuracy and weighted F1 of each set in percent, with spread where there is one."""
    found = []
    for name in sets:
        for metric in ("acc", "wf1"):
            around = f" {sign} {100 * stds[name][metric]:.2f}" if stds else ""
            found.append(f"{100 * scores[name][metric]:.2f}{around}")
    return found


def rendered(
    form: Literal["text", "markdown", "latex"], titles: Sequence[str], runs: Sequence[Metrics], sets: Sequence[str]
) -> str:
    """Table 1: a line a model (and seed), and their mean and spread where there are several. `sets`: rows of the scores."""
    sign = r"$\pm$" if form == "latex" else "+-"
    lines = [[escaped(form, title), *cells(sets, run)] for title, run in zip(titles, runs, strict=True)]
    if len(runs) > 1:
        means, stds = spread(runs)
        lines.append([f"mean {sign} std", *cells(sets, means, stds, sign)])
    names = ["AVG" if name == "average" else escaped(form, name) for name in sets]
    head = ["", *(f"{name} {metric}" for name in names for metric in ("Acc.", "W-F1"))]
    if form == "markdown":
        return markdown([head, *lines])
    if form == "latex":
        first, *body = (" & ".join(line) + r" \\" for line in [head, *lines])
        start, end = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\end{tabular}"
        return "\n".join([start, r"\toprule", first, r"\midrule", *body, r"\bottomrule", end])
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(" ".join(f"{x:>{w}}" for x, w in zip(line, widths, strict=True)) for line in [head, *lines])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, its head first, in Markdown; all but the first column to the right."""
    rows = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escaped(form: str, text: str) -> str:
    """A name that the form's own signs cannot break."""
    if form == "latex":
        return re.sub(r"[\\{}$&#%_^~]", lambda m: rf"\{m[0]}" if m[0] in "{}$&#%_" else rf"\char{ord(m[0])}{{}}", text)
    return text.replace("|", r"\|") if form == "markdown" else text


def summary(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as a table in percent, one line a row."""
    columns = {"acc": "Acc.", "wf1": "W-F1", "macro_f1": "M-F1", "iou": "IOU", "rule_rate": "valid"}
    lines = [f"{'':28}" + "".join(f" {title:>7}" for title in columns.values())]
    for name, row in rows.items():
        lines.append(f"{name:28}" + "".join(f" {100 * row[column]:7.2f}" for column in columns))
    return "\n".join(lines)


def averaged(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """A row `average` of several rows, nothing of one."""
    if len(rows) < 2:
        return {}
    return {"average": {key: statistics.fmean(row[key] for row in rows.values()) for key in next(iter(rows.values()))}}
