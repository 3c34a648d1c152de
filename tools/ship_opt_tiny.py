"""Copy a run of recipes/opt-tiny.yaml into the package, weights as fp16: ``python tools/ship_opt_tiny.py OUT``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TARGET = Path(__file__).resolve().parent.parent / "sentcompress" / "pretrained" / "opt-tiny"
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "recipe.yaml",
)


def main(out: Path) -> None:
    source = out / "pretrain"
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for name in COPIED:
        shutil.copy(source / name, TARGET / name)
    weights = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, TARGET / "model.safetensors", metadata={"format": "pt"})
    card = TARGET / "README.md"
    made = "\n`sentcompress run opt-tiny --out OUT && python tools/ship_opt_tiny.py OUT` makes this folder again.\n"
    card.write_text(card.read_text().replace(source.as_posix(), "sentcompress/pretrained/opt-tiny") + made)
    config = TARGET / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    size = sum(file.stat().st_size for file in TARGET.iterdir()) / 1e6
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    print(f"{TARGET}: {size:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
