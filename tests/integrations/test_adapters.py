"""Peers in the trainers of Lightning, transformers and timm: losses and weights of codistill's own step, in float64."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from codistill.methods import DML, KDCL, Codistillation
from codistill.peers import NetworkPeers
from codistill.utils import InputError
from helpers.common import close
from helpers.reference_loop import CASES, EPOCHS, NAMES, make_optimizer, train_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
JOINT = [case for case in CASES if case[1].get("update") != "alternating" and not case[1].get("holdout_fraction")]
JOINT_NAMES = [name for case, name in zip(CASES, NAMES, strict=True) if case in JOINT]


def views_of(batch):
    """Return a batch's views as a loader of others would give them: a tensor for all, or a list of one a peer."""
    views, targets = batch
    return (views[0] if len(views) == 1 else [*views]), targets


class Batches(Dataset):
    """The reference's batches as the items of a data set."""

    def __init__(self, reference):
        self.items = [views_of(batch) for batch in reference.batches]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def check_equal(ours, reference, losses=None):
    """Compare weights, and losses where the trainer shows them."""
    for name, value in reference.trained.state_dict().items():
        close(ours.peers.state_dict()[name].double(), value.double())
    if losses is not None:
        close(torch.tensor(losses, dtype=torch.float64), torch.tensor(reference.losses, dtype=torch.float64))


def check_student(student, reference):
    """Check that the student is plain and the deployed member."""
    assert {type(m).__module__.partition(".")[0] for m in student.modules()} <= {"torch", "tiny_network"}
    images = reference.batches[0][0][0]
    close(student(images), reference.student(images))


# ---------------------------------------------------------------------------------------------------------- Lightning


def run_lightning(reference, folder, epochs, checkpoint=None, validation=None):
    lightning = pytest.importorskip("lightning")
    from codistill.integrations import PeerModule

    losses = []

    class Recording(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
            losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))

    module = PeerModule(reference.peers, reference.method, make_optimizer, teacher=reference.teacher).double()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[Recording()], precision="64-true",
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Batches(reference), batch_size=None)
    trainer.fit(module, loader, validation, ckpt_path=checkpoint)
    return module, trainer, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "topology"), [case for case in CASES if not case[1].get("holdout_fraction")]
)
def test_lightning_equals_the_own_step(name, options, topology, tmp_path):
    reference = train_reference(name, options, topology)
    module, _, losses = run_lightning(reference, tmp_path, EPOCHS)
    check_equal(module.peer_training, reference, losses)
    check_student(module.student(), reference)


