"""A run that starts from another has its tokenizer, and asks for no other one; a head for other classes is not taken."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from transformer.config import Config, DataConfig
from transformer.config_io import fill_open, resume_conflicts, to_dict
from transformer.data.tokenizers import PairTokenizer, load_tokenizer
from transformer.kinds import kinds_with
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.objectives.seq2seq import Seq2Seq
from transformer.parts import Parts, StandIn
from transformer.runs import donor as module
from transformer.runs.donor import Donor, inherit_params, inherit_tokenizer
from transformer.tokenizer import TOKENIZERS
from transformer.types import UserError

KINDS = [kind for kind in TOKENIZERS.names if kind not in ("auto", "pretrained", "sentencepiece")]
SIZED = kinds_with(TOKENIZERS, "size")
TEXTS = ["one two three", "two three four"]


def kind_of(name, **settings):
    return TOKENIZERS.find(name)(**settings)


def donor_of(data, *, separate=False, class_names=()):
    tokenizer = data.tokenizer.train(TEXTS)
    tokenizer = PairTokenizer(tokenizer, data.tokenizer.train(TEXTS[:1])) if separate else tokenizer
    data = dataclasses.replace(data, tokenizer=data.tokenizer.filled(), share_vocabulary=not separate)
    return Donor("there", Config(data=data, objective=Seq2Seq() if separate else NextToken()), tokenizer, class_names)


@pytest.mark.parametrize(("kind", "asked"), list(itertools.product(KINDS, ["auto", *KINDS])))
def test_the_kind_is_the_donors_or_refused(kind, asked):
    donor = donor_of(DataConfig(tokenizer=kind_of(kind)))
    config = Config(data=DataConfig(tokenizer=kind_of(asked)))
    if asked not in ("auto", kind):
        with pytest.raises(
            UserError, match=rf"has that run's tokenizer, got data.tokenizer.kind={asked} \(there {kind}\)"
        ):
            inherit_tokenizer(config, donor)
        return
    resolved, note = inherit_tokenizer(config, donor)
    assert note == f"tokenizer from there: {kind}, {donor.tokenizer.vocab_size:,} entries"
    # What is recorded is what was used, and all that was left open is filled in.
    assert resolved.data.tokenizer == donor.config.data.tokenizer == kind_of(kind).filled()
    assert getattr(resolved.data.tokenizer, "size", 4096) == 4096


@pytest.mark.parametrize("kind", SIZED)
@pytest.mark.parametrize(("size", "fits"), [(0, True), (300, True), (301, False)])
def test_the_size_is_the_donors_or_refused(kind, size, fits):
    donor = donor_of(DataConfig(tokenizer=kind_of(kind, size=300)))
    config = Config(data=DataConfig(tokenizer=kind_of(kind, size=size)))
    if fits:
        assert inherit_tokenizer(config, donor)[0].data.tokenizer.size == 300
    else:
        with pytest.raises(UserError, match=r"data.tokenizer.size=301 \(there 300\)"):
            inherit_tokenizer(config, donor)


@pytest.mark.parametrize(("separate", "shared"), list(itertools.product([False, True], repeat=2)))
def test_one_vocabulary_or_two_as_the_donor_has(separate, shared):
    donor = donor_of(DataConfig(), separate=separate)
    config = Config(data=DataConfig(share_vocabulary=shared), objective=Seq2Seq())
    if shared != separate:
        assert "257 entries" in inherit_tokenizer(config, donor)[1]
    else:
        with pytest.raises(UserError, match=rf"data.share_vocabulary={shared} \(there {not shared}\)"):
            inherit_tokenizer(config, donor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_tokenizer_knows_its_kind(kind, tmp_path):
    kind_of(kind).train(TEXTS).save(tmp_path)
    assert load_tokenizer(tmp_path, kind_of(kind)).kind == kind


def test_a_run_resumes_with_its_record_by_default():
    recorded = Config(data=DataConfig(tokenizer=kind_of("bpe", size=300)))
    for data in (DataConfig(), DataConfig(tokenizer=kind_of("bpe"))):
        assert resume_conflicts(recorded, to_dict(Config(data=data))) == []
        assert fill_open(Config(data=data), recorded) == recorded
        assert resume_conflicts(Config(data=data), to_dict(recorded)) == []  # a kill before the first save
    conflicts = resume_conflicts(recorded, to_dict(Config(data=DataConfig(tokenizer=kind_of("bytes")))))
    assert conflicts == ["data.tokenizer.kind: bpe -> bytes", "data.tokenizer.size: 300 -> absent"]


@pytest.mark.parametrize(
    ("there", "taken"), [(("neg", "pos"), True), (("pos", "neg"), False), (("no", "yes"), False), ((), True)]
)
def test_a_head_for_other_classes_is_not_taken(there, taken, monkeypatch):
    """Of as many classes, so that the shapes fit."""
    block = BlockConfig(AttentionConfig(num_heads=1))
    config = Config(
        model=ModelConfig(vocab_size=9, num_layers=1, embed_dim=4, pattern=(block,)),
        objective=Classification(),
    )
    parts = Parts(config, StandIn(9), class_names=("a", "b"))
    given = jax.tree.map(lambda x: x + 1, parts.init_params(jax.random.key(7)))
    monkeypatch.setattr(module, "read_run", lambda directory, read, step: (5, given))
    donor = donor_of(DataConfig(), class_names=there)._replace(path="there", config=config)
    params, notes = inherit_params(config, parts, donor, ("neg", "pos") if there else ())
    kernel = np.asarray(params["classifier"]["kernel"])
    assert np.array_equal(kernel, given["classifier"]["kernel"]) == taken
    assert ("fresh: classifier/kernel" in notes) != taken
    assert (f"differs: classes: {', '.join(there)} -> neg, pos" in notes) != taken
    np.testing.assert_array_equal(params["token_embedding"]["embedding"], given["token_embedding"]["embedding"])
