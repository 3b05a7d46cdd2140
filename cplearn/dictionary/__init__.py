"""TODO cplearn.dictionary."""

from cplearn.dictionary.codes import Dictionary
from cplearn.dictionary.hadamard import HadamardDictionary

DICTIONARIES = {"rademacher": Dictionary, "hadamard": HadamardDictionary}
