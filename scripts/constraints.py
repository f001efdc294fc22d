"""Prints what this environment holds of kvrelay[dev] and below, as constraints for pip.

Run by `make constraints`, in an environment whose tests have passed. torch and what comes with a build of it
are left out: they are chosen by the machine (scripts/setup.sh).
"""

import re
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_CHOSEN_ELSEWHERE = re.compile(r"kvrelay$|torch$|nvidia-|cuda-(bindings|pathfinder|toolkit)$")


def versions(root: str, extra: str) -> dict[str, str]:
    """Name -> version of a distribution's requirements under an extra, and all of theirs."""
    found: dict[str, str] = {}
    seen = set()
    left = [(canonicalize_name(root), frozenset({extra, ""}))]
    while left:
        name, extras = wanted = left.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform or Python
        found[name] = installed.version
        for line in installed.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": each}) for each in extras):
                left.append(
                    (canonicalize_name(requirement.name), frozenset(requirement.extras) | {""})
                )
    return found


if __name__ == "__main__":
    print("# Versions that the tests pass with, for Python 3.11: made by `make constraints`.")
    for name, version in sorted(versions("kvrelay", "dev").items()):
        if not _CHOSEN_ELSEWHERE.match(name):
            print(f"{name}=={version.partition('+')[0]}")
