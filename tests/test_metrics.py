"""What a run logs, by hand."""

import pytest
import torch

import data
from corpora.dialogue import Turn
from data import Responder, Sample
from training import metrics, records


def answer(reward, consistency, tokens, parse, finished=True):
    return {"reward": reward, "consistency": consistency, "ids": [1] * tokens, "finished": finished, "parse": parse}


def valid(**emotions):
    return {"reason": None, "last_emotions": emotions, "my_emotions": {"joy": 1.0}, "my_output": "Oh."}


CUT = {"reason": "unfinished", "detail": "cut off"}
HALF = (0.9181818181818182, 2 / 3, 2, valid(joy=0.5, anger=0.5))
GROUPS = [
    {
        "origin": "original", "depth": 0, "gold": {"joy": 1.0}, "core": {"joy": 1.0}, "selected": 0,
        "answers": [answer(1.1, 1 / 3, 4, valid(joy=0.7)), answer(0.0, 0.0, 6, CUT, finished=False)],
    },
    {
        "origin": "synthetic", "depth": 1, "gold": {"anger": 0.6, "joy": 0.4}, "core": {"joy": 0.5, "anger": 0.5},
        "selected": None, "answers": [answer(*HALF), answer(*HALF)],
    },
]  # fmt: skip


def test_a_step_by_hand():
    """IOU of {joy .5, anger .5} and {anger .6, joy .4}: .9/1.1 = .818182, reward .918182; both answers of the second group.

    reward: (1.1 + 0 + 2 * .918182)/4 = .734091; original .55, synthetic .918182. iou: (1 + 0 + 2 * .818182)/4 = .659091.
    One of two groups has equal rewards, the same one equal consistencies. consistency: (1/3 + 0 + 2/3 + 2/3)/4 = .416667.
    Core on gold: joy on joy; joy, first of equals, not on anger. Right heaviest emotion: 1 of 4.
    Valid 3 of 4; entries (1 + 2 + 2)/3; least share (1 + .5 + .5)/3; tokens (4 + 6 + 2 + 2)/4 = 3.5; cut off 1 of 4.
    All 3 valid answers have their keys in the order of Eq. 5 and joy in front, gold has it in 1 of 2 groups.
    """
    found = metrics.rollout_metrics(GROUPS)
    assert found == pytest.approx(
        {
            "reward/mean": 0.734091, "reward/original": 0.55, "reward/synthetic": 0.918182, "reward/iou": 0.659091,
            "reward/acc": 0.25, "reward/zero_std": 0.5, "consistency/mean": 0.416667, "consistency/zero_std": 0.5,
            "consistency/core_on_gold": 0.5, "rule/rate": 0.75, "rule/unfinished": 0.25, "answer/in_order": 1,
            "answer/entries": 1.666667,
            "answer/min_share": 0.666667, "answer/top_emotion": 1, "gold/top_emotion": 0.5, "answer/tokens": 3.5,
            "answer/truncated": 0.25, "buffer/keep_rate": 0.5, "buffer/keep_rate/label/joy": 1,
            "buffer/keep_rate/label/anger": 0, "buffer/keep_rate/depth/0": 1, "buffer/keep_rate/depth/1": 0,
            "buffer/keep_rate/origin/original": 1, "buffer/keep_rate/origin/synthetic": 0,
            "buffer/depth/0": 0.5, "buffer/depth/1": 0.5,
        },
        abs=1e-6,
    )  # fmt: skip


def test_the_emotion_that_is_named_most_is_counted_among_valid_answers():
    """anger, anger, joy in front and one cut off: 2 of 3. Gold: joy, joy, anger: 2 of 3."""
    emotions = ({"anger": 0.9}, {"joy": 0.2, "anger": 0.8}, {"anger": 0.3, "joy": 0.7})
    said = [answer(0, 0, 1, valid(**weights)) for weights in emotions]
    groups = [
        {**GROUPS[0], "gold": {"joy": 1.0}, "answers": said[:1]},
        {**GROUPS[0], "gold": {"joy": 0.6, "anger": 0.4}, "answers": said[1:2]},
        {**GROUPS[0], "gold": {"anger": 1.0}, "answers": [said[2], answer(0, 0, 1, CUT, finished=False)]},
    ]
    found = metrics.rollout_metrics(groups)
    assert (found["answer/top_emotion"], found["gold/top_emotion"]) == pytest.approx((2 / 3, 2 / 3))


