"""Documents tokenized whole, cut nowhere: what a token-level model reads. Cached beside the corpus. No torch."""

from __future__ import annotations

import shutil
from itertools import batched
from pathlib import Path
from uuid import uuid4
