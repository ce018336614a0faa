"""The contracts that every memory keeps, as checks for any memory: `nestling.testing.check(spec)`.

    from nestling import testing
    testing.check(nl.memory.named("my_memory", key_dim=4))

The oracle is the token-by-token reference with autograd gradients. A check raises AssertionError with what differs, and by how
much. Each is a function by itself (`CHECKS`), so that a test suite can draw its own cases; sizes should be small, as the oracle
is slow. The tests of every registered memory are these.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nestling import native
from nestling import state as fast
from nestling.memory import Memory
from nestling.memory.cost import FLOPS
from nestling.memory.protocol import Example, Read

HEADS = 2
READS: tuple[Read, ...] = ("after", "before", "boundary")


@dataclass(frozen=True)
class Case:
    """One way to read: `time` tokens with this chunk, tile and read, inputs by `seed`, with random resets and gaps or without."""

    time: int = 40
    chunk: int = 16
    tile: int | None = None
    read: Read = "after"
    seed: int = 0
    masks: bool = False


Made = tuple[Memory, list[Tensor]]


def check(spec: Memory, *, cases: int = 6, seed: int = 0) -> None:
    """Every contract, on `cases` random cases where there are cases. Raises AssertionError at the first that does not hold.

    spec: with a small key_dim and value_dim, 4 say: the oracle takes its time.
    """
    for case in random_cases(cases, seed):
        chunked_equals_reference(spec, case)
        splitting_changes_nothing(spec, case, share=(case.seed % 97) / 96)
    for alone in CHECKS:
        alone(spec)
    for read in READS:
        causal_and_apart(spec, read)
    for dtype in (torch.bfloat16, torch.float16):
        half_is_computed_in_float32(spec, dtype)


def random_cases(number: int, seed: int) -> Iterator[Case]:
    """Short and long, chunks longer than the text, tiles, masks: the first and the last are the awkward ones."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    for turn in range(number):
        yield Case(
            time=1 if turn == 0 else pick(range(2, 41)),
            chunk=64 if turn == 1 else pick((1, 2, 5, 16)),
            tile=pick((None, 1, 3, 7)),
            read=READS[turn % 3],
            seed=pick(range(10_000)),
            masks=turn % 2 == 1,
        )


def small(spec: Memory, seed: int, **choices: Any) -> Made:
    """The memory with other choices, and float64 initial weights that are never all zero, behind which much would hide."""
    made = cast(Memory, replace(cast(Any, spec), **choices))
    generator = torch.Generator().manual_seed(seed)
    w0 = [w.double() for w in made.init(HEADS, generator)]
    empty = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in w0 if not w.any()]
    return made, [w if w.any() else empty.pop(0) for w in w0]


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-8) -> None:
    """max|a − b| ≤ tolerance · max(1, max|b|); NaN fails."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    error = (actual.double() - expected.double()).abs().amax() if actual.numel() else torch.zeros(())
    bound = tolerance * max(1.0, float(expected.double().abs().amax()) if expected.numel() else 0.0)
    assert bool(error <= bound), f"{what}: off by {float(error):.2e}, allowed {bound:.2e}"


def assert_same(a: object, b: object, tolerance: float = 1e-8) -> None:
    """Of two states, leaf by leaf."""
    for number, (x, y) in enumerate(zip(fast.leaves(a), fast.leaves(b), strict=True)):
        assert_close(x, y, f"state leaf {number}", tolerance)


def cut(x: Example, first: int, last: int) -> Example:
    """Tokens `first` to `last` of an example."""
    q, k, v, gates = x
    part = slice(first, last)
    return q[:, :, part], k[:, :, part], v[:, :, part], gates[part]


def masks(seed: int, lanes: int, time: int, wanted: bool) -> dict[str, Any]:
    """Random resets and tokens that are not valid."""
    if not wanted:
        return {"reset": None, "valid": None}
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        "reset": torch.rand(lanes, time, generator=generator) < 0.1,
        "valid": torch.rand(lanes, time, generator=generator) < 0.8,
    }


def inputs(spec: Memory, seed: int, time: int, lanes: int = 2, dtype: torch.dtype = torch.float64) -> Example:
    """The memory's own example."""
    generator = torch.Generator().manual_seed(seed)
    return spec.example(generator, lanes=lanes, heads=HEADS, time=time, dtype=dtype)


