"""The order of images, views that do not depend on workers, images that fail."""

import pytest
import torch
import torchvision.transforms.v2  # noqa: F401  now, as it takes longer than a deadline here and workers need it
from helpers import write_images

from cplearn.data.augmentations import build_views
from cplearn.data.datasets import Folder
from cplearn.data.loaders import BatchSampler, train_loader
from cplearn.data.pixels import Pixels
from cplearn.data.sources import build_dataset
from cplearn.errors import UserError


def test_batches_cover_each_epoch_once_in_a_new_order():
    batches = BatchSampler(23, 5, seed=0)
    seen = []
    for epoch in (0, 1):
        batches.epoch = epoch
        found = list(batches)
        assert len(found) == len(batches) == 4 and {e for batch in found for e, _ in batch} == {epoch}
        seen.append([i for batch in found for _, i in batch])
        assert len(set(seen[-1])) == 20 and set(seen[-1]) <= set(range(23))
    assert seen[0] != seen[1]
    batches.epoch = 0
    assert [i for batch in batches for _, i in batch] == seen[0]
    assert [i for batch in BatchSampler(23, 5, seed=1) for _, i in batch] != seen[0]


def test_two_ranks_share_the_batches_of_one():
    whole = list(BatchSampler(50, 8, seed=3))
    parts = [list(BatchSampler(50, 4, seed=3, rank=r, world_size=2)) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(("size", "batch"), [(23, 5), (20, 5), (3, 8), (41, 4), (1, 2)])
def test_a_last_batch_that_is_kept_completes_the_epoch(size, batch):
    found = list(BatchSampler(size, batch, seed=0, keep_last=True))
    assert len(found) == len(BatchSampler(size, batch, seed=0, keep_last=True)) == -(-size // batch)
    assert sorted(i for b in found for _, i in b) == list(range(size))
    assert found[: size // batch] == list(BatchSampler(size, batch, seed=0))


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("size", [41, 48, 50, 2])
def test_ranks_share_the_last_batch_evenly_as_torchs_sampler_does(size, world):
    parts = [list(BatchSampler(size, 4, 3, rank=r, world_size=world, keep_last=True)) for r in range(world)]
    one = [i for b in BatchSampler(size, 4 * world, 3, keep_last=True) for _, i in b]
    lengths = [[len(b) for b in part] for part in parts]
    peers = [torch.utils.data.DistributedSampler(range(size), world, r, shuffle=False) for r in range(world)]
    peers = [[len(b) for b in torch.utils.data.BatchSampler(p, 4, drop_last=False)] for p in peers]
    assert lengths == peers
    joined = [i for step in zip(*parts, strict=True) for b in step for _, i in b]
    again = joined[size:]
    assert joined[:size] == one and len(again) == -size % world
    assert again == (one * world)[: len(again)]  # those of the epoch's start


def test_views_do_not_depend_on_the_number_of_workers(image_folder):
    views = build_views("dino", size=32, local_size=16, n_local=2, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    dataset = Pixels(build_dataset("folder", str(image_folder), "train"), views)

    def epochs(num_workers):
        loader = train_loader(dataset, views, batch_size=8, seed=5, num_workers=num_workers, pin_memory=False)
        found = []
        for epoch in (0, 1):
            loader.batch_sampler.epoch = epoch
            found += [[*batch.crops, batch.params, batch.labels, batch.samples] for batch in loader]
        return found

    one, two = epochs(0), epochs(2)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(one[0][0], one[6][0])  # another epoch, other views
    assert [tuple(x.shape) for x in one[0][:2]] == [(8, 2, 3, 32, 32), (8, 2, 3, 16, 16)]
    assert one[0][3].tolist() == dataset.dataset.labels[one[0][4]].tolist()


def test_batch_larger_than_the_data(image_folder):
    dataset = build_dataset("folder", str(image_folder), "train")
    with pytest.raises(UserError, match="batch of 64 images .* larger than the data set of 48"):
        train_loader(Pixels(dataset, []), [], batch_size=64, seed=0, num_workers=0, pin_memory=False)


def small_loader(dataset, workers):
    views = build_views("dino", size=16, local_size=8, n_local=0, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))
    return train_loader(Pixels(dataset, views), views, batch_size=4, seed=5, num_workers=workers, pin_memory=False)


def test_an_unreadable_image_is_replaced_by_a_drawn_one(tmp_path):
    """The same one with any number of workers, another one in another epoch."""
    write_images(tmp_path, 12)
    names = sorted(p.name for p in tmp_path.iterdir())
    for i in (2, 7):
        (tmp_path / names[i]).write_bytes(b"")
    found = {}
    for workers in (0, 2):
        loader = small_loader(Folder(tmp_path), workers)
        for epoch in range(4):
            loader.batch_sampler.epoch = epoch
            found[workers, epoch] = [(batch.samples.tolist(), batch.failures) for batch in loader]
            order = [i for batch in loader.batch_sampler for _, i in batch]
            used = [j for js, _ in found[workers, epoch] for j in js]
            failed = [
                j for _, failures in found[workers, epoch] for j, why in failures if "cannot read the image" in why
            ]
            assert {2, 7} == set(failed)
            for i, j in zip(order, used, strict=True):
                assert i == j if i not in (2, 7) else j not in (2, 7)
    assert all(found[0, e] == found[2, e] for e in range(4)) and len({str(found[0, e]) for e in range(4)}) == 4


def test_a_folder_without_a_readable_image(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="20 images in a row cannot be read; the last: cannot read the image"):
        next(iter(small_loader(Folder(tmp_path), 0)))
