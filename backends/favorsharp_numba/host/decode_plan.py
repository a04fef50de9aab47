"""The plan of `decode_step`: everything that tokens with the same shapes, dtypes and memory layouts share.

The arithmetic of a token takes microseconds, less time than it takes to describe its arrays to a kernel. `dispatch`
asks `turn_of` for a plan (the attribute `plan` of `favorsharp_numba.state.decode_step`).
"""

import math
from typing import Any

from favorsharp.backend import State, unsettled
from favorsharp_numba.host.arguments import Held, empty, indices, name_of, pack
from favorsharp_numba.host.kept_tokens import After, Layout, is_whole, kept_at
from favorsharp_numba.host.token_plans import TokenPlan, is_plain_token
from favorsharp_numba.kernels.decode_step import PLAN_SIZE, turn


class Turn(TokenPlan):
    """A plan: a function of q, k, v, the state and the map, for arrays laid out like those of the first call.

    It does not check layouts or the map again.
    """

    def __init__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> None:
        batch, size, held = tuple(state.like.shape[:-2]), state.like.shape[-1], Held()
        packed, sizes, query, key = pack(feature_map, name_of(state.like), size)
        heads = math.prod(batch)
        work = float(heads * sizes.m * (4 * size + 2 * sizes.d) * q.shape[-2])
        out = empty(q, (*batch, q.shape[-2], size), name_of(q))
        plan = [*sizes, held.place(query), held.place(key), held.constant(indices(packed.batch, batch))]
        for x in (q, k, v, out):
            plan += held.layout(x, batch)
        plan.append(q.shape[-2])
        assert len(plan) == PLAN_SIZE
        super().__init__(turn, sizes, plan, held, one=packed.one, heads=heads, work=work, out=out)
        self.layout = Layout(sizes, self.one, self.heads)

    def __call__(self, q: Any, k: Any, v: Any, state: State, feature_map: Any) -> tuple[Any, State]:
        """The result of a token, and the state after it."""
        kept, position = kept_at(state, self.layout)
        out, places = self.begun(q, k, v)
        self.run(*places, *kept.sums, *kept.places, position)
        if kept.marks[0]:
            kept, position = kept.begun_again(position, raised=True), 0
            self.run(*places, *kept.sums, *kept.places, position)
        return out, unsettled(state, After(kept, position + 1))


def turn_of(q: Any, k: Any, v: Any, state: State, feature_map: Any) -> Turn | None:
    """The plan for arrays of these layouts, or None if the kernel cannot take them."""
    if state.window or not (state.single_tokens is not None or is_whole(state)):
        return None
    return Turn(q, k, v, state, feature_map) if is_plain_token(q, k, v, state, feature_map) else None
