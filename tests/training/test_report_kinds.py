"""Which kinds of tokens go deep, and how chunks agree with words: counted directly."""

import numpy as np
import pytest

from adaptive.data.token_kinds import CLASSES, classes_of
from adaptive.data.tokenizers import Bytes
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import token_choice
from adaptive.models.facts import Experts
from adaptive.training.alarms import health_warnings
from adaptive.training.report.collect import ChunkCounter, RoutingCounter
from adaptive.training.report.kinds import begins_word
from adaptive.training.report.runs import Run
from adaptive.training.report.schema import PlanRecord, RoutingRecord

TEXT = "It was 11, \u00e9 no."


class Pieces:
    """A tokenizer of these texts."""

    def __init__(self, *texts: str):
        self.texts = [text.encode() for text in texts]
        self.vocab_size = len(texts)

    def token_bytes(self, token: int) -> bytes:
        return self.texts[token]


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" ", "blanks"), ("\n\n", "blanks"), (" the", "letters after a blank"), ("ing", "letters"), ("42", "digits"),
     (" 7", "digits"), ("...", "punctuation"), ("a1", "punctuation"), ("\u00e9", "beyond ASCII"), ("", "markers")],
)  # fmt: skip
def test_what_a_token_is(text, kind):
    assert CLASSES[classes_of(Pieces(text))[0]] == kind


def test_where_words_begin():
    begins = begins_word(classes_of(Bytes())[ids_of(TEXT)])
    shown = [TEXT.encode()[i:].decode(errors="replace") for i in np.flatnonzero(begins[0])]
    assert [word.split()[0] for word in shown] == ["was", "11,", "\u00e9", "no."]  # the row's first is not known
    pieces = classes_of(Pieces(" the", "m", " 7", "."))[np.array([[0, 1, 0, 2, 3, 1]])]
    assert begins_word(pieces)[0].tolist() == [True, False, True, False, False, True]


def test_depths_by_kind_equal_a_direct_count():
    rng = np.random.default_rng(0)
    tokens, depth = rng.choice(ids_of(TEXT)[0], (4, 40)).astype(np.int32), rng.integers(1, 4, (4, 40))
    nll, present = rng.exponential(1.0, (4, 40)), rng.random((4, 40)) < 0.9
    classes = classes_of(Bytes())
    counter = RoutingCounter("expert_choice", 3, classes=classes)
    for rows in (slice(0, 1), slice(1, 4)):
        counter.add(depth[rows], [], present[rows], tokens=tokens[rows], nll=nll[rows])
    kinds = counter.record(1, "topk").kinds
    here = present.copy()
    here[:, -1] = False
    for name, members in (("letters", classes[tokens] == 2), ("digits", classes[tokens] == 3)):
        (found,) = (kind for kind in kinds if kind.name == name)
        assert found.tokens == (members & here).sum()
        assert found.depth == pytest.approx(depth[members & here].mean(), abs=1e-4)
    (hard,) = (kind for kind in kinds if kind.name == "1 to 2")
    assert hard.depth == pytest.approx(depth[here & (nll >= 1) & (nll < 2)].mean(), abs=1e-4)
    for by in dict.fromkeys(kind.by for kind in kinds):
        assert sum(kind.tokens for kind in kinds if kind.by == by) == here.sum()
    quarters = [kind for kind in kinds if kind.by == "how frequent it is"]
    counts = np.bincount(tokens[here])
    assert quarters[0].tokens >= counts.max() and len(quarters) == 4
    assert RoutingCounter("none", 1, classes=classes).record(1, "topk").kinds == ()


def test_chunks_at_words_equal_a_direct_count():
    tokens = ids_of("one two  three-four five")
    words = begins_word(classes_of(Bytes())[tokens])
    assert np.flatnonzero(words[0]).tolist() == [4, 9, 15, 20]
    boundaries = np.zeros(tokens.shape, bool)
    boundaries[0, [0, 3, 9, 12, 20]] = True  # before "two", at "three" and "five", within "three", at the beginning
    counter = ChunkCounter()
    counter.add([boundaries], np.ones_like(boundaries), words)
    (record,) = counter.records()
    assert record.words == 3 / 4 and record.at_words == 3 / 5 and record.chance == 8 / tokens.size


def test_a_warning_comes_once_and_tells_since_when(tmp_path):
    """Of training and held-out text together."""
    rows = [{"step": n, "eval/routing/accuracy": a} for n, a in ((5, 0.9), (10, 0.97), (15, 0.9), (20, 0.8))]
    training = [{"step": 20, "routing/accuracy": 0.7}]
    (line,) = Run(tmp_path, training, rows, PlanRecord(steps=20), RoutingRecord(), None, ()).warnings()
    assert line.startswith("sampling accuracy 70.0% in training, 80.0% on held-out text (good: above 99%)")
    assert line.endswith("(so since step 15)")
    assert list(health_warnings(rows[0], "model.body")) == ["sampling accuracy"] and not health_warnings(rows[1], "m")


def test_what_experts_take_equals_a_direct_count():
    """Of two calls of a part, counted in two batches; parts that the model's facts do not know are left out."""
    routed = experts.Settings(token_choice.Settings(), experts=3, expert_size=8)
    facts = [Experts("stack/blocks/0/feed_forward", "", routed, (0, 2))]
    rng, classes = np.random.default_rng(1), classes_of(Bytes())
    tokens = rng.choice(ids_of(TEXT)[0], (4, 30)).astype(np.int32)
    strongest = rng.integers(-1, 3, (2, 4, 30)).astype(np.int16)
    strongest[1] = np.where(tokens == ord("1"), 2, strongest[1])
    present = rng.random((4, 30)) < 0.9
    counter = RoutingCounter("none", 1, classes=classes, experts=facts)
    for rows in (slice(0, 3), slice(3, 4)):
        told = {facts[0].path: strongest[:, rows], "elsewhere": strongest[:, rows]}
        counter.add(np.ones((4, 30), int)[rows], [], present[rows], tokens=tokens[rows], strongest=told)
    found = counter.record(1, "topk", text=chr).experts
    assert [(one.layer, one.expert) for one in found] == [(layer, e) for layer in (0, 2) for e in range(3)]
    for one in found:
        own = present & (strongest[0 if one.layer == 0 else 1] == one.expert)
        want = np.bincount(classes[tokens[own]], minlength=len(CLASSES))
        assert one.counts == tuple(want.tolist())
    assert found[5].top[0] == "1"
