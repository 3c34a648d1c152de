"""Choices that several parts of the package offer under the same names. Imports nothing of ours."""

from __future__ import annotations

from typing import Literal

HeadKind = Literal["auto", "exact", "shortlist-exact", "shortlist"]
"""How the output head finds the next token (:mod:`sentcompress.generation.output_head`)."""
CacheKind = Literal["full", "int8", "offloaded", "offloaded-int8"]
"""How the backbone's keys and values are kept while writing (:mod:`sentcompress.generation.backbone_cache`)."""
