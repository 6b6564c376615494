"""Data modules: handwritten digits, and the four data sets of the paper."""

from examples.decalign.data.base import ModalityData
from examples.decalign.data.batch import Batch, GlobalOrder, Samples, Scaling
from examples.decalign.data.digits import VIEWS, DigitsData
from examples.decalign.data.reader import RefusedPickleError, convert, read_dataset
from examples.decalign.data.sample import make_sample
from examples.decalign.data.sentiment import CHSIMS, IEMOCAP, MOSEI, MOSI, SchemaError

__all__ = [
    "CHSIMS",
    "IEMOCAP",
    "MOSEI",
    "MOSI",
    "VIEWS",
    "Batch",
    "DigitsData",
    "GlobalOrder",
    "ModalityData",
    "RefusedPickleError",
    "Samples",
    "Scaling",
    "SchemaError",
    "convert",
    "make_sample",
    "read_dataset",
]
