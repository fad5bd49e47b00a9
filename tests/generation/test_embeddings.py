"""A text's vector pools the hidden states of the requested layer, for any model and any other texts of the batch."""

import json

import jax
import numpy as np
import pytest

from transformer.cli.main import main
from transformer.config import Config, DataConfig
from transformer.data.tokenizers.bytes import Bytes
from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.objectives.embedding import Embedding
from transformer.objectives.masked_lm import MaskedLM
from transformer.objectives.next_token import NextToken
from transformer.objectives.prefix_lm import PrefixLM
from transformer.objectives.seq2seq import Seq2Seq
from transformer.objectives.span_corruption import SpanCorruption
from transformer.ops.poolings.attention import AttentionPooling
from transformer.ops.poolings.max import MaxPooling
from transformer.parts import Parts, resolve
from transformer.runs.saved import Loaded
from transformer.types import UserError

TEXTS = ["a fine film", "no", "it is what it is", "x" * 60]
KINDS = (NextToken, PrefixLM, MaskedLM, Classification, Embedding, Seq2Seq, SpanCorruption)


def loaded(objective, **model):
    block = BlockConfig(AttentionConfig(num_heads=2))
    config = Config(
        model=ModelConfig(num_layers=3, embed_dim=16, pattern=(block,), init_std=0.3, max_length=32, **model),
        data=DataConfig(tokenizer=Bytes(), sequence_length=32, batch_size=4),
        objective=objective,
    )
    tokenizer = Bytes().train(())
    config = resolve(config, tokenizer)
    parts = Parts(config, tokenizer, class_names=("a", "b"), own_batches=True)
    return Loaded(parts.model, parts.init_params(jax.random.key(0)), tokenizer, config, 0, ("a", "b"))


@pytest.fixture(scope="module", params=KINDS)
def run(request):
    return loaded(request.param())


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (NextToken(), {"head": False}),
        (PrefixLM(), {"head": False, "prefix_BT": jax.numpy.ones((1, 12), bool)}),
        (MaskedLM(), {}),
        (Seq2Seq(), {"method": "encode"}),
        (SpanCorruption(), {"method": "encode"}),
    ],
)
def test_the_last_layer_is_what_the_model_gives(objective, options):
    run = loaded(objective)
    ids = run.encode(TEXTS[0])[None]
    hidden = np.asarray(run.model.apply({"params": run.params}, jax.numpy.array(ids), **options))[0]
    for pooling, expected in (("", hidden.mean(0)), ("first", hidden[0]), ("last", hidden[-1]), ("max", hidden.max(0))):
        (vector,) = run.embed(TEXTS[:1], pooling=pooling)
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)
    (vector,) = run.embed(TEXTS[:1], layer=3)
    np.testing.assert_allclose(vector, hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_earlier_layers_differ_and_texts_do_not_depend_on_each_other(run):
    together = [run.embed(TEXTS, layer=layer) for layer in (1, 2, 3)]
    assert all(vectors.shape == (4, 16) and vectors.dtype == np.float32 for vectors in together)
    assert not np.allclose(together[0], together[1]) and not np.allclose(together[1], together[2])
    for layer, vectors in enumerate(together, 1):
        for text, vector in zip(TEXTS, vectors, strict=True):
            (alone,) = run.embed([text], layer=layer, batch_size=1)
            np.testing.assert_allclose(alone, vector, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(run.embed(TEXTS, normalize=True), axis=1), 1, rtol=1e-5)


def test_scanned_layers_agree_with_a_loop():
    looped, scanned = loaded(NextToken()), loaded(NextToken(), scan_layers=True)
    scanned = Loaded(scanned.model, scan_params(looped.params), *list(scanned)[2:])
    for layer in (1, 2, 3):
        np.testing.assert_allclose(looped.embed(TEXTS, layer=layer), scanned.embed(TEXTS, layer=layer), atol=1e-5)


@pytest.mark.parametrize("pooling", [MaxPooling(), AttentionPooling()])
def test_a_model_that_pools_gives_its_own_vectors(pooling):
    encoder = loaded(Embedding(normalize=True), pooling=pooling)
    predicted = [row["embedding"] for row in encoder.predict(TEXTS)]
    np.testing.assert_allclose(encoder.embed(TEXTS), predicted, rtol=1e-4, atol=1e-5)
    classifier = loaded(Classification(), pooling=pooling)
    vectors, head = classifier.embed(TEXTS), classifier.params["classifier"]
    logits = vectors @ np.asarray(head["kernel"]) + np.asarray(head["bias"])[None]
    (found,) = classifier.predict(TEXTS[:1], top_k=2)
    expected = np.asarray(jax.nn.softmax(logits[0]))
    assert found["probability"] == pytest.approx(float(expected.max()), rel=1e-4)


def test_what_cannot_be_embedded_is_refused():
    run = loaded(NextToken())
    with pytest.raises(UserError, match="must not be blank, text 2 is"):
        run.embed(["a", " "])
    with pytest.raises(UserError, match="layer must be from 1 to 3, or 0 for the last, got 4"):
        run.embed(["a"], layer=4)
    with pytest.raises(UserError, match="this run has none; choose mean"):
        run.embed(["a"], pooling="attention")
    with pytest.raises(UserError, match="median"):
        run.embed(["a"], pooling="median")
    assert run.embed([]).shape == (0, 16)
    broken = Loaded(run.model, jax.tree.map(lambda x: x * np.nan, run.params), *list(run)[2:])
    with pytest.raises(UserError, match="must be finite, the one of text 1 is not"):
        broken.embed(["a"])


def test_the_command_writes_an_array_or_rows(tmp_path, capsys, monkeypatch):
    run = loaded(NextToken())
    monkeypatch.setattr("transformer.cli.rows.load", lambda *arguments, **options: run)
    (tmp_path / "x.csv").write_text("id,text\n1,a fine film\n2," + "y" * 90 + "\n")
    expected = run.embed(["a fine film", "y" * 90], layer=2)
    main(["embed", "RUN", str(tmp_path / "x.csv"), "-o", str(tmp_path / "v.npy"), "--layer", "2"])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, rtol=1e-4, atol=1e-5)
    assert "2 texts of" in (said := " ".join(capsys.readouterr().err.split()))
    assert "1 text longer than the model reads cut" in said
    main(["embed", "RUN", str(tmp_path / "x.csv"), "--layer", "2", "--pooling", "last", "--normalize"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == ["1", "2"]
    vectors = run.embed(["a fine film", "y" * 90], layer=2, pooling="last", normalize=True)
    np.testing.assert_allclose([row["embedding"] for row in rows], vectors, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit):
        main(["embed", "RUN", str(tmp_path / "x.csv"), "-o", str(tmp_path / "v.txt")])
    assert ".npy or .jsonl or .csv" in capsys.readouterr().err
