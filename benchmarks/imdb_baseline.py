"""Sentiment without a transformer: TF-IDF of single words and pairs, logistic regression; prints one JSON line.

    python benchmarks/imdb_baseline.py imdb_train.jsonl.gz imdb_test.jsonl.gz

Needs scikit-learn, which is no dependency of the package.
"""

import json
import sys
import time

from etils import epath
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from transformer.data.files import json_objects


def read(path: str) -> tuple[list[str], list[int]]:
    """Texts and labels of a .jsonl file."""
    rows = [row for _, row in json_objects(epath.Path(path))]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def main() -> None:
    """Fit on the first file, score on the second."""
    start = time.perf_counter()
    texts, labels = read(sys.argv[1])
    test_texts, test_labels = read(sys.argv[2])
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    classifier = LogisticRegression(C=10.0, max_iter=200)
    classifier.fit(vectorizer.fit_transform(texts), labels)
    accuracy = classifier.score(vectorizer.transform(test_texts), test_labels)
    print(json.dumps({"baseline": "tf-idf 1-2 grams", "accuracy": accuracy, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
