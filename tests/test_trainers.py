"""One training in Lightning, Transformers, Accelerate and plain torch: the same numbers.

The model holds running mixtures, is averaged, saved in the middle and resumed, and is trained by
one process and by two.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from multialign import GaussianMomentLoss, MMDLoss, PrototypeAlignmentLoss

EPOCHS, STEPS, BATCH = 2, 6, 16
HALF = STEPS // 2
PRECISIONS = {
    "32-true": None,
    "bf16-mixed": None,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:::accelerate"),
]


class Model(nn.Module):
    """Linear maps of two modalities, and losses that bring them together."""

    def __init__(self, group=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(d, 4, dtype=torch.float32) for d in (5, 6))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.prototypes = PrototypeAlignmentLoss(
            3,
            momentum=0.2,
            num_features=4,
            num_modalities=2,
            em_iterations=2,
            cost_reduction="mean",
            generator=torch.Generator().manual_seed(1),
            process_group=group,
        ).float()
        self.others = nn.ModuleList(
            kind(process_group=group) for kind in (GaussianMomentLoss, MMDLoss)
        )
        self.history = []

    def forward(self, a, b):
        features = [f(x) for f, x in zip(self.maps, (a, b))]
        loss = self.prototypes(features) + sum(loss(features) for loss in self.others)
        self.history.append(loss.item())
        return {"loss": loss}


class Rows(Dataset):
    """The samples of an epoch, in their order; a part of each batch for one of several ranks."""

    def __init__(self, dtype=None, rank=0, ranks=1):
        generator = torch.Generator().manual_seed(2)
        rows = [
            torch.randn(HALF, BATCH, d, generator=generator, dtype=torch.float32) for d in (5, 6)
        ]
        rows = [x.chunk(ranks, 1)[rank].flatten(0, 1) for x in rows]
        self.rows = [x if dtype is None else x.to(dtype) for x in rows]

    def __len__(self):
        return len(self.rows[0])

    def __getitem__(self, index):
        return dict(zip("ab", (x[index] for x in self.rows)))


def loader(dtype=None, rank=0, ranks=1):
    return DataLoader(Rows(dtype, rank, ranks), batch_size=BATCH // ranks)


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def average_of(model):
    return AveragedModel(model, use_buffers=True)


def train_plainly(precision="32-true", rank=0, ranks=1, group=None):
    """Return the model and its average after a loop in plain torch."""
    dtype = PRECISIONS[precision]
    model = Model(group) if dtype is None else Model(group).to(dtype)
    average, optimizer = average_of(model), optimizer_of(model)
    call = model if ranks == 1 else DistributedDataParallel(model)
    for batch in [*loader(dtype, rank, ranks)] * EPOCHS:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = call(**batch)["loss"]
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
    return model, average


def train_sharded(rank, group):
    """Return the state and the losses of a model whose parameters are sharded over two ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    model = Model(group)
    fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = optimizer_of(model)
    for batch in [*loader(None, rank, 2)] * EPOCHS:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    options = StateDictOptions(full_state_dict=True)
    return get_model_state_dict(model, options=options), model.history


