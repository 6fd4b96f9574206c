"""The kinds of models that :func:`alnico.checkpoint.model.open_model` opens."""

from alnico.checkpoint.adapted import AdaptedModel
from alnico.checkpoint.dequantised import DequantisedModel
from alnico.checkpoint.model import FileModel

OPENED = (FileModel, AdaptedModel, DequantisedModel)
