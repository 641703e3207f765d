"""ClipCap: image features, a mapper, and a causal language model that reads the mapper's output as a prefix.

After Mokady et al., "ClipCap: CLIP Prefix for Image Captioning" (2021) and its code at 1ad805a, with the repairs of
facts/clipcap.md 7-8: an end token is trained, masks come from true lengths, the feature scaling is part of the model,
and a frozen language model computes no gradients and no dropout. The vision encoder is not inside: features come in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.config import DecodingConfig
from mmkit.errors import InputError
from mmkit.models.decoding import bare_settings, saved_settings, search_arguments
from mmkit.models.generation import stop_ids
from mmkit.models.llm import load_tokenizer, lost_settings, max_positions
from mmkit.models.mappers import FEATURE_NORMS, FeatureNorm, MLPMapper, TransformerMapper
from mmkit.models.meta import read_meta, write_meta
from mmkit.models.paper_beams import length_averaged_beams

MAPPERS = ("mlp", "transformer")
FEATURE_KINDS = ("pooled", "tokens")


class ClipCapConfig(PreTrainedConfig):
    """Everything needed to build a ClipCap model but its weights."""

    model_type = "mmkit-clipcap"
    # transformers walks these to hand dtype and attention settings on to the language model.
    sub_configs = {"lm_config": AutoConfig}  # noqa: RUF012

    lm_config: Any = None
    feature_dim: int = 512
    mapper: str = "mlp"
    prefix_length: int = 10
    # C, apart from P: the published README sets both to 40 for the transformer mapper (facts/clipcap.md 1).
    clip_length: int = 10
    feature_kind: str = "pooled"
    feature_norm: str = "none"
    mapper_layers: int = 8
    mapper_heads: int = 8
    only_mapper: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn a saved language model configuration back into its class and check the choices."""
        if isinstance(self.lm_config, dict):
            fields = dict(self.lm_config)
            # From config.json it comes as a mapping; any causal model's configuration may be inside, so its own type decides.
            self.lm_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        elif self.lm_config is not None:
            # transformers writes attention settings into sub-configurations; the language model keeps its own copy.
            self.lm_config = copy.deepcopy(self.lm_config)
        for name, value, known in (
            ("mapper", self.mapper, MAPPERS),
            ("feature_kind", self.feature_kind, FEATURE_KINDS),
            ("feature_norm", self.feature_norm, FEATURE_NORMS),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}", mend=f"use one of {', '.join(known)}")
        # Its first layer takes one vector of D numbers; N patches have no place in it.
        if self.mapper == "mlp" and self.feature_kind == "tokens":
            raise InputError(
                "the mlp mapper takes one pooled feature, not patch tokens",
                mend="use mapper: transformer, or feature_kind: pooled",
            )
        super().__post_init__(**kwargs)


# Without this, AutoTokenizer warns about an unknown model type when it opens a captioner's folder.
AutoConfig.register(ClipCapConfig.model_type, ClipCapConfig, exist_ok=True)


@dataclass
class ClipCapOutput:
    """What a forward pass gives.

    Attributes:
        loss_sum: f32[], cross-entropy summed over the supervised tokens.
        num_tokens: i64[], how many those are; the loop divides by the global count.
        logits: f[M, V], at the M supervised positions in row order (all B·T positions where no labels were given).
    """

    loss_sum: Tensor
    num_tokens: Tensor
    logits: Tensor


