"""Pruning one layer is exact, whatever the size, the structure and the precision."""
import pytest
import torch
from helpers import random_blocks, small_model

from evoprune_nb import pruning
from evoprune_nb.models import prunable_units
from evoprune_nb.pruning import kept_structures, prune_unit

HEADS = dict(size=4, n_kv_heads=2)


def problem(n_columns: int, n_samples: int = 400, n_rows: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "A weight, correlated inputs (columns, samples), and their Hessian, all from one generator."
    generator = torch.Generator().manual_seed(n_columns)
    weight = torch.randn(n_rows, n_columns, generator=generator)
    mixing = torch.randn(n_columns, n_columns, generator=generator) / n_columns**0.5 + torch.diag(torch.rand(n_columns, generator=generator))
    inputs = (mixing @ torch.randn(n_columns, n_samples, generator=generator)).double()
    return weight, inputs, (2 * inputs @ inputs.T / n_samples).float()


def brain_surgeon(weight, hessian, size=1, n_kv_heads=0, heads="free", damping=0.01):
    """Remove one structure after another by the formulas of the paper, inverting from scratch each time.

    Returns the order of removal and, per number of structures removed, the full-size updated weight."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    n_structures = len(h) // size
    group = n_structures // n_kv_heads if n_kv_heads else 1
    structures = [[s] for s in range(n_structures)]
    if heads == "group":
        structures = [list(range(g * group, (g + 1) * group)) for g in range(n_kv_heads)]
    columns_of = lambda structure: [s * size + c for s in structure for c in range(size)]
    order, history, taken = [], {0: w.clone()}, set()
    while structures:
        alive = sorted(column for structure in structures for column in columns_of(structure))
        inverse = torch.zeros_like(h)
        inverse[torch.tensor(alive)[:, None], torch.tensor(alive)] = torch.linalg.inv(h[alive][:, alive])
        if all(structure[0] // group in taken for structure in structures):
            taken = set()
        best, best_score = None, float("inf")
        for structure in structures:
            if heads == "query" and structure[0] // group in taken:
                continue
            s = columns_of(structure)
            score = sum(row @ torch.linalg.inv(inverse[s][:, s]) @ row for row in w[:, s])
            if score < best_score:
                best, best_score = structure, score
        s = columns_of(best)
        w = w - w[:, s] @ torch.linalg.inv(inverse[s][:, s]) @ inverse[s]
        w[:, s] = 0
        structures.remove(best)
        order += best
        history[len(order)] = w.clone()
        taken = taken | {best[0] // group}
    return order, history


def full_size(pruned, level: int, gone: int, shape, size: int = 1) -> torch.Tensor:
    "The weight of a level with zeros where columns were removed."
    full = torch.zeros(shape, dtype=torch.float64)
    columns = (kept_structures(pruned.order, gone)[:, None] * size + torch.arange(size)).flatten()
    full[:, columns] = pruned.weights[level].double()
    return full


@pytest.mark.parametrize("n_columns, n_samples", [(24, 400), (24, 5), (130, 400)], ids=["small", "singular", "more than two blocks"])
def test_channels_match_one_by_one_removal(n_columns, n_samples):
    "Channels go in the order, and with the weights, of the plain column-by-column algorithm, also for a singular Hessian."
    weight, _, hessian = problem(n_columns, n_samples)
    order, history = brain_surgeon(weight, hessian)
    removed = [0, 1, n_columns // 3, n_columns // 2, n_columns - 1, n_columns]
    pruned = prune_unit(weight, hessian, removed)
    assert pruned.order.tolist() == order
    for level in range(1, len(removed) - 1):
        torch.testing.assert_close(full_size(pruned, level, removed[level], weight.shape), history[removed[level]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, removed", [("free", [0, 1, 2, 3, 4, 5, 6]), ("query", [0, 2, 4, 6]), ("group", [0, 3, 6])])
@pytest.mark.parametrize("n_samples", [400, 10], ids=["full rank", "singular"])
def test_heads_match_one_by_one_removal(heads, removed, n_samples):
    "Head blocks go in the order, and with the weights, of the plain algorithm, in all three ways to count heads off by what they cost."
    weight, _, hessian = problem(24, n_samples)
    order, history = brain_surgeon(weight, hessian, heads=heads, **HEADS)
    pruned = prune_unit(weight, hessian, removed, heads=heads, **HEADS)
    assert pruned.order.tolist() == order
    for level, gone in enumerate(removed[1:-1], 1):
        torch.testing.assert_close(full_size(pruned, level, gone, weight.shape, 4), history[gone], rtol=1e-5, atol=1e-5)


def test_query_mode_takes_one_head_of_every_group_per_round():
    "With heads='query', every level removes the same number of heads from each key/value group."
    weight, _, hessian = problem(24)
    order = prune_unit(weight, hessian, [0, 6], heads="query", **HEADS).order.tolist()
    assert all(sorted(head // 3 for head in order[i : i + 2]) == [0, 1] for i in (0, 2, 4))


def energy(weight, hessian, columns, damping=0.01) -> float:
    "How much of the output the best weights for some columns explain."
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    reached = weight.double() @ h[:, columns]
    return (torch.linalg.solve(h[columns][:, columns], reached.T) * reached.T).sum().item()


def test_kv_mode_keeps_the_heads_that_explain_most_per_parameter():
    "Each head kept adds more output per parameter than any other would, when the first of a group costs twice as much."
    weight, _, hessian = problem(24)
    order = prune_unit(weight, hessian, [0, 1, 2, 3, 4, 5, 6], heads="kv", **HEADS).order.tolist()
    columns = lambda heads: torch.tensor([4 * head + c for head in heads for c in range(4)])
    for n in range(1, 6):
        kept, opened = order[6 - n:], {head // 3 for head in order[6 - n:]}
        worth = lambda head: (energy(weight, hessian, columns([*kept, head])) - energy(weight, hessian, columns(kept))) / (1 + (head // 3 not in opened))
        assert order[5 - n] == max(set(range(6)) - {*kept}, key=worth)
    groups = lambda heads, seed: {head // 3 for head in prune_unit(*problem(24, 400 + seed)[::2], [0, 6], heads=heads, **HEADS).order.tolist()[4:]}
    assert sum(len(groups("kv", seed)) for seed in range(8)) < sum(len(groups("free", seed)) for seed in range(8))


def test_levels_are_least_squares_solutions():
    "Each level holds the best weights for its kept columns: those that least squares on the raw inputs finds."
    weight, inputs, hessian = problem(24)
    pruned = prune_unit(weight, hessian, [0, 5, 12, 20], damping=1e-9)
    for level, gone in ((1, 5), (2, 12), (3, 20)):
        kept = kept_structures(pruned.order, gone)
        best = torch.linalg.lstsq(inputs[kept].T, (weight.double() @ inputs).T).solution.T
        torch.testing.assert_close(pruned.weights[level].double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options, removed", [({}, [0, 1, 6, 12, 23, 24]), (HEADS, [0, 1, 3, 5, 6])], ids=["channels", "heads"])
def test_reported_error_is_the_measured_one(options, removed):
    "The error of a level is ‖(W−W')X‖²/‖WX‖² on the calibration inputs, 0 for dense and 1 for empty, rising in between."
    weight, inputs, hessian = problem(24)
    pruned = prune_unit(weight, hessian, removed, damping=1e-9, **options)
    dense = weight.double() @ inputs
    for level in range(1, len(removed) - 1):
        outputs = full_size(pruned, level, removed[level], weight.shape, options.get("size", 1)) @ inputs
        assert pruned.errors[level] == pytest.approx(((dense - outputs).norm() / dense.norm()).item() ** 2, rel=1e-4)
    assert pruned.errors[0] == 0 and pruned.errors[-1] == 1 and pruned.errors == sorted(pruned.errors)


def test_dead_inputs_go_first_and_cost_nothing():
    "Columns whose input is always zero are removed first, without error and without changing the others."
    weight, inputs, _ = problem(24)
    inputs[[3, 17]] = 0
    pruned = prune_unit(weight, (2 * inputs @ inputs.T / 400).float(), [0, 2, 24])
    kept = kept_structures(pruned.order, 2)
    assert set(pruned.order[:2].tolist()) == {3, 17}
    assert pruned.errors[1] < 1e-12
    torch.testing.assert_close(pruned.weights[1], weight[:, kept], rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_are_pruned_in_full_precision():
    "A bfloat16 layer gets the float32 result, rounded once at the end."
    weight, _, hessian = problem(24)
    half = prune_unit(weight.bfloat16(), hessian, [0, 6, 12])
    full = prune_unit(weight.bfloat16().float(), hessian, [0, 6, 12])
    assert torch.equal(half.order, full.order)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half.weights[1:], full.weights[1:]))


def test_overflown_hessian_is_an_error():
    "Non-finite calibration statistics are reported, not turned into weights."
    weight, _, hessian = problem(24)
    hessian[2, 2] = torch.inf
    with pytest.raises(ValueError, match="non-finite"):
        prune_unit(weight, hessian, [0, 12])


@pytest.mark.parametrize("rows", [256, 32], ids=["one block", "blocks that do not divide the width"])
def test_hessian_is_that_of_the_layer_inputs(monkeypatch, rows):
    "H = 2XXᵀ/n over all calibration tokens, whatever the batch size, in however many blocks of rows."
    monkeypatch.setattr(pruning, "_ROWS", rows)
    model = small_model("llama-gqa")
    unit = prunable_units(model)[-1]
    seen = []
    handle = model.get_submodule(unit.output).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(random_blocks())
    handle.remove()
    x = torch.cat(seen).T
    for batch_size in (3, 16):
        (hessian,) = pruning.collect_hessians(model, [unit], random_blocks(), batch_size, progress=False)
        torch.testing.assert_close(hessian.double(), 2 * x @ x.T / x.shape[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(hessian, hessian.T)


def test_a_wide_layer_is_pruned_as_exactly():
    "Wide enough for factors and inverse by halves: every level is the least-squares solution on its channels, and its error the measured one."
    n = 1100
    weight, _, hessian = problem(n, 2 * n, n_rows=3)
    removed = [0, 100, 500, n - 1]
    pruned = prune_unit(weight, hessian, removed)
    w, h = weight.double(), hessian.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(n)
    for level, gone in enumerate(removed[1:], 1):
        kept = kept_structures(pruned.order, gone)
        full = torch.zeros_like(w)
        full[:, kept] = torch.linalg.solve(h[kept][:, kept], (w @ h)[:, kept].T).T
        torch.testing.assert_close(full_size(pruned, level, gone, w.shape), full, rtol=1e-5, atol=1e-6)
        assert pruned.errors[level] == pytest.approx((((w - full) @ h * (w - full)).sum() / (w @ h * w).sum()).item(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 129])
def test_inverse_by_halves(n):
    "Whatever the size, and halves that are unequal: inverse and factor as exact as torch's; an indefinite matrix is an error."
    torch.manual_seed(n)
    inputs = torch.randn(2 * n, n, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    matrix = inputs.T @ inputs / n + 1e-4 * torch.eye(n, dtype=torch.float64)
    found = pruning._inverse(matrix, small=4)
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pruning._cholesky(matrix, small=4), torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)
    with pytest.raises(torch.linalg.LinAlgError):
        pruning._inverse(matrix - 2 * matrix.diagonal().max() * torch.eye(n, dtype=torch.float64), small=4)
