"""The api's routes: each function makes the request of one, with typed arguments and answer."""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NotRequired, TypedDict, Unpack
from urllib.parse import quote

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.client.requests import Call, Events, JsonObject, Pages, reader
from deltadock.client.resources import (
    Accepted,
    AliasMove,
    Base,
    Delta,
    Generated,
    Job,
    Key,
    LogLine,
    Method,
    Model,
    Node,
    Preview,
    Readiness,
    Report,
    Resolved,
    Tenant,
    Webhook,
    WebhookMessage,
)
from deltadock.errors import InvalidInput
from deltadock.names import PART, parse_reference

Messages = Sequence[Mapping[str, Any]]
Scope = Literal["read", "write", "infer", "admin"]

_ID: Final = re.compile(r"dlt_[a-z0-9]+")
_NAME: Final = re.compile(f"{PART}/{PART}")


class GoalOptions(TypedDict, total=False):
    """What determines a delta's size; at most one of them, by default 1.0 bit."""

    bits: float | None
    target_bytes: int | None
    ratio: float | None
    max_kl: float | None
    min_agreement: float | None


class TenantLimits(TypedDict, total=False):
    """What a tenant may use; None is no limit."""

    max_bytes: int | None
    max_deltas: int | None
    max_jobs: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


class RuleFields(TypedDict):
    """When a newer version becomes the default by itself, in nats per token."""

    max_kl: float
    max_increase: NotRequired[float]


class ModelChanges(TypedDict, total=False):
    """What is changed of a model; a rule of None: the default moves only by hand."""

    description: str
    tags: list[str]
    rule: RuleFields | None


class Sampling(TypedDict, total=False):
    """How an answer is generated; what is left out is the model's own default."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: dict[str, float] | None
    seed: int | None
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    response_format: JsonObject | None
    guided_json: JsonObject | str | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


def is_reference(text: str) -> bool:
    """Whether `text` is the id or the name of a delta, with or without version or alias."""
    return _ID.fullmatch(text) is not None or parse_reference(text) is not None


def checked_reference(text: str) -> str:
    """The reference, if it is one.

    Raises:
        InvalidInput: it is neither a delta's id nor a name.
    """
    if not is_reference(text):
        raise InvalidInput(
            f"{text!r} is not the name of a delta. Write project/model, project/model:3, "
            "project/model@alias or an id such as dlt_k7wq2mzv; `client.deltas()` lists them."
        )
    return text


def checked_name(text: str) -> str:
    """The name `project/model`, if it is one.

    Raises:
        InvalidInput: it is not.
    """
    if _NAME.fullmatch(text) is None:
        raise InvalidInput(
            f"{text!r} is not a name of the form project/model, such as maths/skills: each part "
            "has letters, digits, '.', '_' and '-', at most 96, a letter or digit first, and "
            "neither version nor alias follows."
        )
    return text


def checked_base_name(text: str) -> str:
    """The name for a base, if it is one.

    Raises:
        InvalidInput: it is not.
    """
    if re.fullmatch(PART, text) is None:
        raise InvalidInput(
            f"{text!r} is not a name for a base: it has letters, digits, '.', '_' and '-', at most "
            "96, a letter or digit first. Give it another name."
        )
    return text


def _path(text: str) -> str:
    return quote(text, safe="/:@")


def _segment(text: str) -> str:
    return quote(text, safe="")


def _delta(reference: str) -> str:
    return f"/v1/deltas/{_path(checked_reference(reference))}"


def _model(name: str) -> str:
    return f"/v1/registry/{_path(checked_name(name))}"


def _new_key() -> str:
    return uuid.uuid4().hex


def ready() -> Call[Readiness]:
    """Whether the server and what it depends on are ready."""
    return Call("GET", "/readyz", reader(Readiness))


def methods() -> Call[list[Method]]:
    """The compression methods."""
    read = reader(list[Method])
    return Call("GET", "/v1/methods", lambda answer: read(answer["data"]))


def create_base(name: str, checkpoint: str) -> Call[Base]:
    """Register an uploaded checkpoint, named by its digest, as a base.

    Raises:
        Conflict: another checkpoint has this name.
    """
    body = {"name": checked_base_name(name), "checkpoint": checkpoint}
    return Call("POST", "/v1/bases", reader(Base), body=body, key=_new_key())


def base(name: str) -> Call[Base]:
    """The base with this name or id."""
    return Call("GET", f"/v1/bases/{_segment(name)}", reader(Base))


def base_manifest(name: str) -> Call[CheckpointManifest]:
    """The digests of the files and tensors of the base with this name or id."""
    return Call("GET", f"/v1/bases/{_segment(name)}/manifest", reader(CheckpointManifest))


def delete_base(name: str) -> Call[None]:
    """Delete a base that no delta needs; `restore_base` undoes it for some days.

    Raises:
        Conflict: a delta needs it.
    """
    return Call("DELETE", f"/v1/bases/{_segment(name)}", lambda _: None)


def restore_base(name: str) -> Call[Base]:
    """Restore a deleted base."""
    return Call("POST", f"/v1/bases/{_segment(name)}/restore", reader(Base))


def share_base(name: str, *, shared: bool = True) -> Call[Base]:
    """Let every tenant use a base of the operator's, or end that."""
    path = f"/v1/bases/{_segment(name)}"
    return Call("PATCH", path, reader(Base), body={"shared": shared}, idempotent=True)


