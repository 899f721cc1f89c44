"""What each step trains on: walks the data stages, one open at a time."""

from collections.abc import Iterator

import torch

from pentode import device as devices
from pentode import log
from pentode.config.schema import Config
from pentode.data.loader import Loader, validation_batches
from pentode.data.open import StageData
from pentode.data.stages import Stage, plan_stages, stage_at
from pentode.data.tokenizer import Tokenizer
from pentode.data.windows import fingerprint_of
from pentode.dist.mesh import Mesh
from pentode.dist.together import in_turn
from pentode.parallel.batch import Batch


class Feed:
    """Gives every step its micro-batches, on the device; opens a stage's data when its first step comes."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device, *, data: StageData | None = None) -> None:
        self.stages = plan_stages(
            config.data_stages, train_steps=config.tokens.train_steps, sequence_length=config.tokens.sequence_length
        )
        self.config, self.mesh, self.device = config, mesh, device
        self.vocab_size = config.model.model_config.vocab_size  # -1 until the data told it
        self.stage: Stage | None = None if data is None else self.stages[0]
        self.data = data  # given ready made, it is the only stage's
        self.loader: Loader | None = None

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` belongs to."""
        return stage_at(self.stages, step)

    def open(self, step: int) -> StageData:
        """The data of the stage that `step` belongs to, opened if it is not."""
        stage = self.stage_at(step)
        if self.data is None or self.stage != stage:
            if self.stage is not None:
                log.info(
                    f"[Training Stage: {stage.name}] Clearing the previous training stage's dataloader and datasets "
                    "from memory"
                )
                self.close()
            self.stage, self.data = stage, self._open_in_turn(stage)
        return self.data

    def batches(self, step: int, *, consumed: int, first_number: int) -> list[Batch]:
        """This data rank's micro-batches of `step`, in the host's memory, pinned for a GPU.

        consumed      samples that the stage has given before
        first_number  samples that the whole run has seen before
        """
        data = self.open(step)
        if self.loader is None:
            self.loader = self._loader(data)
        return self.loader.step_batches(consumed, first_number=first_number)

    def validation(self, step: int) -> Iterator[Batch]:
        """This data rank's held-out micro-batches, the same ones each time; none if nothing is held out."""
        held_out = self.open(step).validation
        if held_out is None:
            return
        tokens, data = self.config.tokens, self.mesh.data
        for batch in validation_batches(
            held_out,
            vocab_size=self.vocab_size,
            micro_batch_size=tokens.micro_batch_size,
            limit=tokens.limit_val_batches,
            rank=data.rank,
            ranks=data.size,
            pin=devices.is_gpu(self.device),
        ):
            yield batch.to(self.device)

    @property
    def order_key(self) -> str:
        """A hash of all that decides which tokens the open stage's n-th sample has."""
        args = self.config.data_stages[self.stage.index].data
        return fingerprint_of(self.data.fingerprint, len(self.data.train), self.stage.sequence_length, args.seed)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The open stage's tokenizer, which checkpoints carry."""
        return None if self.data is None else self.data.tokenizer

    def stop(self) -> None:
        """Prepare no more batches; the open stage's data stays."""
        if self.loader is not None:
            self.loader.close()
        self.loader = None

    def close(self) -> None:
        """Let the open stage go."""
        self.stop()
        self.data = None

    def _open_in_turn(self, stage: Stage) -> StageData:
        """First on one rank, which prepares and keeps what the others then only read."""

        def opened() -> StageData:
            return StageData.open(
                self.config.data_stages[stage.index],
                sequence_length=stage.sequence_length,
                tokenizer_args=self.config.tokenizer,
                vocab_size=self.vocab_size,
            )

        return in_turn(opened, self.mesh.world)

    def _loader(self, data: StageData) -> Loader:
        tokens, args = self.config.tokens, self.config.data_stages[self.stage.index].data
        return Loader(
            data.train,
            seed=args.seed,
            vocab_size=self.vocab_size,
            micro_batch_size=tokens.micro_batch_size,
            micro_batches=tokens.batch_accumulation_per_replica,
            rank=self.mesh.data.rank,
            ranks=self.mesh.data.size,
            workers=args.num_loading_workers,
            pin=devices.is_gpu(self.device),
        )