def test_a_group_that_failed_counts_in_the_rewards_and_hits_nothing():
    group = {**GROUPS[0], "core": {}, "selected": None, "answers": [answer(0.0, 0.0, 5, CUT, finished=False)] * 2}
    found = metrics.rollout_metrics([group])
    assert (found["reward/mean"], found["rule/rate"], found["consistency/core_on_gold"]) == (0, 0, 0)
    assert (found["reward/zero_std"], found["answer/truncated"], found["answer/entries"]) == (1, 1, 0)
    assert (found["answer/top_emotion"], found["gold/top_emotion"]) == (0, 1)
    assert "reward/synthetic" not in found


def test_answers_in_the_order_of_eq_5_are_counted_among_the_valid_ones():
    """Of four answers one is cut off; of the three that keep the rule two recognise, feel and reply in this order, the third
    replies first: 2/3. Where no answer is valid, 0."""
    parts = {"last": "'last_emotions': {'joy': 1}", "mine": "'my_emotions': {'joy': 1}", "reply": "'my_output': 'Oh.'"}
    texts = [f"<think>So.</think>{{{', '.join(map(parts.get, order))}}}" for order in (
        ("last", "mine", "reply"), ("reply", "last", "mine"), ("last", "mine", "reply"), ("last", "mine"))]  # fmt: skip
    parses = [records.parse_record(data.parse_output(text, ["joy"])) for text in texts]
    group = {**GROUPS[0], "answers": [answer(0, 0, 1, parse) for parse in parses]}
    assert metrics.rollout_metrics([group])["answer/in_order"] == pytest.approx(2 / 3)
    assert metrics.rollout_metrics([{**group, "answers": group["answers"][3:]}])["answer/in_order"] == 0


def test_rewards_of_both_origins_stand_beside_their_mixture():
    names = metrics.rollout_metrics(GROUPS)
    assert {"reward/mean", "reward/original", "reward/synthetic"} <= set(names)


def test_micro_batches_add_up_and_the_largest_ratio_stays():
    first = {"loss/policy": 0.25, "ratio/max": 1.5, "ratio/mean": 0.5}
    second = {"loss/policy": -1.0, "ratio/max": 1.2, "ratio/mean": 0.5}
    assert metrics.added([first, second]) == {"loss/policy": -0.75, "ratio/max": 1.5, "ratio/mean": 1.0}


def test_mini_batches_are_averaged_and_shown_one_by_one():
    first = {"loss/policy": 1.0, "ratio/mean": 1.0, "ratio/max": 1.0, "clip_frac": 0.0, "grad_norm": 2.0}
    second = {"loss/policy": 0.0, "ratio/mean": 1.1, "ratio/max": 3.0, "clip_frac": 0.5, "grad_norm": 4.0}
    assert metrics.update_metrics([first, second]) == {
        "loss/policy": 0.5, "ratio/mean": 1.05, "ratio/max": 3.0, "clip_frac": 0.25, "grad_norm": 3.0,
        "ratio/mean/by_mini_batch": [1.0, 1.1], "ratio/max/by_mini_batch": [1.0, 3.0], "clip_frac/by_mini_batch": [0.0, 0.5],
    }  # fmt: skip


def test_kl_and_the_gap_between_sampler_and_policy():
    """d = .5, -.5, 0: k3 .148721, .106531, 0: mean .085084, over tokens, not answers. Gaps .1, 0, .3: mean .133333."""
    old_N, ref_N = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5, -2.5, -3.0])
    found = metrics.logprob_metrics(old_N, ref_N, [[-1.1, -2.0], [-3.3]])
    expected = {"policy/kl": 0.085084, "rollout/logp_gap_mean": 0.133333, "rollout/logp_gap_max": 0.3}
    assert found == pytest.approx(expected, abs=1e-6)


