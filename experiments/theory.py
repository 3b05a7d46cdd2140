"""The loss at its minimum: embeddings that no network restrains, optimized with this project's own loss.

    python experiments/theory.py [--json FILE] [--figure figures/theory.png] [--only PATTERN] [--seed 0]

n free unit embeddings of width f, the same in both views, c codes, in float64 and on one core: what the loss asks for,
with no backbone, no data and no end of training between it and the answer. L-BFGS with a strong Wolfe line search,
until a step changes the loss by less than 1e-12, or for 300 evaluations of loss and gradient. All rows and the figure
took 8 minutes of a core that other programs used too.

Rows: (f 64, c 256, n 512 / 256 / 64) x beta x dictionary x start; (384, 16384, 64), the sizes of recipes/one_gpu.txt,
x n_ref x start; recipes/digits.txt and laptop.txt; (64, 64, n) with Hadamard codes, which is Theorem 1; (64, c, 2 c).
Starts: `aligned` puts image i on code i (modulo c), `random` puts it anywhere, `alike` puts all images within 1 % of
one direction. --only takes a part of a row's size and name, as the table has them, or a pattern with *.

    at start, loss      before and after the optimization (nats)
    bound               min(1, beta) max(0, log(c / n)), which no assignments can pass
    aligned, uniform    one code per image, in equal use; uniform assignments
    way                 (uniform - loss) / (uniform - bound)
    alignment, random   |cosine| of an embedding and its nearest code; the same of random directions
    per image           codes that an image spreads over: exp of the mean entropy
    groups              exp of what an assignment tells about its image: at most min(n, c); n if images share no code
    used, most          different nearest codes; images on the most frequent one
    same, other         mean cosine^2 of two images of the same nearest code, and of different ones; random directions
                        have 1 / f
    off                 share of the energy of H^T H off its diagonal
    its codes, formula  the same of the nearest codes in place of the embeddings; what is expected of min(n, c) codes in
                        equal use: (f - 1) / (min(n, c) + f - 1) for random signs, 0 for whole Hadamard blocks
    gradient            largest of any image's own loss, in nats per radian: 0 at a minimum, and wherever assignments
                        are so close to one-hot that nothing pulls
    calls, falling      evaluations; where they ran out, what the loss fell in the last 50 of them
"""

import fnmatch
import json
import math
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cplearn import errors
from cplearn.errors import UserError
from cplearn.files import check_output_dir, write_text
from cplearn.flags import ArgumentParser
from cplearn.host import git_commit
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import streamed_loss
from cplearn.methods.cplearn import reference_losses
from cplearn.pictures.style import COLORS, pyplot, save_figure
from cplearn.text import format_table
from cplearn_head import CPLearnHead

CALLS = 300
STARTS = ("aligned", "random", "alike")
COLUMNS = {"at start": ".4f", "loss": ".4f", "bound": ".4f", "aligned": ".4f", "uniform": ".4f", "way": ".3f",
           "alignment": ".3f", "random": ".3f", "per image": ".1f", "groups": ".1f", "used": "", "most": "",
           "same": ".4f", "other": ".4f", "off": ".4f", "its codes": ".4f", "formula": ".4f", "gradient": ".0e",
           "calls": "", "falling": ".0e"}  # fmt: skip


class Setting(NamedTuple):
    """One row: the sizes, the loss, the dictionary and where the embeddings start."""

    f: int
    c: int
    n: int
    beta: float
    start: str
    dictionary: str = "rademacher"
    n_ref: float = 1.0
    recipe: str = ""

    @property
    def size(self) -> str:
        return f"f {self.f}, c {self.c}, n {self.n}"

    @property
    def name(self) -> str:
        words = [f"beta {self.beta:g}", self.dictionary, self.start]
        words += [f"n_ref {self.n_ref:g}"] * (self.n_ref != 1 or self.c == 16384)
        return ", ".join([*words, *filter(None, [self.recipe])])


SMALL = tuple(
    Setting(64, 256, n, beta, start, dictionary)
    for n, beta, dictionary, start in product((512, 256, 64), (0.25, 1.0, 2.0), ("rademacher", "hadamard"), STARTS)
)
LARGE = tuple(
    Setting(384, 16384, 64, 0.25, start, n_ref=n_ref) for n_ref, start in product((1, 4, 16, 64), ("aligned", "random"))
)
RECIPES = (
    Setting(512, 1024, 64, 0.25, "random", n_ref=4, recipe="digits"),
    Setting(512, 4096, 64, 0.25, "random", n_ref=4, recipe="laptop"),
)
THEOREM = tuple(  # what Theorem 1 is proven for: as many codes as dimensions, orthogonal
    Setting(64, 64, n, 0.25, start, "hadamard") for n, start in product((512, 64, 16), STARTS)
)
MORE_CODES = tuple(
    Setting(64, c, 2 * c, 0.25, start, dictionary)
    for c, dictionary, start in product((128, 1024), ("rademacher", "hadamard"), ("aligned", "random"))
)
CURVES = tuple(
    Setting(64, 256, n, beta, start)
    for n, beta, start in product((2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), (0.25, 1.0), ("aligned", "random"))
)


