"""The methods by name, one record each. Every list of methods in the library is derived from these records.

To add a method, write its formula in `favorsharp.formulas` and its record here (CONTRIBUTING.md, "Adding a method").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from favorsharp import formulas
from favorsharp._checks import check_choice
from favorsharp._typing import Array, Elementwise
from favorsharp.moments import Moments
from favorsharp.parameters import Parameters

MethodLike = str | Elementwise
"""What the public functions take as `method`: a name, or a callable from projected inputs to non-negative features."""

LANDMARKS = "landmarks"
"""The method of attention that makes no feature map: landmarks are chosen anew in each call, and need no fit."""

Kind = Literal["dense-exponential", "trigonometric", "discrete", "elementwise", "nystrom"]


@dataclass(frozen=True)
class Method:
    """What the library knows about a method.

    Attributes
    ----------
    name : str
    title : str
        The name that papers use.
    kind : str
        The kind of features, by which `feature_map` chooses the class of the map.
    fit : callable, optional
        The formula of the parameters: it takes `formulas.Statistics`, and returns the arrays of `Parameters` by name.
        None if moments are not enough, so that only `fit_map` makes the method's maps.
    paired : bool
        Whether each random row makes two features.
    signed : bool
        Whether features can be negative. Attention takes only positive ones.
    log_second_moment : callable, optional
        It takes parameters and unscaled points (*b, n, d), (*b, s, d), and returns log E[(f1 f2)^2] of one feature,
        (*b, n, s). Only methods that estimate the kernel have it.
    excess : callable, optional
        It takes parameters and the moments of unscaled points, and returns the excess, (*b, 1, 1). None if there is no
        closed form.
    logarithm : callable, optional
        Elementwise methods only: it takes projected inputs, and returns the logarithms of the features.
    for_kernels : bool
        Whether `favorsharp.map_choice` tries the method when it looks for the features nearest to a Gaussian kernel.
    """

    name: str
    title: str
    kind: Kind
    fit: Callable[[formulas.Statistics], formulas.Values] | None
    paired: bool = False
    signed: bool = False
    log_second_moment: Callable[[Parameters, Array, Array], Array] | None = None
    excess: Callable[[Parameters, Moments], Array] | None = None
    logarithm: Callable[[Array], Array] | None = None
    for_kernels: bool = False

    @property
    def is_fitted(self) -> bool:
        """Whether the parameters depend on the data."""
        return self.fit is not formulas.plain

    @property
    def estimates_kernel(self) -> bool:
        """Whether products of features estimate the kernel: their mean over draws is the kernel."""
        return self.log_second_moment is not None

    @property
    def takes_proposals(self) -> bool:
        """Whether `feature_map` takes rows and log weights from any proposal."""
        return self.kind == "dense-exponential" and self.fit is not None and not self.paired


def _dense(
    name: str,
    title: str,
    fit: Callable[[formulas.Statistics], formulas.Values],
    *,
    paired: bool = False,
    for_kernels: bool = False,
) -> Method:
    """A method with dense-exponential features, exp(rows.u + row + column)."""
    return Method(
        name,
        title,
        "dense-exponential",
        fit,
        log_second_moment=formulas.dense_second_moment,
        excess=formulas.dense_excess,
        paired=paired,
        for_kernels=for_kernels,
    )


_RECORDS = (
    _dense("posrf", "FAVOR+ (arXiv 2009.14794)", formulas.plain),
    _dense("oprf", "FAVOR++ (arXiv 2205.15317)", formulas.oprf),
    _dense("saderf", "FAVOR#, SADERF (arXiv 2302.00787)", formulas.saderf),
    _dense("aderf", "FAVOR#, ADERF (arXiv 2302.00787)", formulas.aderf),
    _dense("sderf", "FAVOR#, SDERF (arXiv 2302.00787)", formulas.sderf),
    _dense("optimal", "the best of the dense-exponential family (docs: theory)", formulas.optimal, for_kernels=True),
    Method(
        "trig",
        "random Fourier features (Rahimi and Recht 2007)",
        "trigonometric",
        formulas.plain,
        paired=True,
        signed=True,
        log_second_moment=formulas.trig_second_moment,
        for_kernels=True,
    ),
    _dense("hyperbolic", "hyperbolic features (arXiv 2009.14794)", formulas.plain, paired=True),
    Method(
        "poisson",
        "Chefs' Random Tables, Poisson (arXiv 2205.15317)",
        "discrete",
        formulas.poisson,
        signed=True,
        log_second_moment=formulas.poisson_second_moment,
        excess=formulas.poisson_excess,
    ),
    Method(
        "geometric",
        "Chefs' Random Tables, geometric (arXiv 2205.15317)",
        "discrete",
        formulas.geometric,
        signed=True,
        log_second_moment=formulas.geometric_second_moment,
    ),
    Method("relu", "relu of projections", "elementwise", formulas.plain, logarithm=formulas.log_relu),
    Method("elu", "elu + 1 of projections", "elementwise", formulas.plain, logarithm=formulas.log_elu),
    Method("nystrom", "Nystrom's method (docs: theory)", "nystrom", None, signed=True, for_kernels=True),
    Method("prototypes", "attention from means of queries (docs: theory)", "dense-exponential", None),
)

_OF_CALLABLES = Method("callable", "a function of the caller", "elementwise", formulas.plain)

# a plain dict, because torch.compile cannot read a mapping proxy in a function that has written to any dict
TABLE: Mapping[str, Method] = {record.name: record for record in _RECORDS}
"""The record of each method by name."""

METHODS = tuple(name for name, record in TABLE.items() if record.fit is not None)
"""The names that `fit` accepts."""

FROM_POINTS = tuple(name for name, record in TABLE.items() if record.fit is None)
"""Methods that need the points themselves: `fit_map` accepts them, and `fit` does not."""

POSITIVE_FROM_POINTS = tuple(name for name in FROM_POINTS if not TABLE[name].signed)
"""Those of them that attention takes."""

SIGNED = tuple(name for name in METHODS if TABLE[name].signed)
"""Methods whose features can be negative; attention refuses them."""

POSITIVE = tuple(name for name in METHODS if not TABLE[name].signed)
"""Methods that attention takes."""

DENSE_EXPONENTIAL = tuple(name for name in METHODS if TABLE[name].kind == "dense-exponential")
"""Methods whose features are exp(rows.u + row + column)."""

TAKES_PROPOSALS = tuple(name for name, record in TABLE.items() if record.takes_proposals)
"""Methods that `compare` and `suggest` try. `refine`, and rows and log weights of the caller, work with these only."""


FOR_KERNELS = tuple(record.name for record in reversed(_RECORDS) if record.for_kernels)
"""Methods that are compared for a Gaussian kernel; the first is usually the best."""


def method_of(method: MethodLike) -> Method:
    """The record of a checked method; all callables have the same record."""
    return TABLE[method] if isinstance(method, str) else _OF_CALLABLES


_ELSEWHERE = {
    **{name: f"fit_map(x, y, m, method={name!r}) makes a map from the points themselves" for name in FROM_POINTS},
    LANDMARKS: "landmarks(m) makes them, and attention takes the result in place of a feature map",
}
"""Where the names are accepted that are not the name of a fit."""


def check_method(method: Any, *, positive: bool = False, also: tuple[str, ...] = ()) -> None:
    """Raise unless method is a callable, a known name (with `positive`: of a positive method), or one of `also`."""
    if callable(method):
        return
    known = (*(POSITIVE if positive else METHODS), *also)
    if isinstance(method, str) and method in _ELSEWHERE and method not in known:
        accepted = ", ".join(known)
        raise ValueError(f"method {method!r} is not accepted here: {_ELSEWHERE[method]}; accepted: {accepted}")
    others = ", ".join(name for name in _ELSEWHERE if name not in known)
    check_choice("method", method, known, also=", or a callable" + (f"; elsewhere: {others}" if others else ""))