def test_entropy():
    """-(.5 ln .5 + 2 * .25 ln .25) = .346574 + .693147."""
    assert metrics.entropy({"a": 0.5, "b": 0.25, "c": 0.25}) == pytest.approx(1.039721, abs=1e-6)
    assert metrics.entropy({"a": 1.0, "b": 0.0}) == 0


@pytest.mark.parametrize(
    ("p", "q", "distance"),
    [
        ({"a": 1.0}, {"b": 1.0}, 1.0),
        ({"a": 0.3, "b": 0.7}, {"b": 0.7, "a": 0.3}, 0.0),
        # middle .75, .25: .811278 bits; less half of 0 + 1 bit: .311278; its root
        ({"a": 1.0}, {"a": 0.5, "b": 0.5}, 0.557923),
    ],
)
def test_jensen_shannon_distance(p, q, distance):
    assert metrics.js_distance(p, q) == pytest.approx(distance, abs=1e-6)
    assert metrics.js_distance(q, p) == pytest.approx(distance, abs=1e-6)


def sample(reply, **gold):
    context = (Turn("Ann", "Hi."), Turn("Bo", reply))
    return Sample("w/train/0", "w", context, Responder("Ann", None, "swap"), ("joy", "anger"), gold)


def test_label_mass_gives_every_sample_the_same_say():
    """{joy 1.5, anger .5} is .75, .25; with {anger 1}: .375, .625."""
    found = metrics.label_mass([sample("x", joy=1.5, anger=0.5), sample("x", anger=1.0)])
    assert found == pytest.approx({"joy": 0.375, "anger": 0.625})


def test_new_samples_by_hand():
    """Replies "Oh no no" twice and "I feel JOY.": the top reply has 2/3; six bigrams, four of them different; one names its
    label. All are joy, D0 is half joy and half anger: JS distance .557923 (above)."""
    children = [sample("Oh no no", joy=1.0), sample("oh no no", joy=1.0), sample("I feel JOY.", joy=0.4)]
    found = metrics.buffer_metrics([children[0], children[0], children[2]], [sample("x", joy=1.0), sample("y", anger=1.0)])
    assert found == pytest.approx(
        {
            "new/samples": 3, "new/label_entropy": 0, "new/label_js": 0.557923, "new/top_reply": 0.666667,
            "new/distinct_2": 0.666667, "new/reply_words": 3, "new/names_label": 0.333333,
        },
        abs=1e-6,
    )  # fmt: skip
    assert metrics.buffer_metrics(children[:2], children)["new/distinct_2"] == 0.5  # two of four, whatever the case


def test_words_of_replies_without_blanks():
    """Of 好的好的。 the letters are words: three pairs, two of them different."""
    found = metrics.buffer_metrics([sample("好的好的。", joy=1.0)], [sample("x", joy=1.0)])
    assert found["new/reply_words"] == 4 and found["new/distinct_2"] == pytest.approx(2 / 3)


def test_no_new_samples():
    assert metrics.buffer_metrics([], [sample("x", joy=1.0)]) == {"new/samples": 0}


def test_replies_of_one_word_have_no_bigrams():
    assert metrics.buffer_metrics([sample("Oh", joy=1.0)], [sample("x", joy=1.0)])["new/distinct_2"] == 0


def test_the_first_of_equals_is_the_heaviest():
    assert data.heaviest({"a": 0.5, "b": 0.9, "c": 0.9}) == "b"
    assert data.heaviest({}) == ""


def test_means():
    assert metrics.mean([]) == 0
    assert metrics.means([{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 4.0}], "x/") == {"x/a": 1.5, "x/b": 3.0}
    assert metrics.means([], "x/") == {}