class ClipCap(PreTrainedModel):
    """A captioner: scaling, mapper, language model."""

    config_class = ClipCapConfig
    base_model_prefix = "clipcap"
    main_input_name = "features"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: ClipCapConfig, lm: PreTrainedModel | None = None) -> None:
        """Build from a configuration; ``lm`` is taken as it is, else one is built with random weights."""
        super().__init__(config)
        # The second case is from_pretrained, which fills the weights in afterwards.
        self.lm = AutoModelForCausalLM.from_config(copy.deepcopy(config.lm_config)) if lm is None else lm
        self.lm.generation_config = bare_settings(self.lm.generation_config)
        self._plain_head = not lost_settings(self.lm.config)
        width = self.lm.get_input_embeddings().embedding_dim
        self.norm = FeatureNorm(config.feature_norm, config.feature_dim)
        self.mapper: nn.Module
        if config.mapper == "mlp":
            self.mapper = MLPMapper(config.feature_dim, width, config.prefix_length)
        else:
            self.mapper = TransformerMapper(
                config.feature_dim,
                width,
                config.prefix_length,
                clip_length=config.clip_length,
                tokens=config.feature_kind == "tokens",
                layers=config.mapper_layers,
                heads=config.mapper_heads,
            )
        # transformers' registration of tied weights, needed for saving.
        self.post_init()
        self.set_only_mapper(config.only_mapper)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave new modules as torch made them: the published mapper uses torch's own initialisation."""

    def set_only_mapper(self, only_mapper: bool) -> None:
        """Freeze the language model (no gradients, no dropout) or let it train; saved in the configuration."""
        self.config.only_mapper = only_mapper
        self.lm.requires_grad_(not only_mapper)
        # Applies the mode again: eval for a language model that was just frozen, training for one that was let go.
        self.train(self.training)

    def train(self, mode: bool = True) -> ClipCap:
        """Training mode for what trains; a frozen language model stays in eval mode."""
        super().train(mode)
        # A frozen GPT-2 with dropout on would be another function at every step (facts/clipcap.md 1).
        if self.config.only_mapper:
            self.lm.eval()
        return self

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that trains."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.lm.get_input_embeddings()

    def prefix(self, features: Tensor) -> Tensor:
        """Scale and map image features.

        Args:
            features: f[B, D], or f[B, N, D] with feature_kind "tokens".

        Returns:
            f[B, P, H] in the embeddings' dtype.
        """
        want = 3 if self.config.feature_kind == "tokens" else 2
        if features.dim() != want or features.shape[-1] != self.config.feature_dim:
            raise ValueError(
                f"features {tuple(features.shape)} for a captioner of {self.config.feature_kind} features "
                f"with {self.config.feature_dim} numbers"
            )
        # Read from the weights: the mapper may be float32 beside a bfloat16 language model.
        dtype = next(self.mapper.parameters()).dtype
        # Statistics are float32; the scaling is done before any rounding to the mapper's dtype.
        embeddings = self.mapper(self.norm(features.float()).to(dtype))
        return embeddings.to(self.get_input_embeddings().weight.dtype)

    def forward(
        self,
        features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> ClipCapOutput:
        """Score captions, end token included, given image features.

        Args:
            features: f[B, D] or f[B, N, D].
            input_ids: i64[B, T], captions with their end token, padded on the right.
            attention_mask: i64[B, T], 1 up to each caption's true length.
            labels: i64[B, T], aligned with ``input_ids`` (not shifted); -100 where nothing is learnt.

        Returns:
            Summed loss, token count, logits.
        """
        prefix = self.prefix(features)
        # f[B, P + T, H]. Positions are the language model's own, counted from 0 at the first prefix slot (facts/clipcap.md 1).
        embeds = torch.cat([prefix, self.get_input_embeddings()(input_ids)], dim=1)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], dim=1)
        if not self._plain_head:
            return self._score_by_lm(embeds, mask, labels, input_ids)
        # Without the head: logits over the whole vocabulary for prefix and padding would be most of the memory, and of no use.
        hidden = self.lm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        # Position P - 1 + t predicts token t, so the last one predicts nothing.
        # f[B, T, H] from here on, aligned with input_ids.
        hidden = hidden[:, prefix.shape[1] - 1 : -1]
        if labels is None:
            return ClipCapOutput(torch.zeros((), device=hidden.device), input_ids.new_zeros(()), self._head(hidden.flatten(0, 1)))
        chosen = labels != -100
        # By label and not by token id: GPT-2's id 0 is "!", which the published ignore_index=0 never learnt.
        return self._summed(self._head(hidden[chosen]), labels[chosen])

    @staticmethod
    def _summed(logits: Tensor, targets: Tensor) -> ClipCapOutput:
        """The output for logits f[M, V] and the tokens i64[M] that they should predict."""
        # A sum in float32: the loop divides by the tokens of the whole step, so that no mean of means arises.
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return ClipCapOutput(loss, torch.tensor(len(targets), device=targets.device), logits)

    def _score_by_lm(self, embeds: Tensor, mask: Tensor, labels: Tensor | None, input_ids: Tensor) -> ClipCapOutput:
        """:meth:`forward` through the language model's own output, which does more than its head: logits of all T positions."""
        length = input_ids.shape[1]
        more = {"logits_to_keep": length + 1} if self.lm._supports_logits_to_keep() else {}
        out = self.lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **more).logits
        # f[B, T, V], aligned with input_ids.
        logits = out[:, -length - 1 : -1]
        if labels is None:
            return ClipCapOutput(torch.zeros((), device=out.device), input_ids.new_zeros(()), logits.flatten(0, 1))
        chosen = labels != -100
        return self._summed(logits[chosen], labels[chosen])

    def _head(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits f[M, H] -> f[M, V]."""
        return self.lm.get_output_embeddings()(hidden)

    def check_room(self, how: DecodingConfig) -> None:
        """Refuse texts that are longer than the language model has positions for.

        Raises:
            InputError: They are.
        """
        room = max_positions(self.lm.config) - self.config.prefix_length
        if how.max_new_tokens > room:
            what = f"{how.max_new_tokens} new tokens are more than the {room} positions that the prefix leaves"
            raise InputError(what, where="max_new_tokens", mend=f"give at most {room}")

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        how: DecodingConfig,
        *,
        stop: Sequence[int] | None = None,
        draws: Sequence[int] | None = None,
        together: Callable[[bool], bool] | None = None,
    ) -> Tensor:
        """Write captions, batched, with a KV cache.

        Args:
            features: f[B, D] or f[B, N, D].
            how: Greedy, beams, sampling, or the paper's beams.
            stop: Tokens that end a caption; the language model's own if None, none if empty.
            draws: With sampling: a seed for each row, so that a caption does not depend on the batch.
            together: See :func:`~mmkit.models.paper_beams.length_averaged_beams`; transformers' own search asks by itself.

        Returns:
            i64[B, <= max_new_tokens], without the prefix; finished rows are filled up after their stop token.

        Raises:
            InputError: More tokens than the language model has positions.
        """
        self.check_room(how)
        ends = stop_ids(self.lm) if stop is None else list(stop)
        fill = filler(self.lm, ends)
        # Every row has the same P, so a batch needs no padding, and batch 1 equals batch N.
        prefix = self.prefix(features)
        if how.decoding == "paper":
            written = length_averaged_beams(
                self.lm, prefix, num_beams=how.num_beams, max_new_tokens=how.max_new_tokens, stop=ends, together=together
            )
            longest = max(map(len, written))
            rows = [[*ids, *[fill] * (longest - len(ids))] for ids in written]
            return torch.tensor(rows, dtype=torch.int64, device=prefix.device)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        arguments = search_arguments(how, stop=ends, fill=fill, draws=draws)
        # From embeddings, generate returns the new tokens alone.
        return self.lm.generate(inputs_embeds=prefix, attention_mask=mask, synced_gpus=together is not None, **arguments)


def check_fit(model: ClipCap, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse captions that do not fit the language model.

    Args:
        model: The captioner.
        tokenizer: What makes its tokens.
        max_length: Tokens of the longest caption.

    Raises:
        InputError: Tokens without an embedding, or more positions than there are.
    """
    rows = int(model.lm.get_input_embeddings().num_embeddings)
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} tokens, the language model {rows} embeddings"
        raise InputError(what, where="llm.tokenizer", mend="use the language model's own tokenizer")
    need, have = model.config.prefix_length + max_length, max_positions(model.lm.config)
    if need > have:
        what = f"prefix_length {model.config.prefix_length} and max_length {max_length} are more than its {have} positions"
        raise InputError(what, where="llm", mend="lower max_length or mapper.prefix_length")


