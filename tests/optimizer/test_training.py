"""Training: losses against their formulas, the loop, and what it must leave alone."""

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from optimizer.data.splits import Samples
from optimizer.training import losses
from optimizer.training.augmentation import augmented
from optimizer.training.batches import Batch, Batches
from optimizer.training.checkpoint import Checkpoint
from optimizer.training.distillation import NEED_FEATURES, Distillation, Mixture
from optimizer.training.features import hidden_places, places_of
from optimizer.training.loop import Progress, Settings, TrainingDiverged, train
from optimizer.training.masks import Goal, Masks, sparse_layers
from optimizer.training.recalibration import recalibrate
from optimizer.training.schedule import SCHEDULES, rising
from optimizer.training.teacher import Answers, Teacher, answering

Values = NDArray[np.float64]
N_CLASSES = 4


class Images:
    """A split of random images [1, 6, 6] in memory, whose class is their brightest quarter."""

    name = "train"
    digest = "images"

    def __init__(self, n: int = 64, has_labels: bool = True) -> None:
        rng = np.random.default_rng(0)
        images = rng.normal(size=(n, 1, 6, 6)).astype(np.float32)
        quarters = images.reshape(n, 2, 3, 2, 3).mean(axis=(2, 4)).reshape(n, 4)
        self._images = images
        self.labels = quarters.argmax(axis=1).astype(np.int64) if has_labels else None
        self.n_reads = 0

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: object = None) -> Samples:
        self.n_reads += 1
        rows = np.arange(len(self)) if indices is None else np.asarray(indices)
        labels = None if self.labels is None else self.labels[rows]
        return Samples({"image": self._images[rows]}, labels, "")


def network(width: int = 4, n_classes: int = N_CLASSES, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(width * 36, n_classes),
    ).eval()  # fmt: skip


ANSWER = answering(["logits"], "logits")


def data(has_labels: bool = True) -> Batches:
    return Batches(Images(has_labels=has_labels), ["image"])


def settings(**given: object) -> Settings:
    plain = {"epochs": 2.0, "batch_size": 16, "learning_rate": 0.02, "seed": 0}
    return Settings(**{**plain, **given})  # type: ignore[arg-type]


def labelled() -> Distillation:
    return Distillation(Mixture(alpha=1.0), ANSWER, None)


def taught(teacher: nn.Module, **mixture: object) -> Distillation:
    """By the teacher, whose features are taken where the loss needs them."""
    mixed = Mixture(**mixture)  # type: ignore[arg-type]
    example = [torch.zeros(2, 1, 6, 6)]
    find = hidden_places if mixed.loss == "hidden" else places_of
    places = find(network(), teacher, example) if mixed.loss in NEED_FEATURES else None
    return Distillation(
        mixed, ANSWER, Teacher(teacher, ANSWER, places.teacher if places else ()), places
    )


def logits(seed: int, shape: tuple[int, ...] = (5, 3)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- losses


def softmax(values: Values) -> Values:
    return np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)


