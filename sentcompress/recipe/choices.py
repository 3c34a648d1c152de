"""Choices that several parts of the package offer under the same names. Imports nothing from the package."""

from __future__ import annotations

from typing import Literal

HeadKind = Literal["auto", "exact", "shortlist-exact", "shortlist"]
"""How the output head finds the next token (:mod:`sentcompress.generation.output_head`)."""
CacheKind = Literal["full", "int8", "offloaded", "offloaded-int8"]
"""How the backbone's keys and values are kept while generating (:mod:`sentcompress.generation.backbone_cache`)."""
