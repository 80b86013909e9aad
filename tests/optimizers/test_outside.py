"""Optimizers from outside: the class itself does the steps, the study's checks stand around it, and trials find out."""

import copy
import io
import sys

import pytest
import torch

from beyond_outliers.config.registry import REGISTRY, call, entry, ordered
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.optimizers import AdamW, NonFiniteGradientError, build_optimizer
from beyond_outliers.optimizers.outside import Outside
from beyond_outliers.optimizers.trial import trial

MINE = """
import itertools
import random
import torch

class Counting(torch.optim.SGD):
    '''Every third step is doubled; the count is in no state.'''
    def __init__(self, params, lr=1e-2):
        super().__init__(params, lr=lr)
        self.count = itertools.count(1)
    def step(self, closure=None):
        if next(self.count) % 3 == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(2)
        return super().step(closure)

class Noisy(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(random.random())
        return super().step(closure)

class Unkept(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rule"] = lambda x: x

class Lazy(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    p.grad = None
        return super().step(closure)

class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no dense gradients")

def initialising(params, lr):
    made = torch.optim.SGD(params, lr=lr)
    with torch.no_grad():
        made.param_groups[0]["params"][0].mul_(1.5)
    return made

def regrouping(params, lr):
    return torch.optim.SGD([p for group in params for p in group["params"]], lr=lr)

class TwoFaced(torch.optim.SGD):
    def train(self): ...
    def eval(self): ...

def nothing(params, lr):
    return None
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "optimizers_of_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("optimizers_of_mine", None)


def model():
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(vocab_size=24, width=16, depth=1, n_heads=2))


def give_gradients(one, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in one.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def weights(one):
    return {name: p.detach().clone() for name, p in one.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_steps_are_those_of_the_class_itself():
    ours, theirs = model(), model()
    optimizer = build_optimizer(ours, "torch.optim:SGD", lr=0.1, weight_decay=0.01, momentum=0.9)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    plain = torch.optim.SGD(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.1, weight_decay=0.01, momentum=0.9
    )
    for step, factor in enumerate((0.5, 1.0, 0.25)):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * factor  # as the schedule does
        for group in plain.param_groups:
            group["lr"] = 0.1 * factor
        optimizer.step()
        plain.step()
        assert equal(weights(ours), weights(theirs))


def test_roles_that_it_does_not_get_are_trained_by_adamw():
    one, by_adamw, by_sgd = model(), model(), model()
    optimizer = build_optimizer(one, "torch.optim:SGD", lr=0.1, roles=["matrix"], rest_lr=3e-3)
    others = [AdamW([*by_adamw.parameters()], lr=3e-3), torch.optim.SGD(by_sgd.parameters(), lr=0.1)]
    for step in range(3):
        for each in (one, by_adamw, by_sgd):
            give_gradients(each, step)
        for each in (optimizer, *others):
            each.step()
    roles = {name: group["role"] for group in optimizer.param_groups for name in group["param_names"]}
    assert set(roles.values()) == {"matrix", "embedding", "vector"}
    found, adamw, sgd = weights(one), weights(by_adamw), weights(by_sgd)
    for name, role in roles.items():
        expected = sgd if role == "matrix" else adamw
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(sgd[name], adamw[name])


def test_rates_of_roles_reach_the_class():
    one = model()
    optimizer = build_optimizer(one, "torch.optim:SGD", lr=0.1, embedding_lr=0.0, vector_lr=0.0)
    before = weights(one)
    give_gradients(one, 0)
    optimizer.step()
    moved = {name for name, p in weights(one).items() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in one.named_parameters() if p.ndim == 2 and "embed" not in name} and moved


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(bad):
    one = model()
    optimizer = build_optimizer(one, "torch.optim:SGD", lr=0.1, momentum=0.9, roles=["matrix"], rest_lr=3e-3)
    give_gradients(one, 0)
    optimizer.step()
    before, state = weights(one), copy.deepcopy(optimizer.state_dict())
    give_gradients(one, 1)
    name, last = list(one.named_parameters())[-1]
    last.grad.view(-1)[-1] = bad
    with pytest.raises(NonFiniteGradientError, match=name.replace(".", r"\.")):
        optimizer.step()
    assert equal(weights(one), before)
    for kept, now in zip(state["parts"], optimizer.state_dict()["parts"], strict=True):
        for index, entries in kept["state"].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(now["state"][index][k])) for k, v in entries.items()
            )


def test_an_interrupted_run_goes_on_with_the_same_bits():
    whole, parts = model(), model()
    hyper = {"momentum": 0.9, "roles": ["matrix"], "rest_lr": 3e-3}
    first, second = (build_optimizer(one, "torch.optim:SGD", lr=0.1, **hyper) for one in (whole, parts))
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(second.state_dict(), file)
            file.seek(0)
            second = build_optimizer(parts, "torch.optim:SGD", lr=0.7, **hyper)
            second.load_state_dict(torch.load(file, weights_only=True))
        for one, optimizer in ((whole, first), (parts, second)):
            give_gradients(one, step)
            optimizer.step()
    assert equal(weights(whole), weights(parts))


def test_a_copy_trains_its_own_parameters():
    one = model()
    optimizer = build_optimizer(one, "torch.optim:SGD", lr=0.1, roles=["matrix"], rest_lr=3e-3)
    other, copied = copy.deepcopy((one, optimizer))
    before = weights(one)
    give_gradients(other, 0)
    copied.step()
    assert equal(weights(one), before) and not equal(weights(other), before)


def test_states_that_do_not_fit_are_refused():
    one = build_optimizer(model(), "torch.optim:SGD", lr=0.1)
    other = build_optimizer(model(), "torch.optim:RMSprop", lr=0.1)
    wide = Olmo2(Olmo2Config(vocab_size=24, width=32, depth=1, n_heads=2))
    with pytest.raises(ValueError, match=r"torch\.optim:SGD, not 'torch\.optim:RMSprop'"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"\(24, 32\).*these are of"):
        one.load_state_dict(build_optimizer(wide, "torch.optim:SGD", lr=0.1).state_dict())


@pytest.mark.parametrize(
    "name, hyper, words",
    [
        ("torch.optim:SDG", {}, ["'torch.optim'", "unknown optimizer", "'SDG'", "did you mean SGD"]),
        ("nobody:Mine", {}, ["cannot import 'nobody'", "nobody.py"]),
        ("lion", {}, ["unknown optimizer 'lion'", "muon", "module:Class"]),
        ("torch.optim:SGD", {"momentun": 0.9}, ["momentun", "momentum", "roles"]),
        ("torch.optim:SGD", {"roles": ["matrices"]}, ["matrices", "matrix, embedding, vector"]),
        ("torch.optim:SGD", {"roles": ["matrix"]}, ["rest_lr", "embedding, vector"]),
        ("torch.optim:Rprop", {"weight_decay": 0.1}, ["weight_decay", "Rprop", "0.1"]),
        ("torch.optim:LBFGS", {}, ["parameter groups"]),
        ("torch.nn:Linear", {}, ["torch.nn:Linear", "out_features", "valid: an optimizer"]),
        ("optimizers_of_mine:initialising", {}, ["changes the weights"]),
        ("optimizers_of_mine:regrouping", {}, ["groups of its own"]),
        ("optimizers_of_mine:TwoFaced", {}, ["train, eval"]),
        ("optimizers_of_mine:nothing", {}, ["NoneType", "torch.optim.Optimizer"]),
        ("math:pi", {}, ["math:pi is no optimizer", "callable"]),
        ("builtins:dict", {}, ["builtins:dict is no optimizer"]),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(name, hyper, words):
    with pytest.raises(ValueError) as refusal:
        build_optimizer(model(), name, lr=0.1, **hyper)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_class_that_evaluates_the_loss_itself_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"LBFGS evaluates the loss itself"):
        Outside([torch.nn.Parameter(torch.ones(2, 2))], "torch.optim:LBFGS", lr=0.1)


def test_a_trial_finds_what_is_in_no_state():
    assert trial("torch.optim:SGD", 0.1, momentum=0.9) == []
    for name, words in {
        "Counting": ["a resumed run ends in the same weights (here "],
        "Noisy": ["two runs from one seed end in the same weights", "a resumed run"],
        "Unkept": ["an interrupted run goes on; its state cannot be kept ("],
        "Lazy": ["every parameter is trained; these are not: blocks.0"],
    }.items():
        lines = trial(f"optimizers_of_mine:{name}", 0.01)
        assert len(lines) == len(words) and all(map(str.startswith, lines, words)), lines
    # signs that cancel: a weight may be back where it was without having stood still
    assert not any("trained" in line for line in trial("torch.optim:Rprop", 0.01, step_sizes=[0.01, 0.01]))
    with pytest.raises(ValueError, match="Failing fails in step 0: RuntimeError: no dense gradients"):
        trial("optimizers_of_mine:Failing", 0.01)


@pytest.mark.slow
def test_lion_of_a_public_package_needs_no_line_here():
    pytest.importorskip("pytorch_optimizer")
    assert trial("pytorch_optimizer:Lion", 1e-3, betas=[0.9, 0.99], roles=["matrix"], rest_lr=3e-3) == []


def test_label_colour_and_marker_follow_by_themselves():
    one = entry("somewhere.deep:Lion")
    assert one.label == "Lion" and one == entry("somewhere.deep:Lion")
    assert one.colour not in {e.colour for e in REGISTRY.values()}
    assert one.marker not in {e.marker for e in REGISTRY.values()}
    call("somewhere.deep:Cat", "Cat, large")
    assert entry("somewhere.deep:Cat").label == "Cat, large"
    assert ordered(["z:Z", "soap", "a:A", "adamw"]) == ["adamw", "soap", "a:A", "z:Z"]


RATES = """
import torch

