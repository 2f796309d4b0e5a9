"""A dialogue and its turns, and the label sets of the known datasets."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.text import clean

Weights = Mapping[str, float]  # emotion -> weight > 0; they need not sum to 1, Eq. (9) normalises
SPLITS = ("train", "dev", "test")
LABELS: Mapping[str, tuple[str, ...]] = {
    "meld": ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
    "emorynlp": ("joyful", "mad", "peaceful", "neutral", "sad", "powerful", "scared"),
    "iemocap": ("happy", "sad", "neutral", "angry", "excited", "frustrated"),
}


@dataclass(frozen=True)
class Turn:
    """One utterance. `label` is None where nobody annotated it; `id` is the file's own utterance id."""

    speaker: str
    text: str
    label: Weights | None = None
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "speaker", clean(self.speaker))
        object.__setattr__(self, "text", clean(self.text))


@dataclass(frozen=True)
class Dialogue:
    """Turns in conversation order. `id` is unique within a split; `personas` is a user's own character sheet."""

    id: str
    dataset: str
    split: str
    turns: tuple[Turn, ...]
    personas: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """dataset/split/id, because ids start again in every split; as files of personas and gold name it."""
        return clean(f"{self.dataset}/{self.split}/{self.id}")


GROUP = re.compile(
    r"#?all#?|both|every(one|body)|(the )?(guys|girls|kids|others|crowd)|.+\b(friends|sisters)|.+ (and|&) .+", re.IGNORECASE
)


def is_group(name: str) -> bool:
    """Whether a name stands for several people, who cannot answer as one."""
    return GROUP.fullmatch(name) is not None
