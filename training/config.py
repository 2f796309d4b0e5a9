"""The settings of a run: one frozen dataclass whose fields are the flags, and the presets they start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import tyro

from common.errors import UserError
from common.flags import Dtype, Pairs, Switch

Plan = Annotated[
    str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[GPUSxGB]",
        instance_from_str=lambda args: " ".join(args),
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [] if not value else [value],
    ),
]


@dataclass(frozen=True)
class Config:
    """SELF-EMO: closed-loop optimisation (Algorithm 1). Defaults are the paper's (Table 12) where it names a value."""

    preset: Literal["paper", "toy", "small"] = "paper"
    """Where the other values start from: the paper's setting, the offline toy world, or a small pretrained model."""
    model: str = "Qwen/Qwen3-8B"  # Start model: Hugging Face folder or hub name of a chat model (Table 12).
    data: Pairs = ()
    """NAME=DIR of a dataset, repeatable: meld, emorynlp, iemocap, or any other name for a folder of JSONL dialogues."""
    limit: Pairs = ()  # NAME=N, repeatable: use only the first N training samples of a dataset after a seeded shuffle.
    eval_limit: int = 0
    """Samples per dataset in an evaluation on dev: the first so many after a seeded shuffle; 0 takes all."""
    test_limit: int = 0
    """Samples per dataset in the one evaluation on test, at the end: the first so many of a seeded shuffle; 0 takes all."""
    out: str = "runs/paper"  # Folder that the run writes into.
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the newest checkpoint in --out, or start if there is none."""
    seed: int = 0  # Decides every shuffle and every random number of the run.
    date: str = ""
    """Date that a chat template shows, YYYY-MM-DD; by default the day on which the run first starts, also after --resume."""
    iterations: int = 3  # Iterations K of Algorithm 1, line 4; each is an RL stage and a retraining (D25).
    steps: int = 0  # RL steps S per iteration; 0 takes as many as draw each original prompt once (D7).
    batch_prompts: int = 64  # Prompts per RL step (Table 12: train_batch_size).
    n: int = 8  # Answers per prompt, which form a group (Table 12: rollout.n).
    mini_batch_prompts: int = 32  # Prompts per optimizer step of the RL stage (Table 12: ppo_mini_batch_size).
    micro_batch: int = 16
    """Answers per forward and backward; changes memory and time, never the result (Table 12: ppo_micro_batch_size)."""
    max_prompt_tokens: int = 4096  # Prompts with more tokens are dropped and counted (Table 12: max_prompt_length).
    max_new_tokens: int = 8192
    """An answer is cut off after so many tokens, and then breaks the rule (Table 12: max_response_length, D20)."""
    temperature: float = 1.0  # Temperature of the sampled answers, and of every log-prob in the RL loss (D19).
    eval_temperatures: tuple[float, ...] = (0.0,)
    """Temperatures at which an evaluation answers; 0 is greedy, the likeliest token each time."""
    lr: float = 1e-6  # Constant learning rate of AdamW in the RL stages (Table 12).
    cold_start_lr: float = 1e-5  # Learning rate of AdamW in the cold start, line 3 of Algorithm 1 (D26).
    sft_lr: float = 1e-6  # Learning rate of AdamW in the retraining, line 18 of Algorithm 1 (D26).
    sft_batch: int = 64  # Answers per optimizer step of supervised fine-tuning, in cold start and retraining (D26).
    clip_eps: float = 0.2  # Clip range epsilon of Eq. 14, for which the paper gives no value (D4).
    kl_coef: float = 0.001
    """Weight beta, in the RL loss, of the KL to the policy at the start of the RL stage (Table 12: kl_loss_coef, D6)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of Eq. 14: one per token, or one per answer as Eq. 14 is written (D2)."""
    loss_mean: Literal["token", "sequence"] = "token"
    """What counts the same in the RL loss: every token, or every answer as Eq. 14 is written (D3)."""
    self_grpo: Switch = True
    """Reward what the group agrees on (Eq. 12). false: lambda = 0, plain GRPO; consistency still logged (Table 2, D27)."""
    self_play: Switch = True
    """Make new samples and retrain on them. false: lines 12-18 of Algorithm 1 are skipped (Table 2, D27)."""
    cold_start: Literal["self", "dataset", "expert", "none"] = "self"
    """What line 3 learns: the start model's own valid answers, templates of gold, answers of --expert, or nothing (D17)."""
    expert: Pairs = ()
    """For --cold_start expert: the endpoint (https://host/v1) or Hugging Face folder of an expert, repeatable."""
    expert_model: Pairs = ()
    """Model name at an endpoint, one per URL of --expert, in order. The key is in the environment: OPENAI_API_KEY."""
    retrain_from: Literal["current", "base"] = "current"
    """Which model the retraining (line 18) trains: the one after RL, or the start model again (D13)."""
    keep_reward: float = 0.6  # Least reward (Eq. 8) of an answer that becomes a new sample (D11).
    gold: str = ""  # JSONL file of sample ids and emotion weights, which replace the datasets' labels (D14).
    soft_labels: Switch = False  # Take annotators' votes as gold weights, where a release has them (D14).
    label_noise: float = 0.0
    """Share of training labels, in [0, 1), that are made wrong: another label of the dataset takes the place of the heaviest
    one, by a seeded draw per label. Dev and test stay clean (an experiment of ours: python -m tools.ablate noise)."""
    even_labels: Switch = False
    """Draw the prompts of RL steps evenly over gold labels instead of as often as they are: class-balanced sampling. Answers
    name the most frequent label less often; after many steps too seldom (an option of ours: docs/smollm2.md)."""
    drop_overlap: Switch = False  # Leave out training dialogues that share lines with a test dialogue (D24).
    originals: int = 0
    """Original samples in D0: the first so many of a seeded shuffle over all datasets; 0 takes all (Table 2, D27)."""
    max_synthetic: int = 0  # Keep only the newest so many synthetic samples in the buffer; 0 keeps all (Table 2, D27).
    personas: str = ""  # JSONL file of persona sentences (Eq. 4); without it prompts have none.
    persona_scope: Literal["none", "context", "dialogue"] = "none"
    """Personas of dev and test: none, from the context, or from the whole dialogue as the paper, which looks ahead (D28)."""
    prompts: str = ""  # JSON file that replaces the wording of the prompts (D16).
    context: Literal["labelled", "all"] = "labelled"
    """Which turns of IEMOCAP a prompt shows: those with a label, as the benchmarks do, or all."""
    kv_budget: int = 0
    """Bytes for keys and values in sampling; 0 takes half of the device's memory (Table 12: gpu_memory_utilization)."""
    dtype: Dtype = "auto"
    """Number type in which the model learns, scores and samples; weights, moments and log-probs stay float32.
    auto: bfloat16 on a GPU, float32 on a CPU, where bfloat16 pays only with its instructions (AVX512-BF16, AMX)."""
    ref_offload: Switch = True
    """Keep the reference policy of the KL in main memory between its layers' turns (Table 12: ref.param_offload)."""
    activation_checkpointing: Switch = True
    """Keep only the input of every block in a forward and compute the rest again in backward: less memory, more time."""
    compile: Switch = False
    """torch.compile for the blocks that learn; on a GPU, CUDA graphs for decode steps. Not run on a GPU yet."""
    eval_every: int = 10
    """RL steps between evaluations on dev, at the first of --eval_temperatures (Table 12: test_freq). Each stage begins and
    ends with a whole one: at all temperatures, and on the SELF-EMO test split too."""
    save_every: int = 480  # Steps between checkpoints (Table 12: save_freq); each stage ends with one anyway.
    plan: Plan = None
    """Print how much memory a run needs, and stop: on this machine, or for example 8x80 for eight GPUs of 80 GB."""