def plain_kl(student: Values, teacher: Values, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_is_its_formula_when_that_is_written_in_numpy(
    alpha: float, temperature: float
) -> None:
    student, teacher = network(seed=1), network(seed=2)
    batch = data().read(np.arange(8))
    with torch.no_grad():
        given, wanted = (one(*batch.inputs).double().numpy() for one in (student, teacher))
    loss = taught(teacher, alpha=alpha, temperature=temperature)(student, batch)
    assert batch.labels is not None
    entropy = -np.log(softmax(given)[np.arange(8), batch.labels.numpy()]).mean()
    expected = alpha * entropy + (1 - alpha) * plain_kl(given, wanted, temperature)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_soft_targets_tend_to_squares_of_centred_logits_when_the_temperature_rises() -> None:
    # Hinton et al. 2015, section 2.1: matching logits is the limit.
    student, teacher = logits(1), logits(2)
    difference = student - student.mean(1, keepdim=True) - teacher + teacher.mean(1, keepdim=True)
    limit = float(difference.square().mean()) / 2
    assert float(losses.soft_targets(student, teacher, 1e3)) == pytest.approx(limit, rel=1e-2)


def test_losses_are_nothing_when_the_student_is_the_teacher() -> None:
    answers, maps = logits(1), logits(2, (3, 4, 5, 5))
    for value in (
        losses.soft_targets(answers, answers, 3.0), losses.correlations(answers, answers, 3.0),
        losses.relations(answers, answers), losses.directions(answers, answers),
        losses.attention(maps, maps), losses.hint(maps, maps),
    ):  # fmt: skip
        assert float(value) == pytest.approx(0, abs=1e-9)


def test_correlations_are_their_formula_when_that_is_written_in_numpy() -> None:
    student, teacher = logits(1), logits(2)
    p, q = softmax(teacher.numpy() / 2), softmax(student.numpy() / 2)
    rows = [np.corrcoef(one, other)[0, 1] for one, other in zip(p, q, strict=True)]
    columns = [np.corrcoef(one, other)[0, 1] for one, other in zip(p.T, q.T, strict=True)]
    expected = 4 * ((1 - np.mean(rows)) + (1 - np.mean(columns)))
    assert float(losses.correlations(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_attention_is_its_formula_when_that_is_written_in_numpy() -> None:
    student, teacher = logits(1, (3, 2, 4, 4)), logits(2, (3, 5, 4, 4))

    def map_of(features: torch.Tensor) -> Values:
        flat = np.square(features.numpy()).mean(axis=1).reshape(3, -1)
        return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True))

    expected = np.square(map_of(student) - map_of(teacher)).mean()
    assert float(losses.attention(student, teacher)) == pytest.approx(expected, rel=1e-6)


def test_relations_are_their_formula_when_that_is_written_pair_by_pair() -> None:
    student, teacher = logits(1, (4, 3)), logits(2, (4, 6))

    def distances(points: Values) -> Values:
        pairs = [[np.linalg.norm(one - other) for other in points] for one in points]
        return np.asarray(pairs) / (np.sum(pairs) / 12)

    apart = np.abs(distances(student.numpy()) - distances(teacher.numpy()))
    expected = np.where(apart < 1, apart**2 / 2, apart - 0.5).mean()
    assert float(losses.relations(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.relations(student[:1], teacher[:1])) == 0


def test_relations_of_near_points_are_the_same_in_bf16() -> None:
    """Their products in bf16 would have errors as large as their distances."""
    points = [10 + logits(seed, (16, 8)).float() for seed in (0, 1)]
    plain = losses.relations(*points)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses.relations(*points), plain)


def test_relations_have_finite_gradients_when_samples_are_equal() -> None:
    points = torch.ones(3, 2, requires_grad=True)
    losses.relations(points, logits(1, (3, 2)).float()).backward()
    assert points.grad is not None
    assert torch.isfinite(points.grad).all()


def test_directions_and_hint_are_their_formulas() -> None:
    student, teacher = logits(1).numpy(), logits(2).numpy()
    norms = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    cosine = ((student * teacher).sum(axis=1) / norms).mean()
    assert float(losses.directions(logits(1), logits(2))) == pytest.approx(1 - cosine)
    expected = np.square(student - teacher).mean() / np.square(teacher).mean()
    assert float(losses.hint(logits(1), logits(2))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        pytest.param({"alpha": 1.5}, "got alpha 1.5, want 0 to 1", id="alpha"),
        pytest.param({"temperature": 0.0}, "got temperature 0.0, want above 0", id="temperature"),
        pytest.param({"loss": "best"}, "got the loss best for classes", id="unknown loss"),
        pytest.param({"kind": "embedding", "loss": "dist"}, "dist for embedding", id="no classes"),
    ],
)
def test_mixture_refuses_values_by_name(mixture: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**mixture)  # type: ignore[arg-type]


def test_distillation_refuses_data_without_labels_when_labels_are_needed() -> None:
    with pytest.raises(ValueError, match="data without labels, and alpha above 0 needs them"):
        labelled()(network(), data(has_labels=False).read(np.arange(4)))


@pytest.mark.parametrize("label", [-1, N_CLASSES])
def test_distillation_refuses_labels_that_are_no_class(label: int) -> None:
    batch = data().read(np.arange(4))
    wrong = replace(batch, labels=torch.tensor([0, 1, label, 2]))
    with pytest.raises(ValueError, match=f"got the label {label}, want 0 to 3"):
        labelled()(network(), wrong)


def test_distillation_refuses_a_student_of_other_classes() -> None:
    loss = taught(network(n_classes=7), alpha=0.0)
    with pytest.raises(ValueError, match="the student gives 4 values a sample, the teacher 7"):
        loss(network(), data().read(np.arange(4)))


def test_distillation_refuses_to_learn_from_answers_without_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"got alpha 0.5 without a teacher, want 1"):
        Distillation(Mixture(alpha=0.5), ANSWER, None)


# --- teacher and features


def test_teacher_answers_once_for_each_sample_when_answers_can_be_kept() -> None:
    runs: list[int] = []

    def counting(module: nn.Module, batch: Batch, places: Sequence[str]) -> Answers:
        runs.append(len(batch.rows))
        return ANSWER(module, batch, places)

    teacher = Teacher(untraceable(), counting, n_rows=64)
    first = teacher.answers(data().read(np.arange(0, 40)))
    teacher.answers(data().read(np.arange(30, 64)))
    again = teacher.answers(data().read(np.arange(39, 4, -1)))
    assert runs == [40, 34]
    torch.testing.assert_close(again.output, first.output.flip(0)[:35])
    fresh = Teacher(untraceable(), counting)
    fresh.answers(data().read(np.arange(4)))
    fresh.answers(data().read(np.arange(4)))
    assert runs == [40, 34, 4, 4]