def bases() -> Pages[Base]:
    """All bases, by name."""
    return Pages.of(Base, "/v1/bases")


def create_delta(
    name: str,
    base: str,
    checkpoint: str,
    *,
    method: str | None = None,
    seed: int = 0,
    solver: Literal["exact", "scip"] = "exact",
    calibration: str | JsonObject | None = None,
    priority: Literal["high", "normal", "low"] = "normal",
    parent: str | None = None,
    recipe: JsonObject | None = None,
    commit: str | None = None,
    **goal: Unpack[GoalOptions],
) -> Call[Accepted]:
    """Start the compression of an uploaded fine-tune.

    Args:
        name: `project/model`; each compression makes a new version.
        base: name or id.
        checkpoint: digest of the uploaded fine-tune.
        method: None: the server's default, `lora` for an adapter.
        seed, solver, priority: see the REST interface.
        calibration: digest of an uploaded text, or a mixture `{"sources": [...]}`; None: text
            sampled from the fine-tune, if the method needs calibration.
        parent: the delta whose fine-tune this one continues.
        recipe: how it was trained.
        commit: of the training code; the first that is given stays.
        goal: see `GoalOptions`.

    Raises:
        ArchitectureMismatch, UnchangedCheckpoint: it is no fine-tune of this base.
        InvalidAdapter, UnsupportedModel: what it is cannot be compressed, or not by this method.
        InvalidGoal, UnknownMethod, BitsOutOfRange: this method cannot do that.
        QuotaExceeded, RateLimited: the tenant has as many deltas, or jobs, as it may.
    """
    if isinstance(calibration, str):
        calibration = {"source": "text", "digest": calibration}
    body: JsonObject = {
        "name": checked_name(name),
        "base": base,
        "checkpoint": checkpoint,
        **({} if method is None else {"method": method}),
        "seed": seed,
        "solver": solver,
        "calibration": calibration,
        "priority": priority,
        "parent": parent,
        "recipe": recipe,
        "commit": commit,
        **goal,
    }
    return Call("POST", "/v1/deltas", reader(Accepted), body=body, key=_new_key())


def preview(
    base: str, checkpoint: str, *, method: str | None = None, **goal: Unpack[GoalOptions]
) -> Call[Preview]:
    """Predict the size of a compression; nothing is stored.

    Raises:
        InvalidGoal, UnknownMethod, BitsOutOfRange: this method cannot do that.
    """
    body: JsonObject = {"base": base, "checkpoint": checkpoint, **goal}
    if method is not None:
        body["method"] = method
    return Call("POST", "/v1/previews", reader(Preview), body=body, idempotent=True)


