"""Stage finetune: a whole encoder with a linear classifier, trained and scored on labelled pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from torch import Tensor, nn

from mmkit.config import FinetuneRecipe
from mmkit.data.labelled import LabelledSource, open_labelled
from mmkit.distributed.engine import Engine
from mmkit.encoders.features import pixel_batches
from mmkit.encoders.probe import ranked_result
from mmkit.encoders.probing import score_layout
from mmkit.encoders.save import encoder_folder, load_encoder, save_encoder
from mmkit.encoders.vit import VisionEncoder, create_backbone
from mmkit.errors import InputError
from mmkit.files import read_json, write_json
from mmkit.run import Run, resolve_parent
from mmkit.training.objective import Batch, Objective, Stage
from mmkit.training.stages.labelled import Augment, FinetuneSamples, collate_labelled_pictures, mix

WEIGHTS, CLASSES = "classifier.safetensors", "classes.json"


class FinetuneObjective(Objective):
    """Cross entropy of a linear classifier on pooled features; pictures and classes are mixed while it trains."""

    def __init__(
        self, encoder: VisionEncoder, num_classes: int, *, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0
    ) -> None:
        """Put a new classifier on an encoder; its weights come from the global generator.

        Args:
            encoder: Trained whole.
            num_classes: C.
            label_smoothing: Share of the target spread over all classes.
            mixup: Alpha of mixup's Beta distribution; 0: none.
            cutmix: Alpha of CutMix's; 0: none. With both, each micro-batch takes one of them.
        """
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.width, num_classes)
        # Small, so that the encoder's first gradients are not those of a random classifier; not 0, or it would get none.
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self._hits: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Loss sum of ``pixels`` uint8 ``[B, 3, S, S]`` with ``targets`` i64 ``[B]``; fp32 scalar."""
        pixels, targets = batch["pixels"], batch["targets"]
        # Whole pictures and sharp targets, so that the loss compares between recipes.
        if not self.training:
            logits = self.classifier(self.encoder(pixels)).float()
            self._hits = (logits.argmax(dim=1) == targets).sum()
            return self._entropy(logits, targets)
        if not self.mixup and not self.cutmix:
            return self._entropy(self.classifier(self.encoder(pixels)).float(), targets)
        # After normalising: uint8 pictures would round when they are mixed.
        mixed = mix(self.encoder.normalise(pixels), mixup=self.mixup, cutmix=self.cutmix)
        # Under autocast logits are bf16, too coarse for a log-sum-exp.
        logits = self.classifier(self.encoder(mixed.pixels)).float()
        # Twice the cross entropy of hard targets is that of mixed ones, and no [B, C] target is needed.
        # One pass with the targets of the batch and one with those of its reverse, as `mix` joined the pictures.
        own, other = self._entropy(logits, targets), self._entropy(logits, targets.flip(0))
        return mixed.share * own + (1 - mixed.share) * other

    def _entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross entropies; none is smoothed outside training, so that validation losses compare."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)

    def count(self, batch: Batch) -> int:
        """Pictures."""
        return len(batch["targets"])

    def compile_parts(self) -> None:
        """Compile the tower; mixing draws numbers on the host."""
        self.encoder.compile_backbone()

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Pictures whose class is right."""
        assert self._hits is not None, "evaluate comes after a forward pass in eval mode"
        return {"accuracy": float(self._hits)}


def build_finetune(recipe: FinetuneRecipe, engine: Engine) -> Stage:
    """Encoder at the recipe's picture size, classifier, labelled pictures.

    Raises:
        InputError: As the parts raise it.
    """
    parent = resolve_parent("encoder", recipe.encoder)
    train, test, classes = _open_sets(recipe)
    encoder = _make_encoder(recipe, str(parent.folder or recipe.encoder))
    # Its weights depend on the seed alone. They are made on the CPU, so no generator of a GPU need be touched.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        objective = FinetuneObjective(
            encoder, len(classes), label_smoothing=recipe.label_smoothing, mixup=recipe.mixup, cutmix=recipe.cutmix
        )
    size, max_pixels = encoder.image_size, recipe.data.max_pixels
    how = Augment(recipe.crop_scale, recipe.flip, recipe.rand_augment, recipe.decoder)

    def save_product(folder: Path) -> None:
        def write_classifier(inside: Path) -> None:
            state = {name: value.detach().cpu().contiguous() for name, value in objective.classifier.state_dict().items()}
            save_file(state, inside / WEIGHTS, metadata={"format": "pt"})
            write_json(inside / CLASSES, classes)

        save_encoder(encoder, folder, extra={"classes": len(classes), "seed": recipe.seed}, write_more=write_classifier)

    return Stage(
        objective=objective,
        samples=FinetuneSamples(train, train.targets(classes), size=size, max_pixels=max_pixels, augment=how),
        collate=collate_labelled_pictures,
        save_product=save_product,
        parents=[parent],
        data_fingerprint=train.fingerprint,
        validation=FinetuneSamples(test, test.targets(classes), size=size, max_pixels=max_pixels),
        # At 1 layers are not asked for: not every model says what they are.
        lr_of=decayed_rates(encoder, recipe.train.lr, recipe.layer_decay) if recipe.layer_decay < 1 else {},
        # As MAE's fine-tuning (util/lr_decay.py); pretraining decays the position table, as x-cls/superclass does.
        undecayed=("cls_token", "reg_token", "pos_embed"),
    )


def _open_sets(recipe: FinetuneRecipe) -> tuple[LabelledSource, LabelledSource, list[str]]:
    """Training and test pictures, and the classes in order."""
    data = recipe.data
    assert data.train is not None  # the recipe's schema sees to it
    train, test = open_labelled(data.train, data), open_labelled(data.test, data)
    # Before training: the score at the end would be refused otherwise.
    test.targets(train.classes)  # refuses a class that training has not
    # Classes are numbered by training: a test set that lacks one must not shift the others.
    return train, test, train.classes


def _make_encoder(recipe: FinetuneRecipe, source: str) -> VisionEncoder:
    """The parent's encoder in fp32, at the recipe's picture size and with its drop path."""
    known = load_encoder(source)
    size = recipe.image_size or known.image_size
    args = dict(known.model_args)
    if recipe.drop_path != args.get("drop_path_rate", 0.0):
        args["drop_path_rate"] = recipe.drop_path
    if size != known.image_size and hasattr(known.backbone, "set_input_size"):
        patch = known.backbone.patch_embed.patch_size[0]
        if size % patch:
            # timm would leave out the rest at the right and below, in silence.
            raise InputError(f"{size} pixels are no whole number of patches of {patch}", where="image_size", mend="change it")
        args["img_size"] = size
    # Nothing to rebuild: the loaded tower itself is used, no weight is touched.
    if args == known.model_args and size == known.image_size:
        # Many published towers are stored in halves, in which small updates would be rounded away.
        return known.float()
    encoder = VisionEncoder(
        create_backbone(known.architecture, args),
        architecture=known.architecture,
        model_args=args,
        image_size=size,
        mean=known.mean,
        std=known.std,
    )
    # Imported here: it knows other libraries' layouts, which a run at the parent's size does not need.
    from mmkit.encoders.init import init_encoder

    init_encoder(encoder, source)
    return encoder


def decayed_rates(encoder: VisionEncoder, lr: float, decay: float) -> dict[str, float]:
    """Learning rates that fall from block to block below the top (BEiT, arXiv 2106.08254; MAE util/lr_decay.py).

    The classifier has ``lr``, the last of L blocks ``lr * decay``, the embeddings ``lr * decay**(L + 1)``. Layers are timm's: the
    final norm belongs to the last block, where MAE has it with the classifier.

    Args:
        encoder: Any timm model that says which layer a weight belongs to.
        lr: At the top.
        decay: Factor from one layer to the next below.

    Returns:
        Name of a weight in the objective -> learning rate, for `Stage.lr_of`; the classifier is not in it.

    Raises:
        InputError: The model has no layers to tell apart.
    """
    if not hasattr(encoder.backbone, "group_matcher"):
        raise InputError(
            f"{encoder.architecture} does not say what its layers are", where="layer_decay", mend="use layer_decay=1"
        )
    names = [name for name, _ in encoder.backbone.named_parameters()]
    # timm puts a name that none of its patterns fits above the top block: that is where the classifier is.
    named = SimpleNamespace(named_parameters=lambda: [(name, None) for name in [*names, "classifier"]])
    layer_of = group_parameters(named, encoder.backbone.group_matcher(coarse=False), reverse=True)
    top = layer_of["classifier"]
    # Longest names first: the first that a weight's name begins with decides.
    names.sort(key=len, reverse=True)
    return {f"encoder.backbone.{name}": lr * decay ** (top - layer_of[name]) for name in names}


def load_classifier(folder: str | Path) -> tuple[VisionEncoder, nn.Linear, list[str]]:
    """Open a fine-tuned encoder with its classifier.

    Args:
        folder: A finished run or its model folder.

    Returns:
        Encoder, classifier and class names in order, in eval mode.

    Raises:
        InputError: There is none, or it is damaged.
    """
    inside = encoder_folder(folder)
    if not (inside / WEIGHTS).is_file() or not (inside / CLASSES).is_file():
        raise InputError(f"no classifier here ({WEIGHTS}, {CLASSES})", where=inside, mend="give a run of stage=finetune")
    encoder, classes = load_encoder(inside), read_json(inside / CLASSES)
    classifier = nn.Linear(encoder.width, len(classes))
    try:
        classifier.load_state_dict(load_file(inside / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"weights cannot be read: {first}", where=inside / WEIGHTS, mend="write the folder again") from error
    return encoder, classifier.eval(), classes


@torch.inference_mode()
def score_finetuned(run: Run, recipe: FinetuneRecipe) -> dict[str, Any]:
    """Accuracy on the test set with the centre of each picture; written as ``scores.json`` into the run.

    Raises:
        InputError: The run has no product, or a test picture cannot be used.
    """
    manifest = read_json(run.path / "manifest.json", mend="run `mmkit train` first")
    if manifest["status"] != "done":
        raise InputError("this run is not finished", where=run.path, mend="run its command again, it goes on")
    encoder, classifier, classes = load_classifier(run.model)
    test = open_labelled(recipe.data.test, recipe.data)
    targets = torch.tensor(test.targets(classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, classifier = encoder.to(device), classifier.to(device)
    top = []
    batches = pixel_batches(
        test, size=encoder.image_size, workers=recipe.data.workers, max_pixels=recipe.data.max_pixels, batch_size=64
    )
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        for pixels in batches:
            logits = classifier(encoder(pixels.to(device))).float()
            top.append(logits.topk(min(5, len(classes))).indices.cpu())
    result = ranked_result(torch.cat(top), targets, len(classes), probe="finetune", train=manifest["samples_in_data"])
    settings = {
        **result.settings,
        "label": recipe.data.label,
        "encoder": recipe.encoder,
        "model_fingerprint": manifest["product"],
        "image_size": encoder.image_size,
        "precision": recipe.train.precision,
        "limit": recipe.data.limit,
    }
    # Among fewer than five classes there is no top-5.
    values = {"accuracy": result.correct} if result.top5 is None else {"accuracy": result.correct, "top5": result.top5}
    scores = {"tasks": {"finetune": score_layout("finetune", values, test, settings, seed=recipe.seed)}}
    write_json(run.path / "scores.json", scores)
    return scores