class Texts(Images):
    """Random texts as long as the longest of those that are read together."""

    def read(self, indices: object = None) -> Samples:
        rows = np.arange(len(self)) if indices is None else np.asarray(indices)
        images = super().read(rows).inputs["image"].reshape(len(rows), 36)
        return Samples({"image": images[:, : 4 + int(rows.max()) % 7]}, None, "")


def test_teacher_keeps_no_answers_that_are_as_long_as_their_batch() -> None:
    texts = Batches(Texts(), ["image"])
    teacher = Teacher(nn.Identity(), ANSWER, n_rows=64)
    for rows in (np.arange(8), np.arange(3, 13), np.arange(8)):
        batch = texts.read(rows)
        assert torch.equal(teacher.answers(batch).output, batch.inputs[0])


def untraceable() -> nn.Module:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(image)
            return logits if logits.sum() > 0 else logits + 0

    return Branching()


def n_norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def normed(module: nn.Module) -> nn.Module:
    """With statistics as after a training."""
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(3 * torch.randn(32, 1, 6, 6) + 1)
    return module.eval()


def test_teacher_answers_the_same_with_its_normalizations_folded() -> None:
    module = normed(network())
    batch = data().read(np.arange(20))
    with torch.no_grad():
        wanted = module(*batch.inputs)
    teacher = Teacher(module, ANSWER)
    torch.testing.assert_close(teacher.answers(batch).output, wanted, rtol=1e-4, atol=1e-4)
    assert n_norms(module) == 1
    assert n_norms(teacher.module) == 0


def test_teacher_that_cant_be_traced_or_whose_features_are_asked_for_is_left_as_it_is() -> None:
    for teacher in (Teacher(untraceable(), ANSWER), Teacher(network(), ANSWER, ("2",))):
        module = teacher.module
        teacher.answers(data().read(np.arange(4)))
        assert teacher.module is module
        assert n_norms(module) == 1


def test_teacher_without_normalizations_is_left_as_it_is() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, N_CLASSES))
    teacher = Teacher(module, ANSWER)
    teacher.answers(data().read(np.arange(4)))
    assert teacher.module is module