PRESETS: Mapping[str, Config] = {
    "paper": Config(data=("meld=data/meld", "emorynlp=data/emorynlp", "iemocap=data/iemocap")),
    "small": Config(
        preset="small", model="HuggingFaceTB/SmolLM2-135M-Instruct", out="runs/small",
        data=("meld=data/meld", "emorynlp=data/emorynlp"), limit=("meld=240", "emorynlp=200"), eval_limit=12, test_limit=12,
        iterations=1, steps=10, batch_prompts=8, mini_batch_prompts=4, micro_batch=16,
        max_prompt_tokens=256, max_new_tokens=128, cold_start="dataset",
        lr=2e-5, cold_start_lr=2e-4, sft_lr=1e-5, sft_batch=8, save_every=1, activation_checkpointing=False,
    ),
    "toy": Config(
        preset="toy", model="data/toy/base", data=("toy=data/toy/world",), out="runs/toy",
        iterations=2, steps=10, batch_prompts=32, mini_batch_prompts=8, micro_batch=64,
        max_prompt_tokens=256, max_new_tokens=80, eval_temperatures=(0.0, 1.0),
        lr=3e-4, cold_start_lr=5e-4, sft_lr=1e-4, eval_every=2, save_every=5, activation_checkpointing=False,
    ),
}  # fmt: skip
# What a resumed run may change; learning rates, so that a run that met a NaN can go on; a server may move.
MAY_DIFFER = frozenset(
    {"expert", "resume", "out", "save_every", "kv_budget", "ref_offload", "activation_checkpointing", "versions"}
    | {"micro_batch", "plan", "lr", "cold_start_lr", "sft_lr"}
)


