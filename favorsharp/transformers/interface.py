"""The public function `register`, which gives an approximation a name that models of transformers accept."""

from functools import partial
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from favorsharp._checks import check_choice, check_integer
from favorsharp.landmarks.settings import landmarks
from favorsharp.landmarks.verbs import check_landmark_options
from favorsharp.methods import LANDMARKS, MethodLike, check_method
from favorsharp.transformers.attention import attend
from favorsharp.transformers.masks import compact_mask
from favorsharp.transformers.models import guard
from favorsharp.transformers.registrations import REGISTERED, WITHOUT_MAPS, Registration


def register(
    name: str = "favorsharp",
    *,
    method: MethodLike = "optimal",
    num_features: int = 256,
    window: int = 0,
    draw: Any = "orthogonal",
    rng: Any = None,
    calibration: str = "input",
    room: int | None = None,
    per: str = "head",
    dropout: str = "ignore",
) -> None:
    """Register linear attention, by random features or landmarks, under a name for `attn_implementation`.

    Afterwards `from_pretrained(..., attn_implementation=name)` and `model.set_attn_implementation(name)` accept the
    name, for models whose attention goes through transformers' attention interface. A name that this function
    registered before is replaced.

    Parameters
    ----------
    name : str
    method : str or callable
        As in `favorsharp.fit`, only methods whose features are positive; or `"landmarks"`, as in
        `favorsharp.attention`, which are biased and need no calibration; or `"exact"` for softmax attention, for
        comparison.
    num_features : int
        m, 1 or more; the number of landmarks with that method.
    window : int
        Block length of exactly scored near keys, as in `favorsharp.linear_attention`; 0 means none. It is used in
        self-attention only.
    draw
        As in `favorsharp.feature_map`. Landmarks take none.
    rng : None, int, SeedSequence or Generator
        As in `favorsharp.feature_map` and in `favorsharp.landmarks`. All random numbers depend only on the seed of the
        registration, so the same seed gives the same model.
    calibration : {"input", "frozen"}
        What a layer does if `calibrate` has not fitted it. With "input", bidirectional self-attention is fitted to each
        input, separately for each head and each row of the batch; causal and cross-attention raise an error, because a
        fit to the sequence would show it its own future. With "frozen", every layer raises an error. Methods that fit
        nothing (`posrf`) need no calibration. Landmarks take none.
    room : int, optional
        How many keys beyond its landmarks a stream of landmarks holds, as in `favorsharp.landmarks`; None means as many
        as landmarks.
    per : {"head", "layer", "model"}
        What `num_features` landmarks are for: each key head, or all key heads of a layer or of all layers together, in
        equal shares. Features take "head" only.
    dropout : {"ignore", "refuse"}
        What happens in training if the model asks for dropout of attention weights, which do not exist here. With
        "ignore" the model trains without it, and warns once; with "refuse" it raises an error.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or transformers itself uses the name.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from favorsharp.transformers import register
    >>> register("favorsharp", num_features=64, rng=0)
    >>> config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    >>> model = BertModel(config).eval()
    >>> model.set_attn_implementation("favorsharp")
    >>> model(torch.arange(40)[None]).last_hidden_state.shape
    torch.Size([1, 40, 32])
    """
    from favorsharp.draws import DRAWS, generator

    _check_name(name)
    check_method(method, positive=True, also=tuple(WITHOUT_MAPS))
    if isinstance(draw, str):
        check_choice("draw", draw, DRAWS, also=", an (m, d) array of rows, or a pair (rows, log_weight)")
    check_choice("calibration", calibration, ("input", "frozen"))
    check_choice("per", per, ("head", "layer", "model"))
    check_choice("dropout", dropout, ("ignore", "refuse"))
    m = check_integer("num_features", num_features, 1)
    settings = None
    if method == LANDMARKS:
        check_landmark_options(draw, calibrated=calibration != "input")
        settings = landmarks(m, room=room, rng=rng)
    elif room is not None or per != "head":
        raise ValueError(f"room and per belong to method 'landmarks', got method {method!r}; accepted: their defaults")
    registration = Registration(
        name=name,
        method=method,
        num_features=m,
        window=check_integer("window", window, 0),
        draw=draw,
        seed=int(generator(rng).integers(2**62)) if settings is None else settings.seed,
        calibration=calibration,
        landmarks=settings,
        room=room,
        per=per,
        dropout=dropout,
    )
    REGISTERED[name] = registration
    AttentionInterface.register(name, partial(attend, registration))
    AttentionMaskInterface.register(name, compact_mask)
    guard(REGISTERED)


def _check_name(name: Any) -> None:
    """Raise an error if transformers itself uses the name, or would read more than a name in it."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a string that is not empty, got {name!r}")
    taken = name in AttentionInterface._global_mapping and name not in REGISTERED
    if taken or name == "eager" or "flash" in name or any(c in name for c in "/|@:"):
        raise ValueError(f"name {name!r} is used by transformers itself; accepted: any other name without / | @ :")