class Twice(nn.Module):
    """One convolution under two normalizations, which can't be folded into it both."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first = self.norms[0](self.convolution(image))
        return (first + self.norms[1](self.convolution(2 * image))).mean((2, 3))


def test_teacher_that_answers_otherwise_once_folded_is_left_as_it_is() -> None:
    module = normed(Twice())
    batch = data().read(np.arange(20))
    with torch.no_grad():
        wanted = module(*batch.inputs)
    teacher = Teacher(module, ANSWER)
    assert torch.equal(teacher.answers(batch).output, wanted)
    assert teacher.module is module


def test_places_are_the_last_of_each_size_in_either_network() -> None:
    class Teachers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, padding=1)
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
            self.down = nn.Conv2d(8, 6, 2, stride=2)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.down(self.block(self.stem(image)))
            return features.mean(dim=(2, 3))

    places = places_of(network(), Teachers(), [torch.zeros(2, 1, 6, 6)])
    assert places.student == ("2",)
    assert places.teacher == ("block",)
    assert places.channels == ((4, 8),)
    with pytest.raises(ValueError, match=r"sizes none in the student and 6x6, 3x3 in the teacher"):
        places_of(nn.Sequential(nn.Flatten()), Teachers(), [torch.zeros(2, 1, 6, 6)])


class Encoder(nn.Module):
    """Blocks in a list, the second of which may give a tuple or be gone; tokens [n, length, 4]."""

    class Block(nn.Module):
        def __init__(self, width: int, is_tuple: bool) -> None:
            super().__init__()
            self.within = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))
            self.is_tuple = is_tuple

        def forward(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
            out = hidden + self.within(hidden)
            return (out, None) if self.is_tuple else out

    def __init__(self, width: int, n_blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block(width, i == 1) for i in range(n_blocks))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            found = layer(tokens)
            tokens = found[0] if isinstance(found, tuple) else found
        return tokens[:, 0]


def test_hidden_places_are_the_outermost_blocks_that_both_networks_have() -> None:
    example = [torch.ones(2, 5, 4)]
    both = hidden_places(Encoder(3), Encoder(8), example)
    assert both.student == both.teacher == ("layers.0", "layers.1")
    assert both.channels == ((4, 4), (4, 4))
    # A traced one runs the layers within its blocks, and not the blocks.
    traced = torch.fx.symbolic_trace(Encoder(3))
    places = hidden_places(traced, Encoder(8), example)
    assert places.student == ("layers.0.within.2", "layers.1.within.2")
    assert hidden_places(Encoder(3, 1), Encoder(8), example).student == ("layers.0",)
    assert hidden_places(network(), network(), [torch.zeros(2, 1, 6, 6)]).student == tuple("012")


@pytest.mark.parametrize("loss", ["hidden", "feature"])
def test_padding_of_texts_makes_no_difference_to_what_is_learned(loss: str) -> None:
    student, teacher = Encoder(3), Encoder(8)
    find = hidden_places if loss == "hidden" else places_of
    answer = answering(["tokens"], "tokens")
    tokens = torch.randn(2, 5, 4)
    kept = torch.tensor([[True] * 5, [True, True, False, False, False]])

    def value(padding: float, kept: torch.Tensor | None) -> float:
        batch = Batch(np.arange(2), (torch.where(mask[..., None], tokens, padding),), None, kept)
        places = find(student, teacher, batch.inputs)
        torch.manual_seed(0)
        taught_by = Teacher(teacher, answer, places.teacher)
        mixture = Mixture(kind="embedding", loss=loss)
        with torch.no_grad():
            return float(Distillation(mixture, answer, taught_by, places)(student, batch))

    mask = kept
    assert value(0.0, kept) == pytest.approx(value(9.0, kept), rel=1e-6)
    assert value(0.0, None) != pytest.approx(value(9.0, None), rel=1e-3)


def test_attention_mask_tells_which_positions_are_padding() -> None:
    class Texts:
        name, digest, labels = "train", "texts", None

        def __len__(self) -> int:
            return 2

        def read(self, indices: object = None) -> Samples:
            mask = np.array([[1, 1, 0], [1, 0, 0]])
            return Samples({"input_ids": mask * 7, "attention_mask": mask}, None, "")

    names = ["input_ids", "attention_mask"]
    kept = Batches(Texts(), names).read(np.arange(2)).kept
    assert kept is not None
    assert kept.tolist() == [[True, True, False], [True, False, False]]
    assert Batches(Texts(), names[:1]).read(np.arange(2)).kept is None


def test_hidden_places_are_refused_when_no_block_corresponds() -> None:
    with pytest.raises(
        ValueError, match=r"the teacher's blocks \(layers.0, layers.1\).*another loss"
    ):
        hidden_places(nn.Flatten(), Encoder(3), [torch.ones(2, 5, 4)])


# --- recalibration


def test_recalibration_gives_the_statistics_that_are_computed_by_hand() -> None:
    module = network()
    batches = list(data().each(np.arange(64), 16))
    weights = copy.deepcopy(list(module.parameters()))
    recalibrate(module, batches)
    with torch.no_grad():
        seen = [module[0](batch.inputs[0]) for batch in batches]
    mean = torch.stack([one.mean(dim=(0, 2, 3)) for one in seen]).mean(dim=0)
    variance = torch.stack([one.var(dim=(0, 2, 3)) for one in seen]).mean(dim=0)
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1
    assert not any(part.training for part in module.modules())
    assert all(map(torch.equal, module.parameters(), weights))


# --- the loop


@pytest.mark.parametrize(
    "mixture",
    [
        pytest.param({"alpha": 0.0}, id="answers"),
        pytest.param({"alpha": 0.1, "loss": "dist"}, id="dist"),
        pytest.param({"alpha": 0.5, "loss": "attention"}, id="attention"),
        pytest.param({"alpha": 0.0, "loss": "feature"}, id="feature"),
        pytest.param({"alpha": 0.0, "loss": "hidden"}, id="hidden"),
        pytest.param({"alpha": 0.0, "loss": "relational"}, id="relational"),
        pytest.param({"kind": "embedding"}, id="embedding"),
        pytest.param({"kind": "values"}, id="values"),
    ],
)
def test_student_comes_nearer_to_the_teacher_when_it_is_trained(
    mixture: dict[str, object],
) -> None:
    width = 4 if mixture.get("loss") == "hidden" else 6
    student, teacher = network(seed=1), network(width=width, seed=2)
    before = copy.deepcopy(teacher.state_dict())
    loss = taught(teacher, **mixture)
    done = train(student, data(), loss, settings(epochs=4.0))
    assert done.losses[-1] < 0.9 * done.losses[0]
    assert done.n_steps == 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training
    assert not student.training


@pytest.mark.parametrize("given", [{}, {"optimizer": "adamw"}, {"augmentation": "flip_and_crop"}])
def test_training_gives_the_same_weights_when_the_seed_is_the_same(
    given: dict[str, object],
) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        module = network()
        torch.manual_seed(seed + 100)  # the process's own state plays no part
        train(module, data(), labelled(), settings(seed=seed, **given))
        return module.state_dict()

    one, other = weights(0), weights(0)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], tensor) for name, tensor in weights(1).items())


def test_training_leaves_the_process_its_random_numbers() -> None:
    module = network()
    random.seed(5)
    np.random.seed(5)
    state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train(module, data(), labelled(), settings())
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


class Skipping(nn.Module):
    """Leaves its layer out at random in training, by generators that aren't torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1.0 if not self.training else random.random() + np.random.rand()
        return self.whole(x) * scale  # type: ignore[no-any-return]


