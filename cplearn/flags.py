"""Command-line flags: a parser with one-line errors and recipes, and types that check their range."""

import argparse
import difflib
import errno
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from cplearn.errors import UserError

# Flags, and what DINO, solo-learn, lightly and others call them. Of several, the first that a command has is meant.
ELSEWHERE = {
    "lr": "learning_rate base_lr max_lr",
    "arch": "backbone model model_name network",
    "batch_size_per_gpu": "batch_size batchsize bs",
    "epochs": "max_epochs num_epochs n_epochs",
    "images": "train_dir data_dir data root image_path",
    "data_path": "train_dir data_dir data root image_path",
    "pretrained_weights": "checkpoint ckpt weights pretrained",
    "init_from": "checkpoint ckpt weights pretrained",
    "output_dir": "save_dir output log_dir checkpoint_dir dump_path",
    "out": "save_dir output log_dir checkpoint_dir",
    "out_dim": "num_prototypes nmb_prototypes n_prototypes num_codes",
    "image_size": "crop_size img_size input_size input_dim",
    "precision": "amp fp16 bf16 mixed_precision",
    "accum": "accumulate_grad_batches grad_accum accumulation_steps",
    "num_workers": "workers n_workers",
    "ngpus": "gpus devices nproc_per_node",
    "device": "use_cuda gpu accelerator gpus devices nproc_per_node",
    "momentum_teacher": "teacher_momentum base_tau_momentum",
    "nb_knn": "k knn_k n_neighbors",
    "weight_decay": "wd",
    "timeout": "max_time",
}
NOT_NEEDED = {  # flags of DINO's evaluations, and what happens without
    "num_labels": "classes are counted",
    "evaluate": "a finished linear probe is evaluated when its command is typed again",
    "val_freq": "accuracy is measured after every epoch",
    "use_volta32": "run_with_submitit.py --constraint volta32 asks for such GPUs",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse with printed defaults, one-line errors, no abbreviations, and `@file` arguments.

    A file holds one or more arguments per line and # comments; of a flag given twice the later value counts. With
    `common`, names of flags, --help shows these and --help_all every one.
    """

    def __init__(self, *, common: Sequence[str] = (), **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, exit_on_error=False, **kwargs)
        self.common = set(common)
        if common:
            self.add_argument("--help_all", action=_HelpAll, nargs=0, help="Show every flag")
        self.add_argument("--version", action=_Version, nargs=0, help="Print version and commit")

    def format_help(self) -> str:
        """Return the help without a synopsis, which of sixty flags nobody reads, and of `common` flags alone if any."""
        kept = [(action, action.help) for action in self._actions]
        positional = [a.metavar or a.dest for a, _ in kept if not a.option_strings]
        self.usage = " ".join(["python", self.prog, *positional, "[flags]"])
        for action, _ in kept:
            if self.common and action.option_strings and action.dest not in {*self.common, "help", "help_all"}:
                action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in kept:
                action.help = text

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        try:
            return super().parse_known_args(expand_recipes(sys.argv[1:] if args is None else args), namespace)
        except argparse.ArgumentError as error:
            colon = (
                "" if isinstance(error.__context__, argparse.ArgumentTypeError) else ":"
            )  # ours begin with the value
            self.error(f"{error.argument_name}{colon} {error.message}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return args

    def refuse(self, unknown: Sequence[str]):
        """Raise `UserError` for arguments that are not known, with the flags that may have been meant."""
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        guesses = [self._guess(flag.replace("-", "_").replace("_", "-", 2)) for flag in flags]
        hint = " ".join(guess for guess in dict.fromkeys(guesses) if guess)
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint and f': {hint}'} (--help lists the flags)")

    def error(self, message: str):
        """Raise `UserError` with the message in one line."""
        raise UserError(message.replace("\n", "\\n").replace("\r", "\\r"))

    def _guess(self, flag: str) -> str:
        """Return a question that names the flag that was meant: another program's, cut short, mistyped; or ""."""
        known, name = list(self._option_string_actions), flag.removeprefix("--")
        if name in NOT_NEEDED:
            return f"leave out {flag}: {NOT_NEEDED[name]}."
        elsewhere = [f"--{own}" for own, others in ELSEWHERE.items() if name in others.split() and f"--{own}" in known]
        cut_short = [x for x in known if len(flag) > 4 and x.startswith(flag)]
        near = elsewhere or cut_short or difflib.get_close_matches(flag, known, n=1)
        return f"did you mean {near[0]}?" if near else ""


def expand_recipes(argv: Sequence[str]) -> list[str]:
    """Return the arguments with every @file written out. Raises `UserError` for a file that is no recipe."""
    return [word for argument in argv for word in _words_of(str(argument), ())]


def _words_of(argument: str, inside: tuple[str, ...]) -> list[str]:
    """Return the argument, or what its @file says; `inside`: the files that led here."""
    if not argument.startswith("@"):
        return [argument]
    path = os.path.realpath(os.path.expanduser(argument[1:]))
    if path in inside:
        raise UserError(f"{argument} includes itself: take that line out")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"{argument[:200]} cannot be read ({error.strerror}): @FILE is a recipe of flags") from None
    except UnicodeDecodeError:
        raise UserError(f"{argument} is no text file of flags: check the path") from None
    words = []
    for line in text.splitlines():
        try:
            words += shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"a recipe's line cannot be read ({error}): {line}") from None
    return [word for x in words for word in _words_of(x, (*inside, path))]


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.common = set()
        parser.print_help()
        parser.exit()


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        import cplearn
        from cplearn.host import git_commit

        print(f"cplearn {cplearn.__version__}, commit {git_commit()}")
        parser.exit()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints a default only where there is one to print."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS, []) else super()._get_help_string(action)


