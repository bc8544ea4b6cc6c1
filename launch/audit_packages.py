"""Known weaknesses of the installed packages that this project needs, by the database of osv.dev.

    python launch/audit_packages.py        # exit code 1 when there is one; 0 when the database cannot be reached

One request with names and versions; nothing else leaves the machine.
"""

import importlib.metadata
import json
import re
import urllib.request
from dataclasses import dataclass

import click

from data.options import option
from launch.options import command

PROJECT = "cellpuzzles-grpo"
SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Whom to ask."""

    url: str = option("https://api.osv.dev/v1/querybatch", "Where the database answers batches of queries.")


@command(AuditConfig)
def main(config: AuditConfig) -> None:
    """Ask which versions of the installed packages have known weaknesses."""
    versions = needed()
    click.echo(f"{len(versions)} packages are installed for {PROJECT}")
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": v} for name, v in versions.items()]
    request = urllib.request.Request(
        config.url, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            results = json.load(answer)["results"]
        weak = {name: [v["id"] for v in of.get("vulns", [])] for name, of in zip(versions, results, strict=True)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        click.echo(f"nothing was checked: {config.url} gave no answer that can be read ({error})")
        return
    found = {name: ids for name, ids in weak.items() if ids}
    for name, ids in found.items():
        click.echo(f"{name} {versions[name]}: {', '.join(ids)}")
    if found:
        click.echo(f"{len(found)} packages have known weaknesses; read about one at https://osv.dev/vulnerability/ID")
        raise SystemExit(1)
    click.echo("none has a known weakness")


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
    del found[PROJECT]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
