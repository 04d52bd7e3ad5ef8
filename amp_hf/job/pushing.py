"""Pushes to the Hub that lose no model and leak no token."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, create_branch
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import HubStrategy

from ..config import AMP_CONFIG_NAME
from ..trainer import AMPTrainer
from .folder import OF_A_RUN

logger = logging.getLogger(__name__)


class HubError(RuntimeError):
    """A push failed, or could not begin. The message says why, and what to do."""


class PushingTrainer(AMPTrainer):
    """An `AMPTrainer` whose pushes lose no model and leak no token.

    A push that fails raises a `HubError` of one line, after the model has been saved; one that
    fails in the background is a warning. A repository that cannot be created raises a `HubError`
    before the training. The branch `hub_revision` is created where it is missing. Pushes during the
    training carry the model card, amp_config.json and the code that the model needs. No pickle
    holds the token.
    """

    # The Trainer's own.
    hub_model_id: Any
    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = _Token(self.args.hub_token)

    # The parents of transformers 5.19 and newer take `private`, too; here it is one of `kwargs`.
    def init_hf_repo(  # type: ignore[override]
        self, token: str | None = None, **kwargs: Any
    ) -> None:
        with _hub_errors(
            f"Repository {self._repository()} cannot be pushed to",
            "Fix that, or leave push_to_hub out and push the trained model later.",
        ):
            super().init_hf_repo(token, **kwargs)
            self._ensure_branch(self.args.hub_revision, token)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        self.save_model(_internal_call=True)  # before anything can fail
        private = {"private": kwargs["private"]} if "private" in kwargs else {}
        remedy = self._remedy(revision, **private)
        with _hub_errors(f"The push to {self._repository()} failed", remedy):
            if self.hub_model_id is None:
                self.init_hf_repo(token, **private)
            self._ensure_branch(revision, token)
            pushed = super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
            self._delete_leftovers(revision, token)
        if isinstance(pushed, Future):
            self._warn_if_it_fails(pushed, remedy)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        push = self.push_in_progress
        if push is not None and not push.is_done() and not self.args.hub_always_push:
            return  # as the parent does: that upload still reads these files
        folder = Path(checkpoint_folder)
        # The parent copies weights and transformers' own configs.
        for own in (folder / AMP_CONFIG_NAME, *folder.glob("*.py")):
            shutil.copy(own, str(self.args.output_dir))
        self.create_model_card(model_name=self.hub_model_id.rpartition("/")[2])
        running = self.push_in_progress.jobs[:] if self.push_in_progress else []
        super()._push_from_checkpoint(checkpoint_folder)
        for push in self.push_in_progress.jobs:
            if push not in running:
                self._warn_if_it_fails(push, self._remedy())

    def _warn_if_it_fails(self, push: Future, remedy: str) -> None:
        """The training goes on, and the Trainer says nothing about it."""

        def warn(push: Future) -> None:
            if error := push.exception():
                logger.warning(f"A push to {self._repository()} failed: {_reason(error)}. {remedy}")

        push.add_done_callback(warn)

    def _repository(self) -> str:
        folder = Path(str(self.args.output_dir)).absolute().name
        return self.hub_model_id or self.args.hub_model_id or folder

    def _remedy(self, revision: str | None = None, private: bool | None = None) -> str:
        """Where the model is, and the command that pushes it."""
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
        # Names such as refs/pr/1 are no branches, and only the Hub makes them.
        if name and not name.startswith("refs/") and self.is_world_process_zero():
            token = token or self.args.hub_token
            create_branch(self.hub_model_id, branch=name, token=token, exist_ok=True)

    def _delete_leftovers(self, revision: str | None, token: str | None) -> None:
        """An earlier model's files that this one does not replace: adapters, say, which would be
        loaded on top of it."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        api = HfApi(token=token or self.args.hub_token)
        revision = revision or self.args.hub_revision
        leftovers = [
            name
            for name in api.list_repo_files(self.hub_model_id, revision=revision)
            if any(fnmatch(name, pattern) for pattern in OF_A_RUN)
            and "/" not in name  # of a checkpoint
            and not (folder / name).exists()
        ]
        if leftovers:
            api.delete_files(
                self.hub_model_id,
                leftovers,
                revision=revision,
                commit_message="Delete what an earlier model left",
            )


class _Token(str):
    """Pickles to `None`: the Trainer pickles its arguments beside every model, and pushes them."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> _Token:
        return self

    def __repr__(self) -> str:
        return "'<HUB_TOKEN>'"


@contextlib.contextmanager
def _hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever is raised inside into a `HubError`: the client's errors share no class."""
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
    429: "the Hub got too many requests: wait a few minutes",
}


def _reason(error: BaseException | None) -> str:
    """One line: the Hub's answer, if the chain of causes holds one."""
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
