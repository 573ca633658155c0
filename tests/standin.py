"A learner without a model: it emits the events of a fit and records what a GAN records, as fast as it is told to."
import math
import time

import torch

from trainkit.callback import EVENTS, CallbackList
from trainkit.history import History


class Run:
    "The attributes that a view may read, and a `fit` that ends as it is told."

    def __init__(self, *cbs, batches=10, seconds=0.0, run=None, pictures=True, sized=True, valid=2):
        self.cbs, self.history, self.run, self.players = CallbackList(cbs), History(), run, []
        self.step = self.epoch = self.batch_idx = self.fit_start = 0
        self.batches, self.seconds, self.valid, self.sized = batches, seconds, valid, sized
        self.batches_per_epoch = batches if sized else None
        self.fit_steps, self.state, self.error, self.name, self.device = None, "idle", None, "run", torch.device("cpu")
        if pictures: self.sample_fixed = lambda: torch.full((8, 1, 8, 8), math.sin(self.step))

    def emit(self, event):
        assert event in EVENTS
        for act in self.cbs.handlers(event): act(self)

    def fit(self, epochs=1, end="finished", at=None):
        "Train; at step `at`, end by state `end` ('stopped', 'interrupted') or by raising it."
        self.fit_start, self.state, self.error = self.step, "training", None
        self.fit_steps = epochs * self.batches - self.batch_idx if self.sized else None
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