def delta(reference: str) -> Call[Delta]:
    """The delta with this id or name."""
    return Call("GET", _delta(reference), reader(Delta))


def resolve(reference: str) -> Call[Resolved]:
    """What a name, an id or an artifact's digest means now.

    Raises:
        NotReady: the delta has no artifact yet.
    """
    return Call("GET", f"/v1/resolve/{_path(reference)}", reader(Resolved))


def deltas(
    *,
    base: str | None = None,
    method: str | None = None,
    state: str | None = None,
    name: str | None = None,
    tag: str | None = None,
    text: str | None = None,
    sort: Literal["newest", "name", "size", "kl"] | None = None,
    limit: int | None = None,
) -> Pages[Delta]:
    """The deltas that meet all filters, newest first; `limit` is the size of a page."""
    filters = {
        "base": base, "method": method, "state": state, "name": name, "tag": tag, "text": text,
        "sort": sort, "limit": limit,
    }  # fmt: skip
    return Pages.of(Delta, "/v1/deltas", **filters)


def report(reference: str) -> Call[Report]:
    """The compression report of a delta.

    Raises:
        NotReady: it is not compressed yet.
    """
    return Call("GET", f"{_delta(reference)}/report", reader(Report))


def delete(reference: str) -> Call[None]:
    """Delete a delta; `restore` undoes it for some days."""
    return Call("DELETE", _delta(reference), lambda _: None)


def restore(reference: str) -> Call[Delta]:
    """Restore a deleted delta, named by its id or `project/model:version`."""
    return Call("POST", f"{_delta(reference)}/restore", reader(Delta))


def models(
    *, tag: str | None = None, text: str | None = None, limit: int | None = None
) -> Pages[Model]:
    """The models by name; `limit` is the size of a page."""
    return Pages.of(Model, "/v1/registry", tag=tag, text=text, limit=limit)


def model(name: str) -> Call[Model]:
    """A model with its card and aliases."""
    return Call("GET", _model(name), reader(Model))


def change_model(name: str, **changes: Unpack[ModelChanges]) -> Call[Model]:
    """Change a model's card, tags or rule; those that are left out stay."""
    return Call("PATCH", _model(name), reader(Model), body=changes, idempotent=True)


def delete_model(name: str) -> Call[None]:
    """Delete a model with all its versions; `restore` brings one back for some days."""
    return Call("DELETE", _model(name), lambda _: None)


def move_alias(
    name: str, alias: str, version: int, *, reason: str = "", expected: int | None = None
) -> Call[Model]:
    """Let `name@alias` mean a version; `default` is what the bare name means.

    `expected` is the version that it must mean now, 0 for none.

    Raises:
        Conflict: it means another version than `expected`.
        NotReady: the version is not compressed yet.
    """
    body = {"version": version, "reason": reason, "expected": expected}
    return Call("PUT", f"{_model(name)}/aliases/{_segment(alias)}", reader(Model), body=body)


def remove_alias(name: str, alias: str) -> Call[None]:
    """Remove an alias other than `default`.

    Raises:
        Conflict: it is `default`.
    """
    return Call("DELETE", f"{_model(name)}/aliases/{_segment(alias)}", lambda _: None)


def alias_moves(name: str) -> Pages[AliasMove]:
    """The moves of a model's aliases, newest first."""
    return Pages.of(AliasMove, f"{_model(name)}/history")


def job(job: str) -> Call[Job]:
    """A job's current state."""
    return Call("GET", f"/v1/jobs/{_segment(job)}", reader(Job))


def jobs(
    *,
    state: Iterable[str] | None = None,
    delta: str | None = None,
    base: str | None = None,
    limit: int | None = None,
) -> Pages[Job]:
    """The jobs in any of the states, newest first; `limit` is the size of a page."""
    states = None if state is None else [state] if isinstance(state, str) else list(state)
    return Pages.of(Job, "/v1/jobs", state=states, delta=delta, base=base, limit=limit)


