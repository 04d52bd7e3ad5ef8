"""What goes to the Hub: the model card, the push, and what must not get lost or out on the way."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import hf_api

from .card import CardDetails, write
from .config import AMPConfig
from .record import TrainingRecord

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Parent = Trainer
else:
    _Parent = object


class HubError(RuntimeError):
    """A push that failed, or could not begin. The message says why and what to do."""


class HubMixin(_Parent):
    """The part of `AMPTrainerMixin` that writes the model card and pushes it."""

    amp_config: AMPConfig
    card_details: CardDetails
    _pushes: list[Future]  # that were not found to be done

    # The Trainer's own.
    hub_model_id: Any
    push_in_progress: Any  # None, or something that has `jobs`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card_details = CardDetails()
        self.push_in_progress = None  # the parent has it in the process that pushes
        self._pushes = []
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = _Token(self.args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The parent's, which also makes the branch `hub_revision`. Raises `HubError`."""
        with _failing(
            f"Repository {self._repository()} cannot be pushed to",
            "Mend that, or leave push_to_hub out and push the trained model later.",
        ):
            super().init_hf_repo(token, private)
            self._ensure_branch(self.args.hub_revision, token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's. Raises `HubError` where it fails, after the model has been saved."""
        self.save_model(_internal_call=True)
        how = self._how_to_push(revision, private)
        with _failing(f"The push to {self._repository()} failed", how):
            if self.hub_model_id is None:
                self.init_hf_repo(token, private)
            self._ensure_branch(revision, token)
            pushed = super().push_to_hub(
                commit_message, blocking, token, revision, private, **kwargs
            )
        if isinstance(pushed, Future):
            pushed.add_done_callback(lambda job: self._report(job, how))
        return pushed

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output folder: the parent's card, completed by `card.write`.

        Results are those that `evaluate` logged last for each prefix, for example `test` after
        `trainer.evaluate(dataset, metric_key_prefix="test")`; `card_details` adds what only the
        script knows.
        """
        if not hasattr(self.model, "config"):  # where the parent looks for a base model
            kwargs.setdefault("finetuned_from", "")
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir), "README.md")
            known = {name: kwargs.get(name) for name in ("model_name", "tasks")}
            record = TrainingRecord.of(self, self.amp_config, **known)
            details = self.card_details
            if details.dataset is None and isinstance(dataset := kwargs.get("dataset"), str):
                details = replace(details, dataset=dataset)
            write(path, record, details)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            for code in Path(checkpoint_folder).glob("*.py"):  # the parent knows weights only
                shutil.copy(code, str(self.args.output_dir))
            self.create_model_card(model_name=self.hub_model_id.rpartition("/")[2])
        super()._push_from_checkpoint(checkpoint_folder)
        current = self.push_in_progress
        self._pushes += [job for job in current.jobs if job not in self._pushes] if current else []
        self._report_failed_pushes()

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Of those that run beside the training, which goes on; the Trainer says nothing."""
        done = [job for job in self._pushes if job.done()]
        for job in done:
            self._report(job, self._how_to_push())
        self._pushes = [job for job in self._pushes if job not in done]

    def _report(self, push: Future, how: str) -> None:
        if error := push.exception():
            logger.warning(f"A push to {self._repository()} failed: {_reason(error)}. {how}")

    def _repository(self) -> str:
        folder = Path(str(self.args.output_dir)).absolute().name
        return self.hub_model_id or self.args.hub_model_id or folder

    def _how_to_push(self, revision: str | None = None, private: bool | None = None) -> str:
        folder = str(self.args.output_dir)
        words = ["hf", "upload", self._repository(), folder, "."]
        words += ["--exclude", "checkpoint-*", "--exclude", "_*"]
        if revision := revision or self.args.hub_revision:
            words += ["--revision", revision]
        if self.args.hub_private_repo if private is None else private:
            words += ["--private"]
        login = "" if self.args.hub_token is None else ", after `hf auth login`"
        return f"The model is safe in {folder}; this pushes it again{login}: {shlex.join(words)}"

    def _ensure_branch(self, name: str | None, token: str | None) -> None:
        if name and self.is_world_process_zero():
            token = token or self.args.hub_token
            hf_api().create_branch(self.hub_model_id, branch=name, token=token, exist_ok=True)


class _Token(str):
    """Is in no pickle: the Trainer saves its arguments with every model, and pushes them."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> _Token:
        return self

    def __repr__(self) -> str:
        return "'<HUB_TOKEN>'"


@contextlib.contextmanager
def _failing(what: str, remedy: str) -> Iterator[None]:
    """Whatever is raised inside becomes a `HubError`: the clients' errors have no common class."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, HubError) else error
        raise HubError(f"{what}: {_reason(cause)}. {remedy}") from cause


_STATUS = {
    401: "the token is missing or not valid: run `hf auth login` or set HF_TOKEN",
    403: "the token may not write there",
    404: "there is no such repository or branch, or the token may not see it",
    409: "somebody else changed the repository at the same time",
    429: "the Hub got too many requests: wait some minutes",
}


def _reason(error: BaseException | None) -> str:
    """One line, of the Hub's answer if there is one in the chain of causes."""
    first = error
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    if error is None:
        line = next(iter(str(first).strip().splitlines()), "")
        return f"{type(first).__name__}: {line}".removesuffix(": ").rstrip(".")
    status = error.response.status_code
    meaning = _STATUS.get(status) or (error.server_message or "").strip().rstrip(".")
    reason = f"{status} {error.response.reason_phrase}".strip()
    return f"{reason} ({meaning})" if meaning else reason
