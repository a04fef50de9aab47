"""Landmarks: m weighted keys in place of n, chosen for the queries that a head gets (docs: theory, landmarks).

From the public functions downwards: `verbs` checks their arguments; `attention` computes whole calls and streams;
`state` holds and compresses the keys of a stream; `chosen` makes landmarks from keys, with the random choice of `seeds`
and the distances of `metric`; `settings` is what the caller passes; `expected` predicts errors.
"""

from favorsharp.landmarks.settings import Landmarks, landmarks
from favorsharp.landmarks.state import LandmarkState

__all__ = ["LandmarkState", "Landmarks", "landmarks"]