def test_training_gives_the_same_weights_when_the_module_draws_elsewhere_than_in_torch() -> None:
    def weights() -> list[torch.Tensor]:
        module = Skipping()
        train(module, data(), labelled(), settings())
        return list(module.state_dict().values())

    assert all(map(torch.equal, weights(), weights()))


class Viewing(nn.Module):
    """Takes the memory of a feature map for rows, as LeNet's and VGG's code often does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(144, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.head(y.view(len(y), -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_training_takes_networks_that_view_their_feature_maps(who: str) -> None:
    student = network() if who == "teacher" else Viewing(seed=0)
    teacher = network(seed=2) if who == "student" else Viewing(seed=2)
    done = train(student, data(), taught(teacher), settings(epochs=4.0))
    assert done.losses[-1] < done.losses[0]


def test_training_ends_within_an_epoch_when_part_of_one_is_asked_for() -> None:
    assert train(network(), data(), labelled(), settings(epochs=1.5)).n_steps == 6
    assert train(network(), data(), labelled(), settings(epochs=0.25)).n_steps == 1


def test_training_tells_how_far_it_is_after_each_step() -> None:
    told: list[str] = []
    done = train(network(), data(), labelled(), settings(epochs=1.5), tell=told.append)
    assert len(told) == done.n_steps == 6
    assert told[0].startswith("epoch 0.2 of 1.5, loss ")
    assert told[-1].startswith("epoch 1.5 of 1.5, loss ")


def test_training_fails_by_its_step_when_the_loss_is_no_number() -> None:
    module = network()
    with torch.no_grad():
        module[5].weight[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"nan at step 1 of 8, .* lower training.learning"):
        train(module, data(), labelled(), settings())


class Breaking:
    """A loss that is no number for what is held out, or whose gradient is none."""

    def __init__(self, what: str) -> None:
        self.what = what

    def parameters(self) -> list[nn.Parameter]:
        return []

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        total = ANSWER(module, batch, ()).output.square().mean()
        if self.what == "gradient":
            return total + (total * 0).sqrt()
        return total if module.training else total * math.nan


@pytest.mark.parametrize(
    ("what", "message"),
    [("held out", r"the loss of what is held out is nan at step 3"),
     ("gradient", r"the norm of its gradient is nan at step 1")],
)  # fmt: skip
def test_training_fails_when_anything_it_goes_by_is_no_number(what: str, message: str) -> None:
    with pytest.raises(TrainingDiverged, match=message):
        train(network(), data(), Breaking(what), settings(patience=2))


def test_bf16_trains_with_weights_in_fp32() -> None:
    module = network()
    done = train(module, data(), labelled(), settings(precision="bf16"))
    assert all(one.dtype == torch.float32 for one in module.parameters())
    assert math.isfinite(done.losses[-1])


def test_masks_stay_zero_when_all_other_weights_move() -> None:
    module = network()
    with torch.no_grad():
        module[5].weight[:, ::2] = 0
        module[0].weight[0, 0, 0, 0] = 0  # one zero alone isn't pruned
    before = module[5].weight.detach().clone()
    train(module, data(), labelled(), settings(), Masks(module, sparse_layers(module)))
    after = module[5].weight.detach()
    assert (after[:, ::2] == 0).all()
    assert (after[:, 1::2] != before[:, 1::2]).all()
    assert module[0].weight[0, 0, 0, 0] != 0


def test_layers_are_sparse_by_a_good_part_of_zeros_and_not_by_nothing_else() -> None:
    module = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 10), nn.Linear(10, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        module[0].weight[:, :3] = 0
        module[1].weight[:1] = 0
        module[2].weight.zero_()  # as a head begins that nobody has trained
        module[3].weight[:2] = 0
    assert sparse_layers(module) == {"0"}


def test_masks_keep_named_layers_however_few_zeros_they_have() -> None:
    module = network()
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = 0
    train(module, data(), labelled(), settings(), Masks(module, ["0"]))
    assert module[0].weight[0, 0, 0, 0] == 0
    with pytest.raises(ValueError, match="got the layers absent, none has a weight"):
        Masks(module, ["absent"])


# --- sparsity that rises

GOALS = {
    "global": Goal(("0", "5"), "global", 0.8),
    "layer": Goal(("0", "5"), "layer", 0.7),
    "2:4": Goal(("5",), "2:4", 0.5),
}


class Watched(Masks):
    """Notes which weights are zero after each step."""

    def __init__(self, module: nn.Module, goal: Goal) -> None:
        super().__init__(module, (), goal)
        self._watched = {name: module.get_submodule(name).weight for name in goal.layers}
        self.seen: list[Mapping[str, torch.Tensor]] = []

    def apply(self, step: int = 1, n_steps: int = 1) -> None:
        super().apply(step, n_steps)
        self.seen.append({n: weight.detach() == 0 for n, weight in self._watched.items()})


def flat(zeros: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([one.flatten() for one in zeros.values()])


@pytest.mark.parametrize("step", [0, 1, 7, 25, 49, 50, 60])
def test_sparsity_rises_by_the_cubic_of_its_paper(step: int) -> None:
    initial, final, n = Fraction(1, 10), Fraction(9, 10), 50
    t = min(step, n)
    expected = final + (initial - final) * (1 - Fraction(t, n)) ** 3
    assert rising(step, n, 0.1, 0.9) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("pattern", GOALS)
def test_masks_rise_to_their_goal_over_the_first_half_of_the_steps(pattern: str) -> None:
    module, goal = network(), GOALS[pattern]
    masks = Watched(module, goal)
    train(module, data(), labelled(), settings(epochs=5.0), masks)  # 20 steps
    seen = [flat(zeros) for zeros in masks.seen]
    n = len(seen[0])
    for step, zeros in enumerate(seen, start=1):
        wanted = goal.sparsity * (1 - max(0.0, 1 - step / 10) ** 3)
        # Layers are rounded one by one.
        assert int(zeros.sum()) == pytest.approx(wanted * n, abs=len(goal.layers) / 2)
    assert all(bool((later | ~before).all()) for before, later in pairwise(seen))
    assert torch.equal(seen[9], seen[-1])
    at_end = {name: int(one.sum()) for name, one in masks.seen[-1].items()}
    sizes = {name: one.numel() for name, one in masks.seen[-1].items()}
    if pattern == "global":
        assert sum(at_end.values()) == round(0.8 * n)
    else:
        assert at_end == {name: round(goal.sparsity * size) for name, size in sizes.items()}


def test_rising_masks_take_the_least_of_what_is_left() -> None:
    module = network()
    masks = Masks(module, (), Goal(("5",), "layer", 0.5))
    weight = module[5].weight
    masked = torch.zeros_like(weight, dtype=torch.bool)
    for step in (2, 5):
        magnitudes = weight.detach().abs().masked_fill(masked, -1.0)
        masks.apply(step, 10)
        zeros = weight.detach() == 0
        assert magnitudes[zeros].max() <= magnitudes[~zeros].min()
        assert bool((zeros | ~masked).all())
        masked = zeros
        with torch.no_grad():
            weight[masked] = 9.0  # as momentum may; it is undone
    masks.apply(6, 10)
    assert torch.equal(weight == 0, masked)
    assert int(masked.sum()) == weight.numel() // 2


def test_rising_masks_leave_two_of_every_four_when_that_is_their_pattern() -> None:
    module = network()
    train(module, data(), labelled(), settings(), Masks(module, (), GOALS["2:4"]))
    fours = module[5].weight.detach().reshape(-1, 4)
    assert ((fours == 0).sum(dim=1) == 2).all()


def test_masks_rise_from_the_zeros_that_are_there() -> None:
    module = network()
    with torch.no_grad():
        module[5].weight[:, ::2] = 0
    masks = Watched(module, Goal(("5",), "layer", 0.75))
    train(module, data(), labelled(), settings(epochs=5.0), masks)
    shares = [float(flat(zeros).double().mean()) for zeros in masks.seen]
    assert shares[4] == pytest.approx(0.75 - 0.25 / 8, abs=1e-2)
    assert shares[-1] == 0.75
    assert all(bool(zeros["5"][:, ::2].all()) for zeros in masks.seen)


@pytest.mark.parametrize(
    ("goal", "reason"),
    [
        pytest.param(Goal(("0", "5"), "global", 0.999), "leaves nothing of 0", id="empty layer"),
        pytest.param(Goal(("5",), "2:4", 0.6), r"got 0\.6, want at most 0\.5", id="three of four"),
        pytest.param(Goal(("absent",), "layer", 0.5), "got the layers absent", id="no layer"),
    ],
)
def test_rising_masks_are_refused_with_value_and_bound(goal: Goal, reason: str) -> None:
    module = network()
    with torch.no_grad():
        module[0].weight /= 1000
    with pytest.raises(ValueError, match=reason):
        Masks(module, (), goal).apply()


def test_training_keeps_no_epoch_from_before_all_zeros_came() -> None:
    module, goal = network(), GOALS["global"]
    how = settings(epochs=6.0, patience=2)
    # As it worsens from the second look on, the best epoch is the first that was looked at...
    done = train(module, data(), Falling(), how, Masks(module, (), goal))
    assert len(done.losses) - len(done.held_out) == 2  # ...which is the third of six
    weights = torch.cat([module[int(name)].weight.detach().flatten() for name in goal.layers])
    assert int((weights == 0).sum()) == round(0.8 * len(weights))


class Falling:
    """A loss whose value on held-out data rises from look to look."""

    def __init__(self) -> None:
        self.n_looks = 0

    def parameters(self) -> list[nn.Parameter]:
        return []

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        self.n_looks += not module.training
        return ANSWER(module, batch, ()).output.square().mean() * 0.01 + self.n_looks


class Worsening:
    """A loss whose value on held-out data rises from the second epoch on."""

    def __init__(self) -> None:
        self.n_looks = 0

    def parameters(self) -> list[nn.Parameter]:
        return []

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        total = ANSWER(module, batch, ()).output.square().mean()
        if module.training:
            return total
        self.n_looks += 1
        return total * 0 + (1.0 if self.n_looks == 2 else 1.0 + self.n_looks)


def test_training_ends_early_with_the_best_epochs_weights_when_it_gets_no_better() -> None:
    module, same = network(), network()
    done = train(module, data(), Worsening(), settings(epochs=10.0, patience=2))
    assert done.held_out == [2.0, 1.0, 4.0, 5.0]
    assert len(done.losses) == 4
    assert all(torch.equal(done.best[n], tensor) for n, tensor in module.state_dict().items())
    assert not torch.equal(same[5].weight, module[5].weight)


def test_training_that_ended_early_ends_there_again_when_it_is_resumed(tmp_path: Path) -> None:
    """Killed behind the last epoch's checkpoint, it has nothing left to do."""
    how, checkpoint = settings(epochs=10.0, patience=2), Checkpoint(tmp_path / "t", "this one")
    whole = network()
    done = train(whole, data(), Worsening(), how, None, checkpoint)
    resumed = network()
    again = train(resumed, data(), Worsening(), how, None, checkpoint)
    assert again.held_out == done.held_out
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


