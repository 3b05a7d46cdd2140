"""TODO cplearn.evaluation.knn."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def votes(similarity: Tensor, label: Tensor, n_classes: int, temperature: float) -> Tensor:
    """Sum of exp(cosine / temperature) over neighbours of each class, up to a factor of the row's own.

    Shape: similarities (n, k), the most similar first, and labels (n, k) of the neighbours -> (n, n_classes).
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # the best at 1: no overflow at small T
    return torch.zeros(len(label), n_classes).scatter_add_(1, label, weight)


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy for each k; k is capped at the number of training images.

    Each test image takes its k neighbours of largest cosine (exact search); each votes for its class with
    weight exp(cosine / temperature). Shape: train (N, f), test (n, f), labels int64, classes 0..K-1.
    """
    import faiss

    train = F.normalize(train, dim=1).numpy()
    test = F.normalize(test, dim=1).numpy()
    n_classes = int(max(train_labels.max(), test_labels.max())) + 1
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train)
    results: dict[str, float] = {}
    ks = sorted({min(k, len(train)) for k in ks})
    hits = {k: torch.zeros(2, dtype=torch.float64) for k in ks}
    for start in range(0, len(test), 4096):  # votes are (4096, classes): bounded memory
        similarity, neighbour = (torch.from_numpy(x) for x in index.search(test[start : start + 4096], ks[-1]))
        label = train_labels[neighbour]
        truth = test_labels[start : start + 4096, None]
        for k in ks:
            ranked = (
                votes(similarity[:, :k], label[:, :k], n_classes, temperature).topk(min(5, n_classes), dim=1).indices
            )
            correct = ranked == truth
            hits[k] += torch.stack([correct[:, 0].sum(), correct.any(1).sum()])
    for k in ks:
        top1, top5 = (hits[k] / len(test)).tolist()
        results |= {f"knn{k}_top1": top1, f"knn{k}_top5": top5}
    return results
