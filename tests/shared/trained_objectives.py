"""The names of the objectives that are trained; an encoder that gives embeddings has no loss."""

from transformer.objective import OBJECTIVES, Objective

TRAINED = tuple(name for name in OBJECTIVES.names if OBJECTIVES.find(name).loss is not Objective.loss)