class Killed(Exception):
    pass


class Dying(Distillation):
    """Is killed in the third epoch."""

    n_calls = 0

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        self.n_calls += 1
        if self.n_calls > 10:
            raise Killed
        return super().__call__(module, batch)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_comes_to_the_same_weights_when_it_is_resumed(
    optimizer: str, tmp_path: Path
) -> None:
    how = settings(epochs=4.0, optimizer=optimizer, augmentation="flip")
    whole = network()
    history = train(whole, data(), labelled(), how).losses
    checkpoint = Checkpoint(tmp_path / "kept" / "training.safetensors", "this one")
    with pytest.raises(Killed):
        train(network(), data(), Dying(Mixture(alpha=1.0), ANSWER, None), how, None, checkpoint)
    resumed = network()
    loss = Counting()
    done = train(resumed, data(), loss, how, None, checkpoint)
    assert loss.n_calls == 8  # two epochs of four steps, of four
    assert done.losses == history
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


@pytest.mark.parametrize("pattern", GOALS)
def test_training_with_rising_masks_comes_to_the_same_weights_when_it_is_resumed(
    pattern: str, tmp_path: Path
) -> None:
    how = settings(epochs=8.0, augmentation="flip")  # zeros come in the first four epochs
    whole = network()
    train(whole, data(), labelled(), how, Masks(whole, (), GOALS[pattern]))
    checkpoint = Checkpoint(tmp_path / "training.safetensors", "this one")
    dying = Dying(Mixture(alpha=1.0), ANSWER, None)
    killed = network()
    with pytest.raises(Killed):
        train(killed, data(), dying, how, Masks(killed, (), GOALS[pattern]), checkpoint)
    resumed = network()
    train(resumed, data(), labelled(), how, Masks(resumed, (), GOALS[pattern]), checkpoint)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


