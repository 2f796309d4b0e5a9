"""The report: what stands in it, that it stands alone, and that nothing a model says becomes markup."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest
from conftest import lines

from tools import report
from tools.alarms import alarms, right_answers
from tools.charts import MOST, Chart, Series, Timeline, draw, nice_ticks, thinned

# Charts


def test_ticks_are_round_and_enclose_the_values():
    assert nice_ticks(0.48, 0.675) == [0.45, 0.5, 0.55, 0.6, 0.65, 0.7]
    assert nice_ticks(0.1, 0.9) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(1.36, 1.52) == [1.35, 1.4, 1.45, 1.5, 1.55]
    assert nice_ticks(0.4, 0.9) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]  # .4 is in the lower half
    assert nice_ticks(0.0, 0.0)[0] == 0.0
    assert nice_ticks(-0.2, 0.2) == [-0.2, -0.1, 0.0, 0.1, 0.2]


@pytest.mark.parametrize("value", [0.0, 1.0, 37.0, -2.0])
def test_a_line_without_change_has_an_axis(value):
    ticks = nice_ticks(value, value)
    assert ticks[0] <= value <= ticks[-1] and 2 <= len(ticks) <= 8


def test_where_things_lie_in_time():
    """S = 10, K = 2. Cold start and each fine-tuning take 4: RL 1 lies at 4-14, RL 2 at 18-28, and 32 is the end."""
    time = Timeline(10, 2)
    assert (time.slot, time.length) == (4.0, 32.0)
    assert [(s.name, s.first, s.last) for s in time.stages()] == [
        ("cold", 0, 4), ("RL 1", 4, 14), ("SFT 1", 14, 18), ("RL 2", 18, 28), ("SFT 2", 28, 32),
    ]  # fmt: skip
    when = [("start", 0, 0), ("after the cold start", 1, 0), ("RL step 5", 1, 5), ("after RL 1", 1, 10),
            ("after SFT 1", 2, 10), ("RL step 15", 2, 15), ("after RL 2", 2, 20), ("after SFT 2", 2, 20)]  # fmt: skip
    assert [time.evaluation(*w) for w in when] == [0, 4, 9, 14, 18, 23, 28, 32]
    assert time.ticks() == [(4, "0"), (14, "10"), (28, "20")]  # 10 once: RL 2 starts with the steps of RL 1


def small_chart(parts=(0, 0, 0)):
    return Chart("c", "C", "Text.", (0.0, 16.0, 32.0), ("a", "b", "c"), parts, (Series("s", (0.0, 1.0, None)),))


def test_a_chart_is_drawn_into_its_box():
    """420 x 250: the plot is 44-408 wide and 24-214 high, 0 at the bottom, 1 at the top."""
    drawing = draw(small_chart(), Timeline(10, 2))
    assert drawing.lines[0].paths == ("44,214 226,24",)
    assert drawing.lines[0].dots == ((44, 214, "s, a: 0"), (226, 24, "s, b: 1"))
    assert drawing.y_ticks == ((214, "0"), (176, "0.2"), (138, "0.4"), (100, "0.6"), (62, "0.8"), (24, "1"))
    assert drawing.stages[1] == (89.5, 113.7, "RL 1")
    assert draw(small_chart((1, 2, 2)), Timeline(10, 2)).lines[0].paths == ("44,214", "226,24")  # no line across a gap


def test_a_chart_in_words_and_as_a_table():
    assert small_chart().spoken() == "Text. s goes from 0 to 1."
    assert small_chart().rows() == [["a", "0"], ["b", "1"]]  # nothing was measured at c


def test_long_lines_are_averaged():
    n = 2 * MOST
    places = tuple(map(float, range(n)))
    chart = thinned(Chart("c", "C", "T.", places, tuple(map(str, range(n))), (0,) * n, (Series("s", places),)))
    assert len(chart.places) == MOST
    assert (chart.places[0], chart.names[0], chart.series[0].values[0]) == (0.5, "0 to 1", 0.5)
    assert chart.text == "T. Each point is the mean of 2 steps."


# Alarms


HEALTHY = {
    "phase": "rl", "iteration": 1, "step": 0,
    "loss/policy": 0.004, "grad_norm": 0.2, "ratio/mean/by_mini_batch": [1.0, 1.01], "ratio/max": 2.0,
    "reward/zero_std": 0.1, "consistency/zero_std": 0.2, "reward/original": 0.6, "reward/synthetic": 0.7,
    "rule/rate": 0.95, "rule/label": 0.05, "answer/truncated": 0.02, "loss/weight_truncated": 0.02,
    "answer/tokens": 36.0, "answer/entries": 1.4, "answer/top_emotion": 0.5, "gold/top_emotion": 0.45,
    "answer/min_share": 0.7, "consistency/mean": 0.4, "consistency/core_on_gold": 0.7, "policy/entropy": 0.2, "lam": 0.0,
    "clip_frac": 0.01, "kl/clamped": 0.0,
}  # fmt: skip


def raised(late):
    """Titles that are raised when the last two of ten steps are `late`."""
    found = alarms([HEALTHY] * 8 + [{**HEALTHY, **late}] * 2)
    assert len(found) == 12 and all(alarm.found and alarm.meaning for alarm in found)
    assert [alarm.raised for alarm in found] == sorted((alarm.raised for alarm in found), reverse=True)
    return [alarm.title for alarm in found if alarm.raised]


def test_a_healthy_run_raises_nothing_and_explains_loss_and_ratio():
    assert raised({}) == []
    assert alarms([]) == []
    loss = next(a for a in alarms([HEALTHY]) if a.title.startswith("The loss is near 0"))
    assert "step 1: loss 0.004, gradient norm 0.2; the first update" in loss.found
    assert "every ratio is 1" in loss.meaning and "Its gradient is not 0" in loss.meaning


@pytest.mark.parametrize(
    ("late", "title"),
    [
        ({"ratio/mean/by_mini_batch": [1.02, 1.0]}, "The loss is near 0 and the first ratio is 1"),
        ({"rollout/logp_gap_mean": 0.11}, "The loss is near 0 and the first ratio is 1"),
        ({"grad_norm": 0.0}, "The loss is near 0 and the first ratio is 1"),
        ({"answer/truncated": 0.11}, "Answers end by themselves"),
        ({"rule/rate": 0.49}, "Answers keep the rule"),
        ({"reward/zero_std": 0.91}, "Rewards differ within a group"),
        ({"consistency/zero_std": 0.91}, "Consistency differs within a group"),
        ({"consistency/core_on_gold": 0.59, "consistency/mean": 0.4}, "Groups agree on the gold emotion"),
        ({"answer/entries": 1.61, "answer/min_share": 0.6}, "Answers list only emotions that they mean"),
        ({"answer/top_emotion": 0.76, "gold/top_emotion": 0.5}, "Answers name different emotions"),
        ({"policy/entropy": 0.019}, "The policy keeps some entropy"),
        ({"reward/synthetic": 0.76}, "New samples earn no more than real ones"),
        ({"clip_frac": 0.51}, "Few updates are clipped"),
        ({"kl/clamped": 0.011}, "Few updates are clipped"),
    ],
)
def test_each_alarm_is_raised_by_its_own_fault(late, title):
    assert raised(late) == [title]


@pytest.mark.parametrize(
    "late",
    [
        {"grad_norm": 0.0, "reward/zero_std": 1.0, "consistency/zero_std": 1.0},  # nothing differs: no gradient is right
        {"consistency/core_on_gold": 0.59, "consistency/mean": 0.3},  # less agreement as well
        {"answer/entries": 1.61},  # more entries of the same size
        {"answer/top_emotion": 0.76, "gold/top_emotion": 0.52},  # so do the prompts
        {"answer/top_emotion": 0.75},
        {"rollout/logp_gap_mean": 0.1},
        {"kl/clamped": 0.01, "clip_frac": 0.5},
        {"answer/truncated": 0.1, "rule/rate": 0.5, "reward/zero_std": 0.9, "consistency/zero_std": 0.9},
    ],
)
def test_no_alarm_without_its_fault(late):
    assert not set(raised(late)) - {"Rewards differ within a group", "Consistency differs within a group"}


@pytest.mark.parametrize(("share", "expected"), [(0.11, ["Answers end by themselves"]), (0.1, [])])
def test_a_run_that_has_learned_to_be_brief_raises_the_alarm_of_its_first_steps(share, expected):
    """docs/curves.md: with a limit of 31 tokens .53 are cut in the first fifth, .06 in the last."""
    found = alarms([{**HEALTHY, "answer/truncated": share}] * 2 + [HEALTHY] * 8)
    assert [alarm.title for alarm in found if alarm.raised] == expected


def test_a_run_that_did_not_count_emotions_is_not_called_fine():
    line = {name: value for name, value in HEALTHY.items() if "top_emotion" not in name}
    assert next(a for a in alarms([line]) if a.title.startswith("Answers name")).found.startswith("not measured")


def test_the_reward_of_new_samples_says_over_how_many_prompts():
    """32 prompts per step, depth 0 in 15/16 and in 7/8 of them: 2 and 4 are new, 6 of 64 of the last two steps of ten."""
    late = [{**HEALTHY, "buffer/depth/0": 0.9375}, {**HEALTHY, "buffer/depth/0": 0.875}]
    found = next(a for a in alarms([HEALTHY] * 8 + late, prompts=32) if a.title.startswith("New samples"))
    assert found.found == "late reward: synthetic prompts 0.7 (over 6 of 64 prompts), original ones 0.6"


def test_a_tile_shows_the_best_value_beside_the_last():
    lines = [{"when": when, "eval/toy/acc": acc, "eval/toy/iou": 0.5} for when, acc in
             (("start", 0.2), ("after step 2", 0.6), ("after RL 1", 0.4))]  # fmt: skip
    config = {"eval_temperatures": [0.0], "T": 4}
    tile = report.figures(config, lines, [], report.Rollouts((frozenset(), frozenset())))[0]
    assert tile == ("toy, accuracy", "0.200 → 0.400", "first → last on dev, greedy; best 0.600, after step 2")


def test_a_run_without_synthetic_prompts_has_no_such_alarm():
    line = {k: v for k, v in HEALTHY.items() if k != "reward/synthetic"}
    assert next(a for a in alarms([line]) if a.title.startswith("New samples")).found == "no synthetic prompt yet"


def evaluated(*scores, k=1):
    """Evaluations of one RL stage, one after each five steps."""
    when = ["after the cold start", *(f"after step {5 * i}" for i in range(1, len(scores)))]
    return [
        {"phase": "eval", "iteration": k, "step": 5 * i, "when": w, "eval/toy/acc": x, "eval/toy@1/acc": 0.9 - x}
        for i, (w, x) in enumerate(zip(when, scores, strict=True))
    ]


def held_out(lines, right=None):
    title = "Accuracy on dev holds within a stage"
    return next(alarm for alarm in alarms([HEALTHY, *lines], right or {}) if alarm.title == title)


def test_accuracy_that_falls_within_a_stage_is_raised_by_a_paired_test():
    """20 samples; right: 14, 16, 9. From the best to the last 7 are lost and 0 won: p = 2 / 2^7 = .0156.

    Were 9 lost and 2 won instead, p = 2 (1 + 11 + 55) / 2^11 = .0654: the same fall is not raised.
    """
    lines = evaluated(0.7, 0.8, 0.45)
    ids = [f"toy/dev/0/{i}" for i in range(20)]
    best = {name: i < 16 for i, name in enumerate(ids)}
    right = {("eval/toy", "after step 5"): best, ("eval/toy", "after step 10"): {n: i < 9 for i, n in enumerate(ids)}}
    found = held_out(lines, right)
    assert found.raised
    assert "toy: 0.800 after step 5, 0.450 after step 10 (of 20 samples 7 were lost and 0 won: p = 0.016" in found.found
    mixed = {n: i < 7 or i >= 18 for i, n in enumerate(ids)}
    found = held_out(lines, {**right, ("eval/toy", "after step 10"): mixed})
    assert not found.raised and "9 were lost and 2 won: p = 0.065" in found.found


def test_a_sure_fall_of_less_than_two_points_is_too_small_to_raise():
    """1,000 samples, .800 to .785: 15 lost, 0 won, p = 2 / 2^15 = 6.1e-5."""
    ids = range(1000)
    right = {("eval/toy", "after the cold start"): {i: i < 800 for i in ids},
             ("eval/toy", "after step 5"): {i: i < 785 for i in ids}}  # fmt: skip
    found = held_out(evaluated(0.8, 0.785), right)
    assert not found.raised and "15 were lost and 0 won: p = 6.1e-05" in found.found


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (evaluated(0.681, 0.664, 0.598), True),  # .083
        (evaluated(0.681, 0.664, 0.602), False),  # .079
        (evaluated(0.5, 0.6, 0.7), False),
        (evaluated(0.7, k=1) + evaluated(0.5, 0.51, k=2), False),  # a stage begins anew
        (evaluated(0.7, 0.7) + [{**evaluated(0.3)[0], "when": "after SFT 1"}], False),  # fine-tuning is not RL
    ],
)
def test_without_kept_answers_a_large_fall_alone_is_raised(lines, expected):
    found = held_out(lines)
    assert found.raised is expected and "no answers were kept for a test" in found.found


def test_the_kept_answers_of_a_run_give_the_accuracies_it_logged(finished):
    """Every evaluation on dev before test, at the first temperature; the share of right answers is the logged accuracy."""
    right = right_answers(finished)
    logged = {(line["when"], line["eval/tiny/acc"]) for line in lines(finished / "metrics.jsonl") if "eval/tiny/acc" in line}
    assert {name for name, _ in right} == {"eval/tiny"} and len(logged) > 4
    assert {(when, sum(found.values()) / len(found)) for (_, when), found in right.items()} == logged


# The page


class Page(HTMLParser):
    """What a page is made of: every tag with its attributes in order, headings, text by tag, and the nesting checked."""

    VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.headings = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "a tag is left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), [name for name, _ in self.open]))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), [name for name, _ in self.open]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        self.text.append(" " * (tag in ("td", "th", "dt", "dd")))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attrs for tag, attrs, _ in self.tags if tag == name]


def write(run, tmp_path, *more):
    out = tmp_path / "page.html"
    assert report.main([str(run), "--out", str(out), *map(str, more)]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(finished, tmp_path_factory):
    return write(finished, tmp_path_factory.mktemp("report"))


def test_the_page_stands_alone(html):
    page = Page(html)
    assert {tag for tag, _, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"} == set()
    loading = ("href", "src", "srcset", "action")
    links = [value for _, attrs, _ in page.tags for name, value in attrs.items() if name in loading]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|//[\w.]|url\(|@import|\bon\w+=", html)
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_ids_are_unique_and_links_lead_somewhere(html):
    page = Page(html)
    ids = [attrs["id"] for _, attrs, _ in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {attrs["href"][1:] for attrs in page.all("a")} <= set(ids)


def test_headings_are_in_order(html):
    levels = Page(html).headings
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_every_plot_has_a_text_and_a_table(html):
    page = Page(html)
    plots = [attrs for attrs in page.all("svg") if attrs.get("aria-hidden") != "true"]
    assert len(plots) == len(page.all("figure")) == 16  # Fig. 5: 4, Fig. 6: 3, others: 9
    ids = {attrs.get("id") for tag, attrs, _ in page.tags if tag in ("title", "desc")}
    for attrs in plots:
        assert attrs["role"] == "img" and set(attrs["aria-labelledby"].split()) <= ids
    within = [where for tag, _, where in page.tags if tag == "table" and "figure" in where]
    assert len(within) == len(plots) and all("details" in where for where in within)
    assert "goes from" in html
    drawn = re.findall(r'<text x="4" y="-6">(.*?)</text><text class="x" x="226" y="245">RL steps done</text>', html)
    assert len(drawn) == len(plots) and all(drawn) and drawn.count("nats per token") == 4


def test_what_scrolls_is_reached_by_keyboard_and_named(html):
    page = Page(html)
    regions = [attrs for attrs in page.all("div") if "scroll" in attrs.get("class", "").split()]
    assert regions
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in regions)
    wide = [a["aria-label"] for a in regions if "wide" in a["class"].split()]
    assert "Confusion, tiny, RL steps 1 to 1" in wide and "Settings" not in wide  # these say that they scroll
    assert all("scope" in attrs for attrs in page.all("th"))
    assert page.all("html")[0]["lang"] == "en" and 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_the_page_shows_the_run(html, finished):
    text = " ".join("".join(Page(html).text).split())
    config = json.loads((finished / "config.json").read_text())
    assert "preset paper, seed 0" in text and text.count(": finished.") == 1
    assert "2 iterations of 3 RL steps (6 in all), 5 prompts per step, 3 answers per prompt;" in text
    assert f"data {config['data'][0]}" in text
    assert "6 of 6 30 groups, 90 answers" in text
    kept = len(lines(finished / "buffer.jsonl"))
    assert f"new samples {kept} kept answers" in text
    test = lines(finished / "metrics.jsonl")[-1]
    shown = [f"{100 * test['test/tiny/' + key]:.2f}" for key in ("acc", "wf1", "iou", "rule_rate")]
    assert f"this run, test, greedy {' '.join(shown)}" in text
    for words in ("Selected:", "Best:", "Worst:", "You are ", "IOU =", "(Eq. 12)", "advantages (Eq. 13)", "A0 = ("):
        assert words in text, words
    assert re.search(r"step [456] \([1-5] of 5 new\)", text) and "step 1 0." in text  # iteration 1 has none
    assert "tiny, RL steps 1 to 1" in text and "tiny, RL steps 6 to 6" in text
    assert "prompt_sums" not in text  # no setting
    assert "checks are raised" in text and "No ablations beside this run" in text


def test_a_group_and_its_lines_name_the_same_step_counted_from_1(html, finished):
    """Six steps: the records say 0 to 5, the page 1 to 6."""
    heads = re.findall(r"<h3>[^<]+: (\S+), RL step (\d)</h3>", html)
    assert len(heads) > 2 and heads == re.findall(r"<pre>(\S+), RL step (\d), iteration", html)
    records = [r for k in (1, 2) for r in lines(finished / "rollouts" / f"iteration-{k}.jsonl")]
    assert {(name, int(step) - 1) for name, step in heads} <= {(r["sample_id"], r["step"]) for r in records}


def test_an_answer_without_a_valid_output_has_a_column(finished):
    """Every answer to an original prompt of the first step is counted, those that break the rule in the last column."""
    records = [r for r in lines(finished / "rollouts" / "iteration-1.jsonl") if r["step"] == 0 and r["origin"] == "original"]
    matrix = report.read_rollouts(finished, list(range(6))).matrices()[0]
    rows = {gold: (total, cells[-1][0]) for gold, total, cells in matrix.rows()}
    assert sum(total for total, _ in rows.values()) == sum(len(r["answers"]) for r in records)
    broken = [a for r in records for a in r["answers"] if a["parse"]["reason"] is not None]
    assert sum(lost for _, lost in rows.values()) == len(broken) > 0


HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


def test_what_a_model_says_stays_text(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints", "cold_start", "tensorboard"))
    for path in (run / "rollouts").iterdir():
        records = lines(path)
        for record in records:
            record["sample_id"] += HOSTILE
            record["why"] = HOSTILE
            for answer in record["answers"]:
                answer["text"] = HOSTILE
                if answer["parse"]["reason"] is None:
                    answer["parse"]["my_output"] = HOSTILE
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    html = write(run, tmp_path)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "{{ 7*7 }}" in html
    assert "<script" not in html and "<img" not in html
    assert HOSTILE in "".join(Page(html).text)


def test_a_run_that_has_just_begun(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "config.json", run)
    first = (finished / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(first + "\n")
    text = " ".join("".join(Page(write(run, tmp_path)).text).split())
    assert "not finished; the last thing written is the evaluation “start” before the first iteration" in text
    for words in ("No RL step yet.", "No rollouts yet.", "Nothing was scored on test yet.", "No answers to original"):
        assert words in text, words


SCORED = (
    {"id": "meld/test/1/0", "gold": {"joy": 1.0}, "predicted": "joy", "iou": 1.0, "parse": {"reason": None}},
    {"id": "meld/test/1/1", "gold": {"joy": 1.0}, "predicted": "anger", "iou": 0.0, "parse": {"reason": None}},
    {"id": "meld/test/1/2", "gold": {"anger": 0.6, "joy": 0.5}, "predicted": "anger", "iou": 0.5, "parse": {"reason": None}},
    {"id": "emorynlp/test/1/0", "gold": {"mad": 1.0}, "predicted": None, "iou": 0.0, "parse": {"reason": "think"}},
)


def test_table_1_from_written_scores(tmp_path):
    """MELD: 2 of 3 right; both classes have precision and recall 1 and 1/2 or the other way round: F1 2/3 each."""
    path = tmp_path / "base.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SCORED))
    found = report.table_1({"eval_temperatures": [0.0, 1.0]}, [], {"base": report.read_scores(path)})
    assert found == [
        ["", "meld Acc.", "meld W-F1", "meld IOU", "meld valid", "emorynlp Acc.", "emorynlp W-F1", "emorynlp IOU",
         "emorynlp valid", "average Acc.", "average W-F1", "average IOU", "average valid"],
        ["base", "66.67", "66.67", "50.00", "100.00", "0.00", "0.00", "0.00", "0.00", "33.33", "33.33", "25.00", "50.00"],
    ]  # fmt: skip
    meld = report.written_matrices({"base": report.read_scores(path)})[0]
    assert meld.rows() == [("joy", 2, [(1, 0.5), (1, 0.5), (0, 0.0)]), ("anger", 1, [(0, 0.0), (1, 1.0), (0, 0.0)])]


def test_scores_and_ablations_are_shown(finished, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SCORED))
    table = [["", "seeds", "meld Acc."], ["w/o <SELF-GRPO>", "3", "56.15 +- 1.00"]]
    ablate = {"preset": "toy", "seeds": 3, "skipped": {"w/ COLD": "no expert"}, "table": table}
    (tmp_path / "a.json").write_text(json.dumps(ablate))
    html = write(finished, tmp_path, "--scores", tmp_path / "mine.jsonl", "--ablate", tmp_path / "a.json")
    text = " ".join("".join(Page(html).text).split())
    assert "w/o <SELF-GRPO> 3 56.15 ± 1.00" in text and "w/ COLD was left out: no expert." in text
    assert "preset toy, 3 seeds asked for" in text
    assert "meld, mine" in text and "mine 66.67 66.67 50.00 100.00" in text.replace("  ", " ")


def scored_line(when, room, acc):
    return {"when": when} | {f"{room}/{s}/{k}": acc for s in ("toy", "selfemo") for k in ("acc", "wf1", "iou", "rule_rate")}


def test_table_1_has_the_base_model_the_cold_start_and_the_run_on_dev():
    lines = [scored_line("start", "eval", 0.25), scored_line("after the cold start", "eval", 0.5),
             {"when": "after step 2", "eval/toy/acc": 0.6}, scored_line("after RL 1", "eval", 0.75),
             scored_line("test", "test", 0.625)]  # fmt: skip
    lines[-1] = {name: value for name, value in lines[-1].items() if "selfemo" not in name}
    assert report.table_1({"eval_temperatures": [0.0]}, lines, {}) == [
        ["", "toy Acc.", "toy W-F1", "toy IOU", "toy valid"],
        ["base model, dev, greedy", *["25.00"] * 4],
        ["cold start, dev, greedy", *["50.00"] * 4],
        ["this run after RL 1, dev, greedy", *["75.00"] * 4],
        ["this run, test, greedy", *["62.50"] * 4],
    ]


def complaint(capsys, *argv):
    assert report.main([str(x) for x in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_a_users_mistake_is_one_line(finished, tmp_path, capsys):
    assert "cannot read" in complaint(capsys, tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text('{"table": [["a"], ["b", "c"]], "skipped": {}}\n')
    assert "is not an ablate.json" in complaint(capsys, finished, "--ablate", bad)
    assert "does not hold answers" in complaint(capsys, finished, "--scores", bad)
    assert "nowhere.jsonl holds no answers" in complaint(capsys, finished, "--scores", tmp_path / "nowhere.jsonl")
    (tmp_path / "config.json").write_text('{"seed": 0}')
    assert "config.json lacks S, T, batch_prompts, data" in complaint(capsys, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "config.json", run)
    assert "holds nothing to report yet" in complaint(capsys, run)
    shutil.copy(finished / "metrics.jsonl", run)
    (run / "rollouts").mkdir()
    (run / "rollouts" / "iteration-1.jsonl").write_text('{"step": 0}\n')
    assert "iteration-1.jsonl line 1 is no rollout record" in complaint(capsys, run)
    assert not (run / "report.html").exists()


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update")  # fmt: skip
MEASURE = """<script>
const s = e => getComputedStyle(e);
const all = names => [...document.querySelectorAll(names)];
const measure = () => parent.document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, view: innerWidth, page: s(document.body).backgroundColor,
  plots: all("svg.plot").map(p => Math.round(p.getBoundingClientRect().width)),
  scrolls: all(".scroll").map(e => [e.scrollWidth > e.clientWidth, parseFloat(getComputedStyle(e, "::before").height) > 5]),
  cut: all("caption span").filter(e => e.getBoundingClientRect().right > e.closest(".scroll").getBoundingClientRect().right)
    .map(e => e.textContent),
  hidden: all("h2, figure, table").filter(e => !e.getClientRects().length).length});
