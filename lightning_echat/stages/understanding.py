"""Stage 1, understanding ("ASR+P"): write the words heard and label the voice. Encoder and adapter train."""

from lightning_echat.stages.base import EChatStage


class UnderstandingStage(EChatStage):
    """Speech in, transcript and labels out."""

    default_trainable = ("encoder.*", "adapter.*")
