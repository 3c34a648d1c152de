"""The job of ``graft`` with ``graft.split``: an LLM fine-tuned while its middle blocks run once per sentence."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sentcompress.files import folder_digest
from sentcompress.modeling.llm_loading import load_causal_lm
from sentcompress.modeling.losses import TokenLoss
from sentcompress.modeling.saved_models import LONGEST_SENTENCE
from sentcompress.modeling.split import SPLIT, split
from sentcompress.modeling.split_proof import check_split
from sentcompress.recipe import Recipe
from sentcompress.text.boundaries import BoundaryFinder
from sentcompress.training.card import Card
from sentcompress.training.inputs import Inputs
from sentcompress.training.jobs.token_level import PassageJob
from sentcompress.training.run_folder import GRAFT, write_json
from sentcompress.training.teacher import TaughtLM, token_teacher


class SplitJob(PassageJob):
    """An LLM fine-tuned token by token on the passages of the graft while it is split.

    Args:
        teacher: folder of the LLM that teaches it; None if it is the backbone itself.

    Raises:
        InputError: the LLM cannot be split like this, or a setting does not fit.
    """

    def __init__(self, recipe: Recipe, text: Inputs, teacher: Path | None = None) -> None:
        own = recipe.graft
        assert own.split is not None
        lm = load_causal_lm(recipe.backbone)
        finder = BoundaryFinder(text.segmenter, text.tokenizer, LONGEST_SENTENCE)
        split(lm, finder, own.split.first_blocks, own.split.last_blocks)
        check_split(lm)
        super().__init__(recipe, GRAFT, text, lm, own, None, "graft")
        self.own = own.split
        loss = TokenLoss(own.focal_gamma if own.loss == "focal" else 0.0, own.label_smoothing)
        self.model = TaughtLM(lm, loss, token_teacher(recipe, text.tokenizer, lm, teacher))
        if teacher is not None:
            self.inputs["teacher"] = folder_digest(teacher)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        super().save(folder, state)
        segmenter = self.recipe.segmenter.model_dump(mode="json") | {"state": self.text.segmenter.state()}
        about = {"max_sentence_tokens": LONGEST_SENTENCE, "segmenter": segmenter}
        write_json(folder / SPLIT, self.own.model_dump() | about)

    def card(self) -> Card:
        first, last = self.own.first_blocks, self.own.last_blocks
        middle = self.model.lm.config.num_hidden_layers - first - last
        return Card(
            title=f"{self.recipe.backbone.model}, split",
            summary=f"{self.recipe.backbone.model} ({self.parameters}), fine-tuned while only its first {first} and "
            f"last {last} blocks run at every token. Its {middle} blocks between them run once per sentence, at its "
            "last token, to which later tokens attend in the last blocks. Load it as shown: transformers alone would "
            "run all blocks at every token, for which it was not trained.",
            data=self.text.describe(),
            heldout="On held-out passages, each without the text before it in its document; "
            "use `sentcompress bench quality` to compare models.",
            usage="import sentcompress\n\n"
            "model, tokenizer = sentcompress.load_split({folder})\n"
            'inputs = tokenizer("The state of the Union", return_tensors="pt", return_token_type_ids=False)\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
            tags=("split-lm",),
        )