# --- types that check their range ------------------------------------------------------------------------


def _type(kind: type, holds: Callable[[float], bool], requirement: str) -> Callable[[str], float]:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole number' if kind is int else 'number'}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} must {requirement}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise argparse.ArgumentTypeError(f"{text[:40]} must be below 2^63")
        if isinstance(value, float) and value and not 1e-30 <= abs(value) <= 1e30:  # float32 has to hold it
            raise argparse.ArgumentTypeError(
                f"{text[:40]} must lie between 1e-30 and 1e30 (or be 0, where 0 is allowed)"
            )
        return value

    return parse


def positive(kind: type) -> Callable[[str], float]:
    """Return an argparse type for an int or float above 0."""
    return _type(kind, lambda x: x > 0, "be positive")


def nonnegative(kind: type) -> Callable[[str], float]:
    """Return an argparse type for an int or float of at least 0."""
    return _type(kind, lambda x: x >= 0, "not be negative")


def seed_below(limit: int) -> Callable[[str], int]:
    """Return an argparse type for a seed, whatever the generators behind it take."""
    return _type(int, lambda x: 0 <= x < limit, f"not be negative, and be below {limit}")


fraction = _type(float, lambda x: 0 <= x <= 1, "lie between 0 and 1")
fraction_below_one = _type(float, lambda x: 0 <= x < 1, "be at least 0 and below 1")


def bool_flag(text: str) -> bool:
    """Parse DINO's boolean values: `--use_fp16 true`, `1`, `on`, or `false`, `0`, `off`."""
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def expand_paths(args: argparse.Namespace, *names: str) -> None:
    """Expand `~` in these flags, also where the shell left it (--data_path=~/x).

    Raises `UserError` for a path that is empty or longer than the system allows.
    """
    for name in names:
        path = getattr(args, name)
        if path is not None:
            setattr(args, name, check_path(f"--{name}", path))


def check_path(flag: str, path: str) -> str:
    """Return the path with `~` expanded. Raises `UserError` if no file can have it."""
    if not path.strip():
        raise UserError(f"{flag} '' is empty: name a path, or leave the flag out")
    path = os.path.expanduser(path)
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{flag} {path[:60]}... is longer than a path can be: shorten it") from None
    return path


def check_unread_path(args: argparse.Namespace) -> None:
    """Raise `UserError` for a --data_path that nothing would read: the digits need none, hf:PATH has its own."""
    if args.data_path and args.dataset and (args.dataset == "digits" or args.dataset.startswith("hf:")):
        raise UserError(
            f"--data_path {args.data_path} is not read with --dataset {args.dataset}: leave one of them out"
        )


class _Ignored(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{option_string} is ignored: the launcher's LOCAL_RANK says the same", file=sys.stderr)


def ignore_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept what torch.distributed.launch adds to a command: --local_rank N, or --local-rank=N."""
    names = ("--local_rank", "--local-rank")
    parser.add_argument(*names, action=_Ignored, type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
