"""The vision tower of a pretraining stage: new, or started from weights that exist."""

from __future__ import annotations

from mmkit.config import EncoderConfig
from mmkit.encoders.vit import VisionEncoder, build_encoder
from mmkit.run import Parent, resolve_parent


def make_encoder(config: EncoderConfig, *, seed: int) -> tuple[VisionEncoder, list[Parent]]:
    """Build the tower that a recipe describes.

    Args:
        config: The recipe's encoder section.
        seed: Of new weights.

    Returns:
        The tower on the CPU, and what its weights come from.

    Raises:
        InputError: An unknown architecture, or weights that do not fit it.
    """
    encoder = build_encoder(
        config.architecture,
        image_size=config.image_size,
        patch_size=config.patch_size,
        model_args=config.model_args,
        pretrained=config.pretrained,
        layout=config.layout,
        mean=config.mean,
        std=config.std,
        seed=seed,
    )
    parents = []
    if config.init:
        # Imported here: it knows other libraries' checkpoint layouts, which a run from scratch never needs.
        from mmkit.encoders.init import init_encoder

        # Also where only the weights are taken: the lineage in the report must lead to them.
        parents.append(resolve_parent("encoder", config.init))
        init_encoder(encoder, config.init, statistics=config.mean is None and config.std is None)
    if config.patch_drop:
        encoder.check_patch_drop()  # here and not in the first step, after the data have been read
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return encoder, parents


def bare_encoder(config: EncoderConfig) -> VisionEncoder:
    """The tower without the weights it starts from, for checks and plans that look at shapes; make it on the meta device.

    Raises:
        InputError: As `make_encoder`, but for what is wrong with weights.
    """
    # Without them nothing is downloaded and nothing read.
    plain = config.model_copy(update={"pretrained": False, "init": None})
    return make_encoder(plain, seed=0)[0]
