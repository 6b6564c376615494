"""Data modules: your own arrays, handwritten digits, and the four data sets of the paper."""

from examples.decalign.data.arrays import Arrays
from examples.decalign.data.base import Batch, DataWarning, ModalityData, Samples, Scaling
from examples.decalign.data.checks import SchemaError
from examples.decalign.data.digits import VIEWS, DigitsData
from examples.decalign.data.mmsa import CHSIMS, IEMOCAP, MOSEI, MOSI
from examples.decalign.data.reader import RefusedPickleError, convert, read_dataset
from examples.decalign.data.sample import make_sample
from examples.decalign.data.target import Target

__all__ = [
    "CHSIMS",
    "IEMOCAP",
    "MOSEI",
    "MOSI",
    "VIEWS",
    "Arrays",
    "Batch",
    "DataWarning",
    "DigitsData",
    "ModalityData",
    "RefusedPickleError",
    "Samples",
    "Scaling",
    "SchemaError",
    "Target",
    "convert",
    "make_sample",
    "read_dataset",
]