def run(made: Memory, w0: list[Tensor], example: Example, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """`made.scan` over an example."""
    q, k, v, gates = example
    return made.scan(w0, q, k, v, gates, state, **options)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN, the C code's scratch too, so that a cell which nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    try:
        with native.poisoned():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def everything(
    made: Memory, w0: list[Tensor], example: Example, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of a random sum of both with respect to all that was given, by name; fresh tensors
    are poisoned with NaN. dtype: what all of it is given in."""

    def own(x: Tensor) -> Tensor:
        return x.detach().to(dtype, copy=True).requires_grad_()

    weights, (q, k, v), gates = [own(w) for w in w0], map(own, example[:3]), example[3].map(own)
    given = {f"initial weight {n}": w for n, w in enumerate(weights)}
    given |= {"queries": q, "keys": k, "values": v, **{f"gate {name}": gate for name, gate in gates.items()}}
    with poisoned():
        y, state = run(made, weights, (q, k, v, gates), **options)
        found = {"outputs": y} | {f"state leaf {n}": leaf for n, leaf in enumerate(fast.leaves(state))}
        probe = torch.Generator().manual_seed(7)
        total = sum(
            (x * torch.randn(x.shape, generator=probe, dtype=torch.float64).to(x.dtype)).sum()
            for x in found.values()
            if x.is_floating_point()
        )
        gradients = torch.autograd.grad(cast(Tensor, total), list(given.values()), allow_unused=True)
    for (name, x), gradient in zip(given.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return {name: x.detach() for name, x in found.items()}


def chunked_equals_reference(spec: Memory, case: Case) -> None:
    """The fast engine is the definition: outputs, state and every gradient (C4)."""
    made, w0 = small(spec, case.seed, chunk=case.chunk, read=case.read)
    example = inputs(made, case.seed, case.time)
    if example[3].retention is not None:
        example[3].retention[0, 0, case.time // 2] = 0.0  # a gate of exactly 0 is legal
    mask = masks(case.seed, 2, case.time, case.masks)
    expected = everything(made, w0, example, engine="reference", **mask)
    found = everything(made, w0, example, engine="chunked", tile=case.tile, **mask)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(found[name], x, name)


def splitting_changes_nothing(spec: Memory, case: Case, share: float) -> None:
    """Reading A + B is reading A, then B, at the split `share` and token by token (C2); fresh tensors are poisoned with NaN."""
    made, w0 = small(spec, case.seed, chunk=case.chunk, read=case.read)
    time = case.time
    example = inputs(made, case.seed, time)
    mask = masks(case.seed, 2, time, case.masks)
    whole, end = run(made, w0, example, **mask)
    at = round(share * time)
    for bounds in ([0, at, time], list(range(time + 1))):
        state, outputs = None, []
        for first, last in itertools.pairwise(bounds):
            part = {n: None if m is None else m[:, first:last] for n, m in mask.items()}
            with poisoned():
                y, state = run(made, w0, cut(example, first, last), state, **part)
            outputs.append(y)
        assert_close(torch.cat(outputs, 2), whole, f"outputs of the split at {bounds[1]}")
        assert_same(state, end)


def dropping_the_state_is_noticed(spec: Memory) -> None:
    """The state matters: what is read after a split depends on what stood before it."""
    made, w0 = small(spec, 3, chunk=4)
    example = inputs(made, 3, 20)
    whole, _ = run(made, w0, example)
    forgetful, _ = run(made, w0, cut(example, 9, 20))
    assert (whole[:, :, 9:] - forgetful).abs().max() > 1e-3, "the state has no effect"


def lanes_are_read_as_if_alone(spec: Memory) -> None:
    """Lanes at different positions do not see each other (C3)."""
    made, w0 = small(spec, 5, chunk=6)
    example = inputs(made, 5, 25, lanes=3)
    valid = torch.ones(3, 25, dtype=torch.bool)
    for lane, skipped in enumerate((0, 4, 11)):
        valid[lane, :skipped] = False
    y, state = run(made, w0, example, valid=valid)
    for lane, skipped in enumerate((0, 4, 11)):
        q, k, v = (x[lane : lane + 1] for x in example[:3])
        gates = example[3].map(lambda g, lane=lane: g[lane : lane + 1])  # type: ignore[misc]
        alone, end = run(made, w0, cut((q, k, v, gates), skipped, 25))
        assert_close(y[lane : lane + 1, :, skipped:], alone, f"lane {lane}")
        both = fast.stack([fast.take(state, [lane]), end])  # a growing state has room for the longest lane
        for x in fast.leaves(both):
            assert_close(x[:1], x[1:], f"state of lane {lane}")
        assert not y[lane, :, :skipped].any(), "an invalid token is answered with zeros"
    assert state.position.tolist() == [25, 21, 14], "the position counts valid tokens"


def causal_and_apart(spec: Memory, read: Read) -> None:
    """A later token never reaches an earlier output or another lane, and always its own (C3)."""
    made, w0 = small(spec, 11, chunk=5, read=read)
    q, k, v, gates = inputs(made, 11, 18)
    y, _ = made.scan(w0, q, k, v, gates)
    for token in (2, 7, 17):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[0, :, token] = 3 * x[0, :, token] + 1
        z, _ = made.scan(w0, changed[0], changed[1], changed[2], gates)
        assert torch.equal(z[0, :, :token], y[0, :, :token]), f"token {token} reaches an earlier output"
        assert torch.equal(z[1], y[1]), f"token {token} reaches another lane"
        assert not torch.equal(z[0, :, token:], y[0, :, token:]), f"token {token} has no effect"


def all_modes_are_equal(spec: Memory) -> None:
    """With gradients, without, and in inference mode (C1)."""
    made, w0 = small(spec, 13, chunk=4)
    example = inputs(made, 13, 21)
    for x in example[:3]:
        x.requires_grad_()
    y, state = run(made, w0, example)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z, other = run(made, w0, example)
        assert torch.equal(y.detach(), z), f"outputs differ under {mode.__name__}"
        for a, b in zip(fast.leaves(state), fast.leaves(other), strict=True):
            assert torch.equal(a.detach(), b), f"states differ under {mode.__name__}"


def float32_is_within_its_tolerance(spec: Memory) -> None:
    """In float32 the chunked engine finds the definition's outputs, state and gradients to 1e-4 (C4), or, where the definition
    itself loses more, to four times what that loses: behind a norm, short rows have gradients that float32 cannot hold."""
    for seed, time, chunk in ((17, 40, 16), (18, 9, 4), (19, 23, 64)):
        made, w0 = small(spec, seed, chunk=chunk)
        example = inputs(made, seed, time, dtype=torch.float32)
        exact, rounded = (
            everything(made, [w.float() for w in w0], example, dtype, engine="reference")
            for dtype in (torch.float64, torch.float32)
        )
        found = everything(made, [w.float() for w in w0], example, torch.float32)

        def off(x: Tensor, y: Tensor) -> float:
            if not y.numel():
                return 0.0
            return float((x.double() - y.double()).abs().amax()) / max(1.0, float(y.double().abs().amax()))

        lost = max(off(rounded[name], x) for name, x in exact.items())
        for name, x in exact.items():
            assert_close(found[name], x, f"float32, {time} tokens, {name}", max(1e-4, 4 * lost))


def half_is_computed_in_float32(spec: Memory, dtype: torch.dtype) -> None:
    """Half inputs, under autocast to either half precision or without, are computed and kept in float32 (C7): a text, two tokens
    by themselves behind it, and the gradients of q, k, v, which come back in the inputs' own precision."""
    made, w0 = small(spec, 19, chunk=8)
    w0 = [w.float() for w in w0]
    half = inputs(made, 19, 26, dtype=torch.float32)
    half = (*(x.to(dtype) for x in half[:3]), half[3].map(lambda g: g.to(dtype)))  # type: ignore[assignment]

    def read(up: Callable[[Tensor], Tensor], mode: torch.dtype | None) -> tuple[Tensor, object, tuple[Tensor, ...]]:
        """Outputs, the last state and gradients, `up` applied to what is given, under autocast to `mode`."""
        leaves = [x.clone().requires_grad_() for x in half[:3]]
        given = (*map(up, leaves), half[3].map(up))
        state, outputs = None, []
        for first, last in ((0, 24), (24, 25), (25, 26)):
            with torch.autocast("cpu", dtype=mode or dtype, enabled=mode is not None):
                y, state = made.scan(w0, *cut(given, first, last), state)  # type: ignore[arg-type]
            outputs.append(y)
        y = torch.cat(outputs, 2)
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        return y.detach(), state, torch.autograd.grad(y, leaves, probe.to(y.dtype))

    y, state, gradients = read(Tensor.float, None)
    for mode in (torch.float16, torch.bfloat16, None):
        low, kept, slopes = read(lambda x: x, mode)
        where = f"with {dtype} inputs, autocast to {mode}"
        assert low.dtype == dtype, f"outputs are {low.dtype} {where}; expected the query's"
        assert all(w.dtype == torch.float32 for w in fast.leaves(kept) if w.is_floating_point()), (
            f"the state is not float32 {where}"
        )
        assert torch.equal(low, y.to(dtype)), f"computed otherwise than in float32 {where}"
        assert_same(kept, state, 0.0)
        for number, (a, b) in enumerate(zip(slopes, gradients, strict=True)):
            assert_close(a, b, f"gradient {number} {where}", 4 * torch.finfo(dtype).eps)


def no_tokens_is_the_start(spec: Memory) -> None:
    """Nothing read, or nothing valid, is the start state (C1)."""
    made, w0 = small(spec, 23)
    example = inputs(made, 23, 3)
    for engine in ("chunked", "reference"):
        y, state = run(made, w0, cut(example, 0, 0), engine=engine)
        assert y.shape == (2, HEADS, 0, made.value_dim), f"no tokens are answered with shape {tuple(y.shape)}"
        assert_same(state, made.start(w0, 2), 0.0)
    y, state = run(made, w0, example, valid=torch.zeros(2, 3, dtype=torch.bool))
    assert not y.any(), "invalid tokens are answered with zeros"
    assert_same(state, made.start(w0, 2), 0.0)


def gradients_pass_through_a_state(spec: Memory) -> None:
    """Two calls with a state between them have the gradients of one (C1)."""
    made, w0 = small(spec, 29, chunk=5)
    w0 = [w.requires_grad_() for w in w0]
    example = inputs(made, 29, 17)
    given = [*w0, *(x.requires_grad_() for x in example[:3])]
    found = []
    for bounds in ([0, 17], [0, 7, 17]):
        state, outputs = None, []
        for first, last in itertools.pairwise(bounds):
            y, state = run(made, w0, cut(example, first, last), state)
            outputs.append(y)
        probe = torch.randn(torch.cat(outputs, 2).shape, generator=torch.Generator().manual_seed(7)).double()
        grads = torch.autograd.grad(torch.cat(outputs, 2), given, probe, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True)])
    for number, (whole, parts) in enumerate(zip(*found, strict=True)):
        assert_close(parts, whole, f"gradient {number} through a state")


