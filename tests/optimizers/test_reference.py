"""Every optimizer against a float64 NumPy re-derivation on fixed gradients, and against public implementations."""

import numpy as np
import pytest
import torch

from beyond_outliers.optimizers import PSGD, SOAP, AdamW, Muon, Scion, Shampoo
from beyond_outliers.optimizers.linalg import add_gram_, gram, norm_lower_bound
from beyond_outliers.optimizers.muon import newton_schulz
from beyond_outliers.optimizers.psgd import precondition, update_dense_, update_factors, update_low_rank_

SHAPES = [(8, 8), (6, 10), (10, 6), (6, 10), (1, 7), (7, 1), (5,), (1,)]
SQUARE = [(8, 8), (5, 5), (8, 8), (1, 1), (6,)]
STEPS = 30
LR, DECAY = 0.02, 0.1


def gradients(shapes, steps=STEPS, seed=0):
    """[step][parameter] arrays whose scale differs by row and column, so that preconditioning has something to do."""
    rng = np.random.default_rng(seed)
    scales = [rng.lognormal(size=shape) for shape in shapes]
    return [[s * rng.normal(size=s.shape) for s in scales] for _ in range(steps)]


def start(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def train(make, shapes, grads, dtype=torch.float64):
    """Parameters after the fixed gradients, as arrays."""
    params = [torch.tensor(w, dtype=dtype, requires_grad=True) for w in start(shapes)]
    optimizer = make(params)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
    return [p.detach().numpy() for p in params]


def rederive(rule, shapes, grads):
    """The same with `rule(w, grads of that parameter) -> w`, one parameter at a time."""
    return [rule(w, [step[i] for step in grads]) for i, w in enumerate(start(shapes))]


def assert_same(found, expected, rtol=1e-6):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def assert_within(found, expected, bound):
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) < bound


