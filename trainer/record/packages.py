"""The installed packages that this project needs, and the weaknesses of them that the database of osv.dev knows."""

import http.client
import importlib.metadata
import json
import re
import urllib.request

from data.errors import UserError

PROJECT = "cellpuzzles-grpo"
SECONDS = 20
"""How long the database may be silent."""


def weaknesses(versions: dict[str, str], url: str) -> dict[str, list[str]]:
    """{name: ids of its known weaknesses} of the packages that have one, from one request to `url`.

    versions: {name: version}. Raises UserError when there is no answer that can be read.
    """
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": v} for name, v in versions.items()]
    try:
        # made here: an address without a scheme is refused by it
        request = urllib.request.Request(
            url, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            results = json.load(answer)["results"]
        weak = {name: [v["id"] for v in of.get("vulns", [])] for name, of in zip(versions, results, strict=True)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException) as error:
        raise UserError(f"{url} gave no answer that can be read ({error})") from None
    return {name: ids for name, ids in weak.items() if ids}


def needed() -> dict[str, str]:
    """{name: version} of the installed packages that the project needs, directly or not, in its extras too."""
    found: dict[str, str] = {}
    waiting = [PROJECT]
    while waiting:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", waiting.pop())[0]).lower()
        if name in found:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        # a version such as 2.12.0+cpu is 2.12.0 in the database
        found[name] = package.version.partition("+")[0]
        waiting += package.requires or []
    found.pop(PROJECT, None)  # not there where the code is used without being installed
    return dict(sorted(found.items()))