def cancel(job: str) -> Call[Job]:
    """Cancel a job: at once if no worker holds it, else at its next step."""
    return Call("POST", f"/v1/jobs/{_segment(job)}/cancel", reader(Job), idempotent=True)


def retry(job: str) -> Call[Job]:
    """Queue a failed or cancelled job again; it continues after its last finished block.

    Raises:
        Conflict: it would end in the same way, or has not ended.
    """
    return Call("POST", f"/v1/jobs/{_segment(job)}/retry", reader(Job))


def events(job: str) -> Events[Job]:
    """A job now and after every change, until it has ended."""
    return Events(Call("GET", f"/v1/jobs/{_segment(job)}/events", reader(Job)))


def log(job: str, after: int = 0) -> Call[list[LogLine]]:
    """The lines of a job's log that follow line `after`, oldest first."""
    read = reader(list[LogLine])
    return Call(
        "GET",
        f"/v1/jobs/{_segment(job)}/log",
        lambda answer: read(answer["data"]),
        params={"after": after, "limit": 1000},
    )


def nodes() -> Call[list[Node]]:
    """The inference nodes, with the deltas that they hold."""
    read = reader(list[Node])
    return Call("GET", "/v1/nodes", lambda answer: read(answer["data"]))


def drain(node: str) -> Call[None]:
    """Let the node with this id finish its requests and accept no others."""
    return Call("POST", f"/v1/nodes/{_segment(node)}/drain", lambda _: None, idempotent=True)


def resume(node: str) -> Call[None]:
    """Let a drained node accept requests again."""
    return Call("POST", f"/v1/nodes/{_segment(node)}/resume", lambda _: None, idempotent=True)


def evict(node: str, artifact: str) -> Call[None]:
    """Remove a delta, named by its artifact's digest, from a node's slots and host memory.

    Raises:
        Conflict: requests use it.
        NotFound: the node does not have it there.
    """
    path = f"/v1/nodes/{_segment(node)}/deltas/{_segment(artifact)}"
    return Call("DELETE", path, lambda _: None)


def keys(
    *, prefix: str | None = None, tenant: str | None = None, limit: int | None = None
) -> Pages[Key]:
    """The tenant's API keys, newest first; `limit` is the size of a page."""
    return Pages.of(Key, "/v1/keys", prefix=prefix, tenant=tenant, limit=limit)


def create_key(
    name: str,
    scopes: Iterable[str] = ("read", "write", "infer"),
    *,
    expires_at: str | None = None,
    tenant: str | None = None,
) -> Call[Key]:
    """Make an API key, which is shown only in this answer; `expires_at` is an RFC 3339 time."""
    body = {"name": name, "scopes": list(scopes), "expires_at": expires_at, "tenant": tenant}
    return Call("POST", "/v1/keys", reader(Key), body=body)


def revoke_key(key: str) -> Call[None]:
    """Revoke the key with this id."""
    return Call("DELETE", f"/v1/keys/{_segment(key)}", lambda _: None)


def rotate_key(key: str, grace_seconds: int = 24 * 3600) -> Call[Key]:
    """Make a key like this one, which expires after the grace period."""
    body = {"grace_seconds": grace_seconds}
    return Call("POST", f"/v1/keys/{_segment(key)}/rotate", reader(Key), body=body)


def webhooks() -> Call[list[Webhook]]:
    """The tenant's webhooks, oldest first."""
    read = reader(list[Webhook])
    return Call("GET", "/v1/webhooks", lambda answer: read(answer["data"]))


def create_webhook(url: str, events: Sequence[str] | None = None) -> Call[Webhook]:
    """Tell a URL about events, by default all; `secret` is only in this answer.

    Args:
        url: http or https.
        events: of `delta.ready`, `delta.failed` and `alias.moved`.
    """
    body = {"url": url} | ({} if events is None else {"events": list(events)})
    return Call("POST", "/v1/webhooks", reader(Webhook), body=body, key=_new_key())


