"""The frozen codes, one bit per entry, and the loss streamed over blocks of them."""

from cplearn.dictionary.codes import Dictionary
from cplearn.dictionary.hadamard import HadamardDictionary

DICTIONARIES = {"rademacher": Dictionary, "hadamard": HadamardDictionary}
