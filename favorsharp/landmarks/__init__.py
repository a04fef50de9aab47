"""Landmarks: m weighted keys in place of n, chosen for the queries that a head gets (docs: theory, landmarks)."""

from favorsharp.landmarks.settings import Landmarks, landmarks
from favorsharp.landmarks.state import LandmarkState

__all__ = ["LandmarkState", "Landmarks", "landmarks"]
