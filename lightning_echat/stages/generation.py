"""Stage 2, generation: text→speech first, then speech→speech, with text→text mixed in. The language model joins in."""

from lightning_echat.stages.base import EChatStage


class GenerationStage(EChatStage):
    """Text or speech in, text and speech codes out. The two steps differ in their data only."""

    default_trainable = ("encoder.*", "adapter.*", "lm.*")
