"""Stage 3, empathy: think about the words and the voice, then answer in text and speech. Everything trains."""

from lightning_echat.stages.base import EChatStage


class EmpathyStage(EChatStage):
    """Speech in; thinking, text and speech codes out."""

    default_trainable = ("*",)
