"""Texts as vectors, and vectors as places on a map: with a Hugging Face encoder, else with scikit-learn alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.hub import quiet_transformers, user_errors
from common.text import bare, is_blankless, words

Floats = NDArray[np.float64]


def sklearn() -> Any:
    """scikit-learn with the parts that are used here. Raises `UserError` where it is missing."""
    try:
        import sklearn.cluster
        import sklearn.decomposition
        import sklearn.feature_extraction.text
        import sklearn.manifold
    except ImportError:
        raise UserError("personas needs scikit-learn: pip install -r requirements-extra.txt") from None
    return sklearn


def tokens(text: str) -> list[str]:
    """The words of a text that are counted: of two letters or more, or of scripts without blanks (`common.text.words`)."""
    return [word for word in words(bare(text, " ")) if len(word) > 1 or is_blankless(word)]


def tfidf_vectors(texts: Sequence[str], seed: int) -> Floats:
    """Unit vectors of at most 50 dimensions by TF-IDF and SVD. Raises `UserError` where no text has words."""
    kit = sklearn()
    try:
        counter = kit.feature_extraction.text.TfidfVectorizer(
            stop_words="english", sublinear_tf=True, tokenizer=tokens, token_pattern=None
        )
        counts = counter.fit_transform(texts)
    except ValueError:
        raise UserError("the personas have no words to compare") from None
    size = min(50, *(n - 1 for n in counts.shape))
    if size < 2:
        return unit(counts.toarray())
    return unit(kit.decomposition.TruncatedSVD(size, random_state=seed).fit_transform(counts))


def encoder_vectors(texts: Sequence[str], folder: str, batch: int = 32) -> Floats:
    """Unit vectors by a Hugging Face encoder, the mean over tokens. Raises `UserError` where it cannot be opened."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    quiet_transformers()
    with user_errors(f"cannot open the encoder {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    parts = []
    for first in range(0, len(texts), batch):
        part = list(texts[first : first + batch])
        encoded = tokenizer(part, padding=True, truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            hidden_BTD = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])[0]
        parts.append(mean_pooled(hidden_BTD.double().numpy(), encoded["attention_mask"].numpy()))
    return unit(np.concatenate(parts))


def mean_pooled(hidden_BTD: Floats, mask_BT: NDArray[Any]) -> Floats:
    """Mean over the tokens that are not padding."""
    pooled: Floats = (hidden_BTD * mask_BT[:, :, None]).sum(1) / mask_BT.sum(1, keepdims=True)
    return pooled


def unit(vectors: NDArray[Any]) -> Floats:
    """Vectors of length 1; zero vectors stay zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(length > 0, length, 1), dtype=np.float64)


def flat(vectors: Floats, seed: int) -> Floats:
    """t-SNE: two dimensions in which near neighbours stay near; distances between clusters mean little."""
    if len(vectors) < 3:
        return np.zeros((len(vectors), 2))
    near = min(30.0, (len(vectors) - 1) / 3)
    made = sklearn().manifold.TSNE(perplexity=near, init="random", random_state=seed).fit_transform(vectors)
    return np.asarray(made, dtype=np.float64)