class Deaf(torch.optim.SGD):
    '''Its rate is its own.'''
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.01
        return super().step(closure)

class Once(torch.optim.SGD):
    '''Takes the rate that it was made with, whatever a schedule says.'''
    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.first = [group["lr"] for group in self.param_groups]
    def step(self, closure=None):
        for group, rate in zip(self.param_groups, self.first):
            group["lr"] = rate
        return super().step(closure)

class Flagged(torch.optim.SGD):
    '''As Keller Jordan's MuonWithAuxAdam: no lr argument, a flag in every group, parameters in an order of its own.'''
    def __init__(self, param_groups):
        for group in param_groups:
            assert set(group) == {"params", "lr", "use_sign"}
            group["params"] = sorted(group["params"], key=lambda p: -p.numel())
        super().__init__(param_groups, lr=0.0)
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * (p.grad.sign() if group["use_sign"] else p.grad))

class Missing(torch.optim.SGD):
    def __init__(self, params, lr):
        import a_package_that_nobody_has

class Misspelt(torch.optim.SGD):
    def __init__(self, params, lr):
        self.defualts["lr"] = lr
"""


@pytest.fixture
def rates(tmp_path):
    (tmp_path / "rates_of_mine.py").write_text(RATES)
    for name, text in {
        "syntax": "def (",
        "attribute": "import torch\ntorch.optim.Adamm",
        "exits": "raise SystemExit(2)",
    }.items():
        (tmp_path / f"with_{name}.py").write_text(text)
    yield
    for name in ("rates_of_mine", "with_syntax", "with_attribute", "with_exits"):
        sys.modules.pop(name, None)


def test_a_rate_without_effect_is_named(rates):
    found = trial("rates_of_mine:Deaf", 0.01)
    assert len(found) == 2 and found[0].startswith("its learning rate has an effect: 0.01 and 0.005 end")
    # AdamW's rates over the other roles have an effect, which is not the class's
    assert trial("rates_of_mine:Deaf", 0.01, roles=["matrix"], rest_lr=1e-3) == found
    assert trial("rates_of_mine:Once", 0.01) == found[1:]


def test_flags_of_groups_reach_the_class(rates):
    flags = {role: {"use_sign": role == "matrix"} for role in ("matrix", "embedding", "vector")}
    one = model()
    optimizer = build_optimizer(one, "rates_of_mine:Flagged", 0.5, vector_lr=0.25, groups=flags)
    before = weights(one)
    give_gradients(one, 0)
    optimizer.step()
    roles = {name: group["role"] for group in optimizer.param_groups for name in group["param_names"]}
    for name, p in one.named_parameters():
        rate = 0.25 if roles[name] == "vector" else 0.5
        update = p.grad.sign() if roles[name] == "matrix" else p.grad
        torch.testing.assert_close(p.detach(), before[name] - rate * update)
    assert trial("rates_of_mine:Flagged", 0.01, groups=flags) == []
    with pytest.raises(ValueError, match=r"cannot be made .*AssertionError"):
        build_optimizer(model(), "rates_of_mine:Flagged", 0.5)
    with pytest.raises(ValueError, match=r"role 'head'"):
        build_optimizer(model(), "rates_of_mine:Flagged", 0.5, groups={"head": {"use_sign": True}})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("with_syntax:Mine", ["cannot import 'with_syntax'", "SyntaxError"]),
        ("with_attribute:Mine", ["cannot import 'with_attribute'", "AttributeError", "Adamm"]),
        ("with_exits:Mine", ["cannot import 'with_exits'", "SystemExit"]),
        ("rates_of_mine:Missing", ["ModuleNotFoundError", "a_package_that_nobody_has"]),
        ("rates_of_mine:Misspelt", ["AttributeError", "defualts"]),
    ],
)
def test_faults_in_a_file_of_the_users_are_one_line(rates, name, words):
    with pytest.raises(ValueError) as refusal:
        build_optimizer(model(), name, lr=0.1)
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message, message
