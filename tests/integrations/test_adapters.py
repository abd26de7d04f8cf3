"""Peers in the trainers of Lightning, transformers and timm: losses and weights of codistill's own step, in float64."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from codistill.methods import DML
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
