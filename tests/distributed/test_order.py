"""Two ranks exchange the same things in the same order, and no more of them than they did."""

import pytest
import torch
import torch.distributed as dist
from helpers import run_in_processes

import main_cplearn
from cplearn.distributed import collectives
from cplearn.methods import build_method_for

pytestmark = pytest.mark.dist
NAMES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "all_gather_object",
    "broadcast_object_list",
)
VIEWS = ["--arch", "vit_tiny", "--patch_size", "8", "--image_size", "16", "--local_image_size", "8",
         "--local_crops_number", "2", "--out_dim", "64", "--batch_size_per_gpu", "4", "--device", "cpu"]  # fmt: skip
RESNET = ["--arch", "resnet8_w8", *VIEWS[2:]]
# Exchanges of a step besides DDP's sums of gradients. Of batch norm one forward and one backward, however many views.
MOST = {
    "cplearn": (3, VIEWS),
    "cplearn, 2 + 8": (3, [*VIEWS, "--local_crops_number", "8"]),
    "cplearn, forward prior": (4, [*RESNET, "--prior", "forward"]),
    "dino": (1, [*VIEWS, "--method", "dino"]),
    "swav": (14, [*RESNET, "--method", "swav"]),
    "barlow_twins": (10, [*RESNET, "--method", "barlow_twins"]),
    "gedi": (6, [*RESNET, "--method", "gedi"]),
    "self_classifier": (26, [*RESNET, "--method", "self_classifier"]),
    "resnet8bn": (35, [*RESNET, "--arch", "resnet8bn_w8"]),
}


def everything_exchanged(rank):
    torch.set_num_threads(1)
    for name in NAMES:
        setattr(dist, name, noted(name, getattr(dist, name)))
    return {name: exchanged(flags) for name, (_, flags) in MOST.items()}


SEEN = []  # name, shape and type of each exchange of this process


def noted(name, real):
    def call(*given, **options):
        x = next((x for x in given if isinstance(x, torch.Tensor)), None)
        SEEN.append((name, *(() if x is None else (tuple(x.shape), str(x.dtype)))))
        return real(*given, **options)

    return call


def exchanged(flags):
    """Return what a rank exchanges in its third step."""
    args = main_cplearn.parse_args(flags)
    torch.manual_seed(0)
    method = build_method_for(args, [])
    method.begin()
    model = collectives.wrap(method.train(), torch.device("cpu"))
    sizes = [args.image_size] * 2 + [args.local_image_size] * args.local_crops_number
    for step in range(3):
        SEEN.clear()
        method.before_step(1000 + step, 100, 1000)
        output = model([torch.randn(4, 3, size, size) for size in sizes])
        output.loss.backward()
        method.after_backward()
        method.after_step(output, torch.tensor(False))
        model.zero_grad()
    return [*SEEN]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_in_processes(tmp_path_factory.mktemp("order"), everything_exchanged)


@pytest.mark.parametrize("name", MOST)
def test_ranks_exchange_the_same_and_no_more_than_before(name, ranks):
    one, two = (rank[name] for rank in ranks)
    assert one == two
    buckets = [x for x in one if x[0] == "all_gather" and len(x) > 1 and len(x[1]) == 1]  # DDP's gradients
    assert len(one) - len(buckets) <= MOST[name][0], [x for x in one if x not in buckets]