addEventListener("load", () => { measure(); requestAnimationFrame(() => requestAnimationFrame(measure)); });</script>"""


def measured(html, tmp_path, width, scheme):
    """What a browser makes of the page in a frame as wide as a screen (its own window has at least 500 pixels).

    A script of the test's own, not of the page, says so in the title.
    """
    page = tmp_path / "measured.html"
    opened = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("<details", "<details open")
    inner = escape(opened + MEASURE)
    frame = f'<iframe width="{width}" height="844" style="border: 0" srcdoc="{inner}"></iframe>'
    head = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{}</title>'
    page.write_text(head + frame, encoding="utf-8")
    profile = tmp_path / f"profile-{width}"
    settings = (f"--user-data-dir={profile}", "--window-size=1400,900", f"--blink-settings=preferredColorScheme={scheme}")
    command = [CHROMIUM, *FLAGS, *settings, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")
def test_in_a_browser_it_fits_a_phone_and_a_desk_and_follows_the_colour_scheme(html, tmp_path):
    for _ in range(3):  # animations begin with a frame: on a busy machine the first measure may be before it
        phone, desk = measured(html, tmp_path, 390, 0), measured(html, tmp_path, 1280, 1)
        if all(scrolls == says for scrolls, says in phone["scrolls"] + desk["scrolls"]):
            break
    assert phone["wide"] <= phone["view"] == 390 and min(phone["plots"]) > 300
    assert desk["wide"] <= desk["view"] == 1280 and min(desk["plots"]) > 400
    assert (phone["page"], desk["page"]) == ("rgb(20, 23, 26)", "rgb(251, 250, 248)")
    assert phone["hidden"] == desk["hidden"] == 0
    assert phone["cut"] == desk["cut"] == []  # Table 1 has a long caption, and on a phone it is wider than the screen
    assert [True, True] in phone["scrolls"] and [False, False] in desk["scrolls"]
    assert {scrolls == says for scrolls, says in phone["scrolls"] + desk["scrolls"]} == {True}
