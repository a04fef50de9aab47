"""The op `landmark_stream`: attention to a causal stream of landmarks, on the CPU."""

from typing import Any

from favorsharp_numba.host.landmark_stream import StreamProblem
from favorsharp_numba.host.landmark_tokens import token_of


def landmark_stream(
    q: Any, k: Any, v: Any, state: Any, *, key_mask: Any | None = None, grouped: bool = False
) -> tuple[Any, Any]:  # fmt: skip
    """As `favorsharp.landmarks.attention.landmark_stream`."""
    return StreamProblem(q, k, v, state, key_mask, grouped).run()


landmark_stream_plan = token_of
