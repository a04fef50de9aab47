"""The public scikit-learn estimators: features, ridge regression on them, and Nadaraya-Watson estimators.

`gamma` has scikit-learn's meaning: the kernel is exp(-gamma |x - y|^2), so the scale of `favorsharp.fit` is twice
gamma.
"""

from favorsharp.sklearn.nadaraya_watson import NadarayaWatsonClassifier, NadarayaWatsonRegressor
from favorsharp.sklearn.random_features import RandomFeatures
from favorsharp.sklearn.ridge import FeatureRidge

__all__ = ["FeatureRidge", "NadarayaWatsonClassifier", "NadarayaWatsonRegressor", "RandomFeatures"]