def filler(lm: PreTrainedModel, stop: Sequence[int]) -> int:
    """What fills finished rows: the padding token, or a stop token where there is none (GPT-2), or 0."""
    own: int | None = lm.generation_config.pad_token_id
    return own if own is not None else stop[0] if stop else 0


def build_clipcap(
    lm: PreTrainedModel,
    *,
    feature_dim: int,
    mapper: str = "mlp",
    prefix_length: int = 10,
    clip_length: int = 10,
    feature_kind: str = "pooled",
    feature_norm: str = "none",
    mapper_layers: int = 8,
    mapper_heads: int = 8,
    only_mapper: bool = False,
    seed: int = 0,
) -> ClipCap:
    """A captioner from a language model, which is used as it is, and a new mapper.

    Args:
        lm: Causal language model.
        feature_dim: D, numbers per image feature.
        mapper: "mlp" or "transformer".
        prefix_length: P, embeddings the language model sees.
        clip_length: C, tokens a pooled feature is expanded to inside the transformer mapper.
        feature_kind: "pooled" (one vector a picture) or "tokens" (patch tokens; transformer mapper only).
        feature_norm: "none", "l2" or "standardize" (then call ``model.norm.fit(train_features)``).
        mapper_layers: Of the transformer mapper.
        mapper_heads: Of the transformer mapper.
        only_mapper: Freeze the language model.
        seed: Of the mapper's weights.

    Returns:
        The model, in eval mode.

    Raises:
        InputError: For an unknown or impossible choice.
    """
    config = ClipCapConfig(
        lm_config=lm.config,
        feature_dim=feature_dim,
        mapper=mapper,
        prefix_length=prefix_length,
        clip_length=clip_length,
        feature_kind=feature_kind,
        feature_norm=feature_norm,
        mapper_layers=mapper_layers,
        mapper_heads=mapper_heads,
        only_mapper=only_mapper,
    )
    # The seed decides the mapper; what was drawn before, for the language model say, does not.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClipCap(config, lm=lm).eval()