def a_token_costs_the_same_everywhere(spec: Memory) -> None:
    """FLOPs of one token and bytes of the state, for a lane at position 1,000 and at 100,000 (C5). One whose growth is "linear"
    says that this does not hold of it."""
    if spec.growth != "constant":
        return
    made, w0 = small(spec, 31)
    example, found = inputs(made, 31, 1), []
    for position in (1_000, 100_000):
        state = made.start(w0, 2)._replace(position=torch.full((2,), position))
        with torch.no_grad(), native.without(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            _, state = run(made, w0, example, state)
        found.append((counter.get_total_flops(), fast.nbytes(state)))
    assert found[0] == found[1], f"(FLOPs, bytes) at position 1,000 are {found[0]}, at 100,000 {found[1]}"


def the_state_is_data(spec: Memory) -> None:
    """Saved and loaded, or taken apart by lanes and put together, a state goes on as it would have (C6)."""
    made, w0 = small(spec, 37, chunk=5)
    example = inputs(made, 37, 19)
    _, state = run(made, w0, cut(example, 0, 12))
    rest, end = run(made, w0, cut(example, 12, 19), state)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        fast.save(path, state)
        loaded = fast.load(path)
    for other, what in ((loaded, "saved and loaded"), (fast.stack(fast.split(state)), "split and stacked")):
        y, after = run(made, w0, cut(example, 12, 19), other)
        assert_close(y, rest, f"outputs behind a state that was {what}")
        assert_same(after, end)


def a_token_that_is_no_number_is_left_out(spec: Memory) -> None:
    """A NaN key is not written, and counted once; another lane does not notice, and what follows is finite (C8)."""
    made, w0 = small(spec, 41, chunk=5)
    example = inputs(made, 41, 19)
    clean, end = run(made, w0, example)
    q, k, v, gates = example
    k[0, 0, 6] = torch.nan
    y, state = run(made, w0, (q, k, v, gates))
    assert state.faults.tolist() == [1, 0], f"faults are {state.faults.tolist()}; expected [1, 0]"
    assert_close(y[1], clean[1], "another lane's outputs")
    assert_same(fast.take(state, [1]), fast.take(end, [1]))
    assert all(bool(x.isfinite().all()) for x in fast.leaves(state) if x.is_floating_point()), "the state is not finite"
    assert bool(y[0, :, 7:].isfinite().all()), "outputs behind the token are not finite"


CHECKS: tuple[Callable[[Memory], None], ...] = (
    dropping_the_state_is_noticed,
    lanes_are_read_as_if_alone,
    all_modes_are_equal,
    float32_is_within_its_tolerance,
    no_tokens_is_the_start,
    gradients_pass_through_a_state,
    a_token_costs_the_same_everywhere,
    the_state_is_data,
    a_token_that_is_no_number_is_left_out,
)
"""Those that need no case."""
