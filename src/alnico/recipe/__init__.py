"""Reads recipes: YAML or a mapping to a checked :class:`Recipe`; writes those that people know by a name.

Opens no model, except the newest checkpoints of a run: they may be half-written.
"""

from __future__ import annotations

from alnico._package import make_lazy

TYPE_CHECKING = False  # importing typing takes a good part of the time of a small command

if TYPE_CHECKING:
    from alnico.recipe.named_recipes import add_difference as add_difference
    from alnico.recipe.named_recipes import chat_vector as chat_vector
    from alnico.recipe.named_recipes import retain as retain

__all__ = make_lazy(
    __name__,
    {"alnico.recipe.named_recipes": ["add_difference", "chat_vector", "retain"]},
)