def parse(argv: Sequence[str]) -> Config:
    """The settings of a command line: flags over the preset's values over the paper's.

    Own --data replaces the preset's data and limits. Raises `UserError` for values that cannot work; an unknown flag or a
    value of the wrong kind ends the program with status 2 and one message.
    """
    given = [(a.partition("="), b) for a, b in zip(argv, [*argv[1:], ""], strict=True)]
    named = [value if equals else following for (flag, equals, value), following in given if flag == "--preset"]
    preset = PRESETS.get(named[-1] if named else "paper", PRESETS["paper"])
    start = replace(preset, data=(), limit=())
    cfg = tyro.cli(Config, args=list(argv), default=start, use_underscores=True, description=Config.__doc__)
    if not cfg.data:
        cfg = replace(cfg, data=preset.data, limit=cfg.limit or preset.limit)
    check(cfg)
    return cfg


def of_run(settings: Mapping[str, Any]) -> Config:
    """The settings of a run from its config.json, which holds more."""
    return Config(**{field.name: settings[field.name] for field in fields(Config) if field.name in settings})


def check(cfg: Config) -> None:
    """Raise `UserError` for settings that cannot work, one line with the mend."""
    least = {"iterations": 1, "batch_prompts": 1, "n": 2, "mini_batch_prompts": 1, "micro_batch": 1}
    least |= {"max_prompt_tokens": 1, "max_new_tokens": 1, "sft_batch": 1, "eval_every": 1, "save_every": 1}
    least |= dict.fromkeys(("steps", "eval_limit", "test_limit", "originals", "max_synthetic", "kv_budget"), 0)
    least |= dict.fromkeys(("lr", "sft_lr", "cold_start_lr", "clip_eps", "kl_coef", "keep_reward"), 0)
    for name, low in least.items():
        if not getattr(cfg, name) >= low:
            why = " (an answer is compared with its group)" if name == "n" else ""
            raise UserError(f"--{name} is {getattr(cfg, name)}: it must be at least {low}{why}")
    if not 0 <= cfg.label_noise < 1:
        raise UserError(f"--label_noise is {cfg.label_noise}: it is the share of wrong labels, at least 0 and below 1")
    if not cfg.temperature > 0 or not all(t >= 0 for t in cfg.eval_temperatures) or not cfg.eval_temperatures:
        raise UserError("--temperature must be above 0 (greedy answers are all equal), --eval_temperatures at least 0")
    if (cfg.cold_start == "expert") != bool(cfg.expert):
        raise UserError("--cold_start expert and --expert URL or DIR go together: give both or neither")
