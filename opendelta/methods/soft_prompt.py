"""Soft prompts: trained rows before the embedded tokens. arXiv:2104.08691."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from .._sequences.embedding import rows_of
from .._sequences.prompt import PromptLayer
from ..author import Delta, DeltaConfig, Site, option

MASKED = {"attention_mask": 1}
WIDENED = {"attention_mask": 1, "token_type_ids": 0}


@dataclass
class SoftPromptConfig(DeltaConfig):
    """Options of soft prompts.

    Attributes:
        soft_token_num: length of the prompt.
        init_range: a random start is uniform in [-init_range, init_range].
        token_init: start as the embeddings of tokens. True: the first tokens of the vocabulary. A
            list of token ids, or a text: these tokens, repeated if there are too few. False: a
            random start.
        other_expand_ids: ignored; OpenDelta 0.3 had it. Here the mask of a prompt is 1, and other
            ids are those of the first token.
        tokenizer: the folder or hub name of the tokenizer that reads the text.
        strip: take the prompt's positions out of the blocks' output, so that heads and labels see
            the tokens alone. The decoder of an encoder-decoder attends to the prompt in any case.
            False, as in OpenDelta 0.3 and PEFT: a pooler then reads the first row of the prompt. A
            head that finds the last token by its id, as of decoders, sees the tokens in any case.
    """

    soft_token_num: int = option(100, minimum=1)
    init_range: float = option(0.5, minimum=0.0)
    token_init: bool | str | list[int] = True
    other_expand_ids: dict[str, int] | None = option(None, choices=[None, {}, MASKED, WIDENED])
    _: KW_ONLY
    tokenizer: str | None = None
    strip: bool = True


class SoftPromptLayer(PromptLayer):
    """f([P; E x]) without the prompt's positions, for embedded tokens E x and P [length, width]."""

    def __init__(self, site: Site, config: SoftPromptConfig) -> None:
        super().__init__(site, config.soft_token_num, config.strip)
        self.soft_embeds = site.parameter(self.length, self.width)
        if config.token_init is False:
            nn.init.uniform_(self.soft_embeds, -config.init_range, config.init_range)
        else:
            with torch.no_grad():
                self.soft_embeds.copy_(rows_of(site, self.embedding, config, self.length))

    def prompt(self) -> Tensor:
        return self.soft_embeds


class SoftPromptModel(Delta):
    """Trained rows before a model's embedded tokens, taken out of its output. arXiv:2104.08691.

    The prompt goes to the module that embeds the tokens: a decoder, an encoder, or the encoder of
    an encoder-decoder. It stands next to the first token of each row, after padding on the left. If
    the position ids of a row restart, each of its documents has the prompt.

    Example:
        >>> import transformers
        >>> from opendelta import SoftPromptModel
        >>> sizes = dict(n_embd=8, n_head=2, n_layer=1, vocab_size=9, n_positions=9)
        >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        >>> delta = SoftPromptModel(model, soft_token_num=3)
        >>> list(delta.state_dict())
        ['transformer.deltas.soft_prompt.soft_embeds']
    """

    delta_type = "soft_prompt"
    config_class = SoftPromptConfig
    layer_class = SoftPromptLayer
    default_modified_modules = ("root",)
    default_learning_rate = 3e-2
