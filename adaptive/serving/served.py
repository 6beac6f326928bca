"""The model that a server answers with."""

import dataclasses

from adaptive.data.tokenizers import Tokenizer
from adaptive.inference.requests import Engine
from adaptive.runs.load import Trained
from adaptive.serving.chat import Chat, chat_of


@dataclasses.dataclass(frozen=True)
class Served:
    """A model and what computes with it.

    name     that requests call it by
    step     of its checkpoint
    context  tokens of a prompt and its continuation together, at most
    passes   most that a token may take; 1: tokens do not choose
    stages   that cut the text into chunks; 0: none does
    chat     how messages become a prompt
    seconds  that a request may take
    """

    name: str
    step: int
    tokenizer: Tokenizer
    engine: Engine
    context: int
    passes: int
    stages: int
    chat: Chat
    seconds: float

    def about(self) -> dict[str, object]:
        """What its page shows."""
        return {
            "step": self.step, "context": self.context, "passes": self.passes, "stages": self.stages,
            "chat": self.chat.kind,
        }  # fmt: skip


def served_by(engine: Engine, trained: Trained, context: int, seconds: float) -> Served:
    """A trained model that the engine computes."""
    facts, tokenizer = trained.recipe.model.facts(), trained.tokenizer
    passes = facts.recursions if facts.depth != "none" else 1
    chat = chat_of(tokenizer, trained.recipe.data.tokenizer)
    return Served(
        trained.recipe.name, trained.step, tokenizer, engine, context, passes, len(facts.chunking), chat, seconds
    )
