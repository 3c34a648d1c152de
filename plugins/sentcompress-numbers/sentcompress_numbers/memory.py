"""The numbers of older sentences, and a token at either end of each."""

import re
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import sentcompress


class Numbers(sentcompress.Memory):
    """Keep every number, and the first and the last tokens of each older sentence."""

    class Options(sentcompress.Options):
        ends: int = Field(default=1, ge=0)
        """Tokens that are kept at the beginning and at the end of each older sentence."""

    def prepare(self, tokenizer: Any) -> None:
        """Look up the tokens with a digit. Tokens such as <0x0A> stand for a byte, not for a number."""
        names = tokenizer.get_vocab().items()
        self.digits = torch.tensor([id_ for name, id_ in names if re.search(r"^[^<]*[0-9]", name)])

    def keep(self, tokens: sentcompress.Tokens) -> Tensor:
        number = torch.isin(tokens.ids, self.digits.to(tokens.ids.device))
        return number | (tokens.offset < self.options.ends) | (tokens.behind < self.options.ends)
