"""The demo world: a seeded generator of pictures and of everything that is said and asked about them."""

from mmkit.data.world.write import make_world

__all__ = ["make_world"]