# --- one row -------------------------------------------------------------------------------------------


def starting_point(setting: Setting, codes: Tensor, seed: int) -> Tensor:
    """Return the embeddings before the first step. Shape: codes (c, f) -> (n, f) of unit length, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(setting.n, setting.f, dtype=torch.float64, generator=generator)
    if setting.start == "aligned":
        return F.normalize(codes[torch.arange(setting.n) % setting.c], dim=1)
    if setting.start == "random":
        return F.normalize(noise, dim=1)
    one = torch.randn(setting.f, dtype=torch.float64, generator=generator)
    return F.normalize(F.normalize(one, dim=0) + 0.01 * F.normalize(noise, dim=1), dim=1)


def minimize(setting: Setting, calls: int = CALLS, seed: int = 0) -> dict[str, float | int | None]:
    """Optimize the embeddings of a row; return its columns by name. The seed is that of the codes and of the start."""
    head = CPLearnHead(setting.f, setting.c, n_ref=setting.n_ref, dictionary=setting.dictionary, seed=seed)
    codes, scale = head.dictionary.codes(dtype=torch.float64), head.scale * head.kappa
    spec = LossSpec(setting.beta, n_global=1)  # both views are the same: one direction is as good as both
    free = starting_point(setting, codes, seed).requires_grad_()
    losses = []
    optimizer = torch.optim.LBFGS(
        [free], max_iter=calls, max_eval=calls, tolerance_grad=1e-10, tolerance_change=1e-12,
        history_size=10, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        h = F.normalize(free, dim=1)
        loss = streamed_loss([h, h], head.dictionary, scale, spec)[0]
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    loss = closure().item()
    pull = setting.n * free.grad.norm(dim=1) * free.detach().norm(dim=1)  # the gradient of F.normalize is tangential
    refs = reference_losses(setting.beta, setting.c, setting.n)
    return {
        "at start": losses[0],
        "loss": loss,
        "bound": refs.floor,
        "aligned": refs.aligned,
        "uniform": refs.uniform,
        "way": (refs.uniform - loss) / (refs.uniform - refs.floor),
        **describe(F.normalize(free.detach(), dim=1), codes, scale),
        "formula": expected_energy(setting),
        "gradient": pull.max().item(),
        "calls": len(losses) - 1,
        "falling": losses[-52] - loss if len(losses) > max(calls, 51) else None,
    }


def describe(h: Tensor, codes: Tensor, scale: float) -> dict[str, float | int]:
    """Return what can be seen of embeddings and their assignments. Shape: h (n, f), codes (c, f)."""
    n, (c, f) = len(h), codes.shape
    random = F.normalize(torch.randn(256, f, dtype=h.dtype, generator=torch.Generator().manual_seed(1)), dim=1)
    usage, entropies, nearest = h.new_zeros(c), [], []
    for part in h.split(64):  # the (n, c) logits of a large row would not fit
        log_p = F.log_softmax(scale * part @ codes.T, dim=1)
        nearest.append(log_p.argmax(1))
        entropies.append(-(log_p.exp() * log_p).sum(1))
        usage += log_p.exp().sum(0) / n
    nearest, entropy = torch.cat(nearest), torch.cat(entropies).mean().item()
    counts = nearest.bincount()
    return {
        "alignment": (h * codes[nearest]).sum(1).mean().item() / math.sqrt(f),
        "random": (random @ codes.T).amax(1).mean().item() / math.sqrt(f),
        "per image": math.exp(entropy),
        "groups": math.exp(-torch.special.xlogy(usage, usage).sum().item() - entropy),
        "used": int((counts > 0).sum()),
        "most": int(counts.max()),
        **squared_cosines(h, nearest),
        "off": energy_off_diagonal(h),
        "its codes": energy_off_diagonal(codes[nearest]),
    }


def squared_cosines(h: Tensor, nearest: Tensor) -> dict[str, float | None]:
    """Return the mean squared cosine of two images of one code and of two codes, None without such pairs.

    Shape: h (n, f), nearest (n,).
    """
    squares, alike = (h @ h.T).square(), nearest[:, None] == nearest
    pairs = ~torch.eye(len(h), dtype=torch.bool)
    groups = {"same": squares[alike & pairs], "other": squares[~alike]}
    return {name: x.mean().item() if len(x) else None for name, x in groups.items()}


def energy_off_diagonal(h: Tensor) -> float:
    """Return the share of the squared entries of H^T H that lie off its diagonal. Shape: (n, f)."""
    squares = (h.T @ h).square()
    return max(0.0, (1 - squares.diagonal().sum() / squares.sum()).item())


def expected_energy(setting: Setting) -> float | None:
    """Return `energy_off_diagonal` of min(n, c) codes in equal use: of random signs its expected value.

    A sum of m products of signs has the variance m, and the diagonal is m: m f (f - 1) of m f (f - 1) + m^2 f. None for
    parts of a Hadamard dictionary, as that depends on the parts.
    """
    count = min(setting.n, setting.c)
    if setting.dictionary == "hadamard":
        return 0.0 if count == setting.c and count % setting.f == 0 else None
    return (setting.f - 1) / (count + setting.f - 1)


# --- tables and the figure -----------------------------------------------------------------------------


def chosen(pattern: str | None) -> list[Setting]:
    """Return the rows whose name, with their size in front, has the pattern. Raises `UserError` if none has."""
    rows = [*SMALL, *LARGE, *RECIPES, *THEOREM, *MORE_CODES]
    matching = [row for row in rows if fnmatch.fnmatchcase(f"{row.size}, {row.name}", f"*{pattern or ''}*")]
    if not matching:
        raise UserError(f"--only {pattern!r} is part of no row's name, such as '{rows[0].size}, {rows[0].name}'")
    return matching


def show(size: str, results: dict[Setting, dict]) -> None:
    """Print the rows of one size."""
    rows = [(setting.name, *(None if row[k] is None else format(row[k], form) for k, form in COLUMNS.items()))
            for setting, row in results.items()]  # fmt: skip
    print(format_table(rows, (size, *COLUMNS)) + "\n", flush=True)


def draw(results: dict[Setting, dict], path: Path) -> None:
    """Draw alignment and way against n / c. Raises `WriteError`."""
    figure, axes = pyplot().subplots(2, 2, figsize=(9.5, 6.4), layout="constrained", sharex=True, sharey="row")
    c = CURVES[0].c
    for column, beta in enumerate((0.25, 1.0)):
        for color, line, start in zip(COLORS[:2], ("-", "--"), ("random", "aligned"), strict=True):
            curve = [s for s in CURVES if (s.beta, s.start) == (beta, start)]
            images = [s.n / c for s in curve]
            for axis, name in zip(axes[:, column], ("alignment", "way"), strict=True):
                values = [results[s][name] for s in curve]
                axis.plot(images, values, "o", color=color, ms=4, ls=line, label=f"{start} start")
        refs = [reference_losses(beta, c, s.n) for s in curve]
        state = [(x.uniform - x.aligned) / (x.uniform - x.floor) for x in refs]
        axes[1, column].plot(images, state, color="0.45", ls=":", label="one code per image")
        axes[0, column].axhline(results[curve[0]]["random"], color="0.45", ls=":", label="random directions")
        axes[1, column].axhline(0, color="0.75", lw=0.8)
        for axis in axes[:, column]:
            axis.axvline(c**-beta, color="0.2", lw=1, label=f"n = c^(1 - beta) = {c ** (1 - beta):.0f}")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"beta {beta:g}", fontsize=10)
        axes[1, column].set_xlabel("images per code, n / c")
    axes[0, 0].set(xscale="log", ylabel="alignment with the nearest code", ylim=(0, 1.05))
    axes[0, 0].set_xticks([2.0**k for k in range(-8, 3, 2)], ["1/256", "1/64", "1/16", "1/4", "1", "4"])
    axes[0, 0].minorticks_off()
    axes[1, 0].set(ylabel="way from uniform to the bound", ylim=(-0.5, 1.05))
    for axis in axes.flat:
        axis.legend(fontsize=8, loc="lower right")
    figure.suptitle(
        f"Free embeddings at the end of the optimization (f {CURVES[0].f}, c {c}, random signs)", fontsize=10
    )
    save_figure(figure, path.parent, path.stem)


def main(argv: Sequence[str] | None = None) -> None:
    """Optimize every row, print one table per size, and draw the figure."""
    parser = ArgumentParser(prog="experiments/theory.py", description=__doc__)
    parser.add_argument("--json", default=None, help="Also write the rows to this file")
    parser.add_argument("--figure", default=None, help="Also draw alignment and way against n / c into this .png file")
    parser.add_argument("--only", default=None, help="Rows whose size and name have this in them")
    parser.add_argument("--seed", type=int, default=0, help="Of the codes and of the start")
    args = parser.parse_args(argv)
    for flag, name in (("--json", args.json), ("--figure", args.figure)):  # before minutes of work
        if name is not None:
            check_output_dir(str(Path(name).parent), f"{flag} {name}: folder")
    if args.figure is not None and Path(args.figure).suffix != ".png":
        raise UserError(f"--figure {args.figure}: the name must end in .png")
    settings, results, commit = chosen(args.only), {}, git_commit()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, cpu, 1 thread, float64, commit {commit}\n")
    for size in dict.fromkeys(s.size for s in settings):
        rows = {s: minimize(s, seed=args.seed) for s in settings if s.size == size}
        show(size, rows)
        results |= rows
    if args.figure is not None:
        results |= {s: minimize(s, seed=args.seed) for s in CURVES if s not in results}
        draw(results, Path(args.figure))
    if args.json is not None:
        rows = [s._asdict() | row for s, row in results.items()]
        versions = {"commit": commit, "torch": torch.__version__, "seed": args.seed}
        report = versions | {"seconds": time.process_time(), "rows": rows}
        write_text(Path(args.json), json.dumps(report, indent=1) + "\n")
    print(f"{len(results)} rows, {time.process_time():.0f} s of one core")


if __name__ == "__main__":
    errors.run_script(main)