def assert_same(model, expected, rtol=1e-5, atol=1e-6):
    """Compare parameters and buffers, running mixtures included, and the losses of all steps."""
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=rtol, atol=atol)
    count = len(model.history)
    assert count in (STEPS, HALF)  # of the resumed half
    torch.testing.assert_close(model.history, expected.history[-count:], rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def usual_dtype():
    """Trainers make tensors of their own, as in a user's process."""
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def test_the_losses_differ_from_step_to_step():
    model, average = train_plainly()
    assert len(set(model.history)) == STEPS
    assert all(part.num_batches_tracked == STEPS for part in model.prototypes.prototypes)
    assert not torch.equal(average.module.maps[0].weight, model.maps[0].weight)


# --- Lightning -----------------------------------------------------------------------------------


def lightning_module(lightning, model):
    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return optimizer_of(self)

    return Task()


class Averaging:
    """Keep the average in Lightning's checkpoints."""

    def __init__(self, lightning, model):
        average = self.average = average_of(model)

        class Callback(lightning.pytorch.callbacks.Callback):
            def on_train_batch_end(self, trainer, task, *args):
                average.update_parameters(task.model)

            def state_dict(self):
                return copy.deepcopy(average.state_dict())

            def load_state_dict(self, state):
                average.load_state_dict(state)

        self.callback = Callback()


def lightning_fit(folder, precision, epochs, checkpoint=None, rank=0, ranks=1, group=None):
    lightning = pytest.importorskip("lightning")
    model = (
        Model(group) if PRECISIONS[precision] is None else Model(group).to(PRECISIONS[precision])
    )
    averaging = Averaging(lightning, model)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        precision=precision,
        max_epochs=epochs,
        callbacks=[averaging.callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    task = lightning_module(lightning, model)
    trainer.fit(task, loader(PRECISIONS[precision], rank, ranks), ckpt_path=checkpoint)
    return trainer, model, averaging.average


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lightning(precision, tmp_path):
    expected, average = train_plainly(precision)
    _, model, averaged = lightning_fit(tmp_path, precision, EPOCHS)
    assert_same(model, expected)
    torch.testing.assert_close(averaged.state_dict(), average.state_dict())
    # Saved after half of the steps, and resumed by new objects.
    trainer, _, _ = lightning_fit(tmp_path, precision, 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, model, averaged = lightning_fit(tmp_path, precision, EPOCHS, tmp_path / "half.ckpt")
    assert_same(model, expected)
    torch.testing.assert_close(averaged.state_dict(), average.state_dict())


def test_lightning_restores_the_state_before_the_first_batch(tmp_path):
    """As its learning-rate finder does."""
    lightning = pytest.importorskip("lightning")
    model = Model()
    task = lightning_module(lightning, model)
    task.lr, task.configure_optimizers = 0.01, lambda: torch.optim.SGD(task.parameters(), task.lr)
    first = copy.deepcopy(model.state_dict())
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    finder = lightning.pytorch.tuner.Tuner(trainer).lr_find(
        task, loader(), num_training=5, update_attr=False
    )
    assert len(finder.results["loss"]) >= 4
    torch.testing.assert_close(model.state_dict(), first, rtol=0, atol=0)


# --- Transformers --------------------------------------------------------------------------------


def test_transformers(tmp_path, transformers_with_models):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(loader())

    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_steps=HALF,
            report_to=[],
            disable_tqdm=True,
        )
        optimizer = optimizer_of(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return InOrder(model, arguments, train_dataset=Rows(), optimizers=(optimizer, scheduler))

    expected, _ = train_plainly()
    model = Model()
    trainer(model, STEPS).train()
    assert_same(model, expected)
    resumed = Model()
    trainer(resumed, STEPS).train(str(tmp_path / f"checkpoint-{HALF}"))
    assert_same(resumed, expected)


# --- Accelerate ----------------------------------------------------------------------------------


def accelerate_fit(steps=STEPS, load=None, save=None, rank=0, ranks=1, group=None):
    """Train with Accelerate, from a saved state and to one where they are given."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain = Model(group)
    average, optimizer = average_of(plain), optimizer_of(plain)
    model, optimizer = accelerator.prepare(plain, optimizer)
    accelerator.register_for_checkpointing(average)
    first = 0
    if load is not None:
        accelerator.load_state(load)
        first = HALF
    for index, batch in enumerate([*loader(None, rank, ranks)] * EPOCHS):
        if not first <= index < steps:
            continue
        optimizer.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        average.update_parameters(plain)
    if save is not None:
        accelerator.save_state(save)
    accelerator.free_memory()
    return plain, average


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    expected, average = train_plainly()
    model, averaged = accelerate_fit()
    assert_same(model, expected)
    torch.testing.assert_close(averaged.state_dict(), average.state_dict())
    accelerate_fit(HALF, save=str(tmp_path))
    model, averaged = accelerate_fit(load=str(tmp_path))
    assert_same(model, expected)
    torch.testing.assert_close(averaged.state_dict(), average.state_dict())


# --- two processes -------------------------------------------------------------------------------


def in_two_processes(rank, folder, with_accelerate, with_lightning):
    """Train on half of each batch, by each of the trainers, and save the results."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
        ACCELERATE_USE_CPU="true",
    )
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    results = {"plain": train_plainly("32-true", rank, 2, group)}
    if with_accelerate:
        results["accelerate"] = accelerate_fit(rank=rank, ranks=2, group=group)
    if with_lightning:
        results["lightning"] = lightning_fit(folder, "32-true", EPOCHS, None, rank, 2, group)[1:]
    saved = {
        name: (model.state_dict(), average.state_dict(), model.history)
        for name, (model, average) in results.items()
    }
    if hasattr(fsdp, "fully_shard"):  # from torch 2.6 on
        state, history = train_sharded(rank, group)
        saved["sharded"] = (state, None, history)
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """As one process with all samples of the batch."""
    found = []
    for package in ("accelerate", "lightning"):
        try:
            __import__(package)
            found.append(True)
        except ImportError:
            found.append(False)
    mp.spawn(in_two_processes, (str(tmp_path), *found), nprocs=2)
    model, average = train_plainly()
    for rank in range(2):
        for state, averaged, history in torch.load(tmp_path / f"{rank}.pt").values():
            options = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(state, model.state_dict(), **options)
            torch.testing.assert_close(history, model.history, **options)
            if averaged is not None:
                torch.testing.assert_close(averaged, average.state_dict(), **options)