def orthogonalised(m):
    """Five quintic steps applied to the singular values: no matrix iteration at all."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    s = s / (np.sqrt((m**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def adam(w, grads, lr, b1, b2, eps, decay):
    m = v = 0
    for t, g in enumerate(grads, 1):
        w = w * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return w


def muon(w, grads):
    if w.ndim < 2:
        return adam(w, grads, 3e-3, 0.9, 0.95, 1e-6, 0)
    m = np.zeros_like(w)
    for g in grads:
        m = 0.95 * m + 0.05 * g
        u = 0.05 * g + 0.95 * m
        w = w * (1 - LR * DECAY) - LR * max(1, w.shape[0] / w.shape[1]) ** 0.5 * orthogonalised(u)
    return w


def scion(w, grads, constrained=False):
    m = np.zeros_like(w)
    lr = LR if w.ndim == 2 else 3e-3
    for g in grads:
        m = 0.9 * m + 0.1 * g
        shrink = lr if constrained else lr * DECAY * (w.ndim == 2)
        lmo = 2.5 * orthogonalised(m) * (w.shape[0] / w.shape[1]) ** 0.5 if w.ndim == 2 else np.sign(m)
        w = (1 - shrink) * w - lr * lmo
    return w


def inverse_power(a, power, eps):
    values, vectors = np.linalg.eigh(a + eps * np.eye(len(a)))
    return vectors @ np.diag(np.maximum(values, eps) ** -power) @ vectors.T


def shampoo(w, grads, frequency, size=12_288):
    """Cut into blocks first, every block on its own."""
    shape, decay = w.shape, DECAY * (w.ndim == 2)
    w = np.atleast_2d(w.T).T.copy()
    stack = [g.reshape(w.shape) for g in grads]
    for r in range(0, w.shape[0], size):
        for c in range(0, w.shape[1], size):
            block = np.s_[r : r + size, c : c + size]
            w[block] = shampoo_block(w[block], [g[block] for g in stack], frequency, len(shape), decay)
    return w.reshape(shape)


def shampoo_block(w, grads, frequency, order, decay):
    b, eps = 0.95, 1e-10
    m = v = left = right = 0
    p_left = p_right = None
    for t, g in enumerate(grads, 1):
        m, v = b * m + (1 - b) * g, b * v + (1 - b) * g**2
        left, right = b * left + (1 - b) * g @ g.T, b * right + (1 - b) * g.T @ g
        c = 1 - b**t
        step = (m / c) / (np.sqrt(v / c) + eps)
        if t % frequency == 0:
            p_left = inverse_power(left / c, 1 / (2 * order), eps)
            p_right = inverse_power(right / c, 1 / 4, eps) if order == 2 else np.eye(1)
        if p_left is not None:
            direction = p_left @ (m / c) @ p_right
            step = direction * np.linalg.norm(step) / np.linalg.norm(direction)
        w = w - LR * (step + decay * w)
    return w


def soap(w, grads, frequency=10, largest=10_000):
    b1, b2, eps = 0.9, 0.95, 1e-8
    matrix = w.ndim == 2
    shape = w.shape
    w = np.atleast_2d(w.T).T
    grads = [g.reshape(w.shape) for g in grads]
    use = [matrix and n <= largest for n in w.shape]
    factors = [(1 - b2) * grads[0] @ grads[0].T, (1 - b2) * grads[0].T @ grads[0]]
    bases = [np.linalg.eigh(f)[1][:, ::-1] if on else np.eye(len(f)) for f, on in zip(factors, use, strict=True)]
    m = v = np.zeros_like(w)  # m in the ORIGINAL basis here
    for s, g in enumerate(grads[1:], 1):
        ql, qr = bases
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (ql.T @ g @ qr) ** 2
        step = ql @ ((ql.T @ m @ qr) / (np.sqrt(v) + eps)) @ qr.T
        w = w - LR * np.sqrt(1 - b2**s) / (1 - b1**s) * step
        w = w - LR * DECAY * matrix * w
        factors = [b2 * factors[0] + (1 - b2) * g @ g.T, b2 * factors[1] + (1 - b2) * g.T @ g]
        if s % frequency == 0:
            for side in (0, 1):
                if use[side]:
                    order = np.argsort(-np.diag(bases[side].T @ factors[side] @ bases[side]))
                    bases[side] = np.linalg.qr(factors[side] @ bases[side][:, order])[0]
                    v = np.take(v, order, axis=side)
    return w.reshape(shape)


def test_adamw():
    grads = gradients(SHAPES)
    expected = rederive(lambda w, g: adam(w, g, LR, 0.9, 0.95, 1e-8, DECAY * (w.ndim == 2)), SHAPES, grads)
    assert_same(train(lambda p: AdamW(p, LR, weight_decay=DECAY), SHAPES, grads), expected)


def test_muon():
    grads = gradients(SHAPES)
    assert_same(train(lambda p: Muon(p, LR, weight_decay=DECAY), SHAPES, grads), rederive(muon, SHAPES, grads))


@pytest.mark.parametrize("constrained", [False, True])
def test_scion(constrained):
    grads = gradients(SHAPES)
    decay = 0 if constrained else DECAY
    found = train(lambda p: Scion(p, LR, decay, scale=2.5, constrained=constrained), SHAPES, grads)
    assert_same(found, rederive(lambda w, g: scion(w, g, constrained), SHAPES, grads))


@pytest.mark.parametrize("lmo", ["sign", "column"])
def test_scion_embedding(lmo):
    grads = gradients([(12, 5)])

    def rule(w, grads):
        m = np.zeros_like(w)
        for g in grads:
            m = 0.9 * m + 0.1 * g
            step = np.sign(m) / 5 if lmo == "sign" else m / (np.sqrt((m**2).mean(1, keepdims=True)) + 1e-8)
            w = w - 0.3 * step
        return w

    found = train(
        lambda p: Scion([{"params": p, "role": "embedding"}], embedding_lr=0.3, embedding_lmo=lmo), [(12, 5)], grads
    )
    assert_same(found, rederive(rule, [(12, 5)], grads))


@pytest.mark.parametrize(("frequency", "size"), [(1, 12_288), (4, 12_288), (20, 12_288), (7, 4)])
def test_shampoo(frequency, size):
    # No matrix with a single row or column and few gradients: its factor has a null space scaled by eps^(-1/4).
    grads = gradients(SHAPES)
    found = train(lambda p: Shampoo(p, LR, DECAY, frequency=frequency, max_block_size=size), SHAPES, grads)
    assert_same(found, rederive(lambda w, g: shampoo(w, g, frequency, size), SHAPES, grads))


@pytest.mark.parametrize(("frequency", "largest"), [(10, 10_000), (3, 10_000), (4, 6)])
def test_soap(frequency, largest):
    grads = gradients(SQUARE)
    found = train(
        lambda p: SOAP(p, LR, DECAY, betas=(0.9, 0.95), frequency=frequency, max_preconditioned_size=largest),
        SQUARE,
        grads,
    )
    assert_same(found, rederive(lambda w, g: soap(w, g, frequency, largest), SQUARE, grads))


def psgd(w, grads, probes, due, largest=8192):
    """Factors as full matrices, diagonal ones too; inverses instead of triangular solves."""
    shape, decay = w.shape, DECAY * (w.ndim == 2)
    w = np.atleast_2d(w.T).T
    diagonal = [len(shape) < 2 or n == 1 or n > largest for n in w.shape]
    q = [np.eye(n) for n in w.shape]
    m = np.zeros_like(w)
    for n, g in enumerate(grads):
        m = 0.9 * m + 0.1 * g.reshape(w.shape)
        x = m / (1 - 0.9 ** (n + 1))
        if due(n):
            probe = next(probes).reshape(w.shape)
            x = x + 2.0**-13 * np.abs(x).mean() * probe
            a = q[0] @ x @ q[1].T
            b = np.linalg.inv(q[0]).T @ probe @ np.linalg.inv(q[1])
            new = []
            for side, (t1, t2) in enumerate([(a @ a.T, b @ b.T), (a.T @ a, b.T @ b)]):
                if side == 1 and len(shape) < 2:
                    new.append(q[1])  # a vector has no second factor
                    continue
                difference, total = t1 - t2, t1 + t2
                if diagonal[side]:
                    new.append(q[side] - 0.1 * np.diag(np.diag(difference)) @ q[side] / np.diag(total).max())
                else:
                    row = total[np.argmax((total**2).sum(1))] @ total
                    bound = np.linalg.norm(row @ total) / np.linalg.norm(row)
                    new.append(q[side] - 0.1 * np.triu(difference) @ q[side] / bound)
            q = new
        d = q[0].T @ q[0] @ x @ q[1].T @ q[1]
        d = d * min(1, 1.1 / (np.sqrt((d**2).mean()) + 1e-8))
        w = w - LR * (d + decay * w)
    return w.reshape(shape)


@pytest.mark.parametrize(("probability", "period", "largest"), [(None, 1, 8192), (0.3, 4, 8192), (1.0, 1, 7)])
def test_psgd(probability, period, largest):
    # all distinct: one probe after the other; the side of 30 is updated through [A B]
    shapes = [(8, 8), (6, 10), (10, 6), (30, 5), (4, 40), (1, 7), (7, 1), (5,), (1,)]
    grads = gradients(shapes)
    generator = torch.Generator().manual_seed(11)
    probes = {shape: [] for shape in shapes}

    def due(n):
        return n % period == period - 1

    # Matrices come first: the optimizer draws group by group, and groups are split by role.
    for n in range(STEPS):
        for shape in shapes if due(n) else ():
            draw = (1, *shape) if len(shape) == 2 else (1, shape[0], 1)
            probes[shape].append(torch.randn(draw, generator=generator, dtype=torch.float64).numpy())
    found = train(
        lambda p: PSGD(p, LR, DECAY, max_size_triangular=largest, update_probability=probability, seed=11),
        shapes,
        grads,
    )
    assert_same(found, rederive(lambda w, g: psgd(w, g, iter(probes[w.shape]), due, largest), shapes, grads))


def test_psgd_updates_are_due_as_often_as_the_schedule_says():
    """Every call up to n = 500; then the waits grow as exp(0.001 (n - 500)) until every 34th call (1 / 0.03)."""
    p = torch.ones(1, requires_grad=True)
    optimizer = PSGD([p])
    seen = []
    for _ in range(4600):
        p.grad = torch.ones(1)
        optimizer.step()
        seen.append(optimizer.state[p]["updates"])
    updated = np.flatnonzero(np.diff([0, *seen]))
    assert list(updated[:501]) == list(range(501))
    assert np.all(np.diff(updated)[501:600] == 2)
    assert set(np.diff(updated)[-10:]) == {34}
    expected = 500 + sum(min(1, max(0.03, np.exp(-0.001 * (n - 500)))) for n in range(500, 4600))
    assert 0.75 * expected < len(updated) < expected  # waits are whole calls: fewer than the probabilities' sum


# --- public implementations ---------------------------------------------------------------------------------------


def test_torch_muon():
    shapes = [s for s in SHAPES if len(s) == 2]
    grads = gradients(shapes)
    ours = train(lambda p: Muon(p, LR, DECAY, ns_dtype=torch.bfloat16), shapes, grads, torch.float32)
    theirs = train(lambda p: torch.optim.Muon(p, LR, DECAY), shapes, grads, torch.float32)
    # Both iterate in bfloat16, of 8 bits; 30 steps of length LR each.
    assert_within(ours, theirs, 0.03 * LR * STEPS)


def test_torch_adamw_is_followed_exactly():
    grads = gradients(SHAPES)
    ours = train(lambda p: AdamW(p, LR), SHAPES, grads, torch.float32)
    theirs = train(lambda p: torch.optim.AdamW(p, LR, (0.9, 0.95), 1e-8, 0.0, fused=True), SHAPES, grads, torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def public():
    return pytest.importorskip("pytorch_optimizer")


def test_public_soap(public):
    """In float64 up to the first basis update (that package takes the QR in float32), then in float32."""
    grads = gradients(SQUARE)
    for frequency, dtype, rtol in ((100, torch.float64, 1e-9), (10, torch.float32, 2e-4)):
        ours = train(lambda p, f=frequency: SOAP(p, LR, frequency=f), SQUARE, grads, dtype)
        theirs = train(
            lambda p, f=frequency: public.SOAP(p, LR, weight_decay=0.0, precondition_frequency=f), SQUARE, grads, dtype
        )
        assert_same(ours, theirs, rtol)


def test_public_scion(public):
    shapes = [s for s in SHAPES if len(s) == 2]
    grads = gradients(shapes)
    ours = train(lambda p: Scion(p, LR, scale=3.0, ns_dtype=torch.bfloat16), shapes, grads, torch.float32)
    theirs = train(lambda p: public.SCION(p, LR, norm_type=2, scale=3.0), shapes, grads, torch.float32)  # spectral
    assert_within(ours, theirs, 0.03 * 3 * LR * STEPS)
    ours = train(lambda p: Scion([{"params": p, "role": "embedding"}], embedding_lr=LR), shapes, grads)
    theirs = train(lambda p: public.SCION(p, LR, norm_type=4), shapes, grads)  # signs
    assert_same(ours, theirs, 1e-12)


def test_public_kron(public):
    """The same probes for both; it does not damp them (2^-13) and bounds the rms with 1e-6 beside it."""
    shapes = [(8, 8), (6, 10), (10, 6), (5,)]
    grads = gradients(shapes)
    ours = train(lambda p: PSGD(p, LR, seed=3), shapes, grads, torch.float32)
    torch.manual_seed(3)
    theirs = train(lambda p: public.Kron(p, LR, balance_prob=0.0), shapes, grads, torch.float32)
    assert_within(ours, theirs, 2e-3 * LR * STEPS)


def test_newton_schulz_in_float32_stays_on_the_float64_curve():
    rng = np.random.default_rng(0)
    for rows, cols in ((40, 40), (24, 96), (96, 24), (1, 50), (3, 200)):
        m = rng.normal(size=(2, rows, cols)) * rng.lognormal(2, 2, size=cols)
        found = newton_schulz(torch.tensor(m, dtype=torch.float32)).numpy()
        expected = np.stack([orthogonalised(x) for x in m])
        assert np.abs(found - expected).max() < 2e-5


# --- products that skip what structure makes known ----------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 511, 514])
def test_a_gram_matrix_by_strips_is_the_plain_one(n):
    """Sizes around the threshold (512), not divisible by the number of strips."""
    x, symmetric = (torch.randn(2, n, k, generator=torch.Generator().manual_seed(k)).double() for k in (7, n))
    symmetric = symmetric + symmetric.mT
    expected = 0.3 * symmetric - 0.5 * x @ x.mT
    torch.testing.assert_close(add_gram_(symmetric.clone(), x, beta=0.3, alpha=-0.5), expected)
    torch.testing.assert_close(gram(x), x @ x.mT)


@pytest.mark.parametrize("update", [update_dense_, update_low_rank_])
@pytest.mark.parametrize(("size", "rank"), [(2, 1), (64, 64), (65, 3), (129, 40), (520, 7)])
def test_both_ways_to_update_a_factor_agree_at_any_shape(update, size, rank):
    """Each at shapes for which the optimizer would take the other, too; sizes around the blocks of 64 rows."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, size, size, generator=generator, dtype=torch.float64).triu()
    x, y = torch.rand(2, 3, size, rank, generator=generator, dtype=torch.float64)
    total = x @ x.mT + y @ y.mT
    bound, norm = norm_lower_bound(total), torch.linalg.matrix_norm(total, 2, keepdim=True)
    assert (norm / 2**0.5 < bound).all() and (bound <= norm * (1 + 1e-12)).all()
    expected = q - 0.1 * (x @ x.mT - y @ y.mT).triu() @ q / bound
    update(q, x, y, 0.1)
    torch.testing.assert_close(q, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(1024, 32), (37, 5), (5, 37), (64, 64), (200, 1), (1, 70)])