def save_captioner(
    model: ClipCap,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    meta: dict[str, Any],
    decoding: DecodingConfig,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a captioner's folder: weights, configuration, tokenizer, generation settings, mmkit.json.

    Args:
        model: The captioner.
        tokenizer: The language model's.
        folder: Made if missing.
        meta: For mmkit.json, beside ``"kind": "captioner"``: encoder path and fingerprint, and so on.
        decoding: How it writes unless asked otherwise.
        state_dict: Weights gathered by an engine; the model's own if None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Language model included, also where it was frozen: the folder must open without the hub.
    model.save_pretrained(folder, state_dict=state_dict)
    # At the top level: ClipCap itself has none, and the stop token is in there.
    stop = stop_ids(model.lm)
    bos = model.lm.generation_config.bos_token_id
    saved_settings(decoding, stop=stop, fill=filler(model.lm, stop), bos=bos).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Beside generation_config.json, which has no word for the paper's beams, nor for a seed.
    write_meta(folder, "captioner", {**meta, "decoding": decoding.model_dump(exclude_none=True)})


def load_captioner(folder: str | Path) -> tuple[ClipCap, PreTrainedTokenizerBase, dict[str, Any]]:
    """Open a captioner's folder.

    Returns:
        Model (in eval mode), tokenizer, and the content of mmkit.json.

    Raises:
        InputError: When the folder is no captioner's.
    """
    meta = read_meta(folder, "captioner")
    model = ClipCap.from_pretrained(folder)
    # Loading makes new parameters, so freezing is done again.
    model.set_only_mapper(model.config.only_mapper)
    model.lm.generation_config = bare_settings(GenerationConfig.from_pretrained(folder))
    return model, load_tokenizer(folder), meta
