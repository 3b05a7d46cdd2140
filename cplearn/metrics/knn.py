"""Weighted k-nearest-neighbor classification: between two sets of images, and among the images of one."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.errors import UserError

# Unit vectors (n, f) and k -> cosine and row of the k nearest training images, largest first: (n, k) and (n, k).
Search = Callable[[Tensor, int], tuple[Tensor, ...]]
CPU = torch.device("cpu")
BLOCK = 4096  # images that are classified at once: votes are (BLOCK, classes)
LARGEST_PRODUCT = 2**28  # cosines that a GPU holds at once: 1 GiB


def faiss_search(train: Tensor) -> Search:
    """Return an exact search on the CPU, in faiss's own blocks. Shape: unit vectors (N, f)."""
    import faiss

    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train.numpy())
    return lambda x, k: tuple(map(torch.from_numpy, index.search(x.numpy(), k)))


def product_search(train: Tensor, device: torch.device) -> Search:
    """Return an exact search by plain products, for a GPU (not measured). Shape: unit vectors (N, f)."""
    columns = train.to(device).T
    return lambda x, k: tuple(nearest.cpu() for nearest in (x.to(device) @ columns).topk(k, dim=1))


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    leave_one_out: bool = False,
    device: torch.device = CPU,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy for each k; k is capped at the number of training images.

    Raises `UserError` where an image has none to be compared with.

    Each test image takes its k neighbors of largest cosine (exact search); each votes for its class with
    weight exp(cosine / temperature). With `leave_one_out`, train and test are the same images, and none is its own
    neighbor. Shape: train (N, f), test (n, f), labels int64, classes 0..K-1.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    if device.type == "cpu":
        search, block = faiss_search(train), BLOCK
    else:
        search, block = product_search(train, device), max(1, min(BLOCK, LARGEST_PRODUCT // len(train)))
    n_classes = int(max(train_labels.max(), test_labels.max())) + 1
    own = int(leave_one_out)
    if len(train) <= own:
        raise UserError(f"{len(train)} images: k-NN compares each with another, which needs at least 2")
    ks = sorted({min(k, len(train) - own) for k in ks})
    hits = {k: torch.zeros(2, dtype=torch.float64) for k in ks}
    for start in range(0, len(test), block):
        cosine, neighbor = search(test[start : start + block], ks[-1] + own)
        if own:  # to the end, where no k reaches it
            itself = neighbor == torch.arange(start, start + len(neighbor))[:, None]
            order = itself.int().argsort(dim=1, stable=True)
            cosine, neighbor = cosine.gather(1, order), neighbor.gather(1, order)
        labels, truth = train_labels[neighbor], test_labels[start : start + block]
        for k in ks:
            hits[k] += count_hits(cosine[:, :k], labels[:, :k], truth, n_classes, temperature)
    results: dict[str, float] = {}
    for k in ks:
        top1, top5 = (hits[k] / len(test)).tolist()
        results |= {f"knn{k}_top1": top1, f"knn{k}_top5": top5}
    return results


def leave_one_out_knn(features: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07) -> float:
    """Return the top-1 accuracy of each image among all others: for sets of which an n x n matrix fits in memory.

    Shape: features (n, f), labels int64 (n,), classes 0..K-1.
    """
    x = F.normalize(features, dim=1)
    cosine, neighbor = (x @ x.T).fill_diagonal_(-2).topk(min(k, len(x) - 1), dim=1)
    top1, _ = count_hits(cosine, labels[neighbor], labels, int(labels.max()) + 1, temperature).tolist()
    return top1 / len(labels)


def count_hits(cosine: Tensor, labels: Tensor, truth: Tensor, n_classes: int, temperature: float) -> Tensor:
    """Count the images whose class has the most votes, and those whose class is among the first five with a vote.

    Shape: cosines (n, k) of the neighbors, largest first, their labels (n, k), truth (n,) -> int64 (2,).
    """
    first = votes(cosine, labels, n_classes, temperature).topk(min(5, n_classes), dim=1)
    correct = (first.indices == truth[:, None]) & (first.values > 0)  # fewer than five neighbors name fewer classes
    return torch.stack([correct[:, 0].sum(), correct.any(1).sum()])


def votes(cosine: Tensor, labels: Tensor, n_classes: int, temperature: float) -> Tensor:
    """Sum exp(cosine / temperature) over the neighbors of each class, up to a factor common to the row.

    Shape: cosines (n, k) of the neighbors, largest first, and their labels (n, k) -> (n, n_classes).
    """
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # the best at 1: no overflow at small T
    return torch.zeros(len(labels), n_classes).scatter_add_(1, labels, weight)