def delete_webhook(webhook: str) -> Call[None]:
    """Delete a webhook with its messages; what is not sent yet is not sent."""
    return Call("DELETE", f"/v1/webhooks/{_segment(webhook)}", lambda _: None)


def webhook_messages(webhook: str, *, limit: int | None = None) -> Pages[WebhookMessage]:
    """A webhook's messages of the last 30 days, newest first; `limit` is the size of a page."""
    path = f"/v1/webhooks/{_segment(webhook)}/messages"
    return Pages.of(WebhookMessage, path, limit=limit)


def resend_message(webhook: str, message: str) -> Call[WebhookMessage]:
    """Send a message to a webhook again, whatever became of it."""
    path = f"/v1/webhooks/{_segment(webhook)}/messages/{_segment(message)}/resend"
    return Call("POST", path, reader(WebhookMessage))


def tenants(*, limit: int | None = None) -> Pages[Tenant]:
    """All tenants by name, without their usage; `limit` is the size of a page."""
    return Pages.of(Tenant, "/v1/tenants", limit=limit)


def tenant(tenant: str) -> Call[Tenant]:
    """The tenant with this name or id, with its usage."""
    return Call("GET", f"/v1/tenants/{_segment(tenant)}", reader(Tenant))


def create_tenant(name: str, **limits: Unpack[TenantLimits]) -> Call[Tenant]:
    """Make a tenant; `create_key` makes its first key.

    Raises:
        Conflict: another tenant has this name.
    """
    body = {"name": name, **limits}
    return Call("POST", "/v1/tenants", reader(Tenant), body=body, key=_new_key())


def change_tenant(tenant: str, **limits: Unpack[TenantLimits]) -> Call[Tenant]:
    """Set limits of the tenant with this name or id; those that are left out stay, None is none."""
    path = f"/v1/tenants/{_segment(tenant)}"
    return Call("PATCH", path, reader(Tenant), body=limits, idempotent=True)


def check_served(model: str) -> Call[None]:
    """Raise NotFound or NotReady unless this delta or base answers now."""
    return Call("GET", f"/v1/models/{_path(model)}", lambda _: None)


def generate(model: str, prompt: str | Messages, **sampling: Unpack[Sampling]) -> Call[Generated]:
    """Continue a prompt, or answer a conversation, with a delta or a bare base.

    Args:
        model: a delta's name or id, or a base's name.
        prompt: text to continue, or messages `{"role": ..., "content": ...}`, which the model's
            chat template formats.
        sampling: see `Sampling`.

    Raises:
        NotReady: the delta is not compressed yet.
        NoChatTemplate: messages were given, and the model has no template for them.
        ContextExceeded: the prompt leaves no room for an answer.
        Overloaded, RateLimited: too many requests wait, or the tenant has asked too often.
    """
    return _generation(model, prompt, sampling, {})


def stream(model: str, prompt: str | Messages, **sampling: Unpack[Sampling]) -> Events[Generated]:
    """Like `generate`, in pieces as they are generated; the last one has reason and usage."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    return Events(_generation(model, prompt, sampling, more))


def _generation(
    model: str, prompt: str | Messages, sampling: Sampling, more: JsonObject
) -> Call[Generated]:
    chosen = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(prompt, str):
        body = {"model": model, "prompt": prompt, "max_tokens": 128, **chosen, **more}
        return Call("POST", "/v1/completions", _completion, body=body)
    body = {"model": model, "messages": [dict(message) for message in prompt], **chosen, **more}
    return Call("POST", "/v1/chat/completions", _completion, body=body)


def _completion(answer: JsonObject) -> Generated:
    """A completion, a chat completion, or a chunk of either."""
    choice = answer["choices"][0] if answer["choices"] else {}
    message = choice.get("message") or choice.get("delta") or {}
    return Generated(
        text=choice.get("text") or message.get("content") or "",
        finish_reason=choice.get("finish_reason"),
        usage=answer.get("usage"),
    )
