"""MuonAdamW, the optimizer of kernels and the rest."""

import lightning as L
import pytest
import torch
from torch import nn

from helpers import QUIET, randn, same_tensors
from videoalign.miniature.networks.muon import COEFFICIENTS, ITERATIONS, MuonAdamW, orthogonal

# --- the optimizer --------------------------------------------------------------------------------


class Net(nn.Module):
    """A matrix, two convolutions, and what is no matrix: biases, a gain, a row and a kernel of one weight a channel."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.matrix = nn.Linear(6, 4)
            self.flat = nn.Conv2d(3, 4, 3)
            self.deep = nn.Conv3d(2, 3, (3, 1, 2))
            self.gain = nn.Parameter(torch.ones(5))
            self.row = nn.Parameter(randn(1, 7, seed=1))
            self.depthwise = nn.Parameter(randn(4, 1, 1, seed=2))

    @property
    def kernels(self):
        return [self.matrix.weight, self.flat.weight, self.deep.weight]

    @property
    def rest(self):
        kernels = {id(p) for p in self.kernels}
        return [p for p in self.parameters() if id(p) not in kernels]


def give_gradients(parameters, seed):
    for i, p in enumerate(parameters):
        p.grad = randn(*p.shape, seed=1000 * seed + i)


def test_kernels_step_as_muon_on_matrices_and_the_rest_as_adamw():
    """torch's Muon rounds to bfloat16, so that its updates differ by a hundredth; AdamW's are the same bit for bit."""
    net, twin = Net(), Net()
    options = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.05}
    optimizer = MuonAdamW(net.parameters(), rest_lr=0.004, betas=(0.8, 0.95), **options)
    matrices = [nn.Parameter(p.detach().reshape(len(p), -1).clone()) for p in twin.kernels]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="original", **options)
    adam = torch.optim.AdamW(twin.rest, lr=0.004, betas=(0.8, 0.95), weight_decay=0.0)
    before, before_kernels = ([p.detach().clone() for p in ps] for ps in (net.parameters(), net.kernels))
    for step in range(3):
        give_gradients(net.kernels, step), give_gradients(net.rest, 10 + step)
        for matrix, kernel in zip(matrices, net.kernels):
            matrix.grad = kernel.grad.reshape(matrix.shape).clone()
        give_gradients(twin.rest, 10 + step)
        optimizer.step(), muon.step(), adam.step()
    for p, m, old in zip(net.kernels, matrices, before_kernels):
        assert (p - m.view_as(p)).norm() < 0.02 * (p - old).norm()
    assert all(torch.equal(p, q) for p, q in zip(net.rest, twin.rest))
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 7, 5), (1, 4, 4)])
def test_the_iteration_changes_singular_values_alone(shape):
    """Each iteration maps a singular value s to a s + b s^3 + c s^5."""
    matrices = randn(*shape, seed=3).double()
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    values = values / matrices.norm(dim=(1, 2))[:, None]
    for _ in range(ITERATIONS):
        values = sum(c * values ** (2 * i + 1) for i, c in enumerate(COEFFICIENTS))
    torch.testing.assert_close(orthogonal(matrices), u * values[:, None] @ v)


def test_updates_of_kernels_are_nearly_orthogonal():
    """Muon makes all singular values of an update about the learning rate, whatever the gradient's are."""
    net = Net()
    optimizer = MuonAdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    before = net.flat.weight.detach().clone()
    give_gradients(net.parameters(), 0)
    net.flat.weight.grad *= 1e4
    optimizer.step()
    values = torch.linalg.svdvals((net.flat.weight.detach() - before).view(4, -1)) / 0.01
    assert 0.6 < values.min()
    assert values.max() < 1.4


def test_a_closure_is_called_with_gradients():
    net = Net()
    optimizer = MuonAdamW(net.parameters())
    before = net.flat.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert not torch.equal(before, net.flat.weight)


def test_schedulers_change_both_learning_rates():
    """The steps themselves change, not only the rates shown: AdamW's first steps are as large as its rate, 0 at 0."""
    factors, steps = (1.0, 0.25, 0.0), []
    for reached in range(3):
        net = Net()
        optimizer = MuonAdamW(net.parameters(), lr=0.02, rest_lr=0.001, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
        optimizer.step()  # without gradients
        for _ in range(reached):
            schedule.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.02 * factors[reached], 0.001 * factors[reached]])
        before = [p.detach().clone() for p in net.parameters()]
        give_gradients(net.parameters(), 0)
        optimizer.step()
        steps.append(torch.stack([(p.detach() - old).norm() for p, old in zip(net.parameters(), before)]))
    assert (steps[0] > 0).all()
    assert not steps[2].any()
    torch.testing.assert_close(steps[1], 0.25 * steps[0], rtol=1e-3, atol=1e-6)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    def stepped(net, optimizer, steps):
        for step in steps:
            give_gradients(net.parameters(), step)
            optimizer.step()

    net, again, forgetful = Net(), Net(), Net()
    optimizer = MuonAdamW(net.parameters(), lr=0.03)
    stepped(net, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.01
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    stepped(net, optimizer, range(3, 6))
    for other, loads in ((again, True), (forgetful, False)):
        other.load_state_dict(checkpoint["net"])
        fresh = MuonAdamW(other.parameters(), lr=0.03)
        if loads:
            fresh.load_state_dict(checkpoint["optimizer"])
            assert [group["lr"] for group in fresh.param_groups] == [0.01, 2e-3]
        stepped(other, fresh, range(3, 6))
    assert same_tensors(again.state_dict(), net.state_dict())
    assert not any(torch.equal(p, q) for p, q in zip(forgetful.parameters(), net.parameters()))


def test_zero_grad_clears():
    """After it nothing moves, whatever the optimizer's state is."""
    net = Net()
    optimizer = MuonAdamW(net.parameters())
    give_gradients(net.parameters(), 0)
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before))


@pytest.mark.parametrize("only", ["kernels", "rest"])
def test_parameters_of_one_sort_are_refused(only):
    with pytest.raises(ValueError, match="wants matrices and other parameters"):
        MuonAdamW(getattr(Net(), only))


class Tiny(L.LightningModule):
    """A network of convolutions under Lightning."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))

    def training_step(self, batch, index):
        return 100 * self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(randn(8, 3, 8, 8), batch_size=4)

    def configure_optimizers(self):
        return MuonAdamW(self.parameters())


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_kernels_are_clipped(steps):
    """experiments/sprites set gradient_clip_val: the norm is that of all parameters."""
    model = Tiny()
    L.Trainer(**QUIET, max_steps=steps, gradient_clip_val=0.01).fit(model)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
