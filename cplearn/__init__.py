"""CPLearn's package. `from cplearn import load_backbone, load_pretrained` for a trained network in your own code."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cplearn.load import load_backbone, load_pretrained

__version__ = "0.1.0"
__all__ = ["load_backbone", "load_pretrained"]


def __getattr__(name: str):
    if name in __all__:  # on demand, for the head and the loss need none of what these import
        from cplearn import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
