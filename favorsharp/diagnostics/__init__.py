"""Predicted and measured errors of approximate attention, times and memory; `suggest` and the command line use them."""

from favorsharp.diagnostics.comparison import Comparison, compare, recommend
from favorsharp.diagnostics.prediction import predicted_error, relative_error
from favorsharp.diagnostics.sample import load_sample
from favorsharp.diagnostics.suggestion import Suggestion, suggest
from favorsharp.landmarks.expected import expected_error

__all__ = [
    "Comparison",
    "Suggestion",
    "compare",
    "expected_error",
    "load_sample",
    "predicted_error",
    "recommend",
    "relative_error",
    "suggest",
]
