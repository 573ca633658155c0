"A learner without a model: it emits the events of a fit and records what a GAN records, as fast as it is told to."
import math
import time

import torch

from trainkit.callback import EVENTS, CallbackList
from trainkit.controls import Control
from trainkit.history import History
from trainkit.journal import Journal


class Run:
    "The attributes that a view may read, and a `fit` that ends as it is told."

    def __init__(self, *cbs, batches=10, seconds=0.0, run=None, pictures=True, sized=True, valid=2):
        self.cbs, self.history, self.run, self.players = CallbackList(cbs), History(), run, []
        self.step = self.epoch = self.batch_idx = self.fit_start = 0
        self.batches, self.seconds, self.valid, self.sized = batches, seconds, valid, sized
        self.batches_per_epoch = batches if sized else None
        self.fit_steps, self.state, self.error, self.name, self.device = None, "idle", None, "run", torch.device("cpu")
        self.target_epoch, self._began = None, time.monotonic()
        self.journal, self.checkpoints = Journal(), None
        if pictures: self.sample_fixed = lambda: torch.full((8, 1, 8, 8), math.sin(self.step))

    def emit(self, event):
        assert event in EVENTS
        for act in self.cbs.handlers(event): act(self)

    def status(self):
        "What a learner tells a display."
        losses = {n.split("/")[1]: float(v[-20:].mean()) for n, (_, v) in self.history.snapshot().scalars.items()
                  if n.startswith("train/")}  # fmt: skip
        return {"name": "Run", "run": None if self.run is None else str(self.run), "state": self.state, "paused": False,
                "step": self.step, "start": self.fit_start, "steps": self.fit_steps, "epoch": self.epoch,
                "epochs": self.target_epoch, "batch": self.batch_idx, "batches": self.batches_per_epoch, "rate": None,
                "elapsed": time.monotonic() - self._began, "eta": None, "device": "cpu", "memory": 123_000_000,
                "error": "" if self.error is None else f"{type(self.error).__name__}: {self.error}", "losses": losses}

    def controls(self):
        "One knob, which turns nothing."
        return [Control("lr", "generator", (0.1,), ("",), 0.0, 1.0, (0.01, 1.0), log=True)]

    def fit(self, epochs=1, end="finished", at=None):
        "Train; at step `at`, end by state `end` ('stopped', 'interrupted') or by raising it."
        self.fit_start, self.state, self.error, self._began = self.step, "training", None, time.monotonic()
        self.target_epoch = self.epoch + epochs
        self.fit_steps = epochs * self.batches - self.batch_idx if self.sized else None
        for cb in self.cbs: cb.setup(self)
        try:
            self.emit("before_fit")
            self._epochs(self.epoch + epochs, end, at)
            self.emit("after_fit")
        except BaseException as error:
            self.state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.error = None if isinstance(error, KeyboardInterrupt) else error
            raise
        finally: self.emit("cleanup_fit")

    def _epochs(self, target, end, at):
        while self.epoch < target:
            self.emit("before_epoch")
            while self.batch_idx < self.batches:
                self._batch()
                if self.step == at:
                    if isinstance(end, BaseException): raise end
                    self.state = end
                    self.history.mark(end, self.step)
                    return
            self._validate()
            self.epoch, self.batch_idx = self.epoch + 1, 0
            self.history.mark("epoch", self.step, str(self.epoch))
            self.emit("after_epoch")
        self.state = "finished"

    def _batch(self):
        self.emit("before_batch")
        time.sleep(self.seconds)
        self.step, self.batch_idx = self.step + 1, self.batch_idx + 1
        for player, loss in (("discriminator", 1.0), ("generator", 0.5)):
            self.history.add(f"train/{player}/loss", torch.tensor(loss), self.step)
        self.emit("after_batch")

    def _validate(self):
        self.state = "validating"
        self.emit("before_validate")
        for _ in range(self.valid): self.emit("after_validate_batch")
        self.history.add("valid/score", self.step / 100, self.step)
        self.emit("after_validate")
        self.state = "training"