class Counting(Distillation):
    n_calls = 0

    def __init__(self) -> None:
        super().__init__(Mixture(alpha=1.0), ANSWER, None)

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        self.n_calls += 1
        return super().__call__(module, batch)


def test_checkpoint_is_none_when_it_is_absent_damaged_or_anothers(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    mine = Checkpoint(path, "mine")
    assert mine.load() is None
    mine.save({"a": torch.ones(2)}, {"n": 1})
    assert mine.load() is not None
    assert Checkpoint(path, "another").load() is None
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert mine.load() is None
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of a tensor
    assert mine.load() is None
    mine.remove()
    assert list(tmp_path.iterdir()) == []


# --- schedules and augmentation


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_reaches_its_peak_and_ends_near_nothing(name: str) -> None:
    rates = [SCHEDULES[name](step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1)
    assert 0 < rates[-1] < 0.01
    assert all(0 < rate <= 1 for rate in rates)


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    given = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=101)
    wanted = []
    for _ in range(100):
        wanted.append(given.get_last_lr()[0])
        optimizer.step()
        given.step()
    rates = [SCHEDULES["one_cycle"](step, 100) for step in range(100)]
    np.testing.assert_allclose(rates, wanted, atol=0.03)


def test_augmented_images_are_shifted_or_flipped_views_of_themselves() -> None:
    images = torch.arange(8 * 64, dtype=torch.float32).reshape(8, 1, 8, 8) + 1
    generator = torch.Generator().manual_seed(0)
    (flipped,) = augmented("flip", [images], generator)
    is_same = [torch.equal(one, other) for one, other in zip(flipped, images, strict=True)]
    is_mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(is_same, is_mirrored, strict=True))
    assert 0 < sum(is_same) < 8
    (cropped,) = augmented("flip_and_crop", [images], generator)
    for view, image in zip(cropped, images, strict=True):
        padded = nn.functional.pad(image, (1, 1, 1, 1))
        windows = [
            window[:, y : y + 8, x : x + 8]
            for window in (padded, padded.flip(-1))
            for y in range(3)
            for x in range(3)
        ]
        assert any(torch.equal(view, window) for window in windows)