def test_lightning_continues_from_its_checkpoint_and_validates(tmp_path):
    case = ("pcl", {"ema_decay": 0.9}, "networks")
    reference = train_reference(*case)
    _, trainer, _ = run_lightning(reference, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = train_reference(*case)
    validation = torch.utils.data.DataLoader([(b[0][0], b[1]) for b in again.batches], batch_size=None)
    module, trainer, losses = run_lightning(again, tmp_path, EPOCHS, tmp_path / "last.ckpt", validation)
    check_equal(module.peer_training, reference)
    close(torch.tensor(losses).double(), torch.tensor(reference.losses[len(reference.batches) :]).double())
    images, labels = again.batches[0][0][0], again.batches[0][1]
    for batch, targets in [(b[0][0], b[1]) for b in again.batches][1:]:
        images, labels = torch.cat((images, batch)), torch.cat((labels, targets))
    expected = 100 * (module.student()(images).argmax(1) == labels).double().mean()
    assert trainer.callback_metrics["val_top1"].item() == pytest.approx(expected.item(), abs=1e-3)
    (tested,) = trainer.test(module, validation, verbose=False)
    assert tested["test_top1"] == pytest.approx(expected.item(), abs=1e-3)
    assert {*tested} == {"test_top1", "test_nll", "test_ensemble_top1"}
    unlabeled = torch.utils.data.DataLoader([b[0][0] for b in again.batches], batch_size=None)
    for loader in (validation, unlabeled):
        close(torch.cat(trainer.predict(module, loader)), module.student()(images))


# ------------------------------------------------------------------------------------------------------- transformers


class Rows(Dataset):
    """The reference's batches, one row an item, in the mapping that a network of transformers takes."""

    def __init__(self, reference):
        self.rows = [
            {"x": image, "labels": int(label)}
            for views, targets in reference.batches
            for image, label in zip(views[0], targets, strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_trainer(reference, folder, epochs, **more):
    transformers = pytest.importorskip("transformers")
    from codistill.integrations import PeerTrainer

    losses = []

    class Recording(PeerTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            losses.append(float(loss[0] if return_outputs else loss)) if model.training else None
            return loss

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    batch = len(reference.batches[0][1])
    args = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=batch, use_cpu=True,
        report_to=[], save_strategy="epoch", logging_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        per_device_eval_batch_size=batch, **more,
    )  # fmt: skip
    rows = Rows(reference)
    optimizer = make_optimizer(
        [p for p in [*reference.peers.parameters(), *reference.method.parameters()] if p.requires_grad]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = Recording(
        reference.peers, reference.method, args, teacher=reference.teacher, train_dataset=rows, eval_dataset=rows,
        optimizers=(optimizer, schedule),
        compute_metrics=lambda p: {"top1": 100 * float((p.predictions.argmax(1) == p.label_ids).mean())},
    )  # fmt: skip
    return trainer, losses


ONE_VIEW = [case for case in JOINT if case[0] not in ("pcl", "kdcl")]  # a batch of the trainer is one view


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "topology"), ONE_VIEW)
def test_transformers_equals_the_own_step(name, options, topology, tmp_path):
    reference = train_reference(name, options, topology)
    trainer, losses = make_trainer(reference, tmp_path, EPOCHS)
    trainer.train()
    check_equal(trainer.peer_training, reference, losses)
    check_student(trainer.student(), reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("codistillation", {"interval": 1, "interval_unit": "epochs", "burn_in_epochs": 0}, "networks"),
        ("okddip", {}, "branches"),
    ],
)
def test_transformers_continues_from_its_checkpoint_and_evaluates(case, tmp_path):
    reference = train_reference(*case)
    make_trainer(reference, tmp_path, 1)[0].train()
    again = train_reference(*case)
    trainer, losses = make_trainer(again, tmp_path, EPOCHS)
    trainer.train(resume_from_checkpoint=True)
    check_equal(trainer.peer_training, reference)
    close(torch.tensor(losses).double(), torch.tensor(reference.losses[len(reference.batches) :]).double())
    figures = trainer.evaluate()
    student = trainer.student()
    logits = torch.cat([student(views[0]) for views, _ in again.batches])
    labels = torch.cat([targets for _, targets in again.batches])
    assert figures["eval_top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()), abs=1e-3)
    assert figures["eval_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize(("name", "options", "topology"), JOINT, ids=JOINT_NAMES)
def test_timm_equals_the_own_step(name, options, topology):
    pytest.importorskip("timm.task")
    from codistill.integrations import PeerTask

    reference = train_reference(name, options, topology)
    task = PeerTask(reference.peers, reference.method, len(reference.batches), reference.teacher, dtype=torch.float64)
    optimizer = make_optimizer(task.trainable_module.trained_parameters())
    task.attach(optimizer)
    losses = []
    task.train()
    for _ in range(EPOCHS):
        for batch in reference.batches:
            result = task(*views_of(batch))
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            losses.append(result["loss"].item())
            assert result["output"].shape == (len(batch[1]), 10)
    check_equal(task.trainable_module, reference, losses)
    check_student(task.student(), reference)
    state = copy.deepcopy(task.get_checkpoint_state()["state_dict"])
    other = train_reference(name, options, topology)
    fresh = PeerTask(other.peers, other.method, len(other.batches), other.teacher, dtype=torch.float64)
    fresh.load_checkpoint_state(state)
    assert fresh.trainable_module.steps_done == len(losses)
    check_student(fresh.student(), reference)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_a_trainer_cannot_do_is_refused_in_a_sentence(tmp_path):
    transformers = pytest.importorskip("transformers")
    from codistill.integrations import PeerTask, PeerTrainer

    peers = NetworkPeers("tiny_network:Tiny", 2, 10, in_channels=1, image_size=8)
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(InputError, match=r'dml updates one member after the other, which Trainer cannot; .*"joint"'):
        PeerTrainer(peers, DML(2), args)
    with pytest.raises(InputError, match=r'dml updates one member after the other, which a task cannot; .*"joint"'):
        PeerTask(peers, DML(2), 3)
    args.gradient_accumulation_steps = 2
    with pytest.raises(InputError, match=r"dml needs the whole batch at once .* 2 batches a step"):
        PeerTrainer(peers, DML(2, update="joint", divergence="dist"), args)


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def mlp(num_classes):
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, num_classes))


ROWS, LABELS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def fit_lightning(loader, method, peers=None, schedule=None, **options):
    lightning = pytest.importorskip("lightning")
    from codistill.integrations import PeerModule

    peers = NetworkPeers(mlp, 2, 3, example=ROWS) if peers is None else peers
    module = PeerModule(peers, method, make_optimizer, schedule)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module, trainer


def fit_transformers(rows, method, more=None, **args):
    transformers = pytest.importorskip("transformers")
    from codistill.integrations import PeerTrainer

    args = transformers.TrainingArguments(
        output_dir="unused", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, **args,
    )  # fmt: skip
    trainer = PeerTrainer(NetworkPeers(mlp, 2, 3, example=ROWS), method, args, train_dataset=rows, **(more or {}))
    trainer.train()
    return trainer


def named_rows(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_lightning_takes_data_without_a_length():
    loader = torch.utils.data.DataLoader(Stream(list(zip(ROWS, LABELS, strict=True))), batch_size=4)
    module, _ = fit_lightning(loader, KDCL(2, own_views=False))
    assert module.peer_training.steps_done == 6
    with pytest.raises(InputError, match=r"codistillation acts at certain steps .* no length; .*limit_train_batches"):
        fit_lightning(loader, Codistillation(2, interval_unit="epochs"))
    module, _ = fit_lightning(loader, Codistillation(2, interval_unit="epochs"), limit_train_batches=2)
    assert module.peer_training.steps_per_epoch == 2


def test_lightning_takes_the_lists_that_a_loader_makes_of_tuples():
    class Pair(torch.nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.first, self.second, self.head = *(torch.nn.Linear(5, 8) for _ in "ab"), torch.nn.Linear(8, num_classes)

        def forward(self, first, second):
            return self.head((self.first(first) + self.second(second)).relu())

    rows = [((x, -x), label) for x, label in zip(ROWS, LABELS, strict=True)]
    for count in (2, 3):
        peers = NetworkPeers(Pair, count, 3, example=(ROWS, ROWS))
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        module, trainer = fit_lightning(loader, KDCL(count, own_views=False), peers)
        for batches in (loader, torch.utils.data.DataLoader([x for x, _ in rows], batch_size=4)):
            close(torch.cat(trainer.predict(module, batches)), module.student()(ROWS, -ROWS))
    close(peers([ROWS, -ROWS]).logits_PBC, peers((ROWS, -ROWS)).logits_PBC)
    views = [(ROWS * v, -ROWS) for v in range(count)]
    close(peers([list(view) for view in views]).logits_PBC, peers(views).logits_PBC)


def test_lightning_weighs_the_loss_by_rows_where_views_are_stacked():
    batches = [(torch.stack([ROWS[:8], ROWS[:8] + 1]), LABELS[:8]), (torch.stack([ROWS[8:], ROWS[8:]]), LABELS[8:])]
    losses = []
    lightning = pytest.importorskip("lightning")

    class Recording(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
            losses.append(float(outputs["loss"]))

    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    _, trainer = fit_lightning(loader, KDCL(2), callbacks=[Recording()])
    expected = (8 * losses[2] + 4 * losses[3]) / 12
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("batches", "schedule", "words"),
    [
        (named_rows(x=ROWS, label=LABELS), None, r"a batch is a dict; PeerModule takes pairs"),
        ([(x, y, 0) for x, y in zip(ROWS, LABELS, strict=True)], None, r"a batch is 3 parts; PeerModule takes pairs"),
        (list(zip(ROWS, LABELS, strict=True)), torch.optim.lr_scheduler.ReduceLROnPlateau, r"ReduceLROnPlateau steps"),
        (
            list(zip(ROWS, LABELS, strict=True)),
            lambda o: {"scheduler": torch.optim.lr_scheduler.ConstantLR(o), "interval": "step"},
            r"PeerModule steps it once an epoch",
        ),
    ],
)
def test_what_the_lightning_module_does_not_take_is_said(batches, schedule, words):
    with pytest.raises(InputError, match=words):
        fit_lightning(torch.utils.data.DataLoader(batches, batch_size=4), KDCL(2, own_views=False), schedule=schedule)


def test_transformers_takes_data_without_a_length():
    rows = Stream(named_rows(x=ROWS, labels=LABELS))
    trainer = fit_transformers(rows, DML(2, update="joint"), max_steps=7)
    assert trainer.peer_training.steps_done == 7
    with pytest.raises(InputError, match=r"kdcl counts epochs, and the training data set has no length; define"):
        fit_transformers(rows, Ramped(2, own_views=False), max_steps=7)


class Ramped(KDCL):
    """It has a ramp, of two epochs."""

    def weight_at(self, epoch):
        return min(epoch / 2, 1.0)


def test_transformers_predicts_for_data_without_labels():
    trainer = fit_transformers(named_rows(x=ROWS, labels=LABELS), DML(2, update="joint"), num_train_epochs=1)
    predictions = trainer.predict(named_rows(x=ROWS)).predictions
    close(torch.tensor(predictions), trainer.student()(ROWS).detach())


@pytest.mark.parametrize(
    ("columns", "options", "more", "words"),
    [
        ({"x": ROWS, "target": LABELS}, {}, {}, r"a batch holds x, target; PeerTrainer takes .* by the name labels"),
        ({"x": ROWS, "i": LABELS, "labels": LABELS}, {}, {}, r"a batch holds x, i beside labels, .* take one tensor"),
        ({"x": ROWS, "labels": LABELS}, {"label_smoothing_factor": 0.1}, {}, r"label_smoothing_factor is not applied"),
        ({"x": ROWS, "labels": LABELS}, {"gradient_checkpointing": True}, {}, r"set checkpoint_activations = True on"),
        ({"x": ROWS, "labels": LABELS}, {"neftune_noise_alpha": 5.0}, {}, r"neftune_noise_alpha takes a model"),
        ({"x": ROWS, "labels": LABELS}, {}, {"compute_loss_func": print}, r"compute_loss_func: the method makes"),
        ({"x": ROWS, "labels": LABELS}, {}, {"model_init": mlp}, r"PeerTrainer trains the peers; leave model"),
    ],
)
def test_what_the_trainer_does_not_take_is_said(columns, options, more, words):
    with pytest.raises(InputError, match=words):
        fit_transformers(named_rows(**columns), DML(2, update="joint"), more, num_train_epochs=1, **options)


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("lightning", "PeerModule", "PeerModule needs: pip install lightning"),
        ("transformers", "PeerTrainer", "PeerTrainer needs: pip install 'transformers"),
        ("timm.task", "PeerTask", "PeerTask needs: pip install 'timm>=1.0.23'"),
    ],
)
def test_a_missing_or_old_library_is_named(module, name, words, monkeypatch):
    import importlib
    import sys

    file = {"PeerModule": "lightning_module", "PeerTrainer": "transformers_trainer", "PeerTask": "timm_task"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"codistill.integrations.{file}", raising=False)
    with pytest.raises(InputError, match=words):
        importlib.import_module(f"codistill.integrations.{file}")


@pytest.mark.slow
def test_lightning_in_two_processes_trains_as_in_one():
    pytest.importorskip("lightning")
    script = Path(__file__).parents[1] / "helpers" / "lightning_two_processes.py"
    command = [sys.executable, "-W", "ignore", str(script), "okddip"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    gaps = {int(rank): float(gap) for rank, gap in re.findall(r"okddip, rank (\d): ([\d.e+-]+)", done.stdout)}
    assert gaps.keys() == {0, 1}, done.stderr[-2000:]
    assert max(gaps.values()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["loop", "timm", "trainer"])
def test_two_processes_train_as_one(loop):
    pytest.importorskip({"timm": "timm.task", "trainer": "transformers"}.get(loop, "torch"))
    script = Path(__file__).parents[1] / "helpers" / "two_processes.py"
    command = [sys.executable, "-W", "ignore", str(script), loop, "okddip", "codistillation"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.findall(r"(okddip|codistillation), rank (\d): ([\d.e+-]+)", done.stdout)
    assert len(found) == 4, done.stderr[-2000:]
    assert max(float(gap) for _, _, gap in found) < 1e-12
