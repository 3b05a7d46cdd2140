"""The frozen codes, one bit per entry, and the loss streamed over blocks of them."""

from cplearn.loss.codes import Dictionary
from cplearn.loss.hadamard import HadamardDictionary

DICTIONARIES = {"rademacher": Dictionary, "hadamard": HadamardDictionary}
