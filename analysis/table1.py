"""Table 1: the answers of folders and endpoints to score, mean and spread over several, and the table itself.

The command is `python evaluate.py score`.
"""

import re
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import data
from common.errors import UserError
from common.flags import Dtype
from common.hub import load_tokenizer
from common.template import remarks, shows_date
from data import Prompts, Sample
from experts.asking import Expert, Settings, ask, is_url, open_experts, open_local
from experts.cache import open_cache
from experts.responses import Reply, Unanswered

Metrics = Mapping[str, Mapping[str, float]]  # row (a dataset, `average`, ...) -> metric -> value
Answers = dict[str, list[tuple[str, bool]]]  # dataset -> (text, finished) of each sample


def endpoints(models: Sequence[str], names: Sequence[str]) -> dict[str, Expert]:
    """The endpoints among --model, with the names of --model_name in order. Raises `UserError`."""
    urls = list(filter(is_url, models))
    if not urls and not names:
        return {}
    return dict(zip(urls, open_experts(urls, names, flags=("--model", "--model_name")), strict=True))


def asked(
    model: Expert, datasets: Mapping[str, Sequence[Sample]], prompts: Prompts, settings: Settings, cache: Path
) -> Answers:
    """One answer of an endpoint per sample. Raises `UserError` if any is missing: what was not heard cannot be wrong."""
    answers, missing = Answers(), list[Unanswered]()
    with open_cache(cache) as known:
        for name, samples in datasets.items():
            replies = ask(model, [data.messages(s, prompts, model.control) for s in samples], settings, known)
            missing += [reply for reply in replies if isinstance(reply, Unanswered)]
            answers[name] = [(reply.text, reply.finished) for reply in replies if isinstance(reply, Reply)]
    if missing:
        lasting = all(reply.lasting for reply in missing)
        mend = "it will be refused again, mend what it names" if lasting else "the same command asks for those again"
        raise UserError(f"{len(missing)} samples have no answer ({missing[0].why}): {mend}")
    return answers


def generated(
    folder: str, datasets: Mapping[str, Sequence[Sample]], prompts: Prompts, settings: Settings,
    kv_budget: int | None, dtype: Dtype,
) -> tuple[Answers, str | None]:
    """One answer of a local model per sample, in one call per dataset.

    The second value is the date that its chat template shows, if it shows one. Raises `UserError` where the model cannot be
    opened or computes NaN.
    """
    tokenizer, answers = load_tokenizer(folder), Answers()
    for line in remarks(tokenizer, settings.date):
        print(line, file=sys.stderr, flush=True)
    replies_to = open_local(folder, tokenizer, kv_budget=kv_budget, progress=True, dtype=dtype)
    for name, samples in datasets.items():
        encoded = [data.encode(tokenizer, sample, prompts, settings.date) for sample in samples]
        replies = replies_to(encoded, [sample.id for sample in samples], settings)
        answers[name] = [(reply.text, reply.finished) for reply in replies]
    return answers, settings.date if shows_date(tokenizer) else None


def spread(runs: Sequence[Metrics]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Mean and sample standard deviation (n - 1) of every metric of every row that all runs have, over two or more runs."""
    common = [row for row in runs[0] if all(row in run for run in runs)]

    def over_runs(of: Callable[[list[float]], float]) -> dict[str, dict[str, float]]:
        return {row: {name: of([run[row][name] for run in runs]) for name in runs[0][row]} for row in common}

    return over_runs(statistics.fmean), over_runs(statistics.stdev)


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
    """Table 1: a line per model (and seed), and mean and spread over several. `sets`: the rows of the scores shown."""
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


def markdown(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table, its head first, in Markdown; all columns but those of `left` are set to the right."""
    rows = [lines[0], ["---" if i in left else "---:" for i in range(len(lines[0]))], *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escaped(form: str, text: str) -> str:
    """A name that the form's own signs cannot break."""
    if form == "latex":
        return re.sub(r"[\\{}$&#%_^~]", lambda m: rf"\{m[0]}" if m[0] in "{}$&#%_" else rf"\char{ord(m[0])}{{}}", text)
    return text.replace("|", r"\|") if form == "markdown" else text


def summary(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as a table in percent, one line per row of the scores."""
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