def test_swapped_spans_are_where_both_texts_are_and_leave_their_ends() -> None:
    n, length = 64, 12
    ids = torch.arange(n)[:, None] * 100 + torch.arange(length)  # text and place
    lengths = 2 + torch.arange(n) % (length - 1)
    kept = torch.arange(length) < lengths[:, None]
    generator = torch.Generator().manual_seed(0)
    views, mask = augmented("swap_spans", [ids, kept.long()], generator, kept)
    assert torch.equal(mask, kept.long())
    n_swapped = 0
    for text in range(n):
        others = torch.unique(views[text] // 100)
        others = others[others != text]
        assert len(others) <= 1
        assert torch.equal(views[text] % 100, torch.arange(length))
        places = torch.nonzero(views[text] // 100 != text).flatten()
        for other in others:
            n_swapped += 1
            assert places.min() >= 1
            assert places.max() < min(lengths[text], lengths[other]) - 1
            assert len(places) == places.max() - places.min() + 1
    assert n // 4 < n_swapped < n // 2 + 8
    longest = [int((row // 100 != text).sum()) for text, row in enumerate(views)]
    assert max(longest) >= length // 2


def test_swapped_spans_leave_padding_in_front_alone() -> None:
    kept = torch.arange(10) >= 6
    ids = torch.arange(40).reshape(4, 10)
    generator = torch.Generator().manual_seed(0)
    seen = [augmented("swap_spans", [ids], generator, kept.expand(4, 10))[0] for _ in range(40)]
    changed = torch.stack([one != ids for one in seen]).any(0).any(0)
    assert changed.tolist() == [False] * 7 + [True] * 2 + [False]


@pytest.mark.parametrize(
    ("name", "inputs", "kept", "message"),
    [
        ("flip", [torch.zeros(2, 5)], None, r"flip: got inputs \[2, 5\], want one \[n, channel"),
        ("swap_spans", [torch.zeros(2, 5)], None, r"swap_spans: got inputs \[2, 5\], want texts"),
        ("swap_spans", [torch.zeros(2, 5, 3)], torch.ones(2, 5, dtype=torch.bool), "want texts"),
    ],
)
def test_augmentation_refuses_inputs_of_another_kind(
    name: str, inputs: list[torch.Tensor], kept: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        augmented(name, inputs, torch.Generator(), kept)


def test_progress_waits_since_its_best_epoch() -> None:
    assert Progress().n_waited == 0
    assert Progress(held_out=[3.0, 1.0, 2.0, 1.5]).n_waited == 2


def test_answers_are_taken_by_the_name_of_the_output() -> None:
    class Two(nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return image.flatten(1)[:, :2], image.flatten(1)[:, 2:5]

    batch = data().read(np.arange(2))
    answers = answering(["a", "b"], "b")(Two(), batch, ())
    assert isinstance(answers, Answers)
    assert torch.equal(answers.output, batch.inputs[0].flatten(1)[:, 2:5])