def test_psgd_updates_follow_the_plain_formula(shape):
    """Several updates of a stack of two, scales far apart: through [A B] where a side is long, dense where not."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-3, 1e4], dtype=torch.float64).view(2, 1, 1)
    spread = torch.randn(2, *shape, generator=generator, dtype=torch.float64).exp() * scales
    ours = {
        side: (torch.ones(2, 1) if n == 1 else torch.eye(n).repeat(2, 1, 1)).double()
        for side, n in zip(("left", "right"), shape, strict=True)
    }
    plain = [torch.eye(n, dtype=torch.float64).repeat(2, 1, 1) for n in shape]

    def compare():
        for side, q in zip(("left", "right"), plain, strict=True):
            found = ours[side] if ours[side].ndim == 3 else ours[side].unsqueeze(-1)
            torch.testing.assert_close(found, q, rtol=1e-10, atol=1e-10 * q.abs().max().item())

    for _ in range(5):
        g = spread * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        v = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        update_factors(ours, g, v, 0.1)
        a, b = plain[0] @ g @ plain[1].mT, torch.linalg.inv(plain[0]).mT @ v @ torch.linalg.inv(plain[1])
        for side, (t1, t2) in enumerate([(a @ a.mT, b @ b.mT), (a.mT @ a, b.mT @ b)]):
            rows = (t1 + t2).square().sum(-1).argmax(-1)
            row = (t1 + t2)[torch.arange(2), rows].unsqueeze(1) @ (t1 + t2)
            bound = (row @ (t1 + t2)).norm(dim=-1, keepdim=True) / row.norm(dim=-1, keepdim=True)
            plain[side] = plain[side] - 0.1 * (t1 - t2).triu() @ plain[side] / bound
        compare()
    assert all(q.triu(1).any() for q in plain if q.shape[1] > 1)

    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    expected = plain[0].mT @ plain[0] @ x @ plain[1].mT @ plain[1]
    for products, calls, kept in (({}, 1e4, True), ({}, 1e-4, False), (None, 1e4, False)):
        for _ in range(2):  # the second time from what was kept
            found = precondition(ours, x, products, calls)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
        assert set(products or ()) == ({side for side, q in ours.items() if q.ndim == 3} if kept else set())
