"""Loss and gradient of the plain CPLearn head, against the bare matrix products that it cannot do without.

    python benchmarks/loss.py [--device cuda] [--n 64] [--embed_dim 384]

Prints milliseconds for two views of n images and the ratio, both measured in this run. The peer is torch's own
matmul: for each view one (n, f_h) x (f_h, c) product forward and one (n, c) x (c, f_h) product backward.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from augment import milliseconds  # noqa: E402

from cplearn_head import CPLearnHead, cplearn_loss  # noqa: E402
from utils import format_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--embed_dim", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for c in (1024, 16384, 131072):
        head = CPLearnHead(8, c, args.embed_dim).to(args.device)
        torch.manual_seed(0)
        h = [torch.randn(args.n, args.embed_dim, device=args.device, requires_grad=True) for _ in range(2)]
        w = head.dictionary.matrix()
        gradient = torch.randn(args.n, c, device=args.device)

        def step(head=head, h=h):
            cplearn_loss([head.logits(x) for x in h], 0.25)[0].backward()

        def products(h=h, w=w, gradient=gradient):
            for x in h:
                x.detach() @ w.T
                gradient @ w

        ours, bare = (milliseconds(f, args.device, args.repeats) for f in (step, products))
        rows.append((f"c = {c}", ours, bare, ours / bare))
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, n = {args.n} a view, "
          f"f_h = {args.embed_dim}, float32, {args.repeats} repeats, median")  # fmt: skip
    print(format_table(rows, ("loss + gradient", "plain (ms)", "bare products (ms)", "ratio")))


if __name__ == "__main__":
    main()
