"""The Hugging Face edge: `attn_implementation="favorsharp"` for the models of transformers.

`register` names an approximation, `calibrate` fits it to a model on sample text, `StateCache` generates in constant
memory. Masks are decoded or refused (docs: design, masks), and maps live on the attention modules (docs: design, maps).
"""

from favorsharp.transformers.attention import register
from favorsharp.transformers.cache import StateCache
from favorsharp.transformers.calibration import calibrate, load_maps, save_maps

__all__ = ["StateCache", "calibrate", "load_maps", "register", "save_maps"]
