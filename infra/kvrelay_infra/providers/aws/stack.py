"""One CloudFormation stack, brought to a state from whatever state a crash has left it in."""

import enum
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import boto3
from botocore.exceptions import ClientError

from kvrelay_infra.providers.aws.errors import code_of, explained
from kvrelay_infra.providers.aws.settings import TAG
from kvrelay_protocol.errors import ProviderError, ProviderUnreachable

if TYPE_CHECKING:
    from types_boto3_cloudformation.type_defs import StackTypeDef

_POLL_S = 5.0
_LONGEST_S = 3600.0
_DONE = frozenset({"CREATE_COMPLETE", "UPDATE_COMPLETE"})


class Step(enum.Enum):
    """What to do with a stack in some status."""

    CREATE = "create"
    UPDATE = "update"
    WAIT = "wait"
    DELETE = "delete"
    GIVE_UP = "give up"


_STEPS = {
    "DELETE_COMPLETE": Step.CREATE,
    "CREATE_COMPLETE": Step.UPDATE,
    "UPDATE_COMPLETE": Step.UPDATE,
    "UPDATE_ROLLBACK_COMPLETE": Step.UPDATE,
    "IMPORT_COMPLETE": Step.UPDATE,
    "IMPORT_ROLLBACK_COMPLETE": Step.UPDATE,
    # Nothing of the stack was ever made, or only a part that can't be updated.
    "REVIEW_IN_PROGRESS": Step.DELETE,
    "CREATE_FAILED": Step.DELETE,
    "ROLLBACK_COMPLETE": Step.DELETE,
    "ROLLBACK_FAILED": Step.DELETE,
    "DELETE_FAILED": Step.DELETE,
    "UPDATE_FAILED": Step.GIVE_UP,
    "UPDATE_ROLLBACK_FAILED": Step.GIVE_UP,
}


def next_step(status: str | None) -> Step:
    """Towards a stack that is there and up to date; None: there is no stack."""
    if status is None:
        return Step.CREATE
    waiting = Step.WAIT if status.endswith("_IN_PROGRESS") else Step.GIVE_UP
    return _STEPS.get(status, waiting)


class Stack:
    """Every method may be called again after a crash at any point of it."""

    def __init__(
        self,
        session: boto3.Session,
        name: str,
        *,
        say: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cloudformation = session.client("cloudformation")
        self._name = name
        self._say = say
        self._sleep = sleep

    def ensure(self, template: str, parameters: Mapping[str, str]) -> None:
        """Create or update it, and wait for the end.

        Raises:
            ProviderError: it failed; the message has the first reason that CloudFormation gives.
        """
        arguments = {
            "StackName": self._name,
            "TemplateBody": template,
            "Parameters": [
                {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()
            ],
            "Capabilities": ["CAPABILITY_IAM"],
            "Tags": [{"Key": TAG, "Value": self._name}],
        }
        while True:
            status = self._settled()
            match next_step(status):
                case Step.CREATE:
                    self._say(f"creating stack {self._name}; this takes some minutes")
                    with explained(f"stack {self._name}"):
                        self._cloudformation.create_stack(**arguments)  # type: ignore[arg-type]
                case Step.DELETE:
                    self._say(f"removing stack {self._name}, whose creation failed ({status})")
                    self.delete()
                    continue
                case Step.UPDATE:
                    if not self._update(arguments):
                        return
                case _:
                    raise ProviderError(
                        f"aws: stack {self._name} is {status}: {self._reason()}; continue its "
                        "rollback in CloudFormation, or destroy it"
                    )
            self._succeeded()
            return

    def delete(self) -> None:
        """Delete it with everything it made, and wait for the end; nothing if it is not there.

        Raises:
            ProviderError: something could not be deleted.
        """
        if self._settled() is None:
            return
        with explained(f"stack {self._name}"):
            self._cloudformation.delete_stack(StackName=self._name)
        left = self._settled()
        if left not in {None, "DELETE_COMPLETE"}:
            raise ProviderError(
                f"aws: stack {self._name} is {left}: {self._reason()}; run it again"
            )

    def outputs(self) -> dict[str, str] | None:
        """Of the stack; None where there is none."""
        found = self._read()
        if found is None:
            return None
        return {item["OutputKey"]: item["OutputValue"] for item in found.get("Outputs", [])}

    def status(self) -> str | None:
        """CloudFormation's word for its state; None: there is no stack."""
        found = self._read()
        return found["StackStatus"] if found else None

    def _update(self, arguments: Mapping[str, object]) -> bool:
        """False: it is up to date."""
        try:
            self._cloudformation.update_stack(**arguments)  # type: ignore[arg-type]
        except ClientError as error:
            if "No updates are to be performed" in str(error):
                return False
            with explained(f"stack {self._name}"):
                raise
        self._say(f"updating stack {self._name}")
        return True

    def _succeeded(self) -> None:
        status = self._settled()
        if status not in _DONE:
            raise ProviderError(f"aws: stack {self._name} is {status}: {self._reason()}")

    def _settled(self) -> str | None:
        """Its status once nothing is under way."""
        waited = 0.0
        while next_step(status := self.status()) is Step.WAIT:
            if waited >= _LONGEST_S:
                raise ProviderUnreachable(
                    f"aws: stack {self._name} is still {status} after {waited:g} s; run it again later"
                )
            self._sleep(_POLL_S)
            waited += _POLL_S
        return status

    def _read(self) -> "StackTypeDef | None":
        with explained(f"stack {self._name}"):
            try:
                [found] = self._cloudformation.describe_stacks(StackName=self._name)["Stacks"]
            except ClientError as error:
                # There is no code of its own for a stack that does not exist.
                if code_of(error) == "ValidationError" and "does not exist" in str(error):
                    return None
                raise
        return found

    def _reason(self) -> str:
        """Of the earliest failure in the latest operation."""
        with explained(f"stack {self._name}"):
            events = self._cloudformation.describe_stack_events(StackName=self._name)["StackEvents"]
        failures = [
            f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', '')}"
            for event in events
            if event.get("ResourceStatus", "").endswith("_FAILED")
        ]
        return failures[-1] if failures else "no reason given"
