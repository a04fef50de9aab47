"""The public interface to Hugging Face transformers: `attn_implementation="favorsharp"` for its models.

`register` gives an approximation a name, `check` says which layers of a model it reaches, `calibrate` fits it to a
model on sample inputs, and `StateCache` makes generation use constant memory. Masks are decoded or refused (docs:
design, masks). Each attention module of a model holds its own maps (docs: design, maps).
"""

from favorsharp.transformers.cache import StateCache
from favorsharp.transformers.calibration import calibrate, load_maps, save_maps
from favorsharp.transformers.checking import check
from favorsharp.transformers.interface import register

__all__ = ["StateCache", "calibrate", "check", "load_maps", "register", "save_maps"]
